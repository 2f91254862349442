"""Settings of GeoLoRA."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import model_validator
from rankwise.variants.settings.base import Count, Fraction, PerMember, PositiveInt, check_order, setting
from rankwise.variants.settings.target import TARGET_PARAMETERS, TARGET_RANK, TARGET_TOTAL, MayHaveTarget


class GeoLoRASettings(MayHaveTarget):
    """Settings of GeoLoRA; with a target the total is that budget, else the tolerance's."""

    initial_rank: PerMember = setting(role="rank")
    """Rank of each site at the start, which the rank of later does not depend on; 10: the release's script for GLUE."""
    most_rank: PositiveInt = 32
    """Most rank of a site, before a truncation too.  32: the release."""
    least_rank: PositiveInt = 2
    """Rank that a truncation leaves to every site, whatever its singular values.  2: the release."""
    tolerance: Fraction = 0.15
    """What a truncation may lose of a site's update, as a share of its Frobenius norm.  0.15: the release."""
    interval: PositiveInt = setting(11, role="steps")
    """Steps from one augmentation to the next.  11: the release, in which ten steps of the core alone lie between."""
    truncate_after: Count | None = setting(None, role="steps")
    """Steps from an augmentation to the truncation; to the end of the interval if not given."""
    final_steps: Count = setting(0, role="steps")
    """Steps at the end with the ranks fixed, in which the core alone is trained; the last truncation comes before them."""
    core_step: Literal["optimizer", "release"] = "optimizer"
    """How the core moves in an augmentation: by the optimizer, as in every other step; or by plain gradient descent."""
    scale_by: Literal["initial rank", "release"] = "initial rank"
    """initial rank: the scale stays alpha over it; release: each truncation puts alpha over the rank that it leaves."""
    target_rank: PerMember | None = TARGET_RANK
    """Mean rank of a site after a truncation: the budget, which the largest singular values of all sites share."""
    target_total: PositiveInt | None = TARGET_TOTAL
    """The same as the ranks of all sites together.  The release's script has 500."""
    target_parameters: PositiveInt | None = TARGET_PARAMETERS
    """The same as parameters of all sites together, cores counted, with cost = "parameters"."""
    cost: Literal["rank", "parameters"] = "rank"
    """What a singular value takes out of the target: one, or the parameters that it adds to its site's."""

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if self.has_target and self.is_changed("tolerance"):
            raise ValueError(f"tolerance = {self.tolerance} has no effect with a target: take one of them out")
        if self.truncate_after is not None and self.truncate_after >= self.interval:
            raise ValueError(
                f"truncate_after = {self.truncate_after} is not below interval = {self.interval}: the next augmentation comes "
                f"first, so lower it"
            )
        check_order("least_rank", self.least_rank, "most_rank", self.most_rank, "exchange them")
        why = "a site starts with no more than it may grow to, so raise most_rank to at least {}"
        for name, ranks in (("initial_rank", self.initial_rank), *self.rank_pattern.items()):
            check_order(name, ranks, "most_rank", self.most_rank, why)
        return self

    @classmethod
    def for_budget(cls, given: Mapping[str, Any], ranks: Mapping[str, int], parameters: int, scale: float) -> dict[str, Any]:
        """It starts with the ranks of the budget, and every truncation keeps within it, cores counted."""
        first = min(ranks.values())
        settings: dict[str, Any] = {**given, "initial_rank": first}
        if given.get("cost") == "rank":
            settings["target_total"] = sum(ranks.values())
        else:
            settings |= {"cost": "parameters", "target_parameters": parameters}
        if max(ranks.values()) > given.get("most_rank", cls.model_fields["most_rank"].default):
            settings["most_rank"] = 2 * max(ranks.values())
        return cls._starting(settings, ranks, first, scale)
