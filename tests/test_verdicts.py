"""Verdicts on matrices worked by hand: what is claimed, what is withheld and why, in words."""

import json

import numpy as np
import pytest
from rankwise.reports import tables
from rankwise.reports.results import load
from rankwise.reports.statistics import holm, seeds_needed, sign_flip_power, sign_flip_test
from rankwise.reports.verdicts import budget_reached, missing_baselines, verdicts, warnings

from tests.slow_designs import slow_shared_rate, slow_whole_curve
from tests.synthetic_runs import write_json, write_lines, write_run

RATES = (1e-3, 3e-3, 9e-3)
BASE = [80.0, 81.0, 79.5, 80.5, 80.2, 79.8, 80.9, 80.1, 79.9, 80.3]


def study(folder, arms, *, best=3e-3, quick=False, margin=0.5, reference="lora", sweep=True, **described):
    """A study whose final scores are given for each setting; the sweep's best rate is `best`, or each setting's own."""
    for setting, scores in arms.items():
        method = setting.split()[0]
        mine = best[setting] if isinstance(best, dict) else best
        for rate in RATES if sweep else ():
            write_run(folder, method=method, setting=setting, phase="sweep", rate=rate, score=80.0, quick=quick,
                      selection_score=80.0 - 10 * abs(np.log(rate / mine)))  # fmt: skip
        for seed, score in enumerate(scores):
            changes = {"error": "diverged"} if score is None else {"score": float(score)}
            write_run(folder, method=method, setting=setting, seed=seed, rate=mine, quick=quick, **changes,
                      score_rows=1000, score_standard_error=1.25)  # fmt: skip
    write_json(
        folder / "study.json",
        {"schema": 1, "study": "stsb-minilm", "quick": quick, "title": "t", "captions": [], "reference": reference,
         "methods": list(arms), "complete": True, "margin": margin, **described},
    )  # fmt: skip
    return load(folder)


def plus(shift, spread=0.05):
    return [score + shift + spread * (-1) ** i for i, score in enumerate(BASE)]


def whole_curves(folder, curves, fails=(), **described):
    """A study without a sweep: curves[setting] = (rates, selection (K, S), reported (K, S)); fails: (setting, rate, seed)."""
    for setting, (rates, selection, reported) in curves.items():
        for k, rate in enumerate(rates):
            for seed in range(selection.shape[1]):
                scores = {"score": float(reported[k, seed]), "selection_score": float(selection[k, seed])}
                if (setting, rate, seed) in fails:
                    scores = {"error": "diverged"}
                write_run(folder, method=setting, setting=setting, seed=seed, rate=rate, metric="pearson_spearman", **scores)
    described = {"schema": 1, "study": "stsb-minilm", "quick": False, "title": "t", "captions": [], "reference": "lora",
                 "methods": list(curves), "complete": True, "margin": 0.05, "design": "whole-curve", **described}  # fmt: skip
    write_json(folder / "study.json", described)
    return load(folder)


def hill(random, top, rates=3, seeds=8):
    """Curves that are best at the middle rate, (K, S) selection and reported scores."""
    reported = top - 0.3 * (np.arange(rates) - 1)[:, None] ** 2 + random.standard_normal((rates, seeds))
    return reported + 0.5 * random.standard_normal(reported.shape), reported


def test_a_whole_curve_is_tested_with_the_rates_chosen_again_in_each_permutation(tmp_path):
    random = np.random.default_rng(3)
    lora, full, dora = hill(random, 80.0), hill(random, 81.2), hill(random, 80.1)
    grids = {"lora": RATES, "full": tuple(rate / 10 for rate in RATES), "dora": RATES}
    curves = {name: (grids[name], *curve) for name, curve in (("lora", lora), ("full", full), ("dora", dora))}
    part = whole_curves(tmp_path, curves, shared_with={"dora": "lora"})
    found = {v.setting: v for v in verdicts(part)}
    raw = [slow_whole_curve(*full, *lora), slow_shared_rate(*dora, *lora)]
    assert [found["full"].p, found["dora"].p] == pytest.approx(holm(raw).tolist())
    plain = sign_flip_test(full[1][full[0].mean(1).argmax()] - lora[1][lora[0].mean(1).argmax()])
    assert raw[0] != pytest.approx(plain)  # the test that takes the rates as given says something else here
    assert found["full"].n == 8 and found["full"].low < found["full"].mean < found["full"].high


