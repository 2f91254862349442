"""Settings of SoRA."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import model_validator
from rankwise.variants.settings.allocated import Rule
from rankwise.variants.settings.base import Count, NonNegative, PerMember, Positive, PositiveInt, check_order, setting
from rankwise.variants.settings.lowrank import LowRankSettings


class SoRASettings(LowRankSettings):
    """Settings of SoRA."""

    initial_rank: PerMember = setting(role="rank")
    """Rank of each site at the start; the scale stays alpha over it."""
    threshold: Literal["soft", "release"] = "soft"
    """The step after the optimizer's: soft, the paper's, by the gates' rate times `sparsity`; release: its own, by `tau`."""
    sparsity: NonNegative = setting(0.375, only_with=("threshold", ("soft",)))
    """Weight lambda of the gates' L1 norm, by which the soft threshold acts."""
    # 0.375: the release's script for STS-B has a threshold of 3e-4 at a rate of 8e-4.
    tau: NonNegative = setting(3e-4, only_with=("threshold", ("release",)))
    """Threshold of the release's step, whatever the rate; 3e-4: its script for STS-B."""
    lambda_schedule: list[NonNegative] = []
    """Values that take the place of `sparsity` or `tau`, one after the other, for equal parts of the run before final_steps."""
    l1: NonNegative = 0.0
    """Weight of the mean |gate| in the loss, besides the threshold; the release has 1e-3 or, for STS-B, 10."""
    gate_lr_ratio: Positive = 1.0
    """Learning rate of the gates over that of A."""
    final_steps: Count = setting(0, role="steps")
    """Steps at the end with the ranks fixed: no gate comes back or is shrunk by the threshold or by `l1`."""
    target_rank: PerMember | None = setting(None, role="rank")
    """Mean rank of a site at the end, to which the largest gates are cut when the final steps begin; no cut if not given."""
    target_total: PositiveInt | None = setting(None, role="total", only_with=("cost", ("rank",)))
    """The same as the ranks of all sites together."""
    target_parameters: PositiveInt | None = setting(None, role="total", only_with=("cost", ("parameters",)))
    """The same as parameters of all sites together, with cost = "parameters"."""
    shrink: bool = False
    """Whether gates that are zero leave parameters, gradients and the optimizer's averages when the final steps begin."""
    cost: Literal["rank", "parameters"] = "rank"
    """What a gate takes out of the target: one, or its parameters; gates are then cut by size per parameter."""

    @property
    def rule(self) -> Rule:
        """SoRA cuts once, by |g|, and has no choice in it; how many gates are zero before is the threshold's doing."""
        return Rule(score="magnitude", schedule="constant", direction="prune")

    @model_validator(mode="after")
    def _target_is_reached(self) -> Self:
        for name in ("sparsity", "tau"):
            if self.lambda_schedule and self.is_changed(name):
                raise ValueError(f"{name} = {getattr(self, name)} has no effect with a lambda_schedule: take it out")
        if self.cost == "parameters" and self.target_rank is None and self.target_parameters is None:
            raise ValueError('cost = "parameters" has no effect without a target: give target_rank or target_parameters')
        why = "SoRA prunes, so give an initial_rank of at least {}"
        check_order("target_rank", self.target_rank, "initial_rank", self.initial_rank, why)
        return self

    @classmethod
    def for_budget(cls, given: Mapping[str, Any], ranks: Mapping[str, int], parameters: int, scale: float) -> dict[str, Any]:
        return cls._pruned(given, ranks, parameters, scale)
