"""Parts of a method in every combination: how an entry is written out, and what each part is worth, by least squares."""

import json
from itertools import product

import numpy as np
import pytest
from rankwise.experiments import config
from rankwise.reports import figures, tables
from rankwise.reports.factors import contrasts, decompositions
from rankwise.reports.page import report
from rankwise.reports.results import load
from rankwise.reports.statistics import holm, sign_flip_test
from scipy.stats import ttest_1samp

from tests.synthetic_runs import write_json, write_run
from tests.test_verdicts import study

PARTS = {
    "start": [{"form": "doublet"}, {"form": "triplet"}],
    "rate": [{"learning_rate": 1e-3, "alpha": 12}, {"learning_rate": 1e-2, "alpha": 24}],
    "penalty": [{"orthogonality": 0.0}, {"orthogonality": 0.1}],
}
ENTRY = {"method": "allocated", "label": "parts", "initial_rank": 6, "target_rank": 4}


def parsed(entry, **others):
    return config.parse({"model": "m", "task": "glue/stsb", "quick": True, "methods": [entry], **others}, "s").methods


def test_factors_stand_for_every_combination_and_each_is_the_entry_written_by_hand():
    found = parsed({**ENTRY, "factors": PARTS})
    assert [entry.label for entry in found] == [
        "parts: none", "parts: penalty", "parts: rate", "parts: rate + penalty",
        "parts: start", "parts: start + penalty", "parts: start + rate", "parts: start + rate + penalty",
    ]  # fmt: skip
    for entry, levels in zip(found, product((0, 1), repeat=3), strict=True):
        assert (entry.cell.design, entry.cell.levels) == ("parts", dict(zip(PARTS, levels, strict=True)))
        by_hand = {k: v for name, level in entry.cell.levels.items() for k, v in PARTS[name][level].items()}
        [alone] = parsed({**ENTRY, **by_hand, "label": entry.label})
        assert entry.model_copy(update={"cell": None}) == alone


def test_a_level_may_change_the_method_and_one_factor_is_enough():
    low, high = parsed({"label": "x", "rank": 4, "alpha": 8, "learning_rate": 1e-3,
                        "factors": {"magnitude": [{"method": "lora"}, {"method": "dora"}]}})  # fmt: skip
    assert (low.method, low.label, high.method, high.label) == ("lora", "x: none", "dora", "x: magnitude")


def test_a_budget_gives_each_entry_the_scale_that_it_asks_for():
    rate = [{"learning_rate": 1e-3}, {"learning_rate": 1e-2, "scale": 3.0}]
    entry = {"method": "lora", "factors": {"rate": rate}}
    low, high = parsed(entry, budget={"equal": "parameters", "parameters": 10_000})
    assert (low.scale, high.scale) == (None, 3.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"factors": 3}, "factors = 3: give a table of 1 to 5 factors"),
        ({"factors": {}}, "give a table of 1 to 5 factors"),
        ({"factors": {f"f{i}": [{"alpha": 1}, {"alpha": 2}] for i in range(6)}}, "give a table of 1 to 5 factors"),
        ({"factors": {"a": [{"alpha": 1}]}}, "}]: give two different tables of settings, without it first"),
        ({"factors": {"a": [{"alpha": 1}, {"alpha": 1}]}}, "give two different tables of settings"),
        ({"factors": {"a": [{}, {"alpha": 1}], "b": [{}, {"alpha": 2}]}}, 'factors.b: alpha is given by the factor "a" too'),
        ({"alpha": 3, "factors": {"a": [{}, {"alpha": 1}]}}, "factors.a: alpha is given by the entry too: keep it in one"),
        ({"factors": {"a": [{}, {"label": "x"}]}}, "factors.a: label is no setting of a level: take it out"),
        ({"ranks": [2, 4], "scale": 2, "factors": {"a": [{}, {"dropout": 0.1}]}}, "ranks and factors both stand for several"),
        ({"rank": 4, "alpha": 8, "factors": {"a": [{}, {"dropuot": 0.1}]}}, "dropuot: unknown setting of lora"),
        ({"rank": 4, "alpha": 8, "factors": {"a": [{}, {"dropout": 0.1}]}, "targets": 3}, "targets = 3: should be a valid"),
    ],
)  # fmt: skip
def test_what_makes_no_combinations_is_refused_in_one_line(change, said):
    with pytest.raises(ValueError) as error:
        parsed({"method": "lora", "learning_rate": 1e-3, **change})
    assert said in str(error.value)
    assert all(line.count("methods[0]") == 1 for line in str(error.value).splitlines())
    assert len(set(str(error.value).splitlines())) == len(str(error.value).splitlines())