def test_a_failed_run_of_a_whole_curve_scores_as_a_constant_predictor_at_its_rate(tmp_path):
    random = np.random.default_rng(5)
    lora, full = hill(random, 80.0), hill(random, 84.0)
    curves = {"lora": (RATES, *lora), "full": (RATES, *full)}
    part = whole_curves(tmp_path, curves, fails={("full", RATES[1], 0)})
    for curve in full:
        curve[1, 0] = 0.0
    (only,) = verdicts(part)
    assert only.n == 8 and only.p == pytest.approx(slow_whole_curve(*full, *lora))
    assert only.mean == pytest.approx(full[1][full[0].mean(1).argmax()].mean() - lora[1][1].mean())


def test_better_worse_equivalent_and_undecided_in_words(tmp_path):
    arms = {"full": plus(2), "head": plus(-30), "lora": BASE, "dora": plus(0.1), "adalora": plus(0.3, 1.5)}
    part = study(tmp_path, arms)
    found = {v.setting: v for v in verdicts(part)}
    assert {setting: v.kind for setting, v in found.items()} == {
        "full": "better", "head": "worse", "dora": "equivalent", "adalora": "undecided"
    }  # fmt: skip
    # By hand: differences 0.1 + 0.05 and 0.1 - 0.05 five times each; sd = 0.05 sqrt(10 / 9); t(0.975, 9) = 2.262157.
    half = 2.2621571628 * 0.05 * np.sqrt(10 / 9) / np.sqrt(10)
    assert (found["dora"].low, found["dora"].high) == pytest.approx((0.1 - half, 0.1 + half))
    assert found["dora"].text == (
        "equivalent to lora within 0.5 (difference +0.10, 95 % interval +0.06 to +0.14, n = 10, "
        "TOST p < 0.001 in a family of 4)"
    )
    assert found["full"].p == pytest.approx(4 * 2 / 2**10)  # the smallest p there is, times the family
    assert found["full"].text == (
        "better than lora (difference +2.00, 95 % interval +1.96 to +2.04, n = 10, p = 0.008 in a family of 4)"
    )
    assert found["adalora"].text.startswith(
        "undecided against lora (difference +0.30, 95 % interval -0.83 to +1.43, n = 10; smallest detectable difference "
    )
    assert [v.setting for v in verdicts(part)] == ["full", "head", "dora", "adalora"]  # in the study's order


def test_holm_is_over_the_family_and_planned_comparisons_count(tmp_path):
    """Eight of ten seeds up: raw p = 0.11 by the sign flip of unequal steps; alone it might pass, never in a family."""
    differences = [1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 1.1, 0.9, -0.2, -0.3]
    arms = {"full": [b + d for b, d in zip(BASE, differences, strict=True)], "lora": BASE, "dora": plus(0), "head": plus(-9)}
    part = study(tmp_path, arms, margin=0.01)
    raw = [sign_flip_test(differences), sign_flip_test([0.05 * (-1) ** i for i in range(10)]), 2 / 2**10]
    assert [v.p for v in verdicts(part)] == pytest.approx(holm([raw[0], raw[1], raw[2]]).tolist())
    (tmp_path / "study.json").write_text(
        json.dumps({**json.loads((tmp_path / "study.json").read_text()), "methods": [*arms, "adalora", "bitfit"]})
    )
    wider = {v.setting: v.p for v in verdicts(load(tmp_path))}
    assert wider["head"] == pytest.approx(5 * 2 / 2**10)  # five comparisons planned, three of them finished


