"""Settings of LoRA and DoRA, and what every low-rank method has."""

import re
from collections.abc import Mapping
from math import ceil
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator
from rankwise.variants.settings.base import Count, Fraction, PerMember, Positive, Settings, setting


class LowRankSettings(Settings):
    """What every low-rank method has."""

    takes_targets: ClassVar[bool] = True

    alpha: list[Positive] | Positive = setting(16.0, role="alpha")
    """Numerator of the scale on the update; one number, or one for each member."""
    # 16: AdaLoRA sec. 4 and LoRA's scripts use 16 or 32 and never tune it.
    dropout: Fraction = 0.0
    """Probability with which an element of the low-rank branch's input is dropped in training."""
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """How alpha becomes a scale; alpha/sqrt(r) is rsLoRA's (Kalajdzievski 2023)."""
    rank_pattern: dict[str, list[Count] | Count] = setting({}, role="rank pattern")
    """Other (initial) ranks for some sites: name, suffix or pattern of a module -> rank, or one for each member."""
    alpha_pattern: dict[str, list[Positive] | Positive] = setting({}, role="alpha pattern")
    """Other alphas for some sites: name, suffix or pattern of a module -> alpha, or one for each member."""
    lr_ratio: Positive = 1.0
    """Learning rate of B over that of A; above 1 it is LoRA+ (Hayou et al. 2024)."""
    magnitude: bool = setting(False, added_later=True)
    """DoRA's trained magnitude around each site (Liu et al. 2024); "dora" and "adalora+dora" always have it."""

    @property
    def allocation(self) -> str:
        return "learned"

    @classmethod
    def _starting(
        cls, settings: Mapping[str, Any], starts: Mapping[str, int], first: int, scale: float, at: int | None = None
    ) -> dict[str, Any]:
        """The settings with ranks and alphas by pattern, where sites differ.

        Args:
            starts: site -> the rank that it starts with; `first`: the one that needs no pattern.
            scale: alpha/r of every site; `at`: the r at which `alpha` gives it, if that is not the least rank at the start.
        """
        scaled = dict(settings)
        if others := {pattern_for(name): rank for name, rank in starts.items() if rank != first}:
            scaled["rank_pattern"] = others
        power = 1.0 if scaled.get("scaling", cls.model_fields["scaling"].default) == "alpha/r" else 0.5
        least, most = min(starts.values()), max(starts.values())
        at = least if at is None else at
        scaled["alpha"] = scale * at**power
        if most > least:
            scaled["alpha_pattern"] = {pattern_for(n): scale * rank**power for n, rank in starts.items() if rank != at}
        return scaled

    @classmethod
    def _pruned(
        cls, given: Mapping[str, Any], ranks: Mapping[str, int], parameters: int, scale: float, keeps: bool = False
    ) -> dict[str, Any]:
        """The settings of a method that starts at 1.5 times its ranks (AdaLoRA sec. 4.1: b(0) = 1.5 b(T)) and ends with these.

        Which sites keep them, and so how many parameters, is its own choice, unless its cost is one of parameters.
        keeps: it starts with the ranks that it ends with.
        """
        total = sum(ranks.values())
        mean = total / len(ranks)
        starts = ranks if keeps else dict.fromkeys(ranks, ceil(1.5 * mean))
        first = min(starts.values())
        settings = {**given, "initial_rank": first, "target_rank": min(round(mean), first)}
        if given.get("cost") == "parameters":
            settings["target_parameters"] = parameters
        elif total != settings["target_rank"] * len(ranks):
            settings["target_total"] = total
        return cls._starting(settings, starts, first, scale)


class RankedSettings(LowRankSettings):
    """Settings of a method whose sites keep the rank that they are given."""

    rank: PerMember = setting(role="rank")
    """Rank of each site; one number, or one for each member."""

    @property
    def allocation(self) -> str:
        ranks = [self.rank, *self.rank_pattern.values()]
        flat = [rank for value in ranks for rank in (value if isinstance(value, list) else [value])]
        return "uniform" if max(flat) - min(flat) <= 1 else "given"  # one more here and there meets a budget

    @classmethod
    def for_budget(cls, given: Mapping[str, Any], ranks: Mapping[str, int], parameters: int, scale: float) -> dict[str, Any]:
        first = min(ranks.values())
        return cls._starting({**given, "rank": first}, ranks, first, scale)


class LoRASettings(RankedSettings):
    """Settings of LoRA."""

    initialization: Literal["kaiming", "gaussian"] = "kaiming"
    """Where A starts; B starts at zero."""


class LoRAPlusSettings(LoRASettings):
    """Settings of LoRA+."""

    lr_ratio: Positive = 16.0
    """Learning rate of B over that of A."""
    # 16: the ratio that Hayou et al. 2024 recommend.


class TrainedAlphaSettings(LoRASettings):
    """Settings of LoRA with a trained alpha."""

    alpha_lr_ratio: Positive = 0.1
    """Learning rate of the scale alpha/r over that of A."""


class AlwaysMagnitude(LowRankSettings):
    """What DoRA has, whatever it is around: magnitudes that cannot be left out."""

    magnitude: bool = True
    """Always true: without it the method is another one."""

    @model_validator(mode="after")
    def _has_magnitude(self) -> Self:
        if not self.magnitude:
            raise ValueError(
                "magnitude = False: this method always has magnitudes, so take it out, or name the method without them "
                '("lora", "adalora")'
            )
        return self


class DoRASettings(AlwaysMagnitude, LoRASettings):
    """Settings of DoRA."""


def pattern_for(name: str) -> str:
    """The pattern that matches the module of this name alone."""
    return f"^{re.escape(name)}$"
