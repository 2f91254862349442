"""What PEFT's keys cannot say of an adapter: JSON under "rankwise" in the metadata of the safetensors file.  Without torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from rankwise.variants.settings import METHODS

SCHEMA = 1


@dataclass(frozen=True)
class Facts:
    """
    method, settings, seed: what makes the adapter again.  head: names of the head's modules.
    targets: as given to `attach`; None in our own format.
    kept: site -> the allocator's choice, a bit for each triplet, of an ADALORA.
    scales: site -> scale in force, where the settings do not say it, of an ADALORA.
    folded: site -> what undoes that a method was written as a LORA; None where nothing is to be undone.
    total_step: of the run, beside `folded`.
    quantization: how the base was quantised, "name" and "is_double", where it was.
    unfinished: what it "has" and its "budget", in "unit" ("rank" or "parameters"), where training ended early.
    """

    method: str
    settings: Mapping[str, Any]
    seed: int
    head: list[str]
    targets: str | list[str] | None = None
    kept: Mapping[str, str] | None = None
    scales: Mapping[str, float] | None = None
    folded: Mapping[str, dict[str, Any]] | None = None
    total_step: int | None = None
    unfinished: Mapping[str, Any] | None = None
    quantization: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA} | {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """
        Raises:
            ValueError: facts of another version of rankwise, or of the wrong type.
        """
        if values.get("schema") != SCHEMA or values.get("method") not in METHODS:
            raise ValueError(
                f"schema {values.get('schema')}, method {values.get('method')!r} is of another version of rankwise; "
                f"this one reads schema {SCHEMA}: load it with the version that saved it"
            )
        kinds = {"settings": dict, "seed": int, "head": list, "kept": dict, "scales": dict, "folded": dict, "unfinished": dict}
        kinds["quantization"] = dict
        needed = ("settings", "seed", "head")
        for key, kind in kinds.items():
            if (key in values or key in needed) and not isinstance(values.get(key), kind):
                raise ValueError(f"{key} = {values.get(key)!r} in its metadata is no {kind.__name__}: a foreign file")
        return cls(**{key: values[key] for key in cls.__dataclass_fields__ if key in values})
