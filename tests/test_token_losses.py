"""Losses of the scored tokens of a language model, against the plain way over all logits."""

import pytest
import torch
import transformers
from rankwise import variants
from rankwise.experiments import models
from rankwise.experiments.data.encoded import IGNORED
from rankwise.experiments.kinds import token_losses as module
from rankwise.experiments.kinds.token_losses import token_losses
from torch.nn import functional as F

from tests import language_models


def batch(model, rows=6, length=9):
    """Rows padded on the right, of which some tokens in the middle are scored; of the last row none."""
    random = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 60, (rows, length), generator=random)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, 0] = IGNORED
    for row in range(rows):
        mask[row, length - row :], labels[row, length - row :] = 0, IGNORED
        labels[row, 1 : 1 + row % 3] = IGNORED
    labels[-1] = IGNORED
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}, labels


def plain(model, inputs, labels):
    """(rows, L): the same from the logits of every token."""
    if model.config.is_encoder_decoder:
        logits, targets = model(**inputs, labels=labels).logits, labels
    else:
        logits, targets = model(**inputs).logits, F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view(targets.shape)


@pytest.mark.parametrize("name", language_models.NAMES)
def test_losses_and_gradients_are_those_of_all_logits_whatever_the_models_head_does(name, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 67 * 4)  # 4 tokens at a time
    model = language_models.made(name).double()
    inputs, labels = batch(model)
    adapter = variants.create("lora", members=3, seeds=[1, 2, 3], rank=2, alpha=5).attach(model, "all-linear", head=[])
    language_models.fill(adapter)
    weights = torch.randn(labels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = []
    for way in (plain, token_losses):
        adapter.begin(variants.Step(1, 2), training=False)
        losses = way(model, inputs, labels)
        (losses * weights).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in adapter.parameters()])
        adapter.zero_grad()
        gradients[-1].insert(0, losses.detach())
    assert gradients[0][0].count_nonzero() == (labels != IGNORED).sum()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)
    assert all(one.abs().sum() > 0 for one in gradients[1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_an_output_layer_that_is_a_target_is_trained(name):
    model = language_models.made(name).double()
    inputs, labels = batch(model)
    adapter = variants.create("lora", members=3, seeds=[1, 2, 3], rank=2, alpha=5).attach(model, ["lm_head"], head=[])
    language_models.fill(adapter)
    gradients = []
    for way in (plain, token_losses):
        losses = way(model, inputs, labels)
        losses.square().sum().backward()
        gradients.append([losses.detach(), *(parameter.grad.clone() for parameter in adapter.parameters())])
        adapter.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


def test_no_tensor_holds_the_logits_of_tokens_that_are_not_scored(monkeypatch):
    """Of 6 rows of 60 tokens 2 each are scored, 4 at a time: no more than 6 rows of the output layer are ever made."""
    monkeypatch.setattr(module, "CHUNK", 67 * 4)
    model = language_models.made("llama")
    adapter = variants.create("lora", rank=2, alpha=5).attach(model, "all-linear", head=[])
    ids = torch.randint(5, 60, (6, 60))
    labels = torch.full_like(ids, IGNORED)
    labels[:, -2:] = ids[:, -2:]
    sizes = []
    model.lm_head.register_forward_hook(lambda _, args, output: sizes.append(output.numel() // 67))
    token_losses(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels).sum().backward()
    assert sizes == [6, 4, 4, 4] and all(parameter.grad is not None for parameter in adapter.parameters())


def test_a_model_without_an_output_layer_is_refused():
    model = transformers.LlamaModel(models.tiny("llama").config)
    with pytest.raises(ValueError, match="no language model"):
        token_losses(model, {"input_ids": torch.ones(1, 2, dtype=torch.int64)}, torch.ones(1, 2, dtype=torch.int64))


def test_losses_in_bf16_are_taken_in_fp32():
    model = language_models.made("llama").bfloat16().requires_grad_(False)
    inputs, labels = batch(model)
    found = token_losses(model, inputs, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain(model.float(), inputs, labels), rtol=0.1, atol=0.1)


def test_full_fine_tuning_trains_embeddings_that_are_the_output_layer_too():
    model = language_models.made("qwen2").double()
    inputs, labels = batch(model)
    adapter = variants.create("full").attach(model, head=[])
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.lm_head.weight.requires_grad
    gradients = []
    for way in (plain, token_losses):
        adapter.begin(variants.Step(1, 2), training=False)
        way(model, inputs, labels).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in adapter.parameters()])
        adapter.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


def test_recomputed_activations_give_the_same_gradients():
    """Gradient checkpointing runs the body again in the backward pass, when its part in the head is long undone."""
    gradients = []
    for is_checkpointed in (False, True):
        model = language_models.made("llama").double()
        inputs, labels = batch(model)
        adapter = variants.create("lora", rank=2, alpha=5, dropout=0.3).attach(model, "all-linear", head=[])
        language_models.fill(adapter)
        if is_checkpointed:
            keyed = {"use_reentrant": False, "context_fn": adapter.draw.recompute_contexts}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keyed)
        model.train()
        adapter.begin(variants.Step(1, 2))
        token_losses(model, inputs, labels).sum().backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=0)
