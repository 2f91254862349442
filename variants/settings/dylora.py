"""Settings of DyLoRA."""

from typing import Literal, Self

from pydantic import model_validator
from rankwise.variants.settings.base import PositiveInt, spread
from rankwise.variants.settings.lowrank import LoRASettings


class DyLoRASettings(LoRASettings):
    """Settings of DyLoRA; `rank` is the most that it can be used at."""

    least_rank: PositiveInt = 1
    """Least rank that is drawn, and that the trained adapter is meant for."""
    sampling: Literal["uniform", "geometric"] = "uniform"
    """How the rank of a step is drawn; geometric: small ranks more often, with p = 0.15."""
    update: Literal["nested", "frozen", "frozen-release"] = "nested"
    """Which slots a step at rank b moves: all of 1 .. b; b alone; b alone by its gradient, and others by AdamW's momentum."""

    @model_validator(mode="after")
    def _ranks_are_left(self) -> Self:
        for rank in [rank for value in (self.rank, *self.rank_pattern.values()) for rank in spread(value, 1)]:
            if rank < self.least_rank:
                raise ValueError(f"least_rank = {self.least_rank} is above rank = {rank}: lower it or raise the rank")
        return self
