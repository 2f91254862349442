"""Settings of bottleneck adapters."""

from typing import Literal

from rankwise.variants.settings.base import PerMember, Settings, setting


class BottleneckSettings(Settings):
    """What Houlsby's and Pfeiffer's adapters share."""

    bottleneck: PerMember = setting(role="member")
    """Inner width of each adapter; one number, or one for each member."""
    nonlinearity: Literal["gelu", "relu", "swish"] = "gelu"
    """Between the two projections."""
    after: list[str] | None = None
    """Modules whose output passes through an adapter, by name, end of a name or pattern; None: those of the architecture."""


class HoulsbySettings(BottleneckSettings):
    """Settings of Houlsby's adapters."""


class PfeifferSettings(BottleneckSettings):
    """Settings of Pfeiffer's adapters."""

    nonlinearity: Literal["gelu", "relu", "swish"] = "relu"
    """Between the two projections."""
