"""Settings of prompt tuning and prefix tuning."""

from typing import Literal

from rankwise.variants.settings.base import Positive, PositiveInt, Settings


class VirtualTokenSettings(Settings):
    """What both share."""

    tokens: PositiveInt = 20
    """Virtual tokens before the text, as many of every member."""


class PromptTuningSettings(VirtualTokenSettings):
    """Settings of prompt tuning."""

    initialization: Literal["vocabulary", "normal"] = "vocabulary"
    """Where the prompt starts: at embeddings of tokens drawn from the vocabulary, or at N(0, 1), PEFT's "RANDOM"."""


class PrefixTuningSettings(VirtualTokenSettings):
    """Settings of prefix tuning."""

    spread: Positive = 0.02
    """Standard deviation of keys and values at the start."""