def test_too_few_seeds_cannot_claim_and_say_what_would(tmp_path):
    part = study(tmp_path, {"full": plus(5)[:5], "lora": BASE[:5]})
    [verdict] = verdicts(part)
    assert (
        verdict.kind == "undecided"
        and "a family of 1 takes 6 seeds" in verdict.text
        and "n = 5; smallest detectable difference" in verdict.text
    )
    assert any("takes n >= 6 seeds, and here n = 5" in line for line in warnings(part))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"best": {"full": 9e-3, "lora": 3e-3}}, "the best rate of full stands at the edge of its grid"),
        ({"best": {"full": 3e-3, "lora": 1e-3}}, "the best rate of lora stands at the edge of its grid"),
        ({"sweep": False}, "full had no choice of rates; lora had no choice of rates"),
    ],
)
def test_no_winner_and_no_equivalence_where_rates_are_not_settled(tmp_path, change, reason):
    for name, shift in (("a", 5), ("b", 0)):
        [verdict] = verdicts(study(tmp_path / name, {"full": plus(shift), "lora": BASE}, **change))
        assert (verdict.kind, reason in verdict.text) == ("undecided", True)


def test_a_quick_look_claims_nothing(tmp_path):
    [verdict] = verdicts(study(tmp_path, {"full": plus(5), "lora": BASE}, quick=True))
    assert verdict.kind == "no claim" and verdict.text.startswith("no claim against lora: a quick look (difference +5.00")


def test_failed_seeds_leave_no_winner(tmp_path):
    [verdict] = verdicts(study(tmp_path, {"full": [None, *plus(5)[1:]], "lora": BASE}))
    assert verdict.kind == "undecided" and "1 of 10 seeds of full failed" in verdict.text and verdict.n == 9


def test_one_seed_and_none_are_no_claim(tmp_path):
    assert "n = 1 supports no claim" in verdicts(study(tmp_path / "a", {"full": [85.0], "lora": [80.0]}))[0].text
    [verdict] = verdicts(study(tmp_path / "b", {"full": [85.0], "lora": [None]}))
    assert (verdict.kind, verdict.n) == ("no claim", 0) and "no seed is finished for both" in verdict.text


@pytest.mark.parametrize(
    ("rows", "scored", "reached"),
    [
        ([(0, 96, 96), (50, 60, 60), (100, 48, 48)], 100, True),
        ([(0, 96, 96), (50, 60, 60), (100, 48, 48)], 50, False),  # the best epoch came before the last budget
        ([(0, 96, 96), (50, 60, 60), (100, 48, 52)], 100, False),  # more ranks than the budget
    ],
)
def test_a_checkpoint_scored_before_its_budget_is_no_winner(tmp_path, rows, scored, reached):
    part = study(tmp_path, {"adalora": plus(5), "lora": BASE})
    for run in part.runs:
        if run.config.phase == "final" and run.config.method == "adalora":
            lines = [{"step": s, "budget": b, "active": a, "live": a, "ranks": {"x": a}} for s, b, a in rows]
            write_lines(run.folder / "ranks.jsonl", lines)
            result = json.loads((run.folder / "result.json").read_text())
            write_json(run.folder / "result.json", {**result, "scored_step": scored})
    part = load(tmp_path)
    assert budget_reached(part.arms[0]) == reached
    [verdict] = verdicts(part)
    assert verdict.kind == ("better" if reached else "undecided")
    assert ("adalora was scored before its rank budget was reached" in verdict.text) != reached


def test_a_test_part_too_small_for_the_difference_is_told_with_its_error(tmp_path):
    part = study(tmp_path, {"full": plus(2), "lora": BASE, "dora": plus(3)})
    assert [v.kind for v in verdicts(part)] == ["better", "better"]
    told = [line for line in warnings(part) if "part is small" in line]
    assert len(told) == 1 and "+2.00 points, where the standard error of a score on its 1,000 rows is 1.25" in told[0]
    assert any("Standard error of one score" in line and "full 1.25" in line for line in tables.comparison(part).caption)


