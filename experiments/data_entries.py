"""What a study file says of a user's own data, [[data]]; read without torch and without the data.

Paths are relative to the study's file: `located` gives them as they are seen from here.
"""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from rankwise.variants.settings import quoted

Kind = Literal[
    "classification",
    "regression",
    "token-classification",
    "span",
    "choice",
    "generation",
    "language-modelling",
    "image-classification",
    "multi-label",
]
PLACES = ("train", "validation", "test")


def _named(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text) or len(text) > 80:
        raise ValueError(
            f"{quoted(text[:100])} cannot name data: give at most 80 letters, digits, '.', '_' and '-', the first no sign"
        )
    return text


def _place(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty: give a file, a glob, a folder of images or a hub id")
    if not text.isprintable():
        raise ValueError(f"{quoted(text)} has control characters, such as a line break: take them out")
    return text


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty: name a field or write a template of fields, or take it out")
    return text


Place = Annotated[str, AfterValidator(_place)]
Template = Annotated[str, AfterValidator(_filled)]


class OwnData(BaseModel):
    """A user's data set: where its parts are, and how they are read."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    name: Annotated[str, AfterValidator(_named)]
    """What `tasks` and tables call it."""
    train: Place
    """File, glob, folder of images or hub id."""
    test: Place | None = None
    """The part that is reported; a fixed tenth of the training rows if not given."""
    validation: Place | None = None
    """The part that rates are chosen on; a fixed tenth of the training rows if not given."""
    kind: Kind | None = None
    """Kind of task; by the fields if not given."""
    input: Template | None = None
    """Field, or a template of fields ("{instruction}\\n{context}"), that the model reads."""
    target: Template | None = None
    """Field, or a template of fields, that it is to give."""
    metrics: list[Annotated[str, Field(min_length=1)]] = []
    """Metrics of the report, the first the one that methods are compared by; the kind's own if not given."""

    def places(self) -> Iterator[tuple[str, str]]:
        """(part, where it is) of the parts that are given."""
        return ((part, where) for part in PLACES if (where := getattr(self, part)) is not None)

    def beside(self, folder: Path) -> "OwnData":
        """The same data, its paths relative to `folder` made relative to the working folder."""
        return self.model_copy(update={part: located(where, folder) for part, where in self.places()})


def is_hub_id(where: str) -> bool:
    """Whether this has the form of "owner/name" or "owner/name:configuration", and is no path to something here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", where)) and not re.search(r"\.[A-Za-z]\w*$", where)


def located(where: str, folder: Path) -> str:
    """A path relative to `folder`, as seen from here; a hub id, where nothing of that name is there, as it is."""
    path = os.path.normpath(os.path.join(folder, os.path.expanduser(where)))
    return where if is_hub_id(where) and not (os.path.exists(path) or glob.glob(path)) else path
