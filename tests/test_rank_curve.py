"""Curves of ranks: how an entry is written out, and which rank is said to be enough, against tests counted out by hand."""

import json
from itertools import product

import numpy as np
import pytest
from rankwise.experiments import config
from rankwise.reports import figures, tables
from rankwise.reports.page import report
from rankwise.reports.rank_curve import which_rank
from rankwise.reports.results import load
from rankwise.reports.statistics import holm, one_sided_test
from scipy.stats import ttest_1samp

from tests.test_verdicts import BASE, RATES, hill, plus, study, whole_curves


def written(*methods, **others):
    return config.parse({"model": "m", "task": "glue/stsb", "quick": True, "methods": list(methods), **others}, "s").methods


def test_ranks_stand_for_one_entry_each_and_the_scale_stays():
    plain, fixed = (
        written({"method": "lora", "learning_rate": 1e-3, "ranks": [8, 2], **rule, "scaling": scaling})
        for rule, scaling in (({"scale": 1.5}, "alpha/sqrt(r)"), ({"alpha": 12}, "alpha/r"))
    )
    assert [entry.label for entry in plain] == ["lora r=2", "lora r=8"]
    assert [(e.settings["rank"], e.settings["alpha"]) for e in plain] == [(2, 1.5 * 2**0.5), (8, 1.5 * 8**0.5)]
    assert [(e.settings["rank"], e.settings["alpha"]) for e in fixed] == [(2, 12), (8, 12)]
    assert [(e.place.curve, e.place.rank) for e in plain] == [("lora", 2), ("lora", 8)]


def test_a_method_that_prunes_ends_with_the_ranks_of_the_curve():
    entry = {"method": "adalora", "label": "mine", "learning_rate": 1e-3, "ranks": [3, 8], "scale": 2, "final_steps": "10%"}
    first, second = written(entry)
    assert (first.label, second.label) == ("mine r=3", "mine r=8")
    assert [first.settings[key] for key in ("initial_rank", "target_rank", "alpha")] == [5, 3, 10]
    assert [second.settings[key] for key in ("initial_rank", "target_rank", "alpha")] == [12, 8, 24]


def test_each_entry_is_the_run_that_it_would_be_by_itself():
    """So the runs of a study that named its ranks one by one are those of the curve, and are not made again."""
    [of_curve, _] = written({"method": "lora", "learning_rate": 1e-3, "ranks": [4, 8], "scale": 2})
    [alone] = written({"method": "lora", "label": "lora r=4", "learning_rate": 1e-3, "rank": 4, "alpha": 8})
    assert of_curve.model_copy(update={"place": None}).resolved(10).identity() == alone.resolved(10).identity()
    assert of_curve.model_copy(update={"place": None}).targets == alone.targets


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ranks": [4]}, "ranks = [4]: give two or more whole numbers above 0"),
        ({"ranks": [4, True]}, "give two or more whole numbers above 0"),
        ({"ranks": [4, 4]}, "ranks = [4, 4] has one twice"),
        ({"ranks": [4, 8]}, "ranks need a rule for the scale: give scale = 2"),
        ({"ranks": [4, 8], "scale": 2, "alpha": 3}, "scale = 2 and alpha = 3: keep the one that holds at all ranks"),
        ({"ranks": [4, 8], "scale": -1}, "scale = -1: give a number above 0"),
        ({"ranks": [4, 8], "scale": 2, "rank": 3}, "rank: a curve has each of ranks = [4, 8] at every site: take it out"),
        ({"rank": 4, "scale": 2}, "scale has no effect without ranks"),
        ({"ranks": [4, 8], "scale": 2, "method": "bitfit"}, "ranks: bitfit has no ranks"),
        ({"ranks": [4, 8], "scale": 2, "dropuot": 0.1}, "dropuot: unknown setting of lora"),
    ],
)
def test_what_is_no_curve_is_refused_once(change, said):
    with pytest.raises(ValueError) as error:
        written({"method": "lora", "learning_rate": 1e-3, **change})
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_budget_of_parameters_leaves_no_ranks_to_name():
    with pytest.raises(ValueError, match=r"methods\[0\].ranks: ranks follow from the budget of parameters"):
        written(
            {"method": "lora", "learning_rate": 1e-3, "ranks": [4, 8], "scale": 2},
            budget={"equal": "parameters", "parameters": 9},
        )


def places(ranks, curve="lora"):
    return {f"{curve} r={rank}": {"curve": curve, "rank": rank} for rank in ranks}


