"""Bottleneck adapters: small layers of their own between the frozen ones.

    A(z) = U f(D z + c) + u         z (d), D (b, d), c (b), U (d, b), u (d)         2 d b + b + d parameters each

houlsby     h + A(h) in the place of h, the output of the attention and that of the feed-forward layer, each after its dropout
            and before the residual is added.  Houlsby et al. 2019, sec. 2.1 and fig. 2; f = GELU, as their release has it.
pfeiffer    one a layer, after the feed-forward layer.  Pfeiffer et al. 2021 (AdapterFusion), appendix, as their library
            `adapters` has it (original_ln_before, residual_before_ln); f = ReLU.  With x the residual:

                LN(h + x + A(LN(h + x)))        where a norm follows the sum (BERT and its relatives)
                x + h + A(h)                    where the norm comes before (GPT-2, LLaMA)

U, c and u start at zero and D at N(0, 0.01^2), cut at two standard deviations, so the model is unchanged at the start; the
papers start U near zero, not at it.  Departure: the norms stay frozen, as in the counts of LoRA's and AdaLoRA's tables;
Houlsby et al. train them too.

It cannot be merged: A is no linear map of what a weight of the model reads, so no weight can hold it.  Members share one pass
by batched products; a member of a smaller bottleneck has its last slots empty.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from rankwise.variants.adapter.draws import Draw
from rankwise.variants.adapter.initialization import generator
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.kinds.interface import trained_dtype
from rankwise.variants.adapter.linears import dtype_of, find_kind, size_of
from rankwise.variants.adapter.site import Site
from rankwise.variants.adapter.surgery import bring, device_of
from rankwise.variants.adapter.targets import matches
from rankwise.variants.settings import nearest, per_member
from torch import Tensor, nn
from torch.nn import functional as F

NONLINEARITIES = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu}
SPREAD = 0.01  # Houlsby et al. 2019, sec. 3.6: standard deviation of D at the start

# model_type of a transformers configuration -> the outputs of attention and of feed-forward layer, after their dropout.
_BERT = ("attention.output.dropout", r"layer\.\d+\.output\.dropout")
_DECODER = ("self_attn.o_proj", "mlp.down_proj")
OUTPUTS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2"), _BERT),
    "albert": ("attention.output_dropout", "ffn_output"),
    "distilbert": ("attention.out_lin", "ffn.dropout"),
    "gpt2": ("attn.resid_dropout", "mlp.dropout"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"), _DECODER),
}
# And the norms of the sum that follows the feed-forward layer, where there is one.
NORMS: dict[str, str] = {
    **{kind: r"layer\.\d+\.output\.LayerNorm" for kind, outputs in OUTPUTS.items() if outputs == _BERT},
    "albert": "full_layer_layer_norm",
    "distilbert": "output_layer_norm",
}


class Bottleneck(Site):
    """K adapters behind one module: y = h + A(h) with h = base(x).

    down (K, b, d), down_bias (K, b), up (K, d, b), up_bias (K, d); slots (K, b): which of the b are the member's.
    """

    def __init__(self, name: str, width: int, dtype: torch.dtype, sizes: list[int], nonlinearity: str, draw: Draw):
        """
        Args:
            width: d, of the module's output.
            dtype: of what is trained.
            sizes: b of each member.
        """
        super().__init__()
        members, most = len(sizes), max(sizes)
        down = torch.zeros(members, most, width, dtype=dtype)
        for k, (seed, size) in enumerate(zip(draw.seeds, sizes, strict=True)):
            start = torch.empty(size, width)
            nn.init.trunc_normal_(start, 0.0, SPREAD, -2 * SPREAD, 2 * SPREAD, generator=generator(seed, name, "down"))
            down[k, :size] = start
        self.down, self.down_bias = nn.Parameter(down), nn.Parameter(torch.zeros(members, most, dtype=dtype))
        self.up = nn.Parameter(torch.zeros(members, width, most, dtype=dtype))
        self.up_bias = nn.Parameter(torch.zeros(members, width, dtype=dtype))
        self.register_buffer("slots", (torch.arange(most) < torch.tensor(sizes)[:, None]).to(dtype))
        self.name, self.sizes, self.nonlinearity, self._draw = name, sizes, NONLINEARITIES[nonlinearity], draw

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        h = base(x)
        return h + self.added(h)

    def added(self, z: Tensor) -> Tensor:
        """A(z) of each member's rows of z (K*N, ..., d)."""
        self._draw.rows.check(self.name, z)
        device = z.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.down.dtype
        down, c, up, u, slots = (t.to(dtype) for t in (self.down, self.down_bias, self.up, self.up_bias, self.slots))
        rows = self._draw.rows.by_member(z).to(dtype)  # (K, N, d)
        inner = self.nonlinearity(torch.baddbmm(c[:, None], rows, down.mT)) * slots[:, None]  # (K, N, b)
        return self._draw.rows.as_input(torch.baddbmm(u[:, None], inner, up.mT), z).to(z.dtype)

    def tensors_of(self, member: int) -> dict[str, Tensor]:
        size = self.sizes[member]
        whole = super().tensors_of(member)
        return whole | {"down": whole["down"][:size], "down_bias": whole["down_bias"][:size], "up": whole["up"][:, :size]}

    def count(self, ranks: Tensor) -> Tensor:
        width = self.up_bias.shape[1]
        each = [2 * width * size + size + width for size in self.sizes]
        return torch.tensor(each, dtype=ranks.dtype, device=ranks.device)

    @torch.no_grad()
    def clear_missing_slots(self) -> None:
        self.down *= self.slots[:, :, None]
        self.down_bias *= self.slots
        self.up *= self.slots[:, None]


