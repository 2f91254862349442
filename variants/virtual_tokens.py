"""Trained tokens before the text: as embeddings (prompt tuning), or as keys and values of every layer (prefix tuning).

prompt-tuning    [P; E(x)]    P (p, d) before the embeddings of the text.  Lester et al. 2021, sec. 2; P starts at the
                 embeddings of tokens of the vocabulary, drawn by the seed (sec. 3.2; there of the 5,000 most frequent ones).
prefix-tuning    softmax(Q [K_P; K]^T / sqrt(d)) [V_P; V]    K_P, V_P (p, d_kv) of each layer, trained themselves.  Li and Liang
                 2021, sec. 4, without the network that their training reparametrises the prefix by: that is P-tuning v2 (Liu et
                 al. 2022, sec. 3.2), with which it runs on encoders too.

Both stand around the model's body.  The attention mask gets ones before it, and the text's positions are counted from p on.
The body's outputs are those of the text alone: what is made of them, a loss over tokens, an answer's span or a classifier,
needs to know nothing of the virtual tokens.  In generation they are read once, with the first step, and stay in the cache.

Departure: a pooler reads the first token of the text, as it did in pre-training; in PEFT's prompt tuning it reads the first
virtual one.  So prompt tuning has PEFT's files for language models only; prefix tuning has them wherever PEFT knows the task.

Neither can be merged: no weight of the model holds another token.  Members share a pass, each row with its own member's tokens.
"""

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from rankwise.variants.adapter.draws import Draw
from rankwise.variants.adapter.initialization import generator
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.kinds.interface import trained_dtype
from rankwise.variants.adapter.site import Site
from rankwise.variants.adapter.surgery import bring, device_of
from torch import Tensor, nn
from transformers import Cache, DynamicCache