def test_a_papers_own_protocol_is_labelled_and_missing_baselines_are_named(tmp_path):
    part = study(tmp_path, {"dora": plus(2), "adalora": BASE}, reference="adalora", protocol="best-dev-epoch")
    text = " ".join(warnings(part))
    assert "A paper's own protocol" in text and "Full fine-tuning is not in the table" in text and "Plain LoRA is not" in text


def test_controls_of_an_allocation_belong_into_every_table_that_is_no_quick_look(tmp_path):
    part = study(tmp_path / "none", {"full": plus(2), "lora": BASE, "adalora": plus(0.1)})
    assert missing_baselines(part) == ["A random allocation of the rank budget"]
    assert missing_baselines(study(tmp_path / "quick", {"adalora": BASE}, quick=True, reference="adalora")) == []
    arms = {"full": plus(2), "adalora": plus(0.1), "random-rank": BASE}
    part = study(tmp_path / "random", arms, reference="adalora")
    assert missing_baselines(part) == ["Plain LoRA", "A uniform allocation of the rank budget"]
    assert "A uniform allocation of the rank budget is not in the table, where a fair" in " ".join(warnings(part))


@pytest.mark.parametrize(
    ("method", "settings", "written", "placed"),
    [
        ("lora", {"rank": 8}, None, "uniform"),
        ("lora", {"rank": 8, "rank_pattern": {"^a$": 9}}, None, "uniform"),  # a budget of parameters mixes ranks
        ("dora", {"rank": 8, "rank_pattern": {"^a$": 2}}, None, "given"),
        ("lora", {"rank": 8, "rank_pattern": {"^a$": 2}}, "taken", "taken"),  # what the run wrote goes first
        ("adalora", {"initial_rank": 4, "target_rank": 2}, None, "learned"),
        ("allocated", {"initial_rank": 4, "target_rank": 2, "score": "random"}, None, "random"),
        ("random-rank", {"rank": 4}, None, "random"),
        ("full", {}, None, "none"),
        ("adalora", {"rank": 8}, None, "learned"),  # settings of another version: by the method's name
        ("dora", {"r": 8}, None, "uniform"),
        ("gone", {}, None, "none"),
    ],
)
def test_what_placed_the_ranks_is_told_by_the_run_or_its_settings_or_its_method(tmp_path, method, settings, written, placed):
    folder = write_run(tmp_path, method=method)
    config = json.loads((folder / "config.json").read_text()) | {"method_settings": settings}
    write_json(folder / "config.json", config | ({"allocation": written} if written else {}))
    assert load(tmp_path).arms[0].allocations == {placed}


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"equal": "steps"}, None),
        ({"equal": "parameters", "parameters": 331776, "scale": 2.0}, "is 331,776 active parameters, the head not counted, at"),
        ({"equal": "time"}, "Equal in training time: each setting has as many steps as fit into the reference's time"),
        ({"equal": "memory", "bytes": 2**31}, "Equal in memory: no training step may need more than 2.00 GiB"),
    ],
)
def test_the_caption_says_what_was_made_equal(tmp_path, budget, words):
    caption = tables.comparison(study(tmp_path, {"full": plus(2), "lora": BASE}, budget=budget)).caption
    planned = [line for line in caption if line.startswith(("The budget of each", "Equal in training", "Equal in memory"))]
    assert [words in line for line in planned] == ([] if words is None else [True])


