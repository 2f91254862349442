"""The application that commands are registered with, and how it complains."""

import contextlib
import sys
from collections.abc import Iterator

import typer
from rankwise.variants.settings import printable

app = typer.Typer(
    help="Adaptive-rank fine-tuning, compared fairly: LoRA, AdaLoRA, DoRA, full fine-tuning and relatives.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@contextlib.contextmanager
def nothing_kept_if_interrupted() -> Iterator[None]:
    """For a command that keeps nothing of what was cut off; `main` speaks of runs, which are kept."""
    try:
        yield
    except KeyboardInterrupt:
        complain("interrupted; nothing was written")
        raise SystemExit(130) from None


def complain(text: str) -> None:
    """Prints each line on standard error, under the command's name."""
    for line in text.split("\n"):
        print(f"rankwise: {printable(line)}", file=sys.stderr)


def place_of(error: OSError) -> str:
    """Which file it is about, where the error knows."""
    return f": {error.filename}" if error.filename else ""
