"""Settings of the methods that train some of the model's own parameters, or all of them one after the other."""

import re

from pydantic import field_validator
from rankwise.variants.settings.base import PositiveInt, Settings, setting

TOP = re.compile(r"top-([1-9]\d*)")  # the keyword


class PartialSettings(Settings):
    """Settings of partial unfreezing."""

    patterns: list[str] = ["top-2"]
    """Parameters that are trained: name, its end, or a pattern, of a parameter or of a module that holds some; "top-2": the
    last two layers, and what comes after them."""

    @field_validator("patterns")
    @classmethod
    def _something_is_named(cls, patterns: list[str]) -> list[str]:
        if not patterns:
            raise ValueError('is empty: name a parameter or a module, or "top-2"; for the head alone take the method "head"')
        return patterns


class GradualSettings(Settings):
    """Settings of gradual unfreezing."""

    interval: PositiveInt | None = setting(None, role="steps")
    """Steps from one layer that is unfrozen to the next; None: all that there are share the run equally."""
