"""A budget that a method may be given, or go without, in one of three ways."""

from typing import Self

from pydantic import model_validator
from rankwise.variants.settings.base import setting
from rankwise.variants.settings.lowrank import LowRankSettings

# The facts of the fields.  Each class declares them itself, last, as the order of fields is that of what runs have written.
TARGET_RANK = setting(None, role="rank")
TARGET_TOTAL = setting(None, role="total", only_with=("cost", ("rank",)))
TARGET_PARAMETERS = setting(None, role="total", only_with=("cost", ("parameters",)))


class MayHaveTarget(LowRankSettings):
    """Settings with target_rank, target_total, target_parameters and cost, of which the targets may all be None."""

    @property
    def has_target(self) -> bool:
        return any(self.get(name) is not None for name in ("target_rank", "target_total", "target_parameters"))

    @model_validator(mode="after")
    def _cost_has_target(self) -> Self:
        if self.get("cost") == "parameters" and self.get("target_rank") is None and self.get("target_parameters") is None:
            raise ValueError('cost = "parameters" has no effect without a target: give target_rank or target_parameters')
        return self
