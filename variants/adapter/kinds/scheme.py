"""The form in which a base is quantised, by name; no torch here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Scheme:
    """How a model is quantised. name: "nf4", "fp4" or "int8". is_double: the scales of 4 bits are quantised too."""

    name: str
    is_double: bool = False

    def __str__(self) -> str:
        return f"{self.name} with double quantization" if self.is_double else self.name

    def as_fact(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_fact(cls, fact: Mapping[str, Any] | None) -> Self | None:
        """What `as_fact` gave; None of None."""
        return None if fact is None else cls(str(fact.get("name")), bool(fact.get("is_double")))
