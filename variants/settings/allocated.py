"""Settings of the methods whose ranks an allocator places while they train."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from rankwise.variants.settings.base import (
    Count,
    Fraction,
    NonNegative,
    PerMember,
    Positive,
    PositiveInt,
    check_bounds,
    check_order,
    setting,
)
from rankwise.variants.settings.lowrank import AlwaysMagnitude, LowRankSettings

ScoreName = Literal[
    "sensitivity", "smoothed-sensitivity", "raw-sensitivity", "magnitude", "norm-share", "gradient", "random", "uniform"
]
ScheduleName = Literal["cubic", "cubic-late", "linear", "cosine", "constant"]
AnySchedule = Literal[ScheduleName, "on-plateau"]  # the latter by each member's loss, which not every method can follow
Bounds = dict[str, Annotated[list[Count], Field(min_length=2, max_length=2)]]


@dataclass(frozen=True)
class Rule:
    """What an allocator reads (allocation/allocated.py): the settings of these names, or what a method has in their place."""

    score: str
    schedule: str
    direction: str
    exchange: int = 0
    warmup_steps: int = 0
    least_rank: int = 0
    most_rank: int | None = None
    rank_bounds: Mapping[str, list[int]] = field(default_factory=dict)
    group_bounds: Mapping[str, list[int]] = field(default_factory=dict)
    beta1: float = 0.0
    beta2: float = 0.0


class AllocatedSettings(LowRankSettings):
    """What every method has whose ranks an allocator places: score x schedule x direction x cost, and bounds."""

    grows: ClassVar[bool] = False  # sites take new slots as they need them, without a most rank
    initial_rank: PerMember = setting(role="rank")
    """Rank of each site at the start."""
    target_rank: PerMember = setting(role="rank")
    """Mean rank of a site at the end; the budget is target_rank times the number of sites."""
    target_total: PositiveInt | None = setting(None, role="total", only_with=("cost", ("rank",)))
    """Ranks of all sites together at the end, where target_rank times the number of sites is not what is wanted."""
    target_parameters: PositiveInt | None = setting(None, role="total", added_later=True, only_with=("cost", ("parameters",)))
    """Parameters of all kept ranks at the end, with cost = "parameters"; those of target_rank at every site if not given."""
    warmup_steps: Count = setting(0, role="steps")
    """Steps at the full budget before the first allocation."""
    final_steps: Count = setting(0, role="steps")
    """Steps at the final budget, with the ranks fixed."""
    interval: PositiveInt = setting(1, role="steps")
    """Steps from one allocation to the next."""
    score: ScoreName = setting("sensitivity", added_later=True)
    """What a rank is worth: see variants/allocation/scores.py."""
    schedule: AnySchedule = setting("cubic", added_later=True)
    """How the total goes from the initial to the target ranks: by the step, or, "on-plateau", once the loss stops falling."""
    direction: Literal["prune", "grow", "both"] = setting("prune", added_later=True)
    """prune: any rank may be cut, and may come back; grow: none is cut; both: at most `exchange` change places at a time."""
    exchange: PositiveInt = setting(4, added_later=True, only_with=("direction", ("both",)))
    """Ranks that one allocation may cut, with direction = "both"."""
    cost: Literal["rank", "parameters"] = setting("rank", added_later=True)
    """What a kept rank takes out of the budget: one, or its parameters; ranks are then kept by score per parameter."""
    least_rank: Count = setting(0, added_later=True)
    """Least rank of every site, whatever its score."""
    most_rank: PositiveInt | None = setting(None, added_later=True)
    """Most rank of every site; with direction = "grow" or "both" what a site may grow to."""
    rank_bounds: Bounds = setting({}, added_later=True)
    """Other [least, most] ranks for some sites: name, suffix or pattern of a module -> [least, most]."""
    group_bounds: Bounds = setting({}, added_later=True)
    """[least, most] ranks of several sites together: pattern that matches them -> [least, most]."""
    shrink: bool = setting(False, added_later=True)
    """Whether cut ranks leave the tensors when the final phase begins; penalty and clipping then see the others alone."""
    beta1: Fraction = setting(
        0.85,
        only_with=("score", ("sensitivity", "smoothed-sensitivity", "norm-share", "gradient", "weight-sensitivity")),
    )
    """Smoothing of the score (AdaLoRA eq. 9)."""
    beta2: Fraction = setting(0.85, only_with=("score", ("sensitivity", "weight-sensitivity")))
    """Smoothing of the sensitivity's uncertainty (AdaLoRA eq. 10)."""

    plateau_patience: PositiveInt = setting(50, role="steps", added_later=True, only_with=("schedule", ("on-plateau",)))
    """Steps in a row without a better smoothed loss, after which training has converged and the total changes."""
    plateau_threshold: Fraction = setting(0.01, added_later=True, only_with=("schedule", ("on-plateau",)))
    """Share of the best smoothed loss by which a smoothed loss must be lower to be better."""
    plateau_smoothing: Fraction = setting(0.9, added_later=True, only_with=("schedule", ("on-plateau",)))
    """Weight of the smoothed loss before in that of now."""
    plateau_stages: PositiveInt = setting(1, added_later=True, only_with=("schedule", ("on-plateau",)))
    """Plateaus from the initial to the target ranks, each an equal part of the way."""

    @model_validator(mode="after")
    def _budget_is_reached(self) -> Self:
        if self.direction == "prune":
            why = f"{self.prunes()}, so give an initial_rank of at least {{}} (the paper starts at 1.5 times the target)"
            check_order("target_rank", self.target_rank, "initial_rank", self.initial_rank, why)
        return self

    @staticmethod
    def prunes() -> str:
        return "this method prunes"

    @property
    def allocation(self) -> str:
        is_fixed = self.direction == "prune" and self.initial_rank == self.target_rank and not self.rank_pattern
        if is_fixed and self.target_total is None and self.target_parameters is None:  # nothing is ever cut
            return "uniform"
        return self.score if self.score in ("random", "uniform") else "learned"

    @property
    def rule(self) -> Rule:
        return Rule(**{one.name: getattr(self, one.name) for one in fields(Rule)})

    @classmethod
    def for_budget(cls, given: Mapping[str, Any], ranks: Mapping[str, int], parameters: int, scale: float) -> dict[str, Any]:
        """One that grows starts at rank 1; one that places ranks uniformly has nothing to prune, and keeps its ranks."""
        if given.get("direction", cls.model_fields["direction"].default) != "grow":
            keeps = given.get("score") == "uniform"
            # What is kept costs what it costs: a budget that these ranks do not use up to the last would ask for more of them.
            given = {name: value for name, value in given.items() if not (keeps and name == "cost")}
            return cls._pruned(given, ranks, parameters, scale, keeps)
        total = sum(ranks.values())
        mean = round(total / len(ranks))
        settings = {**given, "initial_rank": 1, "target_rank": mean}
        settings |= {"target_parameters": parameters} if given.get("cost") == "parameters" else {"target_total": total}
        # A site that takes slots as it grows has alpha over its rank of the moment; the mean one gets the scale in the end.
        return cls._starting(settings, dict.fromkeys(ranks, 1), 1, scale, at=mean if cls.grows else 1)

    @model_validator(mode="after")
    def _growth_is_bounded(self) -> Self:
        if self.direction != "prune" and self.most_rank is None and not self.grows:
            raise ValueError(f'direction = "{self.direction}" needs most_rank: what a site may grow to')
        check_bounds({"least_rank": (self.least_rank, self.most_rank), **self.rank_bounds, **self.group_bounds})
        return self


