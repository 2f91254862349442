"""What each method can be told, and the list of methods: the one place to look a setting up.

This module imports no torch, so that a study file is checked, and a wrong one refused, within a second.  The
mathematics of a method stands in its own file, which `Method.location` names.
"""

import difflib
import importlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
PerMember = list[PositiveInt] | PositiveInt
Targets = str | list[str]


class Settings(BaseModel):
    """Settings of a method: keyword-only, frozen, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
    LATER: ClassVar[tuple[str, ...]] = ()

    def for_member(self, member: int) -> "Settings":
        """The same settings with every per-member list replaced by that member's value."""
        change = {k: getattr(self, k)[member] for k in PER_MEMBER if isinstance(self.get(k), list)}
        for name in PATTERNS:
            if any(isinstance(value, list) for value in self.get(name, {}).values()):
                change[name] = {k: v[member] if isinstance(v, list) else v for k, v in getattr(self, name).items()}
        return self.model_copy(update=change)

    def check_members(self, members: int) -> None:
        """
        Raises:
            ValueError: a list of another length than `members`.
        """
        for name in PER_MEMBER:
            per_member(self.get(name), members, name)
        for name in PATTERNS:
            for pattern, value in self.get(name, {}).items():
                per_member(value, members, f'{name}["{pattern}"]')

    def first_members(self, members: int) -> "Settings":
        """The same settings with every per-member list cut to so many members."""

        def cut(value: Any) -> Any:
            return value[:members] if isinstance(value, list) else value

        change = {k: cut(getattr(self, k)) for k in PER_MEMBER if hasattr(self, k)}
        change |= {k: {p: cut(v) for p, v in getattr(self, k).items()} for k in PATTERNS if hasattr(self, k)}
        return self.model_copy(update={k: v for k, v in change.items() if v != getattr(self, k)})

    @property
    def allocation(self) -> str:
        """What places the ranks: "none" has any, "uniform", "given" (by patterns), "random", or "learned"."""
        return "none"

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)

    def identity(self) -> dict[str, Any]:
        """What tells one run from another.

        A setting that came later (`LATER`) is left out while it has its default, so that the runs made before it stay what
        they were.  Such a default may therefore never change.
        """
        values = self.model_dump(mode="json")
        defaults = {name: type(self).model_fields[name].get_default() for name in self.LATER if name in values}
        return {k: v for k, v in values.items() if k not in defaults or getattr(self, k) != defaults[k]}


PER_MEMBER = ("rank", "initial_rank", "target_rank", "alpha", "orthogonality")  # what members of a pack may differ in
PATTERNS = ("rank_pattern", "alpha_pattern")  # module -> value, in which they may differ too


class LowRankSettings(Settings):
    """What every low-rank method has."""

    alpha: list[Positive] | Positive = 16.0
    """Numerator of the scale on the update; one number, or one for each member."""
    # 16: AdaLoRA sec. 4 and LoRA's scripts use 16 or 32 and never tune it.
    dropout: Fraction = 0.0
    """Probability with which an element of the low-rank branch's input is dropped in training."""
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """How alpha becomes a scale; alpha/sqrt(r) is rsLoRA's (Kalajdzievski 2023)."""
    rank_pattern: dict[str, list[Count] | Count] = {}
    """Other (initial) ranks for some sites: name, suffix or pattern of a module -> rank, or one for each member."""
    alpha_pattern: dict[str, list[Positive] | Positive] = {}
    """Other alphas for some sites: name, suffix or pattern of a module -> alpha, or one for each member."""
    lr_ratio: Positive = 1.0
    """Learning rate of B over that of A; above 1 it is LoRA+ (Hayou et al. 2024)."""
    magnitude: bool = False
    """DoRA's trained magnitude around each site (Liu et al. 2024); "dora" and "adalora+dora" always have it."""

    LATER = ("magnitude",)

    @property
    def allocation(self) -> str:
        return "learned"


class LoRASettings(LowRankSettings):
    """Settings of LoRA and of DoRA."""

    rank: PerMember
    """Rank of each site; one number, or one for each member."""
    initialization: Literal["kaiming", "gaussian"] = "kaiming"
    """Where A starts; B starts at zero."""

    @property
    def allocation(self) -> str:
        ranks = [self.rank, *self.rank_pattern.values()]
        flat = [rank for value in ranks for rank in (value if isinstance(value, list) else [value])]
        return "uniform" if max(flat) - min(flat) <= 1 else "given"  # one more here and there meets a budget


