"""The methods by name: where each is, its settings, and its source."""

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError
from rankwise.variants.settings.allocated import (
    AdaLoRADoRASettings,
    AdaLoRASettings,
    DynamicDoRASettings,
    ElaLoRASettings,
    FlexLoRASettings,
    FreelyAllocatedSettings,
    IncreLoRASettings,
)
from rankwise.variants.settings.base import NoSettings, Settings
from rankwise.variants.settings.bayeslora import BayesLoRASettings
from rankwise.variants.settings.bottleneck import HoulsbySettings, PfeifferSettings
from rankwise.variants.settings.dylora import DyLoRASettings
from rankwise.variants.settings.geolora import GeoLoRASettings
from rankwise.variants.settings.ia3 import IA3Settings
from rankwise.variants.settings.l1ra import L1RASettings
from rankwise.variants.settings.lowrank import (
    DoRASettings,
    LoRAPlusSettings,
    LoRASettings,
    RankedSettings,
    TrainedAlphaSettings,
)
from rankwise.variants.settings.messages import explain, nearest, quoted
from rankwise.variants.settings.partial import GradualSettings, PartialSettings
from rankwise.variants.settings.placed import (
    EVASettings,
    FIMLoRASettings,
    GoRASettings,
    HeavyTailSettings,
    PlacedSettings,
    SpectralRankSettings,
)
from rankwise.variants.settings.sora import SoRASettings
from rankwise.variants.settings.truncated import TruncatedSettings
from rankwise.variants.settings.vera import VeRASettings
from rankwise.variants.settings.virtual_tokens import PrefixTuningSettings, PromptTuningSettings
from rankwise.variants.settings.weightlora import WeightLoRASettings


@dataclass(frozen=True)
class Placement:
    """How a method places rank, in four words, with the settings that it has by default; variants/allocation/placing.md.

    Which ranks move, and when, is said by its direction and its schedule; these say what is counted, and by what.
    """

    unit: Literal["triplet", "matrix", "site"] = "triplet"
    """What is ranked: rank-one terms of all sites; weight matrices, each given some rank; adapters, whole."""
    total: Literal["fixed", "tolerance", "threshold", "prior"] = "fixed"
    """What sets the total rank: a budget; an error that is let pass; a bound on the score; a prior's posterior."""
    basis: Literal["keep", "truncate", "augment-truncate"] = "keep"
    """What becomes of the directions that stay: as they were; rotated to singular vectors; widened by the gradient before."""
    data: Literal["train", "calibration", "held-out", "none"] = "train"
    """Which examples decide: those trained on, while it trains; some of them before it; others; none."""


