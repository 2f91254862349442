"""Settings of LoRA that is truncated after training."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import model_validator
from rankwise.variants.settings.base import Count, PerMember, PositiveInt, check_order, setting
from rankwise.variants.settings.lowrank import LowRankSettings

NORMALISATIONS = ("none", "site-share", "site-largest", "weight")  # how truncation compares the sites' singular values


class TruncatedSettings(LowRankSettings):
    """Settings of LoRA that is truncated after training."""

    initial_rank: PerMember = setting(role="rank")
    """Rank of each site in training."""
    target_rank: PerMember = setting(role="rank")
    """Mean rank of a site after it; the budget is target_rank times the number of sites."""
    target_total: PositiveInt | None = setting(None, role="total", only_with=("cost", ("rank",)))
    """Ranks of all sites together, where target_rank times the number of sites is not what is wanted."""
    target_parameters: PositiveInt | None = setting(None, role="total", only_with=("cost", ("parameters",)))
    """Parameters of all ranks together, with cost = "parameters"; those of target_rank at every site if not given."""
    cost: Literal["rank", "parameters"] = "rank"
    """What a rank takes out of the budget: one, or its parameters; squared singular values are then compared per parameter."""
    least_rank: Count = 0
    """Least rank of every site, however small its singular values."""
    most_rank: PositiveInt | None = None
    """Most rank of every site."""
    normalisation: Literal[NORMALISATIONS] = "none"
    """How the singular values of different sites are compared: see variants/weights/truncation.py."""
    initialization: Literal["kaiming", "gaussian"] = "kaiming"
    """Where A starts; B starts at zero."""

    @model_validator(mode="after")
    def _something_is_cut(self) -> Self:
        why = "truncation adds no rank, so give an initial_rank of at least {}"
        check_order("target_rank", self.target_rank, "initial_rank", self.initial_rank, why)
        if self.most_rank is not None and self.least_rank > self.most_rank:
            raise ValueError(f"least_rank = {self.least_rank} is above most_rank = {self.most_rank}: exchange them")
        return self

    @classmethod
    def for_budget(cls, given: Mapping[str, Any], ranks: Mapping[str, int], parameters: int, scale: float) -> dict[str, Any]:
        return cls._pruned(given, ranks, parameters, scale)
