"""Small random language models of the common families, and a tokenizer with an end of text."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from rankwise.experiments import models
from rankwise.variants.adapter.probe import fill as fill

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZE, "num_key_value_heads": 2, "head_dim": 8}
COMMON = {"vocab_size": 67, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "max_position_embeddings": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0, "forced_eos_token_id": None}

CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(
        **COMMON, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=64, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0
    ),
    "llama": lambda: transformers.LlamaConfig(**COMMON, **GROUPED),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, **GROUPED, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**COMMON, **GROUPED),
    "gemma": lambda: transformers.GemmaConfig(**COMMON, **GROUPED),
    "gemma2": lambda: transformers.Gemma2Config(**COMMON, **GROUPED, final_logit_softcapping=0.5),
    "cohere": lambda: transformers.CohereConfig(**COMMON, **SIZE, num_key_value_heads=2, logit_scale=0.25),
    "granite": lambda: transformers.GraniteConfig(**COMMON, **SIZE, num_key_value_heads=2, logits_scaling=3.0),
    "bloom": lambda: transformers.BloomConfig(
        **COMMON, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**COMMON, **SIZE, hidden_dropout=0.0, attention_dropout=0.0),
    "t5": lambda: transformers.T5Config(**COMMON, **T5, decoder_start_token_id=0),
    "bart": lambda: transformers.BartConfig(**COMMON, **BART, decoder_start_token_id=3),
}
NAMES = tuple(CONFIGS)


def made(name: str) -> Any:
    """In evaluation mode, with biases and norms away from 0 and 1, and sharp enough outputs to tell tokens apart."""
    config = CONFIGS[name]()
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with models.quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = auto.from_config(config)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
        if name == "bart":
            model.final_logits_bias.normal_()
    return model.eval()


def tokenizer() -> Any:
    """That of `models.tiny`, with [SEP] as its end of text."""
    one = models.tiny_tokenizer()
    one.eos_token = "[SEP]"
    return one


def saved(name: str, folder: Path) -> str:
    """A folder with such a model and its tokenizer."""
    made(name).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


TASK = SimpleNamespace(kind="generation", num_labels=0)  # as far as a loader reads it
