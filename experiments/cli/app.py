"""The application, and how it complains."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

app = typer.Typer(
    help="Adaptive-rank fine-tuning, compared fairly: LoRA, AdaLoRA, DoRA, full fine-tuning and relatives.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


@contextlib.contextmanager
def nothing_kept_if_interrupted() -> Iterator[None]:
    """Says so; what `main` says of an interrupt is about runs, which are kept."""
    try:
        yield
    except KeyboardInterrupt:
        complain("interrupted; nothing was written")
        raise SystemExit(130) from None


def complain(text: str) -> None:
    for line in text.splitlines():
        print(f"rankwise: {line}", file=sys.stderr)


def place_of(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""
