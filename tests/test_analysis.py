"""Overlaps, amplification, sizes and directions: against plain loops and known cases; the driver and its report."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from rankwise import variants
from rankwise.experiments import analysis
from rankwise.experiments.data.draws import shuffled
from rankwise.experiments.training.trainer import Trainer
from rankwise.reports.analysis import directions, read, subspaces
from rankwise.reports.tables import escape_markdown
from rankwise.variants.adapter.linears import weight_of
from rankwise.variants.adapter.step import NotPackable
from scipy.linalg import subspace_angles

from tests import small_world
from tests.command import rankwise
from tests.test_cli import ROOT
from tests.tiers import quick
from tests.tiny import tiny


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
    assert analysis.moved(start, now)[1] == pytest.approx(0.5e-18, rel=1e-6, abs=0)


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


# -- the driver ---------------------------------------------------------------------------------------------------------

OPTIONS = ["--task", "small/regression", "--examples", "40", "--steps", "8", "--batch-size", "5", "--max-length", "24"]
OPTIONS += ["--seed", "3", "--rate", "0.01", "--device", "cpu"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(the tiny model's id, a folder with both analyses of it)."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RANKWISE_CACHE", str(tmp_path_factory.mktemp("cache")))
    small_world.register(patch.setitem)
    model = small_world.model(tmp_path_factory.mktemp("model"))
    out = tmp_path_factory.mktemp("out")
    assert rankwise("analysis", "subspace", "--out", str(out), "--model", model, *OPTIONS, "--ranks", "6,2,3") == 0
    more = ["--rank", "3", "--seeds", "2", "--full-rate", "0.002"]
    assert rankwise("analysis", "magnitude", "--out", str(out), "--model", model, *OPTIONS, *more) == 0
    yield model, out
    patch.undo()


def ordinary_run(model, folder, method, seed, rate, **settings):
    """The same run by the Trainer's own `run`, one member; its trainer, and the weights before."""
    made = variants.settings.check(method, settings)
    changes = {"epochs": 8, "max_steps": 8, "batch_size": 5, "evaluations_per_epoch": 0, "warmup_ratio": 0.06}
    changes |= {"clip": 1.0, "weight_decay": 0.01, "evaluation_batch_size": 64, "max_skipped_steps": 10}
    pack = small_world.pack(model, "lora", seeds=(seed,), learning_rates=(rate,), **changes)
    pack = dataclasses.replace(pack, method=method, settings=made, targets=["query", "value"])
    data = small_world.encoded(pack.task)
    data["train"] = data["train"].select(np.sort(shuffled(len(data["train"]), 0, 3)[:40]))
    trainer = small_world.trainer(pack, folder, data)
    starts = {
        n: m.weight.detach().double().numpy().copy() for n, m in trainer.model.named_modules() if n.endswith(("query", "value"))
    }
    trainer.run()
    return trainer, starts


def strict(path):
    def refuse(word):
        raise ValueError(word)

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.slow
def test_the_subspaces_are_those_of_ordinary_runs(world, tmp_path):
    model, out = world
    found, grids = strict(out / "subspace.json"), np.load(out / "subspace.npz")
    assert [(m["rank"], m["seed"]) for m in found["members"]] == [(2, 3), (3, 3), (6, 3), (6, 4)]
    assert found["pairs"] == {"nested": [1, 2], "ranks": [1, 3], "seeds": [2, 3]}
    runs = {k: ordinary_run(model, tmp_path / str(k), "lora", m["seed"], 0.01, rank=m["rank"], alpha=analysis.ALPHA)[0]
            for k, m in enumerate(found["members"])}  # fmt: skip
    for at, site in enumerate(found["sites"]):
        name = site["name"]
        assert site["in_features"] == 32
        A = [runs[k].adapter.site(name).A[0].detach().double().numpy() for k in range(4)]
        dW = [runs[k].adapter.delta(name)[0].detach().double().numpy() for k in range(4)]
        for pair, (a, b) in found["pairs"].items():
            expected = analysis.phi(analysis.directions(A[a]), analysis.directions(A[b]))
            assert grids[f"A/{pair}"][at] == pytest.approx(expected, abs=2e-3)  # float16; packed is alone to rounding
        small, large = (np.linalg.svd(dW[k])[2].T for k in (1, 3))
        assert grids["dW/ranks"][at] == pytest.approx(analysis.phi(small[:, :3], large[:, :6]), abs=2e-3)
        for row in found["amplification"]:
            if row["site"] == name:
                k = [(m["rank"], m["seed"]) for m in found["members"]].index((row["rank"], row["seed"]))
                weight = weight_of(runs[k].adapter.base(name)).double().numpy()
                assert row["update_norm"] == pytest.approx(np.linalg.norm(dW[k]), rel=1e-3)
                expected = analysis.amplification(weight, dW[k], row["rank"], weight)["of_update"]
                assert row["of_update"] == pytest.approx(expected, rel=1e-3)
    scores = [runs[k].evaluate("validation")[0]["pearson_spearman"] for k in range(4)]
    assert [m["score"] for m in found["members"]] == pytest.approx(scores, abs=1e-3)
    assert len(found["amplification"]) == 4 * len(found["sites"]) == 16


