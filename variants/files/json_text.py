"""JSON out of files that others wrote: no larger and no deeper than any honest one.  Without torch."""

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 64 << 20  # a history of 100,000 lines is a few MB, an adapter's configuration a few kB


def parse(text: str | bytes, **options: Any) -> Any:
    """The value that a text says.

    options: those of json.loads.
    Raises:
        ValueError: no JSON, larger than MOST_BYTES, or nested so deep that only an attack is.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"{len(text):,} bytes, more than the {MOST_BYTES:,} that are read")
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("nested too deep to be read") from None


def read(path: Path) -> Any:
    """The same of a file, which may begin with a byte order mark; one that is too large is not opened.

    Raises:
        ValueError: as `parse`, or no UTF-8.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{size:,} bytes, more than the {MOST_BYTES:,} that are read")
    return parse(path.read_text(encoding="utf-8-sig"))
