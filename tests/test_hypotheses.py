"""Hypotheses: what a study's file may say of them, and what is said of their runs, on scores worked by hand."""

import shutil
import tomllib

import numpy as np
import pytest
from rankwise.experiments import config
from rankwise.experiments.hypotheses import LOOKS
from rankwise.reports import figures, page
from rankwise.reports.hypotheses import hypothesis_table, outcomes_of
from rankwise.reports.results import load
from rankwise.reports.statistics import sign_flip_test

from tests.synthetic_runs import write_json, write_run

BASE = [80.0, 81.0, 79.5, 80.5, 80.2, 79.8, 80.9, 80.1, 79.9, 80.3, 80.6, 79.7]
H1 = {"name": "H1", "arms": ["adalora", "within"], "task": "glue/stsb", "margin": 0.3, "order": 1, "why": "placing"}
H2 = {"name": "H2", "arms": ["dora", "lora"], "task": None, "margin": 0.5, "order": 2, "why": ""}
SHARED = {"within": "adalora", "dora": "lora"}
FILE = """
name = "s"
model = "m"
tasks = ["glue/stsb"]
seeds = 12
[sweep]
{top}
[[methods]]
method = "lora"
rank = 8
learning_rates = [1e-3, 2e-3]
[[methods]]
method = "dora"
rank = 8
shared_with = "lora"
learning_rates = [1e-3, 2e-3]
{more}
"""
ONE = '[[hypothesis]]\nname = "H1"\narms = ["dora", "lora"]\nmargin = 0.5\norder = 1\n'


def study(folder, scores, hypotheses=(H1, H2), best=3e-3, looks=(), seeds=12, shared=SHARED):
    """Runs of each setting, one a seed; a score of None is a failed run. The sweep's scores are best at `best`."""
    for setting, values in scores.items():
        method = "adalora" if setting == "within" else setting
        for rate in (1e-3, 3e-3, 9e-3):
            write_run(folder, method=method, setting=setting, phase="sweep", rate=rate, seed=100, score=80.0,
                      selection_score=80.0 - abs(np.log(rate / best)))  # fmt: skip
        for seed, score in enumerate(values):
            result = {"error": "diverged"} if score is None else {"score": float(score)}
            write_run(folder, method=method, setting=setting, seed=seed, rate=best, metric="pearson_spearman", **result)
    described = {"schema": 1, "study": "stsb-minilm", "quick": False, "title": "t", "captions": [], "reference": "lora",
                 "methods": list(scores), "complete": True, "margin": 0.5, "seeds": list(range(seeds)),
                 "shared_with": shared, "hypotheses": list(hypotheses), "looks": list(looks)}  # fmt: skip
    write_json(folder / "study.json", described)
    return load(folder)


def plus(shift, spread=0.05, n=12):
    return [score + shift + spread * (-1) ** i for i, score in enumerate(BASE[:n])]


def test_the_sequence_goes_on_after_a_decision_and_after_an_equivalence(tmp_path):
    scores = {"adalora": plus(0.1), "within": BASE, "dora": plus(-1.0), "lora": BASE}
    first, second = outcomes_of(study(tmp_path, scores))
    assert (first.kind, second.kind) == ("equivalent", "worse")
    assert first.design == second.design == "shared rate"
    assert second.comparison.p == pytest.approx(2 / 2**12) and second.comparison.difference == pytest.approx(-1.0)
    assert second.text.startswith("dora is worse than lora (difference -1.00, 90 % interval ")


def test_nothing_is_claimed_behind_an_undecided_hypothesis(tmp_path):
    scores = {"adalora": plus(0.2, spread=1.5), "within": BASE, "dora": plus(-1.0), "lora": BASE}
    first, second = outcomes_of(study(tmp_path, scores))
    assert first.kind == "undecided" and "smallest detectable difference" in first.text
    assert second.kind == "not tested" and "H1 before it is undecided" in second.text and "-1.00" in second.text