def test_a_smaller_A_of_the_same_seed_starts_inside_the_larger_one(world):
    grids = np.load(world[1] / "subspace.npz")
    assert grids["start/nested"][:, :, -1] == pytest.approx(np.ones((4, 3)), abs=1e-3)
    assert grids["start/ranks"][:, -1, -1].max() < 0.6  # expected: 6 / 32
    assert grids["gaussian"].shape == (6, 6) and grids["gaussian"][-1, -1] < 0.6


def test_the_movements_are_those_of_ordinary_runs(world, tmp_path):
    model, out = world
    found = strict(out / "magnitude.json")
    assert found["snapshots"] == [2, 4, 6, 8]
    assert len(found["moves"]) == 3 * 2 * 4 * 4  # methods, seeds, snapshots, sites
    settings = {"full": {}, "lora": {"rank": 3, "alpha": 16}, "dora": {"rank": 3, "alpha": 16}}
    for method, own in settings.items():
        trainer, starts = ordinary_run(model, tmp_path / method, method, 4, 0.002 if method == "full" else 0.01, **own)
        last = {r["site"]: r for r in found["moves"] if (r["method"], r["seed"], r["step"]) == (method, 4, 8)}
        for name in found["sites"]:
            now = starts[name] + trainer.adapter.delta(name)[0].detach().double().numpy()
            for axis, convention in ((1, "rows"), (0, "columns")):
                dM, dD = analysis.moved(starts[name], now, axis)
                assert last[name][f"dM_{convention}"] == pytest.approx(dM, rel=1e-3)
                assert last[name][f"dD_{convention}"] == pytest.approx(dD, rel=1e-3)
            assert last[name]["familiarity"] == pytest.approx(analysis.familiarity(starts[name], now, 10), abs=1e-4)
        for name in found["sites"]:  # it moves on: snapshots are taken at their steps
            path = [r["dD_rows"] for r in found["moves"] if (r["method"], r["seed"], r["site"]) == (method, 4, name)]
            assert len(path) == 4 and path == sorted(path) and path[0] > 0
        assert all("familiarity" not in row for row in found["moves"] if row["step"] != 8)


def test_the_files_say_where_they_come_from(world):
    for kind in ("subspace", "magnitude"):
        found = strict(world[1] / f"{kind}.json")
        assert found["training"]["max_steps"] == 8 and found["training"]["train_examples"] == 40
        assert found["versions"]["torch"] == torch.__version__ and found["device"] == "cpu" and found["precision"] == "fp32"
        assert {"commit", "dirty", "device_name", "threads", "model_hash", "data_hash"} <= set(found)
    assert sorted(path.name for path in world[1].iterdir()) == ["magnitude.json", "subspace.json", "subspace.npz"]


