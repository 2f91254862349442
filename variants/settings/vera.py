"""Settings of VeRA."""

from collections.abc import Mapping
from typing import Any, ClassVar

from rankwise.variants.settings.base import Count, Fraction, PerMember, Positive, Settings, setting


class VeRASettings(Settings):
    """Settings of VeRA."""

    takes_targets: ClassVar[bool] = True

    rank: PerMember = setting(role="rank")
    """Rows of the shared A; one number, or one for each member.  A rank is one trained number at each site."""
    # The paper trains 1024 in RoBERTa-base, 256 in RoBERTa-large.
    dropout: Fraction = 0.0
    """Probability with which an element of the low-rank branch's input is dropped in training."""
    d_initial: Positive = 0.1
    """Where d starts; b starts at zero."""
    projection_seed: Count | None = None
    """Seed of A and B, PEFT's projection_prng_key; the member's own where none is given."""
    save_projection: bool = True
    """Whether a file holds A and B too; without them a reader draws them again, which needs the same torch."""

    @property
    def allocation(self) -> str:
        return "uniform"

    @classmethod
    def for_budget(cls, given: Mapping[str, Any], ranks: Mapping[str, int], parameters: int, scale: float) -> dict[str, Any]:
        return {**given, "rank": min(ranks.values())}  # one A for all sites