SMOOTHS = {
    "sensitivity": ("beta1", "beta2"),
    "smoothed-sensitivity": ("beta1",),
    "norm-share": ("beta1",),
    "gradient": ("beta1",),
    "weight-sensitivity": ("beta1", "beta2"),
}
ScoreName = Literal[
    "sensitivity", "smoothed-sensitivity", "raw-sensitivity", "magnitude", "norm-share", "gradient", "random", "uniform"
]
ScheduleName = Literal["cubic", "cubic-late", "linear", "cosine", "constant"]
Bounds = dict[str, Annotated[list[Count], Field(min_length=2, max_length=2)]]


class AllocatedSettings(LowRankSettings):
    """What every method has whose ranks an allocator places: score x schedule x direction x cost, and bounds."""

    GROWS: ClassVar[bool] = False  # sites take new slots as they need them, without a most rank
    initial_rank: PerMember
    """Rank of each site at the start."""
    target_rank: PerMember
    """Mean rank of a site at the end; the budget is target_rank times the number of sites."""
    target_total: PositiveInt | None = None
    """Ranks of all sites together at the end, where target_rank times the number of sites is not what is wanted."""
    target_parameters: PositiveInt | None = None
    """Parameters of all kept ranks at the end, with cost = "parameters"; those of target_rank at every site if not given."""
    warmup_steps: Count = 0
    """Steps at the full budget before the first allocation."""
    final_steps: Count = 0
    """Steps at the final budget, with the ranks fixed."""
    interval: PositiveInt = 1
    """Steps from one allocation to the next."""
    score: ScoreName = "sensitivity"
    """What a rank is worth: see variants/allocation/scores.py."""
    schedule: ScheduleName = "cubic"
    """How the total goes from the initial to the target ranks."""
    direction: Literal["prune", "grow", "both"] = "prune"
    """prune: any rank may be cut, and may come back; grow: none is cut; both: at most `exchange` change places at a time."""
    exchange: PositiveInt = 4
    """Ranks that one allocation may cut, with direction = "both"."""
    cost: Literal["rank", "parameters"] = "rank"
    """What a kept rank takes out of the budget: one, or its parameters; ranks are then kept by score per parameter."""
    least_rank: Count = 0
    """Least rank of every site, whatever its score."""
    most_rank: PositiveInt | None = None
    """Most rank of every site; with direction = "grow" or "both" what a site may grow to."""
    rank_bounds: Bounds = {}
    """Other [least, most] ranks for some sites: name, suffix or pattern of a module -> [least, most]."""
    group_bounds: Bounds = {}
    """[least, most] ranks of several sites together: pattern that matches them -> [least, most]."""
    shrink: bool = False
    """Whether cut ranks leave the tensors when the final phase begins; penalty and clipping then see the others alone."""
    beta1: Fraction = 0.85
    """Smoothing of the score (AdaLoRA eq. 9)."""
    beta2: Fraction = 0.85
    """Smoothing of the sensitivity's uncertainty (AdaLoRA eq. 10)."""

    LATER = (
        *LowRankSettings.LATER,
        *("target_parameters", "score", "schedule", "direction", "exchange", "cost"),
        *("least_rank", "most_rank", "rank_bounds", "group_bounds", "shrink"),
    )

    @model_validator(mode="after")
    def _budget_is_reached(self) -> "AllocatedSettings":
        initial, target = self.initial_rank, self.target_rank
        length = max(len(value) if isinstance(value, list) else 1 for value in (initial, target))
        for start, end in zip(_spread(initial, length), _spread(target, length), strict=False):
            if end > start and self.direction == "prune":
                raise ValueError(
                    f"target_rank = {end} is above initial_rank = {start}: {self.prunes()}, so give an initial_rank "
                    f"of at least {end} (the paper starts at 1.5 times the target)"
                )
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

    @model_validator(mode="after")
    def _settings_have_effect(self) -> "AllocatedSettings":
        def changed(name: str) -> bool:
            return getattr(self, name) != type(self).model_fields[name].get_default()

        for name in ("beta1", "beta2"):
            if changed(name) and name not in SMOOTHS.get(self.score, ()):
                raise ValueError(f'{name} = {getattr(self, name)} has no effect with score = "{self.score}": take it out')
        if changed("exchange") and self.direction != "both":
            raise ValueError(f'exchange = {self.exchange} has no effect with direction = "{self.direction}": take it out')
        other = "target_parameters" if self.cost == "rank" else "target_total"
        if getattr(self, other) is not None:
            raise ValueError(f'{other} = {getattr(self, other)} has no effect with cost = "{self.cost}": take it out')
        if self.direction != "prune" and self.most_rank is None and not self.GROWS:
            raise ValueError(f'direction = "{self.direction}" needs most_rank: what a site may grow to')
        for name, (least, most) in {
            "least_rank": (self.least_rank, self.most_rank),
            **self.rank_bounds,
            **self.group_bounds,
        }.items():
            if most is not None and least > most:
                raise ValueError(f"{name}: least rank {least} is above the most rank {most}: exchange them")
        return self


