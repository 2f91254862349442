"""Overlaps, amplification, sizes and directions: against plain loops and known cases; the driver and its report."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

import variants
from experiments import analysis
from tests.tiny import tiny
from variants.base import weight_of


@pytest.fixture
def random():
    return np.random.default_rng(0)


# -- overlaps -----------------------------------------------------------------------------------------------------------


def loops_phi(first, second, i, j):
    """|U1^i^T U2^j|_F^2 / min(i, j), a product and a sum at a time; the directions by the eigenvectors of A^T A."""
    bases = []
    for matrix, count in ((first, i), (second, j)):
        values, vectors = np.linalg.eigh(matrix.T @ matrix)
        order = sorted(range(len(values)), key=lambda k: -values[k])
        bases.append([vectors[:, k] for k in order[:count]])
    total = 0.0
    for u in bases[0]:
        for v in bases[1]:
            total += sum(a * b for a, b in zip(u, v, strict=True)) ** 2
    return total / min(i, j)


def test_phi_is_the_papers_formula_at_every_i_and_j(random):
    first, second = random.normal(size=(3, 7)), random.normal(size=(5, 7))
    grid = analysis.phi(analysis.directions(first), analysis.directions(second))
    assert grid.shape == (3, 5)
    for i in range(1, 4):
        for j in range(1, 6):
            assert grid[i - 1, j - 1] == pytest.approx(loops_phi(first, second, i, j), rel=1e-9)


def test_phi_is_the_mean_squared_cosine_of_the_principal_angles(random):
    U, V = (analysis.directions(random.normal(size=(r, 9))) for r in (4, 6))
    grid = analysis.phi(U, V)
    for i in range(1, 5):
        for j in range(1, 7):
            assert grid[i - 1, j - 1] == pytest.approx(np.mean(np.cos(subspace_angles(U[:, :i], V[:, :j])) ** 2), rel=1e-9)


def test_phi_is_one_less_the_projection_metric_over_p_and_not_what_appendix_g_prints(random):
    U, V = (analysis.directions(random.normal(size=(4, 9))) for _ in range(2))
    p, d = 4, math.sqrt(4 - (np.linalg.svd(U.T @ V)[1] ** 2).sum())
    assert analysis.phi(U, V)[-1, -1] == pytest.approx((p - d**2) / p)
    assert analysis.phi(U, V)[-1, -1] != pytest.approx((1 - d**2) / p, abs=0.1)


def test_one_subspace_overlaps_itself_wholly_whatever_its_basis(random):
    A = random.normal(size=(4, 9))
    mixed = random.normal(size=(4, 4)) @ A  # the same row space, other singular vectors
    same, other = (analysis.phi(analysis.directions(A), analysis.directions(b)) for b in (A, mixed))
    assert same == pytest.approx(np.ones((4, 4)))  # the top i lie inside the top j
    assert other[-1] == pytest.approx(np.ones(4)) and other[:, -1] == pytest.approx(np.ones(4))
    assert other[0, 0] < 0.99


def test_orthogonal_subspaces_do_not_overlap():
    I = np.eye(9)
    assert not analysis.phi(analysis.directions(I[:4]), analysis.directions(I[4:])).any()


def test_the_first_direction_is_that_of_the_greatest_singular_value():
    A = np.zeros((2, 5))
    A[0, 1], A[1, 3] = 2.0, -5.0
    assert np.abs(analysis.directions(A)) == pytest.approx(np.eye(5)[:, [3, 1]])


def test_random_subspaces_overlap_by_the_greater_dimension_over_the_width(random):
    grids = [analysis.phi(*(analysis.directions(random.normal(size=(r, 24))) for r in (3, 8))) for _ in range(400)]
    expected = np.maximum.outer(np.arange(1, 4), np.arange(1, 9)) / 24
    assert np.mean(grids, 0) == pytest.approx(expected, rel=0.12)


# -- amplification ------------------------------------------------------------------------------------------------------


def rotation(random, size):
    return np.linalg.qr(random.normal(size=(size, size)))[0]


def test_amplification_of_known_matrices(random):
    U, V = rotation(random, 6), rotation(random, 8)[:, :6]
    strengths = np.array([9.0, 7, 5, 3, 2, 1])
    weight = U * strengths @ V.T
    update = 12 * np.outer(U[:, 3], V[:, 3]) + 4 * np.outer(U[:, 4], V[:, 4])  # what W holds at strength 3 and 2
    noise = np.outer(U[:, 5], V[:, 5]) + 0.5 * np.outer(U[:, 2], V[:, 2])
    two = analysis.amplification(weight, update, 2, noise)
    assert two["of_update"] == pytest.approx(math.hypot(3, 2))
    assert two["of_weight"] == pytest.approx(math.hypot(9, 7))
    assert two["of_random"] == pytest.approx(math.hypot(1, 5))
    assert two["weight_norm"] == pytest.approx(math.sqrt((strengths**2).sum()))
    assert two["update_norm"] == pytest.approx(math.hypot(12, 4))
    assert two["factor"] == pytest.approx(math.hypot(12, 4) / math.hypot(3, 2))
    assert analysis.amplification(weight, update, 1, noise)["of_update"] == pytest.approx(3)


def test_amplification_is_table_7s_formula(random):
    weight, update, noise = (random.normal(size=(5, 7)) for _ in range(3))
    found = analysis.amplification(weight, update, 3, noise)
    for key, matrix in (("of_update", update), ("of_weight", weight), ("of_random", noise)):
        left, right = (np.linalg.eigh(product)[1][:, ::-1] for product in (matrix @ matrix.T, matrix.T @ matrix))
        total = 0.0
        for a in range(3):
            for b in range(3):
                total += sum(left[o, a] * weight[o, i] * right[i, b] for o in range(5) for i in range(7)) ** 2
        assert found[key] == pytest.approx(math.sqrt(total), rel=1e-9)


def test_an_update_of_zero_is_refused(random):
    with pytest.raises(ValueError, match="train for more steps"):
        analysis.amplification(random.normal(size=(5, 7)), np.zeros((5, 7)), 2, random.normal(size=(5, 7)))


# -- sizes and directions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [1, 0])
def test_dM_and_dD_are_the_papers_formulas(random, axis):
    start, now = random.normal(size=(5, 3)), random.normal(size=(5, 3))
    lines = list(zip(start, now, strict=True)) if axis == 1 else [(start[:, k], now[:, k]) for k in range(3)]
    sizes, turns = [], []
    for before, after in lines:
        m0, m1 = math.sqrt(sum(x * x for x in before)), math.sqrt(sum(x * x for x in after))
        sizes.append(abs(m1 - m0))
        turns.append(1 - sum(x * y for x, y in zip(before, after, strict=True)) / (m0 * m1))
    expected = sum(sizes) / len(sizes), sum(turns) / len(turns)
    assert analysis.moved(start, now, axis) == pytest.approx(expected, rel=1e-9)


def test_rows_that_are_stretched_have_not_turned_and_rows_that_turn_keep_their_size():
    start = np.array([[3.0, 4.0], [0.0, 2.0]])
    assert analysis.moved(start, start * [[2.0], [0.5]]) == pytest.approx((3.0, 0.0), abs=1e-15)  # |10 - 5|, |1 - 2|
    turned = np.array([[-4.0, 3.0], [0.0, 2.0]])  # the first by a right angle
    assert analysis.moved(start, turned) == pytest.approx((0.0, 0.5), abs=1e-15)


def test_small_angles_do_not_cancel():
    start, now = np.array([[1.0, 0.0]]), np.array([[math.cos(1e-9), math.sin(1e-9)]])
    assert analysis.moved(start, now)[1] == pytest.approx(0.5e-18, rel=1e-6)


def test_a_row_of_zeros_has_not_turned():
    start, now = np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([[3.0, 0.0], [0.0, 1.0]])
    assert analysis.moved(start, now) == pytest.approx((1.5, 0.5))


def test_familiarity_is_the_greatest_cosine_with_any_pre_trained_direction(random):
    U, V = rotation(random, 6), rotation(random, 4)
    start = U[:, :4] * [9.0, 7, 5, 3] @ V.T
    new = (U[:, 1] + U[:, 2]) / math.sqrt(2)  # between two of them
    strange = (U[:, 4] + 0.1 * U[:, 0]) / math.sqrt(1.01)  # nearly outside of what W reaches
    now = np.column_stack([U[:, 3], new, strange]) * [4.0, 11, 2] @ V.T[:3]
    assert analysis.familiarity(start, now, 2) == pytest.approx([1 / math.sqrt(2), 1.0])
    now = np.column_stack([U[:, 3], new, strange]) * [4.0, 2, 11] @ V.T[:3]
    assert analysis.familiarity(start, now, 1) == pytest.approx([0.1 / math.sqrt(1.01)])


def test_doras_magnitudes_are_the_sizes_of_the_merged_rows():
    model = tiny("bert")
    starts = {name: module.weight.detach().numpy().copy() for name, module in model.named_modules() if name.endswith("query")}
    adapter = variants.create("dora", rank=3, alpha=5, members=2).attach(model, ["query"])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))
    for name, site in adapter.named_sites():
        now = weight_of(adapter.base(name)) + adapter.delta(name)
        for k in range(2):
            merged, m = now[k].detach().numpy(), site.magnitude[k].detach().numpy()
            assert np.linalg.norm(merged, axis=1) == pytest.approx(np.abs(m), rel=1e-12)
            expected = np.abs(m - np.linalg.norm(starts[name], axis=1)).mean()
            assert analysis.moved(starts[name], merged)[0] == pytest.approx(expected, rel=1e-12)