def test_members_that_cannot_be_packed_are_trained_apart(world, tmp_path, monkeypatch):
    init = Trainer.__init__
    made = []

    def alone(self, pack, *rest):
        made.append(pack.members)
        if pack.members > 1:
            raise NotPackable("rows are mixed")
        init(self, pack, *rest)

    monkeypatch.setattr(Trainer, "__init__", alone)
    words = ["subspace", "--out", str(tmp_path), "--model", world[0], *OPTIONS, "--ranks", "2,3,6"]
    assert rankwise("analysis", *words) == 0
    assert made == [4, 1, 1, 1, 1]
    packed, apart = (strict(folder / "subspace.json") for folder in (world[1], tmp_path))
    key = lambda row: (row["site"], row["rank"], row["seed"])  # noqa: E731
    for one, other in zip(*(sorted(f["amplification"], key=key) for f in (packed, apart)), strict=True):
        assert key(one) == key(other)
        assert [v for v in one.values() if isinstance(v, float)] == pytest.approx(
            [v for v in other.values() if isinstance(v, float)], rel=1e-3
        )
    for a, b in ((np.load(folder / "subspace.npz") for folder in (world[1], tmp_path)),):
        assert all(a[name] == pytest.approx(b[name], abs=2e-3) for name in a.files)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "subspace | magnitude"),
        (["subspace"], "--out"),
        (["subspace", "--steps", "x"], "--steps"),
        (["subspace", "--ranks", "3"], "at least two different ranks"),
        (["subspace", "--rate", "-1"], "learning_rate"),
        (["subspace", "--task", "glue/stb"], "closest: glue/stsb"),
        (["magnitude", "--steps", "3"], "--steps 3: give at least 4"),
        (["magnitude", "--seeds", "0"], "--seeds 0: give at least 1"),
        (["subspace", "--ranks", "3,x"], "--ranks 3,x: give at least two different ranks"),
        (["magnitude", "--ranks", "3,4"], "--ranks"),
        (["magnitude", "--seed", "-1"], "--seed -1: give at least 0"),
    ],
)
def test_what_the_user_can_mend_is_one_line_before_torch_is_imported(tmp_path, words, said):
    words = [*words, "--out", str(tmp_path)] if words not in ([], ["subspace"]) else words
    code = f"import sys; from tests.command import rankwise; code = rankwise('analysis', *{words!r}); "
    code += "sys.exit(9 if 'torch' in sys.modules else code)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("rankwise: ")
    assert not any(tmp_path.iterdir())


def test_ranks_that_no_matrix_can_have_are_refused_and_nothing_is_written(world, tmp_path, capsys):
    assert rankwise("analysis", "subspace", "--out", str(tmp_path), "--model", world[0], *OPTIONS, "--ranks", "3,33") == 2
    assert "33 is above 32" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_run_that_diverges_is_refused_with_the_remedy(world, tmp_path, capsys):
    words = ["subspace", "--out", str(tmp_path), "--model", world[0], *OPTIONS, "--ranks", "2,3", "--rate", "1e30"]
    assert rankwise("analysis", *words) == 2
    assert "not finite at the rate 1e+30: lower it" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


# -- the report ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", quick([False, True], [False]))
def test_the_report_has_every_figure_and_table_and_is_the_same_each_time(world, tmp_path, drawn, request):
    if not drawn:
        request.getfixturevalue("figures_undrawn")
    for folder in ("1", "2"):
        assert rankwise("analysis", "report", str(world[1]), "--out", str(tmp_path / folder)) == 0
    files = {path.relative_to(tmp_path / "1"): path.read_bytes() for path in (tmp_path / "1").rglob("*.*")}
    assert files == {path.relative_to(tmp_path / "2"): path.read_bytes() for path in (tmp_path / "2").rglob("*.*")}
    figures = {f"figures/{name}.{end}" for name in ("subspace-ranks", "subspace-seeds", "subspace-updates", "movement")
               for end in ("svg", "png")}  # fmt: skip
    tables = {f"tables/{name}.{end}" for name in ("overlaps", "amplification", "correlations") for end in ("csv", "tex")}
    assert {str(name) for name in files} == figures | tables | {"analysis.md"}
    page = (tmp_path / "1" / "analysis.md").read_text()
    for name in figures:
        assert name.endswith(".svg") or f"({name})" in page
    assert "nan" not in page and "8 steps of 5 rows out of 40" in page


