"""Prompt tuning and prefix tuning in PEFT's files.

prompt_embeddings       (p, d), or (p, 2 L d_kv) of prefix tuning: keys and values of layer 0, then of layer 1, and so on
base_model.<head>....   the task head
num_virtual_tokens, token_dim, num_attention_heads, num_layers, task_type ...
"""

from typing import Any

from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.files.facts import Facts
from rankwise.variants.files.folders import Contents
from rankwise.variants.files.peft import writing
from rankwise.variants.files.peft.checks import check_heads, heads_of
from rankwise.variants.files.peft.config import PeftConfig
from rankwise.variants.files.peft.names import CONFIG, ORIGINAL_HEAD, WEIGHTS, head_tensor
from rankwise.variants.files.state import as_fact, copy, detached_if_it_fails, trained
from rankwise.variants.settings import method
from torch import nn

TOKENS = "prompt_embeddings"
PREFIX = "base_model."  # PEFT has no tuner between its wrapper and the model here
METHODS = {"PROMPT_TUNING": "prompt-tuning", "PREFIX_TUNING": "prefix-tuning"}
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")  # ends of the names of transformers' classes


def holds(adapter: Adapter) -> bool:
    """Whether PEFT has the same function: it needs a task, and a head after prompt tuning reads a virtual token there."""
    return _fits(adapter.model, str(adapter.peft_form)) and writing.common(adapter, [])["task_type"] is not None


def _fits(model: nn.Module, form: str) -> bool:
    return form == "PREFIX_TUNING" or type(model).__name__.endswith(LANGUAGE_MODELS)


def written(adapter: Adapter, member: int) -> Contents:
    """PEFT's files of one member of an attached prompt or prefix tuning."""
    alone, form = adapter.alone(member), str(adapter.peft_form)
    ((_, site),) = adapter.named_sites()
    shared = writing.common(adapter, [])
    del shared["target_modules"]
    model = adapter.model.config
    heads = model.num_attention_heads if form == "PROMPT_TUNING" else site.heads
    width = site.tokens.shape[2] if form == "PROMPT_TUNING" else site.tokens.shape[2] // (2 * site.layers)
    config: dict[str, Any] = {
        **shared,
        "peft_type": form,
        "num_virtual_tokens": site.tokens.shape[1],
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": model.num_hidden_layers,
    }
    config |= {"prompt_tuning_init": "RANDOM"} if form == "PROMPT_TUNING" else {"prefix_projection": False}
    settings = alone.settings.model_dump(exclude_unset=True)
    own = {"quantization": as_fact(adapter.model), "targets": adapter.targets}
    facts = Facts(adapter.method, settings, alone.seeds[0], adapter.head_names, **own)
    beside = {PREFIX + name: value for name, value in writing.beside_sites(adapter, member, []).items()}
    return Contents({TOKENS: site.tokens[member], **beside}, config, facts)


def load(model: nn.Module, contents: Contents) -> Adapter:
    """
    Raises:
        ValueError: a configuration, or tensors, that do not fit each other or `model`.
    """
    raw, facts = contents.config, contents.facts
    config, form = PeftConfig.read_shared(raw), raw["peft_type"]
    if not _fits(model, form):
        raise ValueError(
            f"in PEFT the head of a {type(model).__name__} reads the first virtual token of a PROMPT_TUNING, and here the "
            f"text's: use PEFT for this adapter"
        )
    if raw.get("num_transformer_submodules") not in (None, 1):
        raise ValueError(f"{CONFIG}: virtual tokens before an encoder and a decoder are not supported: use PEFT")
    tensors = dict(contents.tensors)
    tokens = tensors.pop(TOKENS, None)
    if tokens is None or tokens.dim() != 2:
        raise ValueError(f"{WEIGHTS} holds no {TOKENS} of a {form}: a foreign file; save the adapter again")
    if (said := raw.get("num_virtual_tokens")) != len(tokens):
        raise ValueError(f"num_virtual_tokens = {said}, and {WEIGHTS} has {len(tokens)}: save or copy both again")
    rest = {head_tensor(n.removeprefix(PREFIX))[0]: t for n, t in tensors.items() if ORIGINAL_HEAD not in n}
    heads = heads_of(model, config)
    check_heads(model, rest, heads, config)
    settings = {"tokens": len(tokens)} if facts is None else facts.settings
    adapter = method(METHODS[form]).load()(seeds=[0 if facts is None else facts.seed], **settings)
    with detached_if_it_fails(adapter):
        adapter.attach(model, head=heads if facts is None else list(facts.head))
        for name, key, parameter in trained(adapter.heads):
            copy(parameter, rest, f"{name}.{key}")
        ((_, site),) = adapter.named_sites()
        copy(site.tokens, {TOKENS: tokens}, TOKENS)
    return adapter