class AdaLoRASettings(AllocatedSettings):
    """Settings of AdaLoRA, with or without DoRA's magnitude."""

    orthogonality: list[NonNegative] | NonNegative = 0.5
    """Weight of the orthogonality penalty.  0.5: peft's AdaLoraConfig default; the paper searches 0.1, 0.3, 0.5."""
    penalty_form: Literal["release", "paper"] = "release"
    """release: mean of Frobenius norms over all matrices; paper: sum of squared norms (eq. 4)."""

    @staticmethod
    def prunes() -> str:
        return "AdaLoRA prunes"


class IncreLoRASettings(AdaLoRASettings):
    """Settings of IncreLoRA."""

    GROWS = True

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
    rise_steps: Count | None = None
    """Steps over which a new rank's learning rate rises, to fall to zero at the end of training; interval, if not given.
    0: the rate of all others."""
    score_form: Literal["release", "paper"] = "release"
    """Sum of |dW * dL/ddW| over sqrt(out * in) (release), or over out * in (paper)."""
    overshoot: bool = False
    """Whether a round may go beyond the target, as in the release: every site of a round, ties too, grows by added_rank."""

    @model_validator(mode="after")
    def _growth_has_effect(self) -> "IncreLoRASettings":
        if self.top_sites is not None and self.schedule != "linear":
            raise ValueError(f'schedule = "{self.schedule}" has no effect with top_sites = {self.top_sites}: take one out')
        if self.overshoot and (self.top_sites is None or self.cost != "rank"):
            raise ValueError('overshoot = true needs top_sites and cost = "rank": give them, or take it out')
        for name in ("least_rank", "group_bounds"):
            if getattr(self, name):
                raise ValueError(f"{name} = {getattr(self, name)} has no effect on a method that only grows: take it out")
        return self


class ElaLoRASettings(AdaLoRASettings):
    """Settings of ElaLoRA."""

    GROWS = True

    target_rank: PerMember | None = None
    """Mean rank of a site at the end, which is that of the start."""
    direction: Literal["both"] = "both"
    """Ranks are cut at some sites, and as many added at others."""
    schedule: Literal["cubic-late", "steady"] = "cubic-late"
    """How many ranks are exchanged over time: exchange (1 - progress^3), or always `exchange`."""
    orthogonality: list[NonNegative] | NonNegative = 0.1
    """Weight of the orthogonality penalty.  0.1: the release's default."""
    candidates: PositiveInt = 2
    """Weakest ranks of each site that may be cut at one time."""
    optimizer_reset: Literal["never", "release"] = "never"
    """release: after each exchange all averages of the optimizer start anew, those of ranks that stay and of the head too."""

    @model_validator(mode="after")
    def _budget_is_reached(self) -> "ElaLoRASettings":
        if self.target_rank not in (None, self.initial_rank):
            raise ValueError(
                f"target_rank = {self.target_rank} is not initial_rank = {self.initial_rank}: ElaLoRA keeps its total, so "
                f"take it out and set initial_rank"
            )
        for name in ("target_total", "target_parameters", "group_bounds"):
            if getattr(self, name):
                raise ValueError(f"{name} = {getattr(self, name)} has no effect: ElaLoRA keeps its total; take it out")
        return self


