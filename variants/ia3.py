"""(IA)3: scale keys, values and the inner activations of the feed-forward layers by learned vectors.

    softmax(Q (l_k * K^T) / sqrt(d)) (l_v * V)        W_2 (l_ff * f(W_1 x))

Liu et al. 2022 (Few-shot parameter-efficient fine-tuning), sec. 3.3.  Each vector starts at ones, so the model is unchanged at
the start.  At a module y = W x + b it is one of two:

    output scaled    y = l * (W x + b)    dW = diag(l - 1) W, and b becomes l * b      l (K, O): keys, values
    input scaled     y = W (l * x) + b    dW = W diag(l - 1)                           l (K, I): the feed-forward layer's second

so that a member is merged into weight and bias exactly.  Vectors do not decay: their start is one, not zero.

Departure: the modules are PEFT's for each architecture (PLACES), which where it names them is not always the paper's choice.
At BERT's family "output.dense" is the attention's output layer too, GPT-2's c_attn scales the queries with keys and values,
and OPT, GPT-J, Gemma, Qwen and others have queries in the place of keys.  `outputs` and `inputs` name others.  A file of PEFT's
holds its own modules.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from rankwise.variants.adapter.draws import Draw
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.kinds.interface import trained_dtype
from rankwise.variants.adapter.linears import as_stored, dtype_of, is_linear, size_of, weight_of
from rankwise.variants.adapter.site import Site
from rankwise.variants.adapter.step import Group
from rankwise.variants.adapter.targets import resolve
from torch import Tensor, nn

# model_type of a transformers configuration -> outputs and inputs that are scaled.
_BERT = (("key", "value"), ("output.dense",))
_QUERY_VALUE_DOWN = (("q_proj", "v_proj"), ("down_proj",))
_KEY_VALUE_DOWN = (("k_proj", "v_proj"), ("down_proj",))
_FUSED = (("query_key_value",), ("dense_4h_to_h",))
PLACES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # peft 0.21.2, utils/constants.py: TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING, .._FEEDFORWARD_MODULES_MAPPING
    "bert": _BERT,
    "roberta": _BERT,
    "deberta-v2": (("key_proj", "value_proj"), ("output.dense",)),
    "deberta": (("in_proj",), ("output.dense",)),
    "t5": (("k", "v"), ("wo",)),
    "mt5": (("k", "v", "wi_1"), ()),
    "bart": (("q_proj", "v_proj"), ("fc2",)),
    "opt": (("q_proj", "k_proj"), ("fc2",)),
    "phi": (("q_proj", "v_proj"), ("fc2",)),
    "gpt2": (("c_attn",), ("mlp.c_proj",)),
    "gpt_bigcode": (("c_attn",), ("mlp.c_proj",)),
    "gptj": (("q_proj", "v_proj"), ("fc_out",)),
    "gpt_neo": (("q_proj", "v_proj"), ("c_proj",)),
    "gpt_neox": _FUSED,
    "falcon": _FUSED,
    "bloom": (("query_key_value",), ("mlp.dense_4h_to_h",)),
    "llama": _KEY_VALUE_DOWN,
    "mistral": _KEY_VALUE_DOWN,
    **dict.fromkeys(("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _QUERY_VALUE_DOWN),
    # which PEFT does not name: the paper's choice
    **dict.fromkeys(("xlm-roberta", "electra", "camembert"), _BERT),
    "distilbert": (("k_lin", "v_lin"), ("ffn.lin2",)),
    "albert": (("key", "value"), ("ffn_output",)),
}


class Scaled(Site):
    """One vector for each member at a frozen linear: l (K, O) on its output, or l (K, I) on its input."""

    has_delta = True

    def __init__(self, name: str, base: nn.Module, at_input: bool, draw: Draw):
        super().__init__()
        out_features, in_features = size_of(base)
        size, dtype = in_features if at_input else out_features, trained_dtype(dtype_of(base))
        self.vector = nn.Parameter(torch.ones(len(draw.seeds), size, dtype=dtype))
        self.name, self.at_input, self._draw = name, at_input, draw

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        self._draw.rows.check(self.name, x)
        return base(self._scaled(x)) if self.at_input else self._scaled(base(x))

    def _scaled(self, x: Tensor) -> Tensor:
        """Each member's rows of x (K*N, ..., F) times its vector; the product is taken in the vector's type."""
        rows = self._draw.rows.by_member(x)  # (K, N, F)
        return self._draw.rows.as_input(rows * self.vector[:, None], x).to(x.dtype)

    def delta(self, base: nn.Module) -> Tensor:
        W = weight_of(base).to(self.vector.dtype)
        change = self.vector - 1
        return W * (change[:, None] if self.at_input else change[:, :, None])  # (K, O, I)

    def merged(self, base: nn.Module, member: int) -> dict[str, Tensor]:
        vector = self.vector[member]
        weight = weight_of(base).to(vector.dtype) * (vector if self.at_input else vector[:, None])
        values = {"weight": as_stored(base, weight)}
        if not self.at_input and base.bias is not None:
            values["bias"] = base.bias * vector
        return values

    def count(self, ranks: Tensor) -> Tensor:
        return torch.full_like(ranks, self.vector.shape[1])


class IA3(Adapter):
    """K members of (IA)3."""

    method = "ia3"
    peft_form: ClassVar[str | None] = "IA3"

    def choose(self, model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
        """Names of the modules that are scaled, in the model's order; `targets` says nothing of them.

        Raises:
            ValueError: an architecture without an entry in PLACES, or a module that is no linear or would be scaled twice.
        """
        outputs, inputs = (self._named(model, which, head) for which in ("outputs", "inputs"))
        if twice := [name for name in outputs if name in inputs]:
            raise ValueError(f'"{twice[0]}" stands in both outputs and inputs: leave it out of one')
        self._at_input = set(inputs)
        chosen = {*outputs, *inputs}
        for name in chosen:
            if not is_linear(model.get_submodule(name)):
                kind = type(model.get_submodule(name)).__name__
                raise ValueError(f'"{name}" is no linear module ({kind}), and {self.method} scales those only: leave it out')
        return [name for name, _ in model.named_modules() if name in chosen]

    def _named(self, model: nn.Module, which: str, head: Sequence[str]) -> list[str]:
        ends = self.settings.get(which)
        if ends is None:
            kind = getattr(getattr(model, "config", None), "model_type", None)
            if kind not in PLACES:
                raise ValueError(
                    f"{self.method}: where it stands in a model of type {kind!r} is not known; name the modules whose output, "
                    f"and those whose input, are scaled: outputs = [...], inputs = [...]"
                )
            ends = PLACES[kind][which == "inputs"]
        return resolve(model, ends, head) if ends else []

    def make_site(self, name: str, module: nn.Module) -> Site:
        return Scaled(name, module, name in self._at_input, self.draw)

    def parameter_groups(self) -> list[Group]:
        """The head's weights; and what does not decay: vectors, biases and norms."""
        norms = self.norm_parameters()
        named = [(n.rpartition(".")[2], p) for n, p in self.named_parameters()]
        plain = [p for n, p in named if n in ("bias", "vector") or id(p) in norms]
        kept = {id(p) for p in plain}
        groups = [Group([p for _, p in named if id(p) not in kept]), Group(plain, weight_decay=0.0)]
        return [group for group in groups if group.params]
