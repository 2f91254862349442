"""An adapter as the LoRA file that llama.cpp loads (`--lora FILE`): GGUF, with llama.cpp's names and its order of rows.

    general.type = "adapter", adapter.type = "lora", adapter.lora.alpha    one alpha for all sites
    blk.0.attn_q.weight.lora_a (r, I), blk.0.attn_q.weight.lora_b (O, r)   float32
    token_embd.weight.lora_a (V, r), token_embd.weight.lora_b (D, r)       A is transposed: its rows are looked up

llama.cpp multiplies each update by alpha / r, r the columns of its own lora_b, and by 1 where alpha is 0
(src/llama-adapter.h, get_scale).  A site whose scale times rank is not that one alpha has the quotient in its B.

Its converter stores the rows of some models' query and key weights in another order, for its own way of rotating
(conversion/llama.py, permute): of each head the first half of the rows takes turns with the second.  The rows of B follow.
A layer's name is that of the gguf package's table for the architecture.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from rankwise.variants.doctor.reading import Site, ThinAdapter
from rankwise.variants.doctor.writing import not_plain

FILE = "adapter.gguf"
EMBEDDING, HEAD = "token_embd", "output"
# transformers' model_type -> (name in gguf.MODEL_ARCH, whether the rows of queries and keys are in another order).  Here stand
# those whose converter does nothing else to a matrix than this; of the others one may be split, joined or scaled.
ARCHITECTURES = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "smollm3": ("SMOLLM3", True),
    "qwen2": ("QWEN2", False),
    "qwen3": ("QWEN3", False),
    "gemma": ("GEMMA", False),
    "gemma2": ("GEMMA2", False),
    "gpt2": ("GPT2", False),
}


@dataclass(frozen=True)
class BaseModel:
    """What must be known of the base model.  is_tied: its embedding and its output layer are one tensor."""

    model_type: str
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    is_tied: bool


@dataclass(frozen=True)
class LlamaCpp:
    """What stands in the file.  architecture: as GGUF names it.  tensors: float32, in numpy's order of axes, not GGUF's."""

    architecture: str
    alpha: float
    tensors: Mapping[str, np.ndarray]


def as_llama_cpp(adapter: ThinAdapter, base: BaseModel) -> LlamaCpp:
    """
    Raises:
        ValueError: an architecture that is not in ARCHITECTURES, what the file has no place for, or another base model.
        ImportError: no gguf package.
    """
    import gguf

    if base.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f'a base of type "{base.model_type}" has no form known here for llama.cpp, but {known} have; merge it')
    name, is_reordered = ARCHITECTURES[base.model_type]
    architecture = gguf.MODEL_ARCH[name]
    names = gguf.get_tensor_name_map(architecture, base.num_layers)
    reason = not_plain(adapter)
    alpha = _common_alpha(adapter)
    tensors: dict[str, np.ndarray] = {}
    for site in adapter.sites:
        if reason is not None:
            break
        module = names.get_name(site.name) or names.get_name(f"model.{site.name}")
        reason = _no_place(adapter, site, module, base)
        if reason is not None or not site.rank:
            continue
        A, B, E = adapter.parts(site)
        if E is not None:
            A = A * E[:, None]
        if np.float32(site.scale * site.rank) != np.float32(alpha):
            B = B * (site.scale * site.rank / alpha)
        heads = {"attn_q": base.num_heads, "attn_k": base.num_key_value_heads}.get(module.rpartition(".")[2])
        if is_reordered and heads is not None:
            if len(B) % (2 * heads):
                reason = f"{site.name} has {len(B)} outputs, which are not {heads} heads of even size: another base model"
                continue
            B = reordered(B, heads)
        if module == EMBEDDING:
            A = A.T
        if f"{module}.weight.lora_a" in tensors:
            reason = f"{site.name} and another module are both {module} there"
            continue
        tensors[f"{module}.weight.lora_a"], tensors[f"{module}.weight.lora_b"] = map(_as_float32, (A, B))
    if reason is None and not tensors:
        reason = "no site has a rank"
    if reason is not None:
        raise ValueError(f"{adapter.path} has no form for llama.cpp: {reason}")
    return LlamaCpp(gguf.MODEL_ARCH_NAMES[architecture], alpha, tensors)


def reordered(B: np.ndarray, heads: int) -> np.ndarray:
    """B (O, R) with the rows of each head in llama.cpp's order: 0, h/2, 1, h/2 + 1, ... for h rows a head."""
    halves = B.reshape(heads, 2, len(B) // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(B.shape)


def _common_alpha(adapter: ThinAdapter) -> float:
    """Scale times rank of the most sites: their factors then stay as they are.  Not 0, which llama.cpp takes for scale 1."""
    counts = Counter(float(np.float32(site.scale * site.rank)) for site in adapter.sites if site.scale and site.rank)
    return counts.most_common(1)[0][0] if counts else 1.0


def _no_place(adapter: ThinAdapter, site: Site, module: str | None, base: BaseModel) -> str | None:
    """Why llama.cpp would not load this site, or would load and not apply it."""
    if site.expert is not None:
        return f"{site.name} is a bare parameter"
    if module is None:
        return f"{site.name} has no name there for a {base.model_type} of {base.num_layers} layers: is that its base model?"
    if site.is_embedding and module != EMBEDDING:
        return f"{site.name} is an embedding that is looked up without its update there"
    if base.is_tied and module in (EMBEDDING, HEAD):
        return f"{site.name} is tied: the output layer and the embedding are one tensor there, which takes no update"
    if len(adapter.stored.shapes[site.keys["A"]]) != 2:
        return f"{site.name} is a convolution"
    return None


def _as_float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        made = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(made).all():
        raise ValueError(f"a number of {np.abs(values).max():.3g} does not fit into float32: the adapter cannot be written so")
    return made