class DynamicDoRASettings(AllocatedSettings):
    """Settings of dynamic-rank DoRA (Mao et al. 2024)."""

    score: ScoreName = "norm-share"
    """What a component is worth (eq. 7)."""
    schedule: ScheduleName = "cubic-late"
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


class PlacedSettings(LowRankSettings):
    """What every method has that places rank once, before training, which then is LoRA's."""

    rank: PerMember
    """Mean rank of a site: the budget is that of a uniform start, `rank` (or rank_pattern's) at every site."""
    total_rank: PositiveInt | None = None
    """Ranks of all sites together, where rank times the number of sites is not what is wanted."""
    total_parameters: PositiveInt | None = None
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
    def _budget_is_told_once(self) -> "PlacedSettings":
        other = "total_parameters" if self.cost == "rank" else "total_rank"
        if getattr(self, other) is not None:
            raise ValueError(f'{other} = {getattr(self, other)} has no effect with cost = "{self.cost}": take it out')
        bounds = {"least_rank": (self.least_rank or 0, self.most_rank), **self.rank_bounds, **self.group_bounds}
        for name, (least, most) in bounds.items():
            if most is not None and least > most:
                raise ValueError(f"{name}: least rank {least} is above the most rank {most}: exchange them")
        return self


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
    def _budget_has_effect(self) -> "GoRASettings":
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


class DyLoRASettings(LoRASettings):
    """Settings of DyLoRA; `rank` is the most that it can be used at."""

    least_rank: PositiveInt = 1
    """Least rank that is drawn, and that the trained adapter is meant for."""
    sampling: Literal["uniform", "geometric"] = "uniform"
    """How the rank of a step is drawn; geometric: small ranks more often, with p = 0.15."""
    update: Literal["nested", "frozen", "frozen-release"] = "nested"
    """Which slots a step at rank b moves: all of 1 .. b; b alone; b alone by its gradient, and others by AdamW's momentum."""

    @model_validator(mode="after")
    def _ranks_are_left(self) -> "DyLoRASettings":
        for rank in [rank for value in (self.rank, *self.rank_pattern.values()) for rank in _spread(value, 1)]:
            if rank < self.least_rank:
                raise ValueError(f"least_rank = {self.least_rank} is above rank = {rank}: lower it or raise the rank")
        return self


class SoRASettings(LowRankSettings):
    """Settings of SoRA."""

    # What an allocator asks for and this method has no choice in.
    warmup_steps: ClassVar[int] = 0
    score: ClassVar[str] = "magnitude"
    schedule: ClassVar[str] = "constant"
    direction: ClassVar[str] = "prune"
    beta1: ClassVar[float] = 0.0
    beta2: ClassVar[float] = 0.0
    least_rank: ClassVar[int] = 0
    most_rank: ClassVar[int | None] = None
    rank_bounds: ClassVar[Bounds] = {}
    group_bounds: ClassVar[Bounds] = {}

    initial_rank: PerMember
    """Rank of each site at the start; the scale stays alpha over it."""
    threshold: Literal["soft", "release"] = "soft"
    """The step after the optimizer's: soft, the paper's, by the gates' rate times `sparsity`; release: its own, by `tau`."""
    sparsity: NonNegative = 0.375
    """Weight lambda of the gates' L1 norm, by which the soft threshold acts."""
    # 0.375: the release's script for STS-B has a threshold of 3e-4 at a rate of 8e-4.
    tau: NonNegative = 3e-4
    """Threshold of the release's step, whatever the rate; 3e-4: its script for STS-B."""
    lambda_schedule: list[NonNegative] = []
    """Values that take the place of `sparsity` or `tau`, one after the other, for equal parts of the run before final_steps."""
    l1: NonNegative = 0.0
    """Weight of the mean |gate| in the loss, besides the threshold; the release has 1e-3 or, for STS-B, 10."""
    gate_lr_ratio: Positive = 1.0
    """Learning rate of the gates over that of A."""
    final_steps: Count = 0
    """Steps at the end with the ranks fixed: no gate comes back or is shrunk by the threshold or by `l1`."""
    target_rank: PerMember | None = None
    """Mean rank of a site at the end, to which the largest gates are cut when the final steps begin; no cut if not given."""
    target_total: PositiveInt | None = None
    """The same as the ranks of all sites together."""
    target_parameters: PositiveInt | None = None
    """The same as parameters of all sites together, with cost = "parameters"."""
    shrink: bool = False
    """Whether gates that are zero leave the tensors when the final steps begin."""
    cost: Literal["rank", "parameters"] = "rank"
    """What a gate takes out of the target: one, or its parameters; gates are then cut by size per parameter."""

    shrink: bool = False
    """When the final steps begin, gates that are zero leave parameters, gradients and the optimizer's averages."""

    @model_validator(mode="after")
    def _settings_have_effect(self) -> "SoRASettings":
        unread = "tau" if self.threshold == "soft" else "sparsity"
        for name in (unread, *(("sparsity", "tau") if self.lambda_schedule else ())):
            if getattr(self, name) != type(self).model_fields[name].get_default():
                why = f'threshold = "{self.threshold}"' if name == unread else "a lambda_schedule"
                raise ValueError(f"{name} = {getattr(self, name)} has no effect with {why}: take it out")
        other = "target_parameters" if self.cost == "rank" else "target_total"
        if getattr(self, other) is not None:
            raise ValueError(f'{other} = {getattr(self, other)} has no effect with cost = "{self.cost}": take it out')
        if self.cost == "parameters" and self.target_rank is None and self.target_parameters is None:
            raise ValueError('cost = "parameters" has no effect without a target: give target_rank or target_parameters')
        length = max(len(value) if isinstance(value, list) else 1 for value in (self.initial_rank, self.target_rank))
        for start, end in zip(_spread(self.initial_rank, length), _spread(self.target_rank, length), strict=False):
            if end is not None and end > start:
                raise ValueError(
                    f"target_rank = {end} is above initial_rank = {start}: SoRA prunes, so give an initial_rank "
                    f"of at least {end}"
                )
        return self