def test_equivalence_is_two_one_sided_tests_by_the_inverted_sign_flip_test(tmp_path):
    """By hand for n = 8: the shifts d for which the test of the differences less d has p > 10 %."""
    differences = np.array([0.31, -0.2, 0.15, 0.4, 0.05, -0.1, 0.22, 0.35])
    scores = {"adalora": (np.array(BASE[:8]) + differences).tolist(), "within": BASE[:8]}
    (only,) = outcomes_of(study(tmp_path, scores, [H1], seeds=8))
    grid = np.linspace(-0.5, 0.8, 5201)
    accepted = [shift for shift in grid if sign_flip_test(differences - shift) > 0.10]
    assert only.comparison.low == pytest.approx(min(accepted), abs=3e-4)
    assert only.comparison.high == pytest.approx(max(accepted), abs=3e-4)
    assert only.comparison.level == pytest.approx(0.90)


def test_a_look_decides_with_its_own_level_and_later_seeds_do_not_change_it(tmp_path):
    # Seven of eight differences are positive and one negative and small: p = 4 / 256 = 0.0156 <= 0.0235.
    differences = [1.0, 1.1, 0.9, 1.2, 0.8, 1.3, 0.7, -0.2, -9.0, -9.0, -9.0, -9.0]
    scores = {"adalora": (np.array(BASE) + differences).tolist(), "within": BASE}
    (only,) = outcomes_of(study(tmp_path, scores, [H1], looks=(8, 12)))
    assert only.kind == "better" and only.comparison.seeds == 8 and only.alpha == LOOKS[8]
    assert only.comparison.p == pytest.approx(4 / 2**8)
    assert only.comparison.level == pytest.approx(1 - 2 * LOOKS[8])


def test_the_levels_of_the_looks_together_are_at_most_5_percent():
    """A union bound: it holds whatever the looks share.  Each level is one that the test of so many seeds can reach."""
    reached = [int(level * 2**seeds) / 2**seeds for seeds, level in LOOKS.items()]
    assert 0.045 < sum(reached) <= 0.05


def test_settings_that_ended_at_different_rates_do_not_share_one(tmp_path):
    study(tmp_path, {"adalora": plus(3.0), "within": BASE}, [H1])
    for seed in range(13):  # within has more final runs at another rate, and none of its own at the joint one counts
        write_run(tmp_path, method="adalora", setting="within", seed=seed, rate=1e-3, metric="pearson_spearman", score=80.0)
    for run in load(tmp_path).runs:
        if (run.config.setting, run.config.phase, run.config.learning_rate) == ("within", "final", 3e-3):
            shutil.rmtree(run.folder)
    (only,) = outcomes_of(load(tmp_path))
    assert (only.kind, only.design) == ("undecided", "chosen rate")


def test_no_claim_where_nothing_says_what_a_constant_predictor_scores(tmp_path):
    study(tmp_path, {"adalora": plus(3.0), "within": BASE}, [H1])
    write_run(tmp_path, method="adalora", setting="within", seed=0, rate=3e-3, metric="f1", error="diverged")
    (only,) = outcomes_of(load(tmp_path))
    assert only.kind == "undecided" and "nothing says what a constant predictor scores on f1" in only.text


def test_between_two_looks_the_seeds_beyond_the_first_are_not_read(tmp_path):
    noisy = [3.0, -3.0, 2.0, -2.0, 1.0, -1.0, 0.5, -0.4]
    for more in ([], [5.0, 5.0]):
        base, steps = BASE[: 8 + len(more)], [*noisy, *more]
        scores = {"adalora": [score + step for score, step in zip(base, steps, strict=True)], "within": base}
        (only,) = outcomes_of(study(tmp_path / str(len(more)), scores, [H1], looks=(8, 12)))
        assert only.kind == "undecided" and only.comparison.seeds == 8
        assert only.comparison.difference == pytest.approx(np.mean(noisy))
    (only,) = outcomes_of(study(tmp_path / "few", {"adalora": BASE[:5], "within": BASE[:5]}, [H1], looks=(8, 12)))
    assert (only.kind, only.text) == ("waiting", "waiting: 5 of 8 seeds are finished for both")


def test_no_winner_where_the_rates_are_their_own_or_stand_at_an_edge(tmp_path):
    scores = {"adalora": plus(3.0), "within": BASE}
    (own,) = outcomes_of(study(tmp_path / "own", scores, [H1], shared={}))
    assert (own.kind, own.design) == ("undecided", "chosen rate") and "rate of its own" in own.text
    (edge,) = outcomes_of(study(tmp_path / "edge", scores, [H1], best=9e-3))
    assert edge.kind == "undecided" and "stands at the edge" in edge.text


