"""Settings of (IA)3."""

from typing import Self

from pydantic import model_validator
from rankwise.variants.settings.base import Settings


class IA3Settings(Settings):
    """Settings of (IA)3."""

    outputs: list[str] | None = None
    """Modules whose output is scaled, by name, end of a name or pattern; None: the architecture's keys and values."""
    inputs: list[str] | None = None
    """Modules whose input is scaled, in the same words; None: the architecture's second feed-forward layer."""

    @model_validator(mode="after")
    def _something_is_scaled(self) -> Self:
        if self.outputs == [] and self.inputs == []:
            raise ValueError("outputs = [] and inputs = [] scale nothing: name a module in one of them, or leave one out")
        return self
