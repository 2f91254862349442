"""The user's cache: where it is, whether what is in it is whole, and a lock for those who write to it."""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankwise.experiments.sources.entries import Entry


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


def cached(entry: Entry) -> Path:
    """Where the cache has an entry's files, whether they are there or not."""
    return cache_folder() / ("models" if entry.kind == "model" else "data") / entry.id.replace("/", "--")


@contextmanager
def lock(path: Path, name: str) -> Iterator[bool]:
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


def is_whole(entry: Entry, folder: Path) -> bool:
    return folder.is_dir() and not faults(entry, folder)


def faults(entry: Entry, folder: Path) -> list[str]:
    """The files of the entry that `folder` lacks or holds with another content."""
    wrong = []
    for name, (sha256, size) in entry.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or sha256_of(path) != sha256:
            wrong.append(name)
    return wrong


def sha256_of(path: Path) -> str:
    """Of a file, read once a process for as long as its size and time of change stay the same."""
    status = path.stat()
    return _sha256_once(str(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _sha256_once(path: str, size: int, time: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """sha256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def one_line(error: BaseException) -> str:
    """What went wrong, without line ends, at most 300 characters."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    return " ".join(str(error).split())[:300] or type(error).__name__


def is_content(name: str) -> bool:
    """Whether a file of a model's folder is part of what the model is."""
    return name.endswith((".safetensors", ".json", ".txt", ".model")) and not name.startswith(".")
