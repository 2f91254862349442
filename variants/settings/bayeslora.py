"""Settings of BayesLoRA."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from rankwise.variants.settings.base import (
    Count,
    NonNegative,
    PerMember,
    Positive,
    PositiveInt,
    check_order,
    setting,
)
from rankwise.variants.settings.target import TARGET_PARAMETERS, TARGET_RANK, TARGET_TOTAL, MayHaveTarget


class BayesLoRASettings(MayHaveTarget):
    """Settings of BayesLoRA; how many ranks are left is the posterior's outcome, unless there is a target."""

    initial_rank: PerMember = setting(role="rank")
    """Rank of each site at the start; the scale stays alpha over it."""
    kl_weight: NonNegative = 1e-6
    """Weight of the divergence from the prior in the loss.  1e-6: the release's default."""
    initial_log_variance: Annotated[float, Field(ge=-20, le=2)] = -8.0
    """Where the log variance of each rank starts.  -8: the release."""
    variance: Literal["both", "A"] = "both"
    """What a rank's variance is of: its row of A and its column of B, or of the row alone (the asymmetric form)."""
    sampling: Literal["local", "weights"] = "local"
    """What is drawn in training: outputs, at each row anew (at linear modules), or the weights, once a forward pass."""
    variance_lr_ratio: Positive = 1.0
    """Learning rate of the log variances over that of A."""
    threshold: Annotated[float, Field(allow_inf_nan=False)] = 3.0
    """A rank is cut where its log noise-to-signal ratio is at least this.  3: the release."""
    interval: PositiveInt = setting(200, role="steps")
    """Steps from one pruning to the next.  200: the release's script for GPT-2; that for GLUE has 2000."""
    warmup_steps: Count = setting(0, role="steps")
    """Steps before the first pruning."""
    final_steps: Count = setting(0, role="steps")
    """Steps at the end with the ranks fixed; the last pruning comes before them."""
    least_rank: Count = 0
    """Rank that is left to every site, whatever its ratios.  0: the release's default."""
    target_rank: PerMember | None = TARGET_RANK
    """Mean rank of a site to which those of the highest ratios are cut when the final steps begin; no such cut if not given."""
    target_total: PositiveInt | None = TARGET_TOTAL
    """The same as the ranks of all sites together."""
    target_parameters: PositiveInt | None = TARGET_PARAMETERS
    """The same as parameters of all sites together, variances counted, with cost = "parameters"."""
    cost: Literal["rank", "parameters"] = "rank"
    """What a rank takes out of the target: one, or its parameters."""

    @model_validator(mode="after")
    def _target_is_reached(self) -> Self:
        why = "BayesLoRA prunes, so give an initial_rank of at least {}"
        check_order("target_rank", self.target_rank, "initial_rank", self.initial_rank, why)
        return self

    @classmethod
    def for_budget(cls, given: Mapping[str, Any], ranks: Mapping[str, int], parameters: int, scale: float) -> dict[str, Any]:
        return cls._pruned(given, ranks, parameters, scale)
