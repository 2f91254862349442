"""Losses per member: each the mean over its own rows or scored tokens, as torch has them for one."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rankwise.experiments import kinds
from torch.nn import functional as F

from tests import small_world

K, N, LENGTH, LABELS = 3, 4, 5, 7


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def classes(*shape: int) -> torch.Tensor:
    return torch.randint(LABELS, shape, generator=torch.Generator().manual_seed(1))


def test_regression_is_the_mean_squared_error_of_each_member():
    logits, labels = random(K * N, 1), random(K * N) * 3
    expected = [F.mse_loss(logits[k * N : (k + 1) * N, 0], labels[k * N : (k + 1) * N]) for k in range(K)]
    torch.testing.assert_close(kinds.get("regression").losses(logits, labels, K), torch.stack(expected))


def test_classification_is_the_cross_entropy_of_each_member():
    logits, labels = random(K * N, LABELS), classes(K * N)
    expected = [F.cross_entropy(logits[k * N : (k + 1) * N], labels[k * N : (k + 1) * N]) for k in range(K)]
    torch.testing.assert_close(kinds.get("classification").losses(logits, labels, K), torch.stack(expected))


def test_token_classification_is_the_mean_over_each_member_s_scored_tokens():
    logits, labels = random(K * N, LENGTH, LABELS), classes(K * N, LENGTH)
    labels[0, 1:] = labels[1] = labels[5, 2] = -100  # the members have 11, 19 and 20
    expected = [
        F.cross_entropy(logits[k * N : (k + 1) * N].flatten(0, 1), labels[k * N : (k + 1) * N].flatten()) for k in range(K)
    ]
    torch.testing.assert_close(kinds.get("token-classification").losses(logits, labels, K), torch.stack(expected))
    assert kinds.get("token-classification").counts(labels, K).tolist() == [11, 19, 20]


def test_a_span_s_loss_is_the_mean_of_its_start_s_and_its_end_s_as_bert_has_it():
    starts, ends = classes(K * N) % LENGTH, classes(2 * K * N)[K * N :] % LENGTH
    logits = random(K * N, LENGTH, 2)
    expected = []
    for k in range(K):
        own = slice(k * N, (k + 1) * N)
        two = F.cross_entropy(logits[own, :, 0], starts[own]), F.cross_entropy(logits[own, :, 1], ends[own])
        expected.append((two[0] + two[1]) / 2)
    labels = torch.stack([starts, ends], 1)
    torch.testing.assert_close(kinds.get("span").losses(logits, labels, K), torch.stack(expected))
    assert kinds.get("span").counts(labels, K).tolist() == [N] * K
    assert (starts != ends).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_span_s_loss_does_not_depend_on_its_padding(dtype):
    scores, labels = random(2, LENGTH + 3, 2).to(dtype), torch.tensor([[0, 2], [1, 1]])
    output = SimpleNamespace(start_logits=scores[..., 0], end_logits=scores[..., 1])
    mask = torch.tensor([[1] * LENGTH + [0] * 3] * 2)
    padded = kinds.get("span").logits(output, {"attention_mask": mask})
    assert torch.equal(padded[:, :LENGTH], scores[:, :LENGTH]) and torch.isfinite(padded).all()
    found = kinds.get("span").losses(padded, labels, 2)
    torch.testing.assert_close(found, kinds.get("span").losses(scores[:, :LENGTH], labels, 2))
    other = SimpleNamespace(logits=scores)
    assert all(
        kinds.get(kind).logits(other, {"attention_mask": mask}) is scores for kind in ("regression", "token-classification")
    )


def test_a_member_without_a_scored_token_has_a_loss_of_zero_and_counts_nothing():
    labels = classes(2 * N, LENGTH)
    labels[N:] = -100
    logits = random(2 * N, LENGTH, LABELS).requires_grad_()
    found = kinds.get("token-classification").losses(logits, labels, 2)
    assert found[1] == 0
    assert kinds.get("token-classification").counts(labels, 2).tolist() == [N * LENGTH, 0]
    found.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[N:] == 0).all()


@pytest.mark.parametrize("kind", ["regression", "classification", "token-classification", "span"])
def test_a_member_s_loss_sends_no_gradient_to_others(kind):
    shapes = {"regression": (K * N, 1), "classification": (K * N, LABELS), "span": (K * N, LENGTH, 2)}
    shape = shapes.get(kind, (K * N, LENGTH, LABELS))
    logits = random(*shape).requires_grad_()
    labels = random(K * N) * 3 if kind == "regression" else classes(*shape[:-1])
    labels = labels[:, :2] % LENGTH if kind == "span" else labels
    kinds.get(kind).losses(logits, labels, K)[1].backward()
    sent = logits.grad.flatten(1).abs().sum(1).view(K, N)
    assert (sent[1] > 0).all()
    assert (sent[[0, 2]] == 0).all()


def test_losses_of_sixteen_bit_outputs_are_computed_in_fp32():
    logits = random(K * N, 1).bfloat16()
    found = kinds.get("regression").losses(logits, random(K * N), K)
    assert found.dtype == torch.float32
    assert torch.equal(found, kinds.get("regression").losses(logits.float(), random(K * N), K))


def test_predictions_are_numbers_or_the_likeliest_labels():
    assert kinds.get("regression").predictions(torch.tensor([[0.5], [2.0]]).bfloat16()).tolist() == [0.5, 2.0]
    assert kinds.get("classification").predictions(torch.tensor([[0.0, 3.0, 1.0]])).tolist() == [1]
    assert kinds.get("token-classification").predictions(torch.tensor([[[0.0, 1.0], [5.0, 1.0]]])).tolist() == [[1, 0]]
    assert kinds.get("span").predictions(torch.tensor([[[0.5, 1.0]]]).bfloat16()).tolist() == [[[0.5, 1.0]]]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match='kind = "ranking": should be regression'):
        kinds.get("ranking")


def test_a_run_keeps_the_predictions_of_every_kind_but_the_scores_of_each_token_of_a_span():
    """Texts as arrays of bytes (tests/test_language_kinds.py)."""
    predicted = np.arange(6.0).reshape(3, 2)
    as_they_are = [name for name in kinds.names() if name != "generation"]
    assert [name for name in as_they_are if kinds.get(name).stored(predicted) is not predicted] == ["span"]
    assert kinds.get("span").stored(predicted) is None


def test_kinds_are_named_without_torch():
    """Study files are checked within a second."""
    code = "import sys, rankwise.experiments.tasks as t; t.get('squad/v1'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_task_of_an_unknown_kind_is_refused_where_it_is_made():
    with pytest.raises(ValueError, match=r'kind = "ranking": should be regression, classification, .* or '):
        replace(small_world.task(), kind="ranking")
