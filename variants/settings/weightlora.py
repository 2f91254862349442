"""Settings of WeightLoRA."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import model_validator
from rankwise.variants.settings.base import Count, PerMember, Positive, PositiveInt, setting, spread
from rankwise.variants.settings.lowrank import LoRASettings


class WeightLoRASettings(LoRASettings):
    """Settings of WeightLoRA; `rank` is that of each site at the start."""

    kept_sites: PerMember | None = setting(None, role="member")
    """Sites whose weight a projection leaves; half of them if not given.  20 of 72: the release's script for GLUE."""
    site_lr: Positive = 5.0
    """Learning rate of the weights at the schedule's peak, whatever that of the other tensors.  5: the release's scripts."""
    interval: PositiveInt | None = setting(None, role="steps")
    """Steps from one projection to the next; if not given 1, and 10 with growth: the release's scripts."""
    final_steps: Count = setting(0, role="steps")
    """Steps at the end in which no weight that is zero comes back; the last projection comes before them."""
    kept_by: Literal["size", "release"] = "size"
    """What the projection keeps: the largest |w|; or the largest w, so that one that is far below zero is dropped."""
    growth: Literal["none", "smart", "dummy", "restart"] = "none"
    """WeightLoRA+: each projection halves the sites and doubles the rank of those that stay; how says weightlora.py."""
    doublings: PositiveInt = setting(2, only_with=("growth", ("smart", "dummy", "restart")))
    """How often.  2: the release's scripts."""

    @property
    def steps_between(self) -> int:
        """Steps from one projection to the next."""
        return self.interval or (1 if self.growth == "none" else 10)

    @property
    def allocation(self) -> str:
        return "learned"

    @model_validator(mode="after")
    def _sites_have_effect(self) -> Self:
        if self.growth != "none" and self.kept_sites is not None:
            raise ValueError(
                f"kept_sites = {self.kept_sites} has no effect with growth: sites are halved `doublings` times; take it out"
            )
        return self

    @classmethod
    def for_budget(cls, given: Mapping[str, Any], ranks: Mapping[str, int], parameters: int, scale: float) -> dict[str, Any]:
        """The ranks of the sites that stay are as many as those of all; which stay, and so how many parameters, it chooses."""
        number, total = len(ranks), sum(ranks.values())
        kept = max(number // 2, 1) if given.get("kept_sites") is None else max(spread(given["kept_sites"], 1))
        if given.get("growth", "none") != "none":
            kept = number  # each halving doubles
        first = max(total // min(kept, number), 1)
        return cls._starting({**given, "rank": first}, dict.fromkeys(ranks, first), first, scale)