def test_the_tables_of_statistics_and_of_all_tasks_by_hand(tmp_path):
    arms = {"lora": BASE[:4], "full": [82.0, 82.0, 80.5, 80.4]}
    part = study(tmp_path, arms)
    row = dict(zip((t := tables.statistics_table(part)).columns, t.rows[1], strict=True))
    assert row["median"] == 81.25 and row["mean"] == pytest.approx(81.225)
    # Of 16 pairs: 82.0 twice beats all four, 80.5 beats 80.0 and 79.5 and ties 80.5, 80.4 beats 80.0 and 79.5.
    assert row["P(improvement)"] == pytest.approx((4 + 4 + 2.5 + 2) / 16)
    assert row["test-set error"] == pytest.approx(1.25)
    for other in part.runs:  # the same study on a second task, 10 points lower
        config, result = (json.loads((other.folder / name).read_text()) for name in ("config.json", "result.json"))
        fingerprint = "f" + config["fingerprint"][1:]
        lower = {k: None if result[k] is None else result[k] - 10 for k in ("score", "selection_score")}
        changed = {"task": "sarcasm", "fingerprint": fingerprint}
        write_json(tmp_path / ("f" + other.folder.name[1:]) / "config.json", {**config, **changed})
        write_json(tmp_path / ("f" + other.folder.name[1:]) / "result.json", {**result, **changed, **lower})
    parts = load(tmp_path).parts()
    assert len(parts) == 2
    table = tables.overall(parts)
    row = dict(zip(table.columns, table.rows[1], strict=True))
    assert row["mean over tasks"].mean == pytest.approx(76.225)
    # Eight values, a quarter cut at each end: the middle four of 70.4 70.5 72 72 | 80.4 80.5 82 82.
    assert row["interquartile mean"] == pytest.approx((72 + 72 + 80.4 + 80.5) / 4)
    assert row["difference to lora"].mean == pytest.approx(81.225 - np.mean(BASE[:4]))
    assert tables.overall(parts[:1]) is None and tables.verdicts_over_tasks(parts[:1]) is None
    over = tables.verdicts_over_tasks(parts)
    assert over.columns == ("setting", "glue/stsb", "sarcasm") and [row[0] for row in over.rows] == ["full"]
    [verdict] = verdicts(parts[1])
    cell = f"{verdict.kind} {verdict.mean:+.1f} ({verdict.low:+.1f} to {verdict.high:+.1f})"
    assert over.rows[0][2] == cell and any("no difference to lora can be claimed" in line for line in over.caption)


def test_stated_power_is_that_of_the_test_as_run():
    """The share of drawn studies in which the exact test with Holm's first threshold finds an effect of 1.5 sd."""
    generator = np.random.default_rng(5)
    found = np.mean([sign_flip_test(generator.normal(1.5, 1, 8)) <= 0.05 / 3 for _ in range(1500)])
    assert sign_flip_power(8, 1.5, 3) == pytest.approx(found, abs=0.045)  # three standard errors of both
    assert sign_flip_power(seeds_needed(3) - 1, 50.0, 3) == 0.0  # too few seeds see nothing, however large


def test_equivalence_is_two_one_sided_tests_of_a_family_of_its_own(tmp_path):
    """Between both: 0.25 within 0.5 with an sd of 0.42; by hand t = 0.25 / (sd / sqrt(10)), one side, nine degrees."""
    from scipy.stats import t

    near = plus(0.25, 0.4)
    part = study(tmp_path, {"lora": BASE, "dora": near, "full": plus(3)})
    found = {v.setting: v for v in verdicts(part)}
    raw = t.sf(0.25 / (0.4 * np.sqrt(10 / 9) / np.sqrt(10)), 9)
    assert found["dora"].p_equivalent == pytest.approx(2 * raw) and found["full"].p_equivalent > 0.99  # over two
    alone = study(tmp_path / "alone", {"lora": BASE, "dora": plus(0.25, 0.39)})
    [one] = verdicts(alone)
    assert one.kind == "equivalent" and one.high > 0.5  # its 95 % interval goes beyond the margin, the 90 % one does not
    more = study(tmp_path / "more", {"lora": BASE, "dora": plus(0.25, 0.39), "full": plus(3), "head": plus(-9)})
    assert {v.setting: v.kind for v in verdicts(more)}["dora"] == "undecided"


