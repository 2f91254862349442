"""Five tiny models that show what packing meets: each a sequence classifier that differs from the others in one way.

bert: the plain case.  deberta: relative positions are projected without a batch axis (they have a dropout of their own,
which is off here, as no member may draw it for all).  gpt2: Conv1D, weights stored (in, out).  llama: no dropout modules,
gated MLP, biases on.  albert: one layer called many times.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

LABELS, VOCABULARY = 3, 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "num_labels": LABELS,
    "pad_token_id": 0,
}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


@dataclass(frozen=True)
class Tiny:
    """A tiny model.

    targets: what can be packed there; without_rows: ends of the names of modules whose input has no row for each example.
    """

    build: Callable[[], nn.Module]
    targets: str | list[str] = "all-linear"
    without_rows: tuple[str, ...] = ()


def _bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**SIZES, **DROPOUT))


def _deberta() -> nn.Module:
    relative = {"relative_attention": True, "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    config = DebertaV2Config(**SIZES, **DROPOUT, **relative, norm_rel_ebd="layer_norm", max_relative_positions=-1)
    model = DebertaV2ForSequenceClassification(config)
    for layer in model.deberta.encoder.layer:
        layer.attention.self.pos_dropout.p = 0.0
    return model


def _gpt2() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 32}
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, **dropout, **tokens, num_labels=LABELS))


def _llama() -> nn.Module:
    biases = {"attention_bias": True, "mlp_bias": True}
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, **biases, num_key_value_heads=2, attention_dropout=0.1))


def _albert() -> nn.Module:
    return AlbertForSequenceClassification(AlbertConfig(**SIZES, **DROPOUT, embedding_size=16, classifier_dropout_prob=0.1))


TINY = {
    "bert": Tiny(_bert),
    "deberta": Tiny(_deberta, ["value_proj", "dense"], ("query_proj", "key_proj", "encoder.LayerNorm")),
    "gpt2": Tiny(_gpt2),
    "llama": Tiny(_llama),
    "albert": Tiny(_albert),
}


def tiny(name: str = "bert", dtype: torch.dtype = torch.float64) -> nn.Module:
    """The tiny model of that name, in training mode, the same values every time, every bias and norm off its start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TINY[name].build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.to(dtype).train()


def batch(seed: int, step: int = 0, rows: int = 4, length: int = 6) -> dict[str, Tensor]:
    """Random tokens and labels of one member; the last row ends in padding."""
    random = torch.Generator().manual_seed(1000 * seed + step)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=random)
    mask = torch.ones_like(ids)
    ids[-1, -2:] = mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(LABELS, (rows,), generator=random)}


def packed_batch(seeds: list[int], step: int = 0, rows: int = 4, length: int = 6) -> dict[str, Tensor]:
    """Each member's batch, one after the other."""
    batches = [batch(seed, step, rows, length) for seed in seeds]
    return {key: torch.cat([b[key] for b in batches]) for key in batches[0]}
