"""Settings of the methods that place rank once, before training."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from rankwise.variants.settings.allocated import Bounds
from rankwise.variants.settings.base import Count, NonNegative, PerMember, Positive, PositiveInt, check_bounds, setting
from rankwise.variants.settings.lowrank import LowRankSettings


class PlacedSettings(LowRankSettings):
    """What every method has that places rank once, before training, which then is LoRA's."""

    rank: PerMember = setting(role="rank")
    """Mean rank of a site: the budget is that of a uniform start, `rank` (or rank_pattern's) at every site."""
    total_rank: PositiveInt | None = setting(None, role="total", only_with=("cost", ("rank",)))
    """Ranks of all sites together, where rank times the number of sites is not what is wanted."""
    total_parameters: PositiveInt | None = setting(None, role="total", only_with=("cost", ("parameters",)))
    """Parameters of all ranks together, with cost = "parameters"; those of the uniform start if not given."""
    cost: Literal["rank", "parameters"] = "rank"
    """What a rank takes out of the budget: one, or its parameters, of which never more are used than the budget."""
    least_rank: Count = 0
    """Least rank of every site."""
    most_rank: PositiveInt | None = None
    """Most rank of every site."""
    rank_bounds: Bounds = {}
    """Other [least, most] ranks for some sites: name, suffix or pattern of a module -> [least, most]."""
    group_bounds: Bounds = {}
    """[least, most] ranks of several sites together: pattern that matches them -> [least, most]."""
    scale_by: Literal["mean rank", "own rank"] = "mean rank"
    """Which r the scale alpha/r has at a site: that of the uniform start, so that every site has LoRA's scale whatever rank
    it was given (PEFT's adjust_scaling_factors), or the rank that it was given, so that more rank comes with less scale."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        check_bounds({"least_rank": (self.least_rank or 0, self.most_rank), **self.rank_bounds, **self.group_bounds})
        return self

    @classmethod
    def for_budget(cls, given: Mapping[str, Any], ranks: Mapping[str, int], parameters: int, scale: float) -> dict[str, Any]:
        """The method is given the whole budget, and the mean rank, whose scale every site gets."""
        total = sum(ranks.values())
        mean = round(total / len(ranks))
        by_parameters = given.get("cost") == "parameters"
        whole = {"total_parameters": parameters} if by_parameters else {"total_rank": total}
        return cls._starting({**given, "rank": mean, **whole}, dict.fromkeys(ranks, mean), mean, scale)


class EVASettings(PlacedSettings):
    """Settings of EVA."""

    rho: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    """A site gets at most rho times its rank in the uniform start; 1 is no redistribution.  2: the paper's."""
    tau: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Cosine to the step before from which a direction counts as found (decomposition = "incremental").  0.99: the paper's."""
    decomposition: Literal["incremental", "exact"] = "incremental"
    """incremental: batch after batch, until the directions that are used stand still (the paper's); exact: of all batches."""
    ratio: Literal["release", "paper"] = "release"
    """What a direction is worth: sigma^2 over the whole variance (PEFT's), or over (M - 1) sum sigma (the paper's)."""
    tokens: Literal["unpadded", "labelled"] = "unpadded"
    """Whose inputs count: all tokens but padding, or of these the ones with a label (PEFT's, for one label a token)."""
    calibration_batches: PositiveInt = 16
    """Batches of its own training data that the trainer lets each member measure, at most."""


class GoRASettings(PlacedSettings):
    """Settings of GoRA."""

    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/sqrt(r)"
    """How alpha becomes a scale; the paper's is alpha/sqrt(r)."""
    scale_by: Literal["mean rank", "own rank"] = "own rank"
    """Which r that is at a site: of the uniform start, or its own; the paper's is its own."""
    least_rank: Count | None = None
    """Least rank of every site; half its rank in the uniform start if not given (4 of 8 in the release's scripts)."""
    most_rank: PositiveInt | None = None
    """Most rank of every site; four times its rank in the uniform start if not given (32 of 8 in the release's scripts)."""
    rounding: Literal["paper", "release", "exact"] = "paper"
    """paper: the nearest rank, then the bounds; release: the rank below; both miss the budget; exact: they meet it."""
    importance: Literal["mean", "frobenius"] = "mean"
    """What a weight is worth: mean |W * G| (the paper's and the scripts'), or ||W * G||_F (the release's default)."""
    gamma: NonNegative = 0.05
    """Size of the start: s B A is about -gamma G in norm.  0.05: the release's scripts."""
    sign: Literal["descent", "ascent"] = "descent"
    """descent: the start is a step against the gradient, as in the paper; ascent: along it, as in the release."""
    calibration_batches: PositiveInt = 8
    """Batches of its own training data over which the trainer lets each member average its gradient.  8: the release's."""

    @model_validator(mode="after")
    def _budget_has_effect(self) -> Self:
        for name, value in (
            ("cost", self.cost != "rank"),
            ("total_rank", self.total_rank),
            ("group_bounds", self.group_bounds),
        ):
            if value and self.rounding != "exact":
                raise ValueError(
                    f'{name} = {getattr(self, name)} has no effect with rounding = "{self.rounding}", whose budget is '
                    f'sum sqrt(in + out) rank: take it out or set rounding = "exact"'
                )
        return self


class FIMLoRASettings(PlacedSettings):
    """Settings of FIM-LoRA."""

    least_rank: Count = 1
    """Least rank of every site.  1: the release's."""
    most_rank: PositiveInt | None = None
    """Most rank of every site; twice its rank in the uniform start if not given, as in the release."""
    calibration_batches: PositiveInt = 8
    """Batches of its own training data over which the trainer lets each member average squared gradients.  8: the release's."""


class SpectralRankSettings(PlacedSettings):
    """Settings of the spectral rule."""

    threshold: Positive | None = None
    """C: a site gets as many ranks as sigma_r(G)^2 >= C/n says, so that the total is a result; a budget if not given."""
    calibration_batches: PositiveInt = 8
    """Batches of its own training data over which the trainer lets each member average its gradient."""

    @model_validator(mode="after")
    def _budget_has_effect(self) -> Self:
        for name in ("total_rank", "total_parameters", "group_bounds"):
            if self.threshold is not None and getattr(self, name):
                raise ValueError(
                    f"{name} = {getattr(self, name)} has no effect with a threshold, which sets the total: take one out"
                )
        if self.threshold is not None and self.cost != "rank":
            raise ValueError(f'cost = "{self.cost}" has no effect with a threshold, which sets the total: take one out')
        return self

    @classmethod
    def for_budget(cls, given: Mapping[str, Any], ranks: Mapping[str, int], parameters: int, scale: float) -> dict[str, Any]:
        if given.get("threshold") is not None:
            raise ValueError(
                f"threshold = {given['threshold']} sets the total itself, so no budget can: take it out, or give the entry its "
                f"rank without [budget]"
            )
        return super().for_budget(given, ranks, parameters, scale)


class HeavyTailSettings(PlacedSettings):
    """Settings of ranks by heavy-tailed self-regularization."""

    statistic: Literal["hill", "spikes"] = "hill"
    """What is read from the singular values of W: the Hill exponent of their tail, or how many stand above the
    Marchenko-Pastur edge of a random matrix of the same size."""
    more_to: Literal["light", "heavy"] = "light"
    """Which weights get more rank: light tails (less well trained, AlphaLoRA's reading) or heavy ones (more to adapt)."""
    beta: Positive = 2.5
    """Exponent of the share.  2.5: AlphaLoRA's release; 1: in proportion."""