def curve_of(folder, shifts, spread=0.05, **described):
    """A study of LoRA at ranks 2, 4, ...: BASE plus each shift."""
    ranks = [2 ** (i + 1) for i in range(len(shifts))]
    arms = {f"lora r={rank}": plus(shift, spread * (1 + i)) for i, (rank, shift) in enumerate(zip(ranks, shifts, strict=True))}
    return study(folder, arms, reference=None, curves=places(ranks), **described), arms


def slow_which_rank(arms, margin):
    """p of enough and of too small, before correction: every pair by scipy's own t test."""
    scores = [np.array(arm) for arm in arms.values()]
    enough, small = [], []
    for i, ours in enumerate(scores):
        against = [ours - other for j, other in enumerate(scores) if j != i]
        enough.append(max(ttest_1samp(d, -margin, alternative="greater").pvalue for d in against))
        small.append(min(1, len(against) * min(ttest_1samp(d, -margin, alternative="less").pvalue for d in against)))
    return enough, small


def shaffer(values):
    """Step-down by hand: of k ranks at most k - 1 can be worse than the best by the margin."""
    k, adjusted, running = len(values), {}, 0.0
    for step, index in enumerate(sorted(range(k), key=lambda i: values[i])):
        running = max(running, min(k - 1, k - step) * values[index])
        adjusted[index] = min(1.0, running)
    return [adjusted[i] for i in range(k)]


def test_the_smallest_rank_within_the_margin_of_the_best(tmp_path):
    part, arms = curve_of(tmp_path, [-3, -0.62, -0.1, 0.0], margin=0.5, spread=0.2)
    [answer] = which_rank(part)
    enough, small = slow_which_rank(arms, 0.5)
    assert [point.p_enough for point in answer.points] == pytest.approx(shaffer(enough))
    assert [point.p_too_small for point in answer.points] == pytest.approx(shaffer(small))
    assert [point.kind for point in answer.points] == ["too small", "undecided", "enough", "enough"]
    assert (answer.smallest, answer.possible, answer.by_means) == (8, (4, 8), 8)
    assert answer.text.startswith("rank 8 is the smallest shown to be within 0.5 points of the best (p < 0.001 over 4 ranks")
    assert "Too small: 2. The smallest rank that is enough is one of 4, 8." in answer.text
    assert "The largest rank scores best: a larger one may be better still." in answer.text


def test_more_ranks_ask_for_more(tmp_path):
    """One comparison's p of 0.03 is a claim by itself and none among five ranks."""
    part, arms = curve_of(tmp_path, [0.28, 0.3, 0.29, 0.31, 0.3], margin=0.3, spread=0.2)
    raw, _ = slow_which_rank(arms, 0.3)
    assert min(raw) < 0.05 < min(shaffer(raw))
    [answer] = which_rank(part)
    assert answer.smallest is None and answer.possible == (2, 4, 8, 16, 32)
    assert answer.text.startswith("undecided: no rank is shown to be within 0.3 points of the best (over 5 ranks, n = 10 seeds")


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"quick": True}, "no claim (a quick look). By the means alone rank 4 is enough"),
        ({"best": RATES[-1]}, "no claim (the best rate of lora r=2 and lora r=4 and lora r=8 stands at the edge of its grid)"),
        ({"sweep": False}, "no claim (lora r=2 had no choice of rates; lora r=4"),
    ],
)
def test_no_rank_is_named_where_no_winner_may_be(tmp_path, described, said):
    part, _ = curve_of(tmp_path, [-3, 0.0, 0.1], margin=0.5, **described)
    [answer] = which_rank(part)
    assert answer.text.startswith(said) and answer.smallest is None
    assert {point.p_enough for point in answer.points} == {None}


def test_a_rank_whose_runs_are_missing_or_failed_leaves_no_claim(tmp_path):
    curve_of(tmp_path, [-3, 0.0], margin=0.5)
    described = json.loads((tmp_path / "study.json").read_text())
    described |= {"curves": places([2, 4, 8]), "methods": [*described["methods"], "lora r=8"]}
    (tmp_path / "study.json").write_text(json.dumps(described))
    assert which_rank(load(tmp_path))[0].text.startswith("no claim (rank 8 is not there yet)")
    failed = study(tmp_path / "f", {"lora r=2": BASE, "lora r=4": [None, *BASE[1:]]}, reference=None, curves=places([2, 4]))
    assert which_rank(failed)[0].text.startswith("no claim (1 of 10 seeds of lora r=4 failed)")


def slow_above(va, ya, vr, yr, shift):
    """One-sided p of a whole curve's difference above a shift: every swap, both rates chosen again."""
    seeds = va.shape[1]

    def difference(a, ya, r, yr):
        return ya[a.mean(1).argmax()].mean() - yr[r.mean(1).argmax()].mean()

    seen, count = difference(va, ya, vr, yr) - shift, 0
    for flips in product([False, True], repeat=seeds):
        f = np.array(flips)
        ours, other = ya - shift, yr
        count += abs(
            difference(np.where(f, vr, va), np.where(f, other, ours), np.where(f, va, vr), np.where(f, ours, other))
        ) >= (abs(seen) - 1e-9)
    half = count / 2**seeds / 2
    return half if seen > 0 else 1 - half


