"""Small models that transformers has loaded with bitsandbytes, and the same with plain linears of the dequantised weights.

Widths are multiples of 64, which bitsandbytes' dequantisation on CPUs with AVX512 takes.
"""

import atexit
import copy
import functools
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from rankwise.experiments.models import quiet, tiny_tokenizer
from torch import nn

from tests.tiny import DROPOUT, LABELS, SIZES

WHY = "bitsandbytes or accelerate is not installed: pip install -c constraints.txt -e '.[quantized]'"
needed = pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in ("bitsandbytes", "accelerate")), reason=WHY)
FORMS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4+dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
WIDE = SIZES | {"hidden_size": 64, "intermediate_size": 128}
SKIPPED = {"bert": ["classifier", "pooler"], "llama": ["score"], "gpt2": ["score"], "causal": ["lm_head"]}


def _made(name: str) -> nn.Module:
    import transformers as t

    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    biases = {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}
    if name == "bert":
        return t.BertForSequenceClassification(t.BertConfig(**WIDE, **DROPOUT))
    if name == "llama":
        return t.LlamaForSequenceClassification(t.LlamaConfig(**WIDE, **biases))
    if name == "causal":
        return t.LlamaForCausalLM(t.LlamaConfig(**{**WIDE, "num_labels": 2, **tokens}, **biases, tie_word_embeddings=True))
    sizes = {"vocab_size": SIZES["vocab_size"], "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128, "n_positions": 32}
    return t.GPT2ForSequenceClassification(t.GPT2Config(**sizes, **tokens, num_labels=LABELS))


@functools.cache
def folder(name: str) -> Path:
    """The files of that model, in fp32: weights, biases and norms all off their start."""
    held = tempfile.TemporaryDirectory()
    atexit.register(held.cleanup)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        model = _made(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        model.save_pretrained(held.name)
    return Path(held.name)


def loaded(name: str, form: str, dtype: torch.dtype = torch.float32, skip: bool = True, **options: Any) -> nn.Module:
    """As transformers loads it, in evaluation mode. skip: leave the head in full precision."""
    import transformers as t

    auto = t.AutoModelForCausalLM if name == "causal" else t.AutoModelForSequenceClassification
    skipped = {"llm_int8_skip_modules": SKIPPED[name]} if skip else {}
    config = t.BitsAndBytesConfig(**FORMS[form], **skipped, **options)
    with quiet():
        return auto.from_pretrained(folder(name), quantization_config=config, device_map={"": "cpu"}, dtype=dtype)


def wide_folder(path: Path) -> str:
    """The id (a folder) of a tiny model without a head, and its tokenizer, as small_world has one."""
    import transformers as t

    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        sizes = {"vocab_size": 67, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "pad_token_id": 0}
        t.BertModel(t.BertConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)).save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
    return str(path)


def by_bitsandbytes(module: nn.Module) -> torch.Tensor:
    """W (O, I) by bitsandbytes' own functions."""
    from bitsandbytes import functional
    from bitsandbytes import nn as quantised

    if isinstance(module, quantised.Linear4bit):
        return functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return functional.int8_vectorwise_dequant(module.weight.data, scales)


def quantised_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}


def in_full(model: nn.Module) -> nn.Module:
    """A copy with plain linears in the place of the quantised ones."""
    full = copy.deepcopy(model)
    for name, module in quantised_linears(full).items():
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        linear.weight = nn.Parameter(by_bitsandbytes(module).to(model.dtype))
        linear.bias = module.bias
        full.set_submodule(name, linear.train(module.training))
    return full