class VirtualTokens(Site):
    """The trained tokens of K members around the body of a model of transformers."""

    def __init__(self, start: Tensor, draw: Draw):
        """start: (K, p, F), what is trained."""
        super().__init__()
        self.tokens = nn.Parameter(start)
        self._draw = draw

    def forward(self, base: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The body's outputs at the text's tokens.

        Raises:
            ValueError: more positions than the model has.
        """
        given = inspect.signature(base.forward).bind_partial(*args, **kwargs)
        inputs = {**given.arguments, **given.arguments.get("kwargs", {})}
        inputs.pop("kwargs", None)
        text = inputs.get("input_ids")
        text = inputs["inputs_embeds"] if text is None else text
        p, (rows, length) = self.tokens.shape[1], text.shape[:2]
        past = inputs.get("past_key_values")
        seen = past.get_seq_length() if isinstance(past, Cache) else 0
        most = getattr(base.config, "max_position_embeddings", None)
        if isinstance(most, int) and p + length > most:
            raise ValueError(
                f"tokens = {p} and a text of {length} are more than the {most} positions of a {type(base).__name__}: shorten "
                f"the text (max_length) or train fewer tokens"
            )
        mask = inputs.get("attention_mask")
        if mask is not None:  # without one every token is read
            if mask.dim() != 2:
                raise ValueError(f"attention_mask has {mask.dim()} axes, and virtual tokens need one of (rows, tokens)")
            inputs["attention_mask"] = torch.cat([mask.new_ones(rows, p), mask], 1)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + p
        if seen:
            return base(**inputs)
        return self.read(base, inputs, rows)

    def read(self, base: nn.Module, inputs: dict[str, Any], rows: int) -> Any:
        """The body's outputs, of a pass that begins with the virtual tokens.  inputs: of the text, mask and positions done."""
        raise NotImplementedError

    def of_rows(self, rows: int, dtype: torch.dtype) -> Tensor:
        """(rows, p, F): each row's own member's tokens."""
        tokens = self.tokens.to(dtype)
        K, N = len(tokens), rows // len(tokens)
        return tokens[:, None].expand(K, N, *tokens.shape[1:]).reshape(rows, *tokens.shape[1:])

    def count(self, ranks: Tensor) -> Tensor:
        return torch.full_like(ranks, self.tokens[0].numel())


class Prompt(VirtualTokens):
    """tokens (K, p, d): before the embeddings."""

    def read(self, base: nn.Module, inputs: dict[str, Any], rows: int) -> Any:
        embeddings = inputs.get("inputs_embeds")
        if embeddings is None:
            embeddings = base.get_input_embeddings()(inputs["input_ids"])
        inputs["input_ids"] = None
        inputs["inputs_embeds"] = torch.cat([self.of_rows(rows, embeddings.dtype), embeddings], 1)
        p = self.tokens.shape[1]
        if inputs.get("token_type_ids") is not None:
            types = inputs["token_type_ids"]
            inputs["token_type_ids"] = torch.cat([types.new_zeros(rows, p), types], 1)
        if inputs.get("position_ids") is not None:
            positions = inputs["position_ids"]
            before = torch.arange(p, device=positions.device).expand(len(positions), p)
            inputs["position_ids"] = torch.cat([before, positions], 1)
        return of_text(base, base(**inputs), p)


class Prefix(VirtualTokens):
    """tokens (K, p, 2 L d_kv): keys and values of layer 0, then of layer 1, and so on."""

    def __init__(self, start: Tensor, draw: Draw, layers: int, heads: int):
        super().__init__(start, draw)
        self.layers, self.heads = layers, heads

    def read(self, base: nn.Module, inputs: dict[str, Any], rows: int) -> Any:
        if base.training and any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
            raise ValueError(
                "gradient checkpointing drops the keys and values that prefix tuning trains: train without it, or take "
                "prompt-tuning"
            )
        device = self.tokens.device.type
        enabled = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if enabled else next(base.parameters()).dtype
        past = inputs.get("past_key_values")
        past = DynamicCache(config=base.config) if past is None else past
        parts = self.of_rows(rows, dtype).unflatten(2, (2 * self.layers, self.heads, -1))  # (rows, p, 2 L, heads, size)
        parts = parts.permute(2, 0, 3, 1, 4)  # (2 L, rows, heads, p, size)
        for layer in range(self.layers):
            past.update(parts[2 * layer], parts[2 * layer + 1], layer)
        return base(**{**inputs, "past_key_values": past})


def of_text(base: nn.Module, outputs: Any, p: int) -> Any:
    """The body's outputs without their first p tokens; a pooler reads the first one of the text."""
    if isinstance(outputs, tuple):
        raise ValueError("return_dict = False: outputs without names cannot be cut to the text; leave it out")
    outputs.last_hidden_state = outputs.last_hidden_state[:, p:]
    if outputs.get("hidden_states") is not None:
        outputs.hidden_states = tuple(one[:, p:] for one in outputs.hidden_states)
    if outputs.get("pooler_output") is not None:
        outputs.pooler_output = pooled(base, outputs.last_hidden_state)
    return outputs


def pooled(base: nn.Module, hidden: Tensor) -> Tensor:
    """What the body's pooler makes of its last hidden states; ALBERT's is a linear with the activation apart."""
    if isinstance(base.pooler, nn.Linear):
        return base.pooler_activation(base.pooler(hidden[:, 0]))
    return base.pooler(hidden)


class VirtualTokenAdapter(Adapter):
    """What prompt tuning and prefix tuning share."""

    mergeable = False
    starts_at_identity = False
    adds_tokens: ClassVar[bool] = True

    def choose(self, model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
        """The name of the model's body.

        Raises:
            ValueError: a model without a body that reads text, or an encoder-decoder.
        """
        name = getattr(model, "base_model_prefix", None) or ""
        body, kind = getattr(model, name, None) if name else None, type(model).__name__
        config = getattr(model, "config", None)
        if not isinstance(body, nn.Module) or body is model:
            raise ValueError(f"{self.method} stands around the body of a model of transformers, and {kind} has none apart")
        if getattr(model, "main_input_name", "input_ids") != "input_ids":
            raise ValueError(f"{self.method} puts tokens before a text, and {kind} reads {model.main_input_name}: take lora")
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"{self.method} does not support encoder-decoders such as {kind}: take another method, such as lora"
            )
        return [name]


class PromptTuning(VirtualTokenAdapter):
    """K members of prompt tuning."""

    method = "prompt-tuning"
    peft_form: ClassVar[str | None] = "PROMPT_TUNING"

    def make_site(self, name: str, module: nn.Module) -> Site:
        weight = module.get_input_embeddings().weight
        vocabulary, width = weight.shape
        starts = []
        for seed in self.seeds:
            random = generator(seed, name, "prompt")
            if self.settings.initialization == "vocabulary":
                drawn = torch.randint(vocabulary, (self.settings.tokens,), generator=random)
                starts.append(weight.detach()[drawn.to(weight.device)])
            else:
                starts.append(torch.empty(self.settings.tokens, width).normal_(generator=random).to(weight.device))
        site = Prompt(torch.stack(starts).to(trained_dtype(weight.dtype)), self.draw)
        bring(site, device_of(module))
        return site


class PrefixTuning(VirtualTokenAdapter):
    """K members of prefix tuning."""

    method = "prefix-tuning"
    peft_form: ClassVar[str | None] = "PREFIX_TUNING"
    checkpointable = False

    def choose(self, model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
        """
        Raises:
            ValueError: as the other, or layers that take no keys and values from outside.
        """
        (name,) = super().choose(model, targets, head)
        body = model.get_submodule(name)
        if "past_key_values" not in inspect.signature(body.forward).parameters:
            raise ValueError(
                f"{type(body).__name__} takes no keys and values from outside (past_key_values), which {self.method} is made "
                f"of: take prompt-tuning"
            )
        return [name]

    def make_site(self, name: str, module: nn.Module) -> Site:
        layers, heads, size = shape_of(module.config)
        width = 2 * layers * heads * size
        dtype = trained_dtype(next(p.dtype for p in module.parameters() if p.is_floating_point()))
        draws = [torch.empty(self.settings.tokens, width).normal_(generator=generator(s, name, "prefix")) for s in self.seeds]
        site = Prefix((torch.stack(draws) * self.settings.spread).to(dtype), self.draw, layers, heads)
        bring(site, device_of(module))
        return site


def shape_of(config: Any) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and the size of a head."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, size