def test_heat_maps_show_the_grids(world):
    found = read(world[1])["subspace"]
    drawing = subspaces.ranks_figure(found)
    query = [i for i, site in enumerate(found["sites"]) if site["name"].endswith("query")]
    shown = np.asarray(drawing.figure.axes[0].images[0].get_array())
    assert shown == pytest.approx(found["grids"]["A/ranks"][query].mean(0))
    assert [ax.get_title(loc="left") for ax in drawing.figure.axes[:3]] == [
        "query: two seeds", "query: one seed", "query: one seed, untrained"]  # fmt: skip
    assert drawing.figure.axes[0].get_xlabel() == "j  (r = 6, seed 4)"
    assert drawing.figure.axes[1].get_xlabel() == "j  (r = 6, seed 3)"
    gaussian = subspaces.seeds_figure(found).figure.axes[2]
    assert np.asarray(gaussian.images[0].get_array()) == pytest.approx(found["grids"]["gaussian"])
    assert gaussian.images[0].get_clim() == (0, 1)


def test_the_scatter_is_of_one_seed_with_its_own_correlation(world):
    found = read(world[1])["magnitude"]
    drawing = directions.movement_figure(found)
    ax = drawing.figure.axes[1]
    mine = [r for r in found["moves"] if (r["method"], r["seed"]) == ("lora", 3) and r["site"].endswith("query")]
    dots = {(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if line.get_linestyle() == "None"}
    assert dots == {(row["dD_rows"], row["dM_rows"]) for row in mine}
    expected = scipy.stats.pearsonr([r["dD_rows"] for r in mine], [r["dM_rows"] for r in mine]).statistic
    assert ax.get_title(loc="left") == f"lora, query  {expected:+.2f}"


def moves(numbers, method="lora", seed=0):
    """Moves of two query matrices at snapshots 1, 2, ...: [(dD, dM) of layer 0, (dD, dM) of layer 1, ...] in turn."""
    rows = []
    for at, (dD, dM) in enumerate(numbers):
        row = {"method": method, "seed": seed, "step": 1 + at // 2, "site": f"layer.{at % 2}.query"}
        row |= {"dD_rows": dD, "dM_rows": dM, "dD_columns": dD, "dM_columns": -dM, "familiarity": [0.9, 0.49, 0.5, 0.2]}
        rows.append(row)
    return rows


def magnitude_of(rows):
    found = {"kind": "magnitude", "model": "m", "task": "t", "sites": ["layer.0.query", "layer.1.query"], "moves": rows}
    found |= {"snapshots": sorted({row["step"] for row in rows}), "commit": None, "dirty": None, "methods": []}
    found |= {"training": {"max_steps": 2, "batch_size": 1, "train_examples": 1}, "precision": "fp32", "device_name": "d"}
    return found | {"versions": {"torch": "2"}}


def test_correlations_are_pearsons_a_seed_at_a_time():
    up, down = [(1, 1), (2, 3), (3, 2), (4, 4)], [(1, 4), (2, 3), (3, 2), (4, 1)]
    found = magnitude_of(moves(up, seed=0) + moves(down, seed=1) + moves(down, "dora"))
    (method, kind, n, both, last, columns, paper, *_, intruders), dora = directions.correlations(found).rows
    assert (method, kind, n, paper) == ("lora", "query", 2, 0.83)
    assert (both.mean, both.low, both.high) == pytest.approx(((0.8 - 1) / 2, -1, 0.8))  # 0.8: 1 - 6 * 2 / 60, these are ranks
    assert str(both) == "-0.10 (-1.00 to +0.80)"
    assert (columns.low, columns.high) == pytest.approx((-0.8, 1))
    assert last is None  # two layers make no correlation
    assert intruders.mean == 2  # below 0.5; 0.5 itself is not
    assert dora[3].mean == pytest.approx(-1)


def test_sentences_say_whether_the_sign_is_the_papers():
    up, down = [(1, 1), (2, 2), (3, 3), (4, 4)], [(1, 4), (2, 3), (3, 2), (4, 1)]
    found = magnitude_of(moves(down, "full") + moves(up, "lora") + moves(up, "dora"))
    said = directions.magnitude_sentences(found)
    assert "-1.00 (paper -0.62: the same sign)" in said[0]
    assert "+1.00 (paper +0.83: the same sign)" in said[1]
    assert "+1.00 (paper -0.31: the opposite sign)" in said[2]


def test_shared_dimensions_are_the_last_i_above_a_half():
    grid = np.zeros((4, 6))
    assert subspaces.shared_dimensions(grid) == 0
    grid[0, 0], grid[2, 2], grid[3, 3] = 0.9, 0.51, 0.5
    assert subspaces.shared_dimensions(grid) == 3


def test_what_random_subspaces_share_is_no_excess(random):
    grids = [analysis.phi(*(analysis.directions(random.normal(size=(8, 24))) for _ in range(2))) for _ in range(300)]
    assert subspaces.excess(np.mean(grids, 0), 24) == pytest.approx(0, abs=0.01)
    assert subspaces.excess(np.ones((8, 8)), 24) == pytest.approx(1 - 4.5 / 24)


def test_the_papers_factors_stand_in_the_table(world):
    rows = subspaces.amplifications(read(world[1])["subspace"]).rows
    assert [(row[0], row[1]) for row in rows] == [*((kind, r) for kind in ("query", "value") for r in (2, 3, 6)),
                                                  ("the paper's W_q", 4), ("the paper's W_q", 64)]  # fmt: skip
    assert [row[-1].mean for row in rows[-2:]] == pytest.approx([21.5, 1.9], abs=0.1)
    found = strict(world[1] / "subspace.json")["amplification"]
    of = [r["factor"] for r in found if r["site"].endswith("query") and (r["rank"], r["seed"]) == (6, 3)]
    assert rows[2][-1].mean == pytest.approx(np.mean(of))


def test_files_that_do_not_belong_together_are_refused(world, tmp_path, capsys):
    assert rankwise("analysis", "report", str(tmp_path)) == 2
    assert "neither subspace.json nor magnitude.json" in capsys.readouterr().err
    shutil.copyfile(world[1] / "subspace.json", tmp_path / "subspace.json")
    assert rankwise("analysis", "report", str(tmp_path)) == 2
    assert "subspace.npz: missing" in capsys.readouterr().err
    content = bytearray((world[1] / "subspace.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "subspace.npz").write_bytes(content)
    assert rankwise("analysis", "report", str(tmp_path)) == 2
    assert "not the file that subspace.json names" in capsys.readouterr().err
    (tmp_path / "subspace.json").write_text('{"schema": 2, "kind": "subspace"}')
    assert rankwise("analysis", "report", str(tmp_path)) == 2
    assert "of schema 1" in capsys.readouterr().err
    whole = json.loads((world[1] / "subspace.json").read_text())
    for value, said in (
        ({key: whole[key] for key in whole if key != "sites"}, "sites: field required"),
        (whole | {"files_sha256": 3}, "files_sha256: input should be a valid dictionary"),
        (whole | {"members": [{"rank": 2, "seed": "x", "score": 1.0}]}, "members.0.seed: input should be a valid integer"),
    ):
        (tmp_path / "subspace.json").write_text(json.dumps(value))
        assert rankwise("analysis", "report", str(tmp_path)) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "subspace.json").write_text("{")
    assert rankwise("analysis", "report", str(tmp_path)) == 2
    assert "no JSON" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["subspace.json", "subspace.npz"]


def test_the_committed_tables_are_those_of_the_committed_numbers():
    folder = ROOT / "reports" / "studies" / "analyses"
    found = read(folder)
    tables = [
        subspaces.overlaps(found["subspace"]),
        subspaces.amplifications(found["subspace"]),
        directions.correlations(found["magnitude"]),
    ]
    page = (folder / "analysis.md").read_text()
    for table in tables:
        assert table.markdown() in page
        assert (folder / "tables" / f"{table.name}.tex").read_text() == table.latex()
    for sentence in (*subspaces.subspace_sentences(found["subspace"]), *directions.magnitude_sentences(found["magnitude"])):
        assert escape_markdown(sentence) in page