NORMALISATIONS = ("none", "site-share", "site-largest", "weight")  # how truncation compares the sites' singular values


class TruncatedSettings(LowRankSettings):
    """Settings of LoRA that is truncated after training."""

    initial_rank: PerMember
    """Rank of each site in training."""
    target_rank: PerMember
    """Mean rank of a site after it; the budget is target_rank times the number of sites."""
    target_total: PositiveInt | None = None
    """Ranks of all sites together, where target_rank times the number of sites is not what is wanted."""
    target_parameters: PositiveInt | None = None
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
    def _something_is_cut(self) -> "TruncatedSettings":
        length = max(len(value) if isinstance(value, list) else 1 for value in (self.initial_rank, self.target_rank))
        pairs = zip(_spread(self.initial_rank, length), _spread(self.target_rank, length), strict=False)
        for start, end in pairs:
            if end > start:
                raise ValueError(
                    f"target_rank = {end} is above initial_rank = {start}: truncation adds no rank, so give an initial_rank "
                    f"of at least {end}"
                )
        other = "target_parameters" if self.cost == "rank" else "target_total"
        if getattr(self, other) is not None:
            raise ValueError(f'{other} = {getattr(self, other)} has no effect with cost = "{self.cost}": take it out')
        if self.most_rank is not None and self.least_rank > self.most_rank:
            raise ValueError(f"least_rank = {self.least_rank} is above most_rank = {self.most_rank}: exchange them")
        return self


class NoSettings(Settings):
    """A method without settings."""