def test_equivalence_of_whole_curves_is_the_tests_own_inversion(tmp_path):
    random = np.random.default_rng(3)
    lora = hill(random, 80.0)
    close = tuple(scores + 0.02 * random.standard_normal(scores.shape) for scores in lora)
    part = whole_curves(tmp_path, {"lora": (RATES, *lora), "full": (RATES, *close)}, margin=0.5)
    [one] = verdicts(part)
    raw = max(slow_whole_curve(close[0], close[1] - shift, *lora) for shift in (-0.5, 0.5)) / 2
    assert one.p_equivalent == pytest.approx(raw) and 0 < raw < 0.5


def test_p_over_the_study_counts_the_comparisons_of_every_task(tmp_path):
    for task, shift in (("glue/stsb", 2), ("sarcasm", 0.1)):
        for setting, scores in {"lora": BASE, "full": plus(shift), "dora": plus(0, 1.0)}.items():
            for rate in RATES:
                write_run(tmp_path, method=setting, phase="sweep", rate=rate, task=task,
                          selection_score=80 - abs(np.log(rate / 3e-3)))  # fmt: skip
            for seed, score in enumerate(scores[:8]):
                write_run(tmp_path, method=setting, seed=seed, rate=3e-3, task=task, score=float(score))
    described = {"schema": 1, "study": "stsb-minilm", "quick": False, "title": "t", "captions": [], "reference": "lora"}
    write_json(tmp_path / "study.json", described | {"methods": ["lora", "full", "dora"], "complete": True, "margin": 0.001})
    stsb, sarcasm = load(tmp_path).parts()
    raw = [sign_flip_test([a - b for a, b in zip(plus(shift, spread)[:8], BASE[:8], strict=True)])
           for shift, spread in ((2, 0.05), (0, 1.0), (0.1, 0.05), (0, 1.0))]  # fmt: skip
    found = [*verdicts(stsb), *verdicts(sarcasm)]
    assert [v.p_study for v in found] == pytest.approx(holm(raw).tolist())
    assert found[0].text.endswith("p = 0.016 in a family of 2, 0.031 over the study's 4)")
    assert verdicts(study(tmp_path / "one", {"lora": BASE, "full": plus(1)}))[0].p_study is None


def test_the_edge_is_that_of_the_rate_which_the_comparison_chose(tmp_path):
    """The arm alone is best at its middle rate; with the arm that shares it, at the edge."""
    random = np.random.default_rng(0)
    own = np.repeat([[79.0], [80.0], [79.5]], 8, 1) + 0.01 * random.standard_normal((3, 8))
    other = np.repeat([[70.0], [70.0], [79.0]], 8, 1) + 0.01 * random.standard_normal((3, 8))
    curves = {"lora": (RATES, own, own), "dora": (RATES, other, other)}
    [one] = verdicts(whole_curves(tmp_path, curves, shared_with={"dora": "lora"}))
    assert "the best rate of dora and lora stands at the edge of its grid" in one.text
    [apart] = verdicts(whole_curves(tmp_path / "apart", curves))
    assert "the best rate of dora stands at the edge" in apart.text


def test_a_failed_run_of_an_accuracy_scores_the_commonest_label(tmp_path):
    from rankwise.experiments import labels
    from rankwise.reports.compared import NoConstantScore, compared

    for seed in range(4):
        write_run(tmp_path, method="lora", seed=seed, score=80.0, metric="accuracy")
        write_run(tmp_path, method="dora", seed=seed, score=81.0, metric="accuracy", error="diverged" if not seed else None)
    for path in tmp_path.glob("*/config.json"):
        write_json(path, json.loads(path.read_text()) | {"data_hash": "a" * 64})
    part = load(tmp_path).parts()[0]
    dora, lora = (next(arm for arm in part.arms if arm.setting == name) for name in ("dora", "lora"))
    with pytest.raises(NoConstantScore, match="the labels are not kept"):
        compared(part, dora, lora, range(4))
    labels.write(tmp_path, {("a" * 64, "test"): labels.Labels("classification", np.array([0, 1, 1, 1, 2]))})
    part = load(tmp_path).parts()[0]
    found = compared(part, dora, lora, range(4))
    assert found.differences.tolist() == [60.0 - 80, 1, 1, 1] and found.failed == (1, 0)