def test_a_whole_curve_chooses_the_rates_again(tmp_path):
    random = np.random.default_rng(6)
    curves = {}
    for rank, top in ((2, 75.0), (4, 80.0), (8, 80.2)):
        selection, reported = hill(random, top, seeds=7)
        steep = 1.5 * (np.arange(3) - 1)[:, None] ** 2
        curves[f"lora r={rank}"] = RATES, selection - steep, reported - steep
    whole_curves(tmp_path, curves, reference=None, margin=3.0)
    described = json.loads((tmp_path / "study.json").read_text())
    (tmp_path / "study.json").write_text(json.dumps({**described, "curves": places([2, 4, 8])}))
    part = load(tmp_path)
    [answer] = which_rank(part)
    assert not answer.text.startswith("no claim"), answer.text
    pairs = list(curves.values())
    enough = [
        max(slow_above(*pairs[i][1:], *pairs[j][1:], -3.0) for j in range(3) if j != i) for i in range(3)
    ]  # fmt: skip
    small = [min(1, 2 * min(slow_above(*pairs[j][1:], *pairs[i][1:], 3.0) for j in range(3) if j != i)) for i in range(3)]
    assert [point.p_enough for point in answer.points] == pytest.approx(shaffer(enough))
    assert [point.p_too_small for point in answer.points] == pytest.approx(shaffer(small))
    assert answer.smallest == 4 and [point.kind for point in answer.points] == ["too small", "enough", "enough"]


@pytest.mark.parametrize("studies", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_wrong_claim_comes_at_most_once_in_twenty_studies(studies):
    """Three ranks lie exactly at the margin below the fourth: the claim that one of them is enough is wrong."""
    random, margin, seeds, wrong = np.random.default_rng(0), 1.0, 6, 0
    for _ in range(studies):
        scores = random.standard_normal((4, seeds)) - np.array([margin, margin, margin, 0.0])[:, None]
        p = [max(one_sided_test(scores[i] - scores[j], -margin) for j in range(4) if j != i) for i in range(4)]
        wrong += bool((holm(p, most_true=3)[:3] <= 0.05).any())
    assert wrong / studies <= 0.05 + 2 * (0.05 * 0.95 / studies) ** 0.5


def test_the_report_shows_table_figure_and_answer(tmp_path):
    part, _ = curve_of(tmp_path / "runs", [-3, -0.1, 0.0], margin=0.5)
    table = tables.rank_curve(part)
    assert [row[1] for row in table.rows] == [2, 4, 8] and [row[6] for row in table.rows] == ["too small", "enough", "enough"]
    drawing = figures.rank_curve(part)
    assert "rank 4 is the smallest shown" in drawing.alt
    assert report.section(part)["answers"][0].text.startswith("rank 4 is the smallest shown")


@pytest.mark.slow
def test_both_pages_show_the_curve(tmp_path):
    part, _ = curve_of(tmp_path / "runs", [-3, -0.1, 0.0], margin=0.5)
    text = report.write(part, tmp_path / "report").read_text()
    assert "## Which rank?" in text and "rank 4 is the smallest shown to be within 0.5 points of the best" in text
    assert "Which rank?" in (tmp_path / "report/report.html").read_text()
    assert (tmp_path / "report/figures/rank-curve.svg").is_file() and (tmp_path / "report/tables/rank-curve.csv").is_file()


@pytest.mark.slow
def test_a_study_that_is_run_knows_its_curves(tmp_path, monkeypatch):
    from rankwise.experiments.study import Runner

    from tests import small_world

    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    small_world.register(monkeypatch.setitem)
    training = small_world.training(epochs=1, max_steps=2, train_examples=12, evaluation_examples=8).model_dump()
    entry = {"method": "lora", "ranks": [1, 2], "scale": 2, "learning_rate": 1e-2}
    what = small_world.study(small_world.model(tmp_path / "model"), [entry], training=training, quick=True)
    runner = Runner(what, tmp_path / "runs", device="cpu")
    runner.prepare()
    assert {result["status"] for result in runner.run()} == {"completed"}
    [answer] = which_rank(load(tmp_path / "runs"))
    assert [point.rank for point in answer.points] == [1, 2] and answer.text.startswith("no claim (a quick look)")
    half, whole = (row[9] for row in tables.rank_curve(load(tmp_path / "runs")).rows)
    assert 2 * half == whole