@dataclass(frozen=True)
class Method:
    """A named method: where it is, what it can be told, and where it comes from."""

    name: str
    location: str
    settings: type[Settings]
    summary: str
    source: str
    allocation: str | None = None  # what places the ranks, where the settings do not say

    def placed_by(self, settings: Settings) -> str:
        """What places the ranks of a run with these settings: see `Settings.allocation`."""
        return self.allocation or settings.allocation

    def load(self) -> type:
        """The adapter class; imports torch."""
        module, _, name = self.location.partition(":")
        return getattr(importlib.import_module(module), name)

    @property
    def takes_targets(self) -> bool:
        return issubclass(self.settings, LowRankSettings)

    @property
    def takes_ranks(self) -> bool:
        """Whether each site has the rank that the settings give it, from start to end."""
        return issubclass(self.settings, LoRASettings) and self.allocation is None


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("full", "rankwise.variants.subset:FullFineTuning", NoSettings, "every parameter is trained", "-"),
        Method("head", "rankwise.variants.subset:HeadOnly", NoSettings, "only the task head is trained", "-"),
        Method("bitfit", "rankwise.variants.subset:BitFit", NoSettings, "only the biases are trained", "Zaken et al. 2022"),
        Method("lora", "rankwise.variants.lora:LoRA", LoRASettings, "low-rank update B A of each weight", "Hu et al. 2021"),
        Method("lora-fa", "rankwise.variants.lora_fa:LoRAFA", LoRASettings, "LoRA whose A is frozen", "Zhang et al. 2023"),
        Method(
            "adalora",
            "rankwise.variants.adalora:AdaLoRA",
            AdaLoRASettings,
            "low-rank update P diag(E) Q whose rank is pruned by importance",
            "Zhang et al. 2023",
        ),
        Method(
            "dora", "rankwise.variants.dora:DoRA", LoRASettings, "LoRA on the direction, magnitudes apart", "Liu et al. 2024"
        ),
        Method(
            "allocated",
            "rankwise.variants.adalora:Allocated",
            FreelyAllocatedSettings,
            "any score x schedule x direction x cost, by name",
            "variants/allocation",
        ),
        Method(
            "dynamic-dora",
            "rankwise.variants.dynamic_dora:DynamicDoRA",
            DynamicDoRASettings,
            "rank-one components pruned by their share of the update; not the weight-decomposed DoRA",
            "Mao et al. 2024",
        ),
        Method(
            "adalora+dora",
            "rankwise.variants.dora:AdaLoRADoRA",
            AdaLoRASettings,
            "AdaLoRA on the direction, magnitudes apart",
            "Zhang et al. 2023 with Liu et al. 2024",
        ),
        Method(
            "eva",
            "rankwise.variants.eva:EVA",
            EVASettings,
            "rank and A from the sites' inputs, then LoRA",
            "Paischer et al. 2025",
        ),
        Method(
            "gora",
            "rankwise.variants.gora:GoRA",
            GoRASettings,
            "rank and B from the first gradients, then LoRA",
            "arXiv 2502.12171",
        ),
        Method(
            "stable-rank",
            "rankwise.variants.stable_rank:StableRank",
            PlacedSettings,
            "rank by the stable rank of the weights, then LoRA",
            "after SR-LoRA, arXiv 2507.00327",
        ),
        Method(
            "random-rank",
            "rankwise.variants.random_rank:RandomRank",
            PlacedSettings,
            "rank placed at random, then LoRA",
            "control",
            allocation="random",
        ),
        Method(
            "increlora",
            "rankwise.variants.increlora:IncreLoRA",
            IncreLoRASettings,
            "triplets that are added where the update matters, learning in reserve before",
            "Zhang et al. 2023 (IncreLoRA)",
        ),
        Method(
            "elalora",
            "rankwise.variants.elalora:ElaLoRA",
            ElaLoRASettings,
            "triplets that are cut at some sites and added at others, orthogonal to what is there",
            "Chang et al. 2025",
        ),
        Method(
            "sora",
            "rankwise.variants.sora:SoRA",
            SoRASettings,
            "LoRA with a gate for each rank, which a threshold sends to zero",
            "Ding et al. 2023",
        ),
        Method(
            "dylora",
            "rankwise.variants.dylora:DyLoRA",
            DyLoRASettings,
            "LoRA that is trained to be used at any rank up to its own",
            "Valipour et al. 2023",
        ),
        Method(
            "truncated",
            "rankwise.variants.truncated:Truncated",
            TruncatedSettings,
            "LoRA whose update is cut after training by one threshold over all singular values",
            "inspired by PARA (arXiv 2604.27796)",
        ),
    )
}


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: no method has that name; the message offers the nearest.
    """
    if name not in METHODS:
        raise ValueError(f"method {quoted(name)} is unknown{nearest(name, METHODS)}; there are: {', '.join(METHODS)}")
    return METHODS[name]


def check(name: str, values: dict[str, Any]) -> Settings:
    """`values` as the settings of method `name`.

    Raises:
        ValueError: an unknown name, a wrong type or a value out of range; one line for each fault.
    """
    kind = method(name).settings
    try:
        return kind(**values)
    except ValidationError as error:
        raise ValueError("\n".join(explain(error, kind, where=name))) from None


def together(members: Sequence[Settings]) -> Settings:
    """Settings of one method, one for each member of a pack, as the pack's: lists where they differ (see `for_member`).

    They differ in what `PER_MEMBER` and `PATTERNS` name; a pattern that a member has not means its rank, or its alpha.
    """
    first, change = members[0], {}
    if all(one == first for one in members):
        return first
    for name in PER_MEMBER:
        values = [one.get(name) for one in members]
        if any(value != values[0] for value in values):
            change[name] = values
    for name, otherwise in zip(PATTERNS, ("rank", "alpha"), strict=True):
        patterns = dict.fromkeys(pattern for one in members for pattern in getattr(one, name))
        rows = {pattern: [getattr(one, name).get(pattern, one.get(otherwise)) for one in members] for pattern in patterns}
        change[name] = {p: row[0] if all(value == row[0] for value in row) else row for p, row in rows.items()}
    return first.model_copy(update=change)


def explain(error: ValidationError, kind: type[BaseModel], where: str = "") -> list[str]:
    """Each fault of a pydantic error as one line: place, value, rule and, for an unknown name, the nearest."""
    lines = {}
    counts = Counter(tuple(p for p in fault["loc"] if not _is_type_tag(p)) for fault in error.errors())
    for fault in error.errors():
        path = [p for p in fault["loc"] if not _is_type_tag(p)]
        place = ".".join(str(p) for p in ([where] if where else []) + path)
        if fault["type"] == "extra_forbidden":
            known = _fields_at(kind, path[:-1])
            lines[place] = f"{place}: unknown setting{nearest(str(path[-1]), known)}; there are: {', '.join(known)}"
        elif fault["type"] == "list_type" and counts[tuple(path)] > 1 and not isinstance(fault["input"], list | str | dict):
            continue  # the other branch of "one value, or one for each member" says what is wrong
        elif fault["type"] == "missing":
            lines[place] = f"{place}: missing; give a value"
        elif fault["type"] == "value_error":
            lines[place + fault["msg"]] = f"{place}: {fault['msg'].removeprefix('Value error, ')}"
        else:
            message = _rule(fault)
            line = f"{place} = {shown(fault['input'])}: {message[0].lower()}{message[1:]}"
            lines[place] = lines[place] + ", or " + message[0].lower() + message[1:] if place in lines else line
    return list(lines.values())


def _rule(fault: Any) -> str:
    """What pydantic says of a value, without Python's words for the types of a file."""
    if fault["type"] in ("model_type", "dict_type"):
        return "should be a table"
    if fault["type"] == "too_short":
        return f"should have at least {fault['ctx']['min_length']} of them"
    if fault["type"] == "too_long":
        return f"should have at most {fault['ctx']['max_length']} of them"
    return fault["msg"].replace("Input should be", "should be")


