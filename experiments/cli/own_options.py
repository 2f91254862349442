"""A user's own data, as options of a command say it."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankwise.experiments.data_entries import OwnData

PLAIN = ("train", "data", "training")  # names of files that say nothing: the folder's is taken


def own_entry(
    train: str, test: str | None, validation: str | None, kind: str | None, input: str | None, target: str | None
) -> "OwnData":
    """The entry of a study that these options stand for, named by the file.

    Raises:
        ValueError: one line for each option that cannot be.
    """
    from pydantic import ValidationError
    from rankwise.experiments.data_entries import OwnData
    from rankwise.variants.settings import explain

    given = {"test": test, "validation": validation, "kind": kind, "input": as_written(input), "target": as_written(target)}
    try:
        return OwnData.model_validate({"name": name_for(train), "train": train, **given})
    except ValidationError as error:
        lines = explain(error, OwnData, where="data")
        raise ValueError("\n".join(re.sub(r"^data\.(\w+)( = |: )", r"--\1\2", line) for line in lines)) from None


def as_written(template: str | None) -> str | None:
    """A template with the breaks that \\n and \\t stand for: a shell hands them over as they are typed."""
    return template if template is None else template.replace("\\n", "\n").replace("\\t", "\t")


def name_for(train: str) -> str:
    """What data is called: as its file, or the file's folder where the file's name says nothing."""
    path = Path(train)
    stem = path.stem if path.stem not in PLAIN else path.resolve().parent.name or path.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("._-")[:80] or "data"
