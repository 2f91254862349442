"""Options that several commands share, and the checks of what was given; no torch."""

import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rankwise.variants.settings import nearest

if TYPE_CHECKING:
    from rankwise.variants.adapter.kinds.scheme import Scheme

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.  [default: torch's own number]")]
Pack = Annotated[int | None, typer.Option(help="Most members that train at once.")]
LogFormat = Annotated[str, typer.Option(help="How progress is said on standard error: text, or json (an object a line).")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Run failed runs again.")]

Ray = Annotated[
    str | None,
    typer.Option(
        metavar="[ADDRESS]", help="Train packs at once on a Ray cluster: HOST:PORT, auto, or no address for this machine alone."
    ),
]


def with_values(words: Sequence[str]) -> list[str]:
    """The words of a command line, with the address that --ray has where none is given; typer knows no such option."""
    words = list(words)
    for i in range(len(words)):
        if words[i] == "--ray" and (i + 1 == len(words) or words[i + 1].startswith("-")):
            words[i] = "--ray=local"
    return words


def check_ray(address: str, joined: object | None) -> None:
    """
    Args:
        joined: the processes of torchrun, if any.

    Raises:
        ValueError: no address, no Ray, or torchrun beside it.
    """
    from rankwise.experiments.cluster import pool

    if joined is not None:
        raise ValueError("--ray and torchrun do not go together: packs go to workers, or each to all processes: keep one")
    pool.check(address)


def check_least(option: str, value: int | None, least: int = 1) -> None:
    """
    Raises:
        ValueError: a number below the least that makes sense.
    """
    if value is not None and value < least:
        raise ValueError(f"{option} {value}: give at least {least}")


def check_log_format(name: str) -> None:
    """
    Raises:
        ValueError: it is none.
    """
    if name not in ("text", "json"):
        raise ValueError(f"--log-format {name}: no such format{nearest(name, ('text', 'json'))}; give text or json")


def check_device(name: str) -> None:
    """Whether this names a device at all; whether the machine has it is known only to torch.

    Raises:
        ValueError: it names none.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: no such device; give cpu, cuda, cuda:N, or auto")


def check_quantization(name: str | None, is_double: bool) -> "Scheme | None":
    """The form that --quantization and --double-quantization ask for; None of neither.

    Raises:
        ValueError: no known form, two that do not go together, or no bitsandbytes.
    """
    from rankwise.experiments import quantization

    if name is not None and name not in quantization.NAMES:
        raise ValueError(f"--quantization {name}: no such form{nearest(name, quantization.NAMES)}; give nf4 or int8")
    if is_double and name != "nf4":
        raise ValueError("--double-quantization has no effect without --quantization nf4: add that, or take it out")
    if name is not None and (lacking := quantization.missing()) is not None:
        raise ValueError(f"--quantization {name}: {lacking}")
    return quantization.scheme(name, is_double)


def check_output_folder(option: str, path: Path | None) -> None:
    """
    Raises:
        ValueError: it, or a part of its path, is a file.
    """
    _check_parents(option, path)
    if path is not None and path.exists() and not path.is_dir():
        raise ValueError(f"{option} {path}: this is a file; name a folder")


def check_output_file(option: str, path: Path | None) -> None:
    """
    Raises:
        ValueError: it is a folder, or a part of its path is a file.
    """
    _check_parents(option, path)
    if path is not None and path.is_dir():
        raise ValueError(f"{option} {path}: this is a folder; name a file")


def _check_parents(option: str, path: Path | None) -> None:
    there = None if path is None else next((parent for parent in path.parents if parent.exists()), None)
    if there is not None and not there.is_dir():
        raise ValueError(f"{option} {path}: {there} is a file; name a folder in its place")


def names(option: str, given: str, known: Iterable[str], where: str) -> list[str]:
    """The names in a list with commas between.

    known: those that `where`, a study or a table, has.

    Raises:
        ValueError: none, or one that is not known.
    """
    known = list(known)
    chosen = [name.strip() for name in given.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise ValueError(f'{option}: "{name}" is not in {where}{nearest(name, known)}; it has: {", ".join(known)}')
    if not chosen:
        raise ValueError(f"{option} is empty: name at least one of: {', '.join(known)}")
    return chosen


def width() -> int:
    """Columns of the terminal; 120 where there is none."""
    return shutil.get_terminal_size((120, 24)).columns
