"""Files that are there whole or not at all: a reader never sees half of one, and a kill or a full disk leaves the old one.

Imports nothing heavy: the command, the trainer and the reports all write through here.
"""

import contextlib
import glob
import json
import os
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from rankwise.variants.files import json_text
from rankwise.variants.files.system import system_error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to; it takes the place of `path` if the block succeeds, and is removed if not.

    What processes left there that were killed while they wrote this file goes too.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with system_errors(path):
            yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        number = left.name.split(".")[-2]
        if number.isdecimal() and not _is_alive(int(number)):
            left.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    """Whether a process of that number runs here; where that cannot be asked without harm it does."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


@contextlib.contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """
    Raises:
        OSError: it could not write.
    """
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # by name: most of what writes files needs no safetensors
            raise
        raise system_error(error, path) from None


def write_file(path: Path, content: str | bytes) -> None:
    """Writes text or bytes, and makes the folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        _to_disk(file)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Writes strict JSON: no NaN, no infinity. Without an indent it stands on one line.

    Raises:
        ValueError: a number in it is not finite.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=indent, allow_nan=False)
        file.write("\n")
        _to_disk(file)


def parse_json(text: str | bytes) -> Any:
    """The value of strict JSON.

    Raises:
        ValueError: not JSON, too large or too deep, or a number in it is not finite.
    """
    return json_text.parse(text, parse_constant=_refuse, parse_float=_finite)


def _to_disk(file: Any) -> None:
    """The content must be on the disk before the rename is, or a power failure leaves an empty file under the old name."""
    file.flush()
    os.fsync(file.fileno())


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a number of strict JSON")


def _finite(text: str) -> float:
    if not isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value