class AdaLoRASettings(AllocatedSettings):
    """Settings of AdaLoRA."""

    orthogonality: list[NonNegative] | NonNegative = setting(0.5, role="member")
    """Weight of the orthogonality penalty.  0.5: peft's AdaLoraConfig default; the paper searches 0.1, 0.3, 0.5."""
    penalty_form: Literal["release", "paper"] = "release"
    """release: mean of Frobenius norms over all matrices; paper: sum of squared norms (eq. 4)."""

    @staticmethod
    def prunes() -> str:
        return "AdaLoRA prunes"


class AdaLoRADoRASettings(AlwaysMagnitude, AdaLoRASettings):
    """Settings of AdaLoRA with DoRA's magnitudes."""


class IncreLoRASettings(AdaLoRASettings):
    """Settings of IncreLoRA."""

    grows = True

    initial_rank: PerMember = 1
    """Rank of each site at the start.  1: the release's scripts."""
    score: Literal["weight-sensitivity"] = "weight-sensitivity"
    """What a site is worth: smoothed |dW * dL/ddW|, and its uncertainty."""
    schedule: ScheduleName = "linear"
    """How the total goes from the initial to the target ranks, where top_sites does not say it."""
    direction: Literal["grow"] = "grow"
    """No rank is ever cut."""
    orthogonality: list[NonNegative] | NonNegative = 0.1
    """Weight of the orthogonality penalty.  0.1: most of the release's scripts."""
    added_rank: PositiveInt = 1
    """Ranks that a site grows by at a time, and as many that it holds in reserve."""
    top_sites: PositiveInt | None = None
    """Sites that grow at each allocation, as in the release; if not given, as many as the schedule asks for."""
    advance_learning: bool = True
    """Whether ranks in reserve learn already, through a tiny fixed coefficient."""
    rise_steps: Count | None = setting(None, role="steps")
    """Steps over which a new rank's learning rate rises, to fall to zero at the end of training; interval, if not given.
    0: the rate of all others."""
    score_form: Literal["release", "paper"] = "release"
    """Sum of |dW * dL/ddW| over sqrt(out * in) (release), or over out * in (paper)."""
    overshoot: bool = False
    """Whether a round may go beyond the target, as in the release: every site of a round, ties too, grows by added_rank."""

    @model_validator(mode="after")
    def _growth_has_effect(self) -> Self:
        if self.top_sites is not None and self.schedule != "linear":
            raise ValueError(f'schedule = "{self.schedule}" has no effect with top_sites = {self.top_sites}: take one out')
        if self.overshoot and (self.top_sites is None or self.cost != "rank"):
            raise ValueError('overshoot = true needs top_sites and cost = "rank": give them, or take it out')
        for name in ("least_rank", "group_bounds"):
            if getattr(self, name):
                raise ValueError(f"{name} = {getattr(self, name)} has no effect on a method that only grows: take it out")
        return self