def test_a_failed_run_scores_what_a_constant_predictor_scores(tmp_path):
    values = plus(1.0)
    scores = {"adalora": [None, *values[1:]], "within": BASE}
    (only,) = outcomes_of(study(tmp_path, scores, [H1]))
    assert only.failed == (1, 0) and "1 of adalora" in only.text
    expected = np.mean([0.0, *values[1:]]) - np.mean(BASE)  # a correlation of 0, not a seed left out
    assert only.comparison.difference == pytest.approx(expected)
    assert only.kind == "undecided"


def test_the_report_opens_with_the_hypotheses(tmp_path, figures_undrawn):
    part = study(tmp_path / "runs", {"adalora": plus(0.1), "within": BASE, "dora": plus(-1.0), "lora": BASE})
    text = page.write(part, tmp_path / "report").read_text()
    assert text.index("what it set out to test") < text.index("## Comparison")
    assert "H1: placing" in text and (tmp_path / "report" / "tables" / "hypotheses.csv").is_file()
    assert "what it set out to test" in (tmp_path / "report" / "report.html").read_text()
    assert hypothesis_table(study(tmp_path / "none", {"lora": BASE}, [])) is None


def test_the_figure_has_each_difference_that_was_tested_and_its_margin(tmp_path):
    scores = {"adalora": plus(0.1), "within": BASE, "dora": plus(-1.0)}
    drawing = figures.hypotheses(study(tmp_path, scores))  # LoRA has no run: the second one waits
    (ax,) = drawing.figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["H1: adalora over within"]
    (only, _) = outcomes_of(study(tmp_path / "again", scores))
    interval, point = (line.get_xdata() for line in ax.lines[:2])
    assert list(interval) == [only.comparison.low, only.comparison.high] and list(point) == [only.comparison.difference]
    assert ax.collections[0].get_paths()[0].get_extents().x0 == -only.hypothesis.margin
    assert "equivalent" in {text.get_text() for text in ax.texts}
    assert figures.hypotheses(study(tmp_path / "none", {"lora": BASE})) is None


@pytest.mark.parametrize(
    ("top", "more", "words"),
    [
        ("", ONE.replace('"dora"', '"dra"'), 'hypothesis "H1": arms = [\'dra\', \'lora\']: "dra" is no label of a method; did'),
        ("", ONE.replace('"dora"', '"lora"'), "are one method: name two"),
        ("", ONE + 'task = "sst2"\n', '"sst2" is no task of the study'),
        ("", ONE + ONE.replace("H1", "H2"), "two hypotheses have order = 1"),
        ("", ONE + ONE.replace("order = 1", "order = 2"), "two hypotheses have name = H1"),
        ("", ONE.replace("0.5", "-1.0"), "margin"),
        ("", ONE.replace("margin", "margn"), 'did you mean "margin"?'),
    ],
)  # fmt: skip
def test_a_fault_in_a_hypothesis_is_one_line(top, more, words):
    with pytest.raises(ValueError) as error:
        config.parse(tomllib.loads(FILE.format(top=top, more=more)), "s")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("looks", "more", "words"),
    [
        ("looks = [8, 12]", "", "has no effect without a [[hypothesis]]"),
        ("looks = [6, 12]", ONE, "levels were computed for looks = [8, 12]"),
        ("looks = [8, 12]\nseeds = 10", ONE, "set seeds = 12"),
    ],
)
def test_looks_are_those_whose_levels_are_known(looks, more, words):
    text = FILE.format(top="", more=more).replace("seeds = 12\n", "" if "seeds" in looks else "seeds = 12\n")
    with pytest.raises(ValueError) as error:
        config.parse(tomllib.loads(looks + "\n" + text), "s")
    assert words in str(error.value)


def test_the_placing_study_holds_its_hypotheses():
    placing = config.read(config.shipped()["placing"])
    assert [(one.name, tuple(one.arms), one.margin) for one in placing.hypothesis] == [
        ("H1", ("adalora", "within sites"), 0.3),
        ("H2", ("dora", "lora"), 0.5),
        ("H3", ("learned", "permuted"), 0.5),
    ]
    groups = {entry.label: entry.shared_with or entry.label for entry in placing.methods}
    assert all(groups[one.arms[0]] == groups[one.arms[1]] for one in placing.hypothesis)  # so that their tests are exact
    assert placing.looks == [8, 12] and len(placing.seeds) == 12
