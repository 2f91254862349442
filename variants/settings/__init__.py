"""The settings of each method, and the list of methods: the one place to look a setting up.

    base       what all settings share, and what a field says of itself (`setting`)
    lowrank    LoRA, DoRA        allocated   ranks that move while training       placed   ranks placed before it
    registry   the methods by name               messages    what is said of a wrong value
    a method whose settings no other has: a file of its name

Nothing here imports torch, so that a study file is checked, and a wrong one refused, within a second.  The mathematics of a
method stands in its own file, which `Method.location` names.
"""

from rankwise.variants.settings.allocated import (
    AdaLoRADoRASettings,
    AdaLoRASettings,
    AllocatedSettings,
    DynamicDoRASettings,
    ElaLoRASettings,
    FlexLoRASettings,
    FreelyAllocatedSettings,
    IncreLoRASettings,
)
from rankwise.variants.settings.base import (
    BY_PATTERN,
    FROM_BUDGET,
    PER_MEMBER,
    Count,
    Fraction,
    NonNegative,
    NoSettings,
    PerMember,
    Positive,
    PositiveInt,
    Settings,
    per_member,
    setting,
    together,
)
from rankwise.variants.settings.bayeslora import BayesLoRASettings
from rankwise.variants.settings.bottleneck import BottleneckSettings, HoulsbySettings, PfeifferSettings
from rankwise.variants.settings.dylora import DyLoRASettings
from rankwise.variants.settings.geolora import GeoLoRASettings
from rankwise.variants.settings.ia3 import IA3Settings
from rankwise.variants.settings.l1ra import L1RASettings
from rankwise.variants.settings.lowrank import (
    DoRASettings,
    LoRAPlusSettings,
    LoRASettings,
    LowRankSettings,
    RankedSettings,
    TrainedAlphaSettings,
)
from rankwise.variants.settings.messages import explain, nearest, printable, quoted, shown
from rankwise.variants.settings.partial import GradualSettings, PartialSettings
from rankwise.variants.settings.placed import (
    EVASettings,
    FIMLoRASettings,
    GoRASettings,
    HeavyTailSettings,
    PlacedSettings,
    SpectralRankSettings,
)
from rankwise.variants.settings.registry import METHODS, Method, Placement, check, method
from rankwise.variants.settings.sora import SoRASettings
from rankwise.variants.settings.truncated import NORMALISATIONS, TruncatedSettings
from rankwise.variants.settings.vera import VeRASettings
from rankwise.variants.settings.virtual_tokens import PrefixTuningSettings, PromptTuningSettings
from rankwise.variants.settings.weightlora import WeightLoRASettings

__all__ = [
    "BY_PATTERN",
    "FROM_BUDGET",
    "METHODS",
    "NORMALISATIONS",
    "PER_MEMBER",
    "AdaLoRADoRASettings",
    "AdaLoRASettings",
    "AllocatedSettings",
    "BayesLoRASettings",
    "BottleneckSettings",
    "Count",
    "DoRASettings",
    "DyLoRASettings",
    "DynamicDoRASettings",
    "EVASettings",
    "ElaLoRASettings",
    "FIMLoRASettings",
    "FlexLoRASettings",
    "Fraction",
    "FreelyAllocatedSettings",
    "GeoLoRASettings",
    "GoRASettings",
    "GradualSettings",
    "HeavyTailSettings",
    "HoulsbySettings",
    "IA3Settings",
    "IncreLoRASettings",
    "L1RASettings",
    "LoRAPlusSettings",
    "LoRASettings",
    "LowRankSettings",
    "Method",
    "NoSettings",
    "NonNegative",
    "PartialSettings",
    "PerMember",
    "PfeifferSettings",
    "PlacedSettings",
    "Placement",
    "Positive",
    "PositiveInt",
    "PrefixTuningSettings",
    "PromptTuningSettings",
    "RankedSettings",
    "Settings",
    "SoRASettings",
    "SpectralRankSettings",
    "TrainedAlphaSettings",
    "TruncatedSettings",
    "VeRASettings",
    "WeightLoRASettings",
    "check",
    "explain",
    "method",
    "nearest",
    "per_member",
    "printable",
    "quoted",
    "setting",
    "shown",
    "together",
]
