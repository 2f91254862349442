"""The last layer computed at its first token alone gives the same logits, gradients and draws."""

import dataclasses
from itertools import product

import pytest
import torch
import transformers
from rankwise import variants
from rankwise.experiments import models
from rankwise.experiments.training import first_token
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
from rankwise.variants.settings import METHODS

from tests import contract, small_world
from tests.tiers import STAND_INS, diagonal, quick


def family(name: str) -> torch.nn.Module:
    if name == "bert":
        return models.tiny("bert", dtype="float64", dropout=0.3)
    kind = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta"}[name]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, num_labels=3, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).double().eval()


def batch(model: torch.nn.Module, rows: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 67, (rows, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[rows - 1, 3:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, model.config.pad_token_id), "attention_mask": mask}


def trained(method: str, name: str, only: bool) -> list[torch.Tensor]:
    model = family(name)
    adapter = contract.create(method)
    members = adapter.members
    assert not only or first_token.only(model, adapter.draw)
    adapter.attach(model, calibration=variants.Uncalibrated())
    fill(adapter)
    model.train()
    adapter.begin(Step(3, 10**6))
    inputs = batch(model, 4 * members)
    logits = model(**inputs).logits
    logits.square().sum().backward()
    model.eval()
    with torch.no_grad():
        return [logits, model(**inputs).logits, *(p.grad for p in adapter.parameters() if p.grad is not None)]


MODELS = ["bert", "roberta", "xlm-roberta"]
WHOLE = [name for name, one in METHODS.items() if one.load().adds_tokens]  # a trainer leaves their last layer as it is


@pytest.mark.parametrize(
    ("method", "name"), quick(product([m for m in METHODS if m not in WHOLE], MODELS), diagonal(STAND_INS, MODELS))
)
def test_logits_gradients_and_draws_are_those_of_the_whole_layer(method, name):
    for whole, first in zip(trained(method, name, False), trained(method, name, True), strict=True):
        torch.testing.assert_close(first, whole, rtol=1e-9, atol=1e-12)


def test_fewer_tokens_are_computed():
    model, seen = models.tiny("bert"), []
    adapter = variants.create("lora", rank=2)
    assert first_token.only(model, adapter.draw)
    adapter.attach(model)
    for layer in model.bert.encoder.layer:
        layer.output.dense.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    with torch.no_grad():
        model(**batch(model, 4))
    assert seen == [9, 1]


def test_what_measures_the_inputs_sees_every_token():
    model, seen = models.tiny("bert"), []
    assert first_token.only(model, variants.create("lora", rank=2).draw)
    model.bert.encoder.layer[-1].output.dense.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    with torch.no_grad():
        with first_token.every(model):
            model(**batch(model, 4))
        model(**batch(model, 4))
    assert seen == [9, 1]


def test_the_trainer_measures_every_token(tmp_path, monkeypatch):
    one = small_world.pack(small_world.model(tmp_path / "model"), "eva")
    one = dataclasses.replace(one, targets=["layer.1.output.dense"])
    first = small_world.trainer(one, tmp_path / "first").adapter
    monkeypatch.setattr(first_token, "only", lambda model, draw: False)
    whole = small_world.trainer(one, tmp_path / "whole").adapter
    for (_, a), (_, b) in zip(first.named_sites(), whole.named_sites(), strict=True):
        torch.testing.assert_close(a.A, b.A, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["deberta-v2", "gpt2", "llama", "albert"])
def test_other_models_are_left_alone(name):
    model = models.tiny(name)
    assert not first_token.only(model, variants.create("lora", rank=2).draw)
    assert not any("forward" in vars(module) for module in model.modules())


def test_token_classes_need_every_token():
    model = models.tiny("bert", kind="token-classification")
    assert not first_token.only(model, variants.create("lora", rank=2).draw)


def test_a_model_that_reads_another_token_is_left_alone():
    model = models.tiny("bert")
    model.bert.pooler.forward = lambda hidden: torch.tanh(model.bert.pooler.dense(hidden.mean(1)))
    assert not first_token.only(model, variants.create("lora", rank=2).draw)
    assert "forward" not in vars(model.bert.encoder.layer[-1])


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
def test_the_trainer_does_so_and_ends_where_it_would_have_ended(tmp_path, monkeypatch, checkpointed):
    folder = small_world.model(tmp_path / "model")
    one = small_world.pack(folder, seeds=(0, 1), gradient_checkpointing=checkpointed)
    first, _ = small_world.trained(one, tmp_path / "first")
    assert "forward" in vars(first.model.bert.encoder.layer[-1])
    monkeypatch.setattr(first_token, "only", lambda model, draw: False)
    whole, _ = small_world.trained(one, tmp_path / "whole")
    assert "forward" not in vars(whole.model.bert.encoder.layer[-1])
    torch.testing.assert_close(first.last_loss, whole.last_loss, rtol=1e-3, atol=0)