def nearest(word: str, known: Any) -> str:
    """'; did you mean "x"?' where some known word is near, else nothing."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def quoted(text: Any) -> str:
    """A text in a message: in double quotes, on one line, and not long."""
    inner = str(text).encode("unicode_escape").decode("ascii") if not str(text).isprintable() else str(text)
    return f'"{inner}"' if len(inner) <= 60 else f'"{inner[:57]}..."'


def per_member(value: Any, members: int, name: str) -> list[Any]:
    """`value` for each member: a list is taken as it is, anything else is repeated.

    Raises:
        ValueError: a list of another length than `members`.
    """
    values = _spread(value, members)
    if len(values) != members:
        raise ValueError(f"{name} = {value} has {len(values)} values for {members} members: give one for each, or one number")
    return values


def _spread(value: Any, length: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * length


def _is_type_tag(part: Any) -> bool:
    """Whether a part of a pydantic location names a branch of a union, not a field."""
    return isinstance(part, str) and (
        "[" in part or part in {"int", "float", "str", "bool", "constrained-int", "constrained-float"}
    )


def _fields_at(kind: type[BaseModel], path: list[Any]) -> list[str]:
    for part in path:
        if isinstance(part, int) or part not in kind.model_fields:
            continue
        annotation = kind.model_fields[part].annotation
        models = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type)]
        kind = next((m for m in models if issubclass(m, BaseModel)), kind)
    return list(kind.model_fields)


def shown(value: Any) -> str:
    """A value in a message: on one line, and not long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