@dataclass(frozen=True)
class Method:
    """A named method: where it is, its settings, and its source."""

    name: str
    location: str
    settings: type[Settings]
    summary: str
    source: str
    allocation: str | None = None  # what places the ranks, where the settings do not say
    trains_base: bool = False  # the model's own weights are what is trained, as its class says too
    placement: Placement | None = None  # None: every site keeps the rank that the settings give it, or has none

    def placed_by(self, settings: Settings) -> str:
        """What places the ranks of a run with these settings: see `Settings.allocation`."""
        return self.allocation or settings.allocation

    def load(self) -> type:
        """The adapter class; imports torch."""
        module, _, name = self.location.partition(":")
        return getattr(importlib.import_module(module), name)

    @property
    def takes_targets(self) -> bool:
        return self.settings.takes_targets

    @property
    def takes_ranks(self) -> bool:
        """Whether each site has the rank that the settings give it, from start to end."""
        return issubclass(self.settings, RankedSettings) and self.allocation is None


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "full",
            "rankwise.variants.subset:FullFineTuning",
            NoSettings,
            "every parameter is trained",
            "-",
            trains_base=True,
        ),
        Method("head", "rankwise.variants.subset:HeadOnly", NoSettings, "only the task head is trained", "-"),
        Method("bitfit", "rankwise.variants.subset:BitFit", NoSettings, "only the biases are trained", "Zaken et al. 2022"),
        Method("lora", "rankwise.variants.lora:LoRA", LoRASettings, "low-rank update B A of each weight", "Hu et al. 2021"),
        Method(
            "lora+",
            "rankwise.variants.lora_plus:LoRAPlus",
            LoRAPlusSettings,
            "LoRA whose B learns 16 times as fast as A",
            "Hayou et al. 2024",
        ),
        Method(
            "trained-alpha",
            "rankwise.variants.trained_alpha:TrainedAlpha",
            TrainedAlphaSettings,
            "LoRA whose alpha is trained, one scalar a site",
            "-",
        ),
        Method(
            "pissa",
            "rankwise.variants.pissa:PiSSA",
            RankedSettings,
            "LoRA that starts at the weight's principal part",
            "Meng et al. 2024",
        ),
        Method(
            "olora",
            "rankwise.variants.olora:OLoRA",
            RankedSettings,
            "LoRA that starts at the first columns of the weight's QR decomposition",
            "Buyukakyuz 2024",
        ),
        Method(
            "loftq",
            "rankwise.variants.loftq:LoftQ",
            LoRASettings,
            "LoRA over a quantised base that starts at the error of quantisation",
            "Li et al. 2023",
        ),
        Method(
            "orthogonal",
            "rankwise.variants.orthogonal:Orthogonal",
            RankedSettings,
            "LoRA whose A and B both start at random, in orthogonal subspaces",
            "after PEFT",
        ),
        Method(
            "vera",
            "rankwise.variants.vera:VeRA",
            VeRASettings,
            "two trained vectors at each weight, around random matrices that all share",
            "Kopiczko et al. 2024",
        ),
        Method("lora-fa", "rankwise.variants.lora_fa:LoRAFA", LoRASettings, "LoRA whose A is frozen", "Zhang et al. 2023"),
        Method(
            "adalora",
            "rankwise.variants.adalora:AdaLoRA",
            AdaLoRASettings,
            "low-rank update P diag(E) Q whose rank is pruned by importance",
            "Zhang et al. 2023",
            placement=Placement(),
        ),
        Method(
            "dora", "rankwise.variants.dora:DoRA", DoRASettings, "LoRA on the direction, magnitudes apart", "Liu et al. 2024"
        ),
        Method(
            "allocated",
            "rankwise.variants.adalora:Allocated",
            FreelyAllocatedSettings,
            "any score x schedule x direction x cost, by name",
            "variants/allocation",
            placement=Placement(),
        ),
        Method(
            "dynamic-dora",
            "rankwise.variants.dynamic_dora:DynamicDoRA",
            DynamicDoRASettings,
            "rank-one components pruned by their share of the update; not the weight-decomposed DoRA",
            "Mao et al. 2024",
            placement=Placement(),
        ),
        Method(
            "adalora+dora",
            "rankwise.variants.dora:AdaLoRADoRA",
            AdaLoRADoRASettings,
            "AdaLoRA on the direction, magnitudes apart",
            "Zhang et al. 2023 with Liu et al. 2024",
            placement=Placement(),
        ),
        Method(
            "eva",
            "rankwise.variants.eva:EVA",
            EVASettings,
            "rank and A from the sites' inputs, then LoRA",
            "Paischer et al. 2025",
            placement=Placement(data="calibration"),
        ),
        Method(
            "gora",
            "rankwise.variants.gora:GoRA",
            GoRASettings,
            "rank and B from the first gradients, then LoRA",
            "arXiv 2502.12171",
            placement=Placement(unit="matrix", data="calibration"),
        ),
        Method(
            "stable-rank",
            "rankwise.variants.stable_rank:StableRank",
            PlacedSettings,
            "rank by the stable rank of the weights, then LoRA",
            "after SR-LoRA, arXiv 2507.00327",
            placement=Placement(unit="matrix", data="none"),
        ),
        Method(
            "fim-lora",
            "rankwise.variants.fim_lora:FIMLoRA",
            FIMLoRASettings,
            "rank by the mean squared gradient of B at its start, then LoRA",
            "arXiv 2605.16800",
            placement=Placement(unit="matrix", data="calibration"),
        ),
        Method(
            "spectral-rank",
            "rankwise.variants.spectral_rank:SpectralRank",
            SpectralRankSettings,
            "rank by the singular values of the first gradient, then LoRA",
            "OpenReview gg2Wb2HPOI",
            placement=Placement(data="calibration"),
        ),
        Method(
            "heavy-tail",
            "rankwise.variants.heavy_tail:HeavyTail",
            HeavyTailSettings,
            "rank by the tail of each weight's singular values, then LoRA",
            "after AlphaLoRA, arXiv 2410.10054",
            placement=Placement(unit="matrix", data="none"),
        ),
        Method(
            "random-rank",
            "rankwise.variants.random_rank:RandomRank",
            PlacedSettings,
            "rank placed at random, then LoRA",
            "control",
            allocation="random",
            placement=Placement(data="none"),
        ),
        Method(
            "increlora",
            "rankwise.variants.increlora:IncreLoRA",
            IncreLoRASettings,
            "triplets that are added where the update matters, learning in reserve before",
            "Zhang et al. 2023 (IncreLoRA)",
            placement=Placement(unit="matrix"),
        ),
        Method(
            "elalora",
            "rankwise.variants.elalora:ElaLoRA",
            ElaLoRASettings,
            "triplets that are cut at some sites and added at others, orthogonal to what is there",
            "Chang et al. 2025",
            placement=Placement(),
        ),
        Method(
            "flexlora",
            "rankwise.variants.flexlora:FlexLoRA",
            FlexLoRASettings,
            "triplets that go from matrices of low to matrices of high spectral entropy",
            "Liu et al. 2026",
            placement=Placement(unit="matrix"),
        ),
        Method(
            "l1ra",
            "rankwise.variants.l1ra:L1RA",
            L1RASettings,
            "LoRA with a gate for each rank; ranks whose gates reach zero are handed to other sites",
            "arXiv 2509.04884",
            placement=Placement(),
        ),
        Method(
            "sora",
            "rankwise.variants.sora:SoRA",
            SoRASettings,
            "LoRA with a gate for each rank, which a threshold sends to zero",
            "Ding et al. 2023",
            placement=Placement(total="threshold"),
        ),
        Method(
            "geolora",
            "rankwise.variants.geolora:GeoLoRA",
            GeoLoRASettings,
            "a full core between orthonormal bases that the gradient widens and a tolerance cuts",
            "Schotthoefer et al. 2024",
            placement=Placement(total="tolerance", basis="augment-truncate"),
        ),
        Method(
            "bayeslora",
            "rankwise.variants.bayeslora:BayesLoRA",
            BayesLoRASettings,
            "LoRA with a variance for each rank; ranks go whose posterior is more noise than signal",
            "mercury0100/bayeslora",
            placement=Placement(total="prior"),
        ),
        Method(
            "weightlora",
            "rankwise.variants.weightlora:WeightLoRA",
            WeightLoRASettings,
            "LoRA with a weight for each site, of which a few stay; with growth WeightLoRA+, their rank doubles",
            "Veprikov et al. 2025",
            placement=Placement(unit="site"),
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
            placement=Placement(basis="truncate"),
        ),
        Method(
            "ia3",
            "rankwise.variants.ia3:IA3",
            IA3Settings,
            "vectors that scale keys, values and the feed-forward layers' inner activations",
            "Liu et al. 2022",
        ),
        Method(
            "partial",
            "rankwise.variants.partial:Partial",
            PartialSettings,
            "the parameters that patterns name; without any the last two layers",
            "Li and Liang 2021",
            trains_base=True,
        ),
        Method(
            "gradual",
            "rankwise.variants.partial:Gradual",
            GradualSettings,
            "every parameter, unfrozen layer after layer from the top down",
            "Howard and Ruder 2018",
            trains_base=True,
        ),
        Method(
            "houlsby",
            "rankwise.variants.bottleneck:Houlsby",
            HoulsbySettings,
            "bottleneck layers behind attention and feed-forward layer",
            "Houlsby et al. 2019",
        ),
        Method(
            "pfeiffer",
            "rankwise.variants.bottleneck:Pfeiffer",
            PfeifferSettings,
            "one bottleneck layer behind each feed-forward layer",
            "Pfeiffer et al. 2021",
        ),
        Method(
            "prompt-tuning",
            "rankwise.variants.virtual_tokens:PromptTuning",
            PromptTuningSettings,
            "embeddings of virtual tokens before the text",
            "Lester et al. 2021",
        ),
        Method(
            "prefix-tuning",
            "rankwise.variants.virtual_tokens:PrefixTuning",
            PrefixTuningSettings,
            "keys and values of virtual tokens in every layer",
            "Li and Liang 2021; Liu et al. 2022",
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