class BottleneckInNorm(Bottleneck):
    """The same before a norm that normalises a sum s: y = LN(s + A(LN(s)))."""

    def forward(self, base: nn.Module, s: Tensor) -> Tensor:
        return base(s + self.added(base(s)))


class BottleneckAdapter(Adapter):
    """What Houlsby's and Pfeiffer's adapters share."""

    mergeable = False
    in_norm: ClassVar[bool] = False  # at a layer norm the adapter stands before it, as Pfeiffer's does

    def places(self, kind: str) -> list[str]:
        """Patterns of the modules for that model_type."""
        raise NotImplementedError

    def choose(self, model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
        """Names of the modules behind which an adapter stands, in the model's order; `targets` says nothing of them.

        Raises:
            ValueError: an architecture without an entry in OUTPUTS, or a pattern that means no module.
        """
        patterns = self.settings.after
        if patterns is None:
            kind = getattr(getattr(model, "config", None), "model_type", None)
            if kind not in OUTPUTS:
                raise ValueError(
                    f"{self.method}: where it stands in a model of type {kind!r} is not known; name the modules behind which "
                    f"an adapter stands: after = [...]"
                )
            patterns = self.places(kind)
        names = [name for name, _ in model.named_modules() if name]
        chosen: set[str] = set()
        for pattern in patterns:
            meant = {name for name in names if matches(pattern, name)}
            if not meant:
                raise ValueError(f'after: "{pattern}" means no module of {type(model).__name__}{nearest(pattern, names)}')
            if inside := [name for name in meant for part in head if name == part or name.startswith(f"{part}.")]:
                raise ValueError(f'after: "{inside[0]}" belongs to the task head, which is trained whole: leave it out')
            chosen |= meant
        self._like = {name: _like(model, name) for name in chosen}
        return [name for name in names if name in chosen]

    def make_site(self, name: str, module: nn.Module) -> Site:
        width, dtype, device = self._like[name]
        sizes = per_member(self.settings.bottleneck, self.members, "bottleneck")
        kind = BottleneckInNorm if self.in_norm and "norm" in type(module).__name__.lower() else Bottleneck
        site = kind(name, width, trained_dtype(dtype), sizes, self.settings.nonlinearity, self.draw)
        bring(site, device)
        return site


class Houlsby(BottleneckAdapter):
    """K members of Houlsby's adapters."""

    method = "houlsby"

    def places(self, kind: str) -> list[str]:
        return list(OUTPUTS[kind])


class Pfeiffer(BottleneckAdapter):
    """K members of Pfeiffer's adapters."""

    method = "pfeiffer"
    in_norm = True

    def places(self, kind: str) -> list[str]:
        return [NORMS.get(kind, OUTPUTS[kind][1])]


def _like(model: nn.Module, name: str) -> tuple[int, torch.dtype, torch.device]:
    """Width, type and device of a module's output: its own, or those of what stands beside a module without parameters.

    Raises:
        ValueError: the width is not known.
    """
    module = model.get_submodule(name)
    if find_kind(module) is not None:
        return size_of(module)[0], dtype_of(module), device_of(module)
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return weight.shape[-1], weight.dtype, weight.device
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(f'after: how wide the output of "{name}" is, a {type(module).__name__}, is not known: name its linear')
    parent = model.get_submodule(name.rpartition(".")[0])
    beside = [p for p in (*parent.parameters(), *model.parameters()) if p.is_floating_point()]
    return width, beside[0].dtype, beside[0].device
