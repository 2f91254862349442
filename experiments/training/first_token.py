"""A sequence classifier of BERT's family reads the first token of its last layer, so that layer computes no other.

Keys and values of the last layer still come from every token; its query, its attention, its feed-forward block and all
that an adapter adds to them come from the first alone.  The logits are the same and so is every dropout draw.  It saves
seven ninths of a layer of BERT's shape: 13 % of the products of a model with 6 layers, 6 % with 12.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from rankwise.variants.adapter.draws import Draw
from torch import Tensor, nn
from torch.nn import functional as F

# Their heads read hidden_states[:, 0], and their layers have one form.
FAMILIES = ("BertForSequenceClassification", "RobertaForSequenceClassification", "XLMRobertaForSequenceClassification")


def only(model: nn.Module, draw: Draw) -> bool:
    """Lets the last layer of `model` compute its first token alone, where that gives the same logits; says whether.

    Args:
        model: in evaluation mode, without an adapter yet.
        draw: of the adapter that will be attached.
    """
    layer = last_layer(model)
    if layer is None:
        return False
    same = False
    # A model that takes no such example, or a layer of another form than the one known here, stays as it is.
    with contextlib.suppress(TypeError, AttributeError, RuntimeError, ValueError, IndexError):
        before = _example(model)
        shorten(layer, draw)
        tolerance = 1e-3 if before.dtype in (torch.float32, torch.float64) else 1e-1
        same = torch.allclose(_example(model), before, rtol=tolerance, atol=tolerance)
    if not same:
        vars(layer).pop("forward", None)
    return same


def last_layer(model: nn.Module) -> nn.Module | None:
    """The layer that need compute its first token alone, if the model's form is one known here."""
    config = getattr(model, "config", None)
    if type(model).__name__ not in FAMILIES or config._attn_implementation != "sdpa" or config.is_decoder:
        return None
    return model.base_model.encoder.layer[-1]


def shorten(layer: nn.Module, draw: Draw) -> None:
    """Has the layer compute its first token alone, unchecked."""
    layer.forward = functools.partial(_first_token, layer, draw)


@contextlib.contextmanager
def every(model: nn.Module) -> Iterator[None]:
    """While every layer computes all its tokens again: for what looks at a site's inputs, not at the logits alone."""
    shortened = [m for m in model.modules() if getattr(vars(m).get("forward"), "func", None) is _first_token]
    kept = [(layer, vars(layer).pop("forward")) for layer in shortened]
    try:
        yield
    finally:
        for layer, forward in kept:
            layer.forward = forward


def _first_token(layer: Any, draw: Draw, hidden: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """The layer's output at the first token, (B, 1, H), from hidden (B, L, H)."""
    attention = layer.attention.self
    first, mask = hidden[:, :1], None if attention_mask is None else attention_mask[:, :, :1]

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, attention.attention_head_size).transpose(1, 2)  # (B, heads, tokens, size)

    key, value = heads(attention.key(hidden)), heads(attention.value(hidden))
    with draw.first_tokens(hidden.shape[1]):
        query = heads(attention.query(first))
        rate = attention.dropout.p if attention.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, mask, rate, scale=attention.scaling)
        attended = layer.attention.output(context.transpose(1, 2).flatten(2), first)
        return layer.output(layer.intermediate(attended), attended)


@torch.no_grad()
def _example(model: nn.Module) -> Tensor:
    """The logits of two short rows, the second one padded."""
    ids = torch.arange(1, 13, device=model.device).view(2, 6) + model.config.pad_token_id
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return model(input_ids=ids, attention_mask=mask).logits