def test_effects_are_the_least_squares_coefficients_of_the_saturated_model():
    """score = constant + 1/2 sum_S e_S prod x_f: the regression that a textbook solves, on made-up scores."""
    random = np.random.default_rng(0)
    scores = random.standard_normal((8, 5))
    sets = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    levels = np.array(list(product((-1.0, 1.0), repeat=3)))
    design = np.stack([np.ones(8), *(levels[:, list(chosen)].prod(1) for chosen in sets)], 1)
    coefficients = np.linalg.lstsq(design, scores, rcond=None)[0]
    assert np.allclose(contrasts(scores, sets), 2 * coefficients[1:])
    odd = [i for i, chosen in enumerate(sets) if len(chosen) % 2]
    assert np.allclose(contrasts(scores, sets)[odd].sum(0), scores[-1] - scores[0])


EFFECTS = {"start": 1.0, "penalty": -0.4}


def combined(folder, seeds=8, fails=()):
    """A study of two factors: 80 + the effects + 0.6 where both are there, and a little noise that no effect explains."""
    random = np.random.default_rng(3)
    arms, cells = {}, {}
    for start, penalty in product((0, 1), repeat=2):
        parts = " + ".join(name for name, level in (("start", start), ("penalty", penalty)) if level) or "none"
        level = 80 + EFFECTS["start"] * start + EFFECTS["penalty"] * penalty + 0.6 * start * penalty
        setting = f"lora {parts}"
        arms[setting] = [None if (setting, s) in fails else level + 0.05 * random.standard_normal() for s in range(seeds)]
        cells[setting] = {"design": "lora", "levels": {"start": start, "penalty": penalty}}
        for seed, score in enumerate(arms[setting]):
            said = {"error": "diverged"} if score is None else {"score": score}
            write_run(folder, method="lora", setting=setting, seed=seed, metric="pearson_spearman", **said)
    named = {"schema": 1, "study": "stsb-minilm", "quick": False, "title": "t", "captions": [], "methods": list(arms)}
    write_json(folder / "study.json", {**named, "reference": None, "complete": True, "cells": cells})
    return load(folder), arms


def test_each_part_and_their_combination_with_interval_and_corrected_p(tmp_path):
    part, arms = combined(tmp_path)
    [found] = decompositions(part)
    neither, penalty, start, both = (np.array(arms[f"lora {name}"]) for name in ("none", "penalty", "start", "start + penalty"))
    by_seed = {
        ("start",): (start + both) / 2 - (neither + penalty) / 2,
        ("penalty",): (penalty + both) / 2 - (neither + start) / 2,
        ("start", "penalty"): ((both - penalty) - (start - neither)) / 2,
    }
    assert [effect.factors for effect in found.effects] == list(by_seed)
    for effect, row in zip(found.effects, by_seed.values(), strict=True):
        interval = ttest_1samp(row, 0).confidence_interval(0.95)
        assert (effect.mean, effect.low, effect.high) == pytest.approx((row.mean(), interval.low, interval.high))
        assert effect.p == sign_flip_test(row)
    single = [effect.p_adjusted for effect in found.effects[:2]]
    assert single == pytest.approx(list(holm([sign_flip_test(row) for row in list(by_seed.values())[:2]])))
    assert found.effects[2].p_adjusted == found.effects[2].p
    assert found.whole.mean == pytest.approx((both - neither).mean())
    assert found.text.startswith("start +1.3") and "start with penalty +0.29" in found.text and "n = 8 seeds of 4" in found.text


def test_a_failed_run_scores_as_a_constant_predictor_and_a_missing_one_waits(tmp_path):
    part, _ = combined(tmp_path / "failed", fails={("lora none", 2)})
    [found] = decompositions(part)
    assert (found.n, found.failed) == (8, 1) and found.effects[0].mean == pytest.approx(1.32 + 80 / 16, abs=0.02)
    part, _ = combined(tmp_path / "waits")
    described = json.loads((tmp_path / "waits/study.json").read_text())
    absent = {"design": "lora", "levels": {"start": 1, "penalty": 0}}
    described["cells"] = {k: v for k, v in described["cells"].items() if k != "lora start"} | {"lora beginning": absent}
    write_json(tmp_path / "waits/study.json", described)
    [waiting] = decompositions(load(tmp_path / "waits"))
    assert (waiting.n, waiting.effects, waiting.missing) == (0, (), ("lora beginning",))
    assert waiting.text == "waiting: no seed has run every combination (lora beginning)."


def test_the_report_says_what_each_part_is_worth(tmp_path):
    part, _ = combined(tmp_path / "runs")
    table = tables.factors(part)
    assert [row[1] for row in table.rows] == ["start", "penalty", "start x penalty", "all parts against none"]
    drawing = figures.factors(part)
    assert drawing.name == "factors" and "What each part is worth" in drawing.title
    written = report.write(tmp_path / "runs", tmp_path / "report").read_text()
    assert "## What each part is worth" in written and "start x penalty" in written
    assert "What each part is worth" in (tmp_path / "report/report.html").read_text()
    assert (tmp_path / "report/tables/factors.csv").exists() and (tmp_path / "report/figures/factors.svg").exists()


def test_a_study_without_factors_says_nothing_of_them(tmp_path):
    part = study(tmp_path, {"lora": [80.0, 81.0]}, sweep=False)
    assert (decompositions(part), tables.factors(part), figures.factors(part)) == ([], None, None)
