"""Multi-label classification beside torch's and scikit-learn's: losses of each member, predictions, scores, what is refused."""

import numpy as np
import pytest
import torch
from rankwise.experiments import kinds
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.kinds import Undefined
from rankwise.experiments.tasks import metrics
from sklearn.metrics import f1_score
from torch import nn

from tests import small_world

K, N, LABELS = 3, 4, 5
KIND = kinds.get("multi-label")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_loss_is_torch_s_of_each_member_and_sends_no_gradient_to_others():
    logits, labels = draw(K * N, LABELS).requires_grad_(), (draw(K * N, LABELS) * 3 > 1).float()
    found = KIND.losses(logits, labels, K)
    own = [slice(k * N, (k + 1) * N) for k in range(K)]
    torch.testing.assert_close(found, torch.stack([nn.BCEWithLogitsLoss()(logits[s], labels[s].double()) for s in own]))
    assert KIND.counts(labels, K).tolist() == [N] * K
    found[1].backward()
    assert logits.grad[own[1]].all() and not logits.grad[own[0]].any() and not logits.grad[own[2]].any()


def test_a_label_is_predicted_where_its_probability_is_above_a_half():
    logits = draw(7, LABELS)
    assert torch.equal(KIND.predictions(logits), (logits.sigmoid() > 0.5).long())
    true = (draw(7, LABELS) > 0.7).long()
    for given in (logits, KIND.predictions(logits)):  # logits are scored as what they predict
        (predicted, _), rows = KIND.scored(given, true, None)
        assert rows == 7 and np.array_equal(predicted, KIND.predictions(logits).numpy())


def test_scores_are_scikit_learn_s():
    rng = np.random.default_rng(0)
    predicted, true = (rng.random((40, LABELS)) < [0.7, 0.4, 0.2, 0.1, 0]).astype(int), (rng.random((40, LABELS)) < 0.3) * 1
    true[:, 4] = 0  # a label that occurs nowhere
    found = metrics.f1_of_labels(predicted, true)
    each = [f1_score(true[:, label], predicted[:, label]) for label in range(4)]
    assert found["macro_f1"] == pytest.approx(100 * np.mean(each))
    assert found["micro_f1"] == pytest.approx(100 * f1_score(true.ravel(), predicted.ravel()))
    assert found["exact_match"] == pytest.approx(100 * (predicted == true).all(1).mean())
    weights = metrics.resample_weights(40)[:5]
    drawn = [np.repeat(np.arange(40), w) for w in weights]
    expected = [100 * f1_score(true[rows], predicted[rows], average="micro") for rows in drawn]
    np.testing.assert_allclose(metrics.resampled_micro_f1(predicted, true, weights), expected)


def test_no_label_anywhere_has_no_f1():
    nothing = np.zeros((3, LABELS), dtype=int)
    with pytest.raises(Undefined, match="neither labels nor predictions"):
        metrics.f1_of_labels(nothing, nothing)
    assert not metrics.resampled_micro_f1(nothing, nothing, np.ones((2, 3))).any()


@pytest.mark.parametrize("labels", [np.array([0, 1]), np.array([[0, 2], [1, 0]])])
def test_labels_that_are_no_yes_and_no_are_refused(labels):
    with pytest.raises(ValueError, match=r"give an array \(n, L\) of 0 and 1"):
        KIND.encode(Examples(["a", "b"], None, labels), None, 24)


def test_predictions_of_another_shape_and_no_numbers_are_refused():
    with pytest.raises(ValueError, match=r"predictions of shape \(2, 3\) for labels of shape \(2, 4\)"):
        KIND.scored(np.zeros((2, 3)), np.zeros((2, 4)), None)
    with pytest.raises(Undefined, match="not finite"):
        small_world.task("multi-label").metrics(np.full((2, 3), np.nan), np.ones((2, 3)))
