"""Settings of L1RA."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator
from rankwise.variants.settings.allocated import Bounds, Rule
from rankwise.variants.settings.base import Count, NonNegative, PerMember, Positive, PositiveInt, check_bounds, setting
from rankwise.variants.settings.lowrank import LowRankSettings


class L1RASettings(LowRankSettings):
    """Settings of L1RA."""

    grows: ClassVar[bool] = True

    initial_rank: PerMember = setting(role="rank")
    """Rank of each site at the start, and mean rank to the end; the scale stays alpha over it."""
    sparsity: NonNegative = 1e-3
    """Weight lambda of the gates' L1 norm: a step takes lambda times the gates' rate from every gate.  1e-3: the release's."""
    gate_lr_ratio: Positive = 20.0
    """Learning rate of the gates over that of A.  20: the release's 2e-2 over 1e-3; there the gates' rate is constant."""
    warmup_steps: Count = setting(0, role="steps")
    """Steps before the first exchange."""
    final_steps: Count = setting(0, role="steps")
    """Steps at the end with the ranks fixed."""
    interval: PositiveInt = setting(1, role="steps")
    """Steps from one exchange to the next; a tenth of the run in the release."""
    cost: Literal["rank", "parameters"] = "rank"
    """What is handed on: as many ranks as were freed, or as many as their parameters pay for."""
    least_rank: PositiveInt = 1
    """Least rank of every site."""
    most_rank: PositiveInt | None = None
    """Most rank of every site."""
    rank_bounds: Bounds = {}
    """Other [least, most] ranks for some sites: name, suffix or pattern of a module -> [least, most]."""

    @property
    def rule(self) -> Rule:
        """Which gates are zero is the L1 norm's doing; the allocator hands on what they leave."""
        return Rule(
            score="magnitude",
            schedule="constant",
            direction="both",
            warmup_steps=self.warmup_steps,
            least_rank=self.least_rank,
            most_rank=self.most_rank,
            rank_bounds=self.rank_bounds,
        )

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        check_bounds({"least_rank": (self.least_rank, self.most_rank), **self.rank_bounds})
        return self

    @classmethod
    def for_budget(cls, given: Mapping[str, Any], ranks: Mapping[str, int], parameters: int, scale: float) -> dict[str, Any]:
        """It starts with the ranks that it ends with: the total stays."""
        first = min(ranks.values())
        return cls._starting({**given, "initial_rank": first}, ranks, first, scale)
