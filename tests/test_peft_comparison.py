"""PEFT's comparison read again: its own figures, the interval by hand, and the words that follow."""

from math import sqrt

import pytest
from rankwise.reports.papers.peft_comparison import FILE, REFERENCE, entries, text


@pytest.fixture(scope="module")
def made():
    return entries()


def test_all_63_results_are_there_and_lora_is_the_published_one(made):
    assert len(made) == 63 and {e.questions for e in made} == {1319}
    lora = next(e for e in made if e.experiment == REFERENCE)
    assert round(lora.accuracy, 1) == 47.8 and lora.parameters == 9_175_040 and lora.p is None  # reports/papers has 47.8 too
    assert next(e for e in made if e.method == "ADALORA").correct == 492  # 37.3 %


def test_the_interval_is_wilsons(made):
    z, e = 1.959963984540054, made[0]
    p, n = e.correct / e.questions, e.questions
    centre, half = p + z**2 / (2 * n), z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (e.low, e.high) == pytest.approx([100 * (centre + s * half) / (1 + z**2 / n) for s in (-1, 1)])


def test_holm_is_over_all_others_and_words_follow_from_it(made):
    from scipy.stats import fisher_exact

    right = next(e for e in made if e.p is None).correct
    raw = {
        e.experiment: fisher_exact([[e.correct, 1319 - e.correct], [right, 1319 - right]]).pvalue
        for e in made
        if e.p is not None
    }
    smallest = min(raw, key=raw.get)
    assert next(e for e in made if e.experiment == smallest).p == pytest.approx(62 * raw[smallest])
    assert all(e.verdict == "not told apart" for e in made if e.p is not None and raw[e.experiment] > 0.05)
    worse = [e for e in made if e.verdict == "worse"]
    assert worse and all(e.difference < 0 and e.p <= 0.05 for e in worse)
    assert f"{sum(e.verdict == 'not told apart' for e in made)} cannot be told apart" in text(made)


def test_an_unknown_reference_is_refused():
    with pytest.raises(ValueError, match='reference "lora" is not among the 63 results'):
        entries(FILE, "lora")