class ExchangingSettings(AdaLoRASettings):
    """What every method has whose total stays: ranks are cut at some sites, and as many added at others."""

    grows = True

    target_rank: PerMember | None = None
    """Mean rank of a site at the end, which is that of the start."""
    direction: Literal["both"] = "both"
    """Ranks are cut at some sites, and as many added at others."""
    schedule: Literal["cubic-late", "steady"] = "cubic-late"
    """How many ranks are exchanged over time: exchange (1 - progress^3), or always `exchange`."""
    orthogonality: list[NonNegative] | NonNegative = 0.1
    """Weight of the orthogonality penalty.  0.1: the release's default."""

    @model_validator(mode="after")
    def _budget_is_reached(self) -> Self:
        if self.target_rank not in (None, self.initial_rank):
            raise ValueError(
                f"target_rank = {self.target_rank} is not initial_rank = {self.initial_rank}: {self.keeps()}, so "
                f"take it out and set initial_rank"
            )
        for name in ("target_total", "target_parameters", "group_bounds"):
            if getattr(self, name):
                raise ValueError(f"{name} = {getattr(self, name)} has no effect: {self.keeps()}; take it out")
        return self

    @staticmethod
    def keeps() -> str:
        return "this method keeps its total"

    @classmethod
    def for_budget(cls, given: Mapping[str, Any], ranks: Mapping[str, int], parameters: int, scale: float) -> dict[str, Any]:
        """It starts with the ranks that it ends with: the total stays."""
        first = min(ranks.values())
        return cls._starting({**given, "initial_rank": first}, ranks, first, scale)


class ElaLoRASettings(ExchangingSettings):
    """Settings of ElaLoRA."""

    candidates: PositiveInt = 2
    """Weakest ranks of each site that may be cut at one time."""
    optimizer_reset: Literal["never", "release"] = "never"
    """release: after each exchange all averages of the optimizer start anew, those of ranks that stay and of the head too."""

    @staticmethod
    def keeps() -> str:
        return "ElaLoRA keeps its total"


class FlexLoRASettings(ExchangingSettings):
    """Settings of FlexLoRA."""

    score: Literal["spectral-entropy"] = "spectral-entropy"
    """What a matrix is worth: the entropy of its E^2, over log(rank)."""
    weakest: Literal["magnitude", "signed"] = "magnitude"
    """Which triplet a matrix loses: that of the least |E|, or, as in the release, of the least E, the most negative."""
    undefined_entropy: Literal["lowest", "highest"] = "lowest"
    """How a matrix of one rank, or whose E are all zero, counts; highest: as the release's NaN does, so that it grows."""
    added_std: Positive = 1.0
    """Standard deviation of a new triplet's row of A and column of B.  1: the release's, 50 times that of the start."""


class DynamicDoRASettings(AllocatedSettings):
    """Settings of dynamic-rank DoRA (Mao et al. 2024)."""

    score: ScoreName = "norm-share"
    """What a component is worth (eq. 7)."""
    schedule: AnySchedule = "cubic-late"
    """How the total falls; the release's cube is on the progress made: slow first, fast at the end."""
    beta1: Fraction = 0.9
    """Smoothing of the score (eq. 8)."""
    modulator: NonNegative = 0.1
    """Weight eta of the dimensional equilibrium modulator (eq. 10); the paper takes 0.1 to 0.5."""
    penalty_form: Literal["paper", "release"] = "paper"
    """paper: mean over components of both variances; release: mean over their vectors, half of it."""


class FreelyAllocatedSettings(AdaLoRASettings):
    """Settings of any combination of the allocator's parts."""

    form: Literal["triplet", "doublet"] = "triplet"
    """triplet: P diag(E) Q, which starts at E = 0; doublet: LoRA's B A, which starts at B = 0."""
    orthogonality: list[NonNegative] | NonNegative = 0.0
    """Weight of AdaLoRA's orthogonality penalty on the factors."""
