"""Metrics of generated texts, against the libraries' own numbers and values by hand."""

import math

import numpy as np
import pytest
import sacrebleu
from rankwise.experiments.tasks import text_metrics
from rankwise.experiments.tasks.metrics import resample_weights

TEXTS = ["the cat sat on the mat", "a dog  barks", "the answer is 1,234.50.", "", "he reads 3 books"]
RIGHT = [
    ("the cat sat on a mat", "a cat is on the mat"),
    ("a dog barks",),
    ("#### 1234.5", "none"),
    ("no",),
    ("he reads 4 books", "she reads 3 books", "books"),
]


def test_exact_match_looks_past_blanks_alone():
    assert text_metrics.exact_match(TEXTS, RIGHT).tolist() == [0, 1, 0, 0, 0]
    assert text_metrics.exact_match(["A dog barks"], [("a dog barks",)]).tolist() == [0]


def test_a_numeric_answer_is_the_last_number():
    assert text_metrics.numeric_answer(TEXTS, RIGHT).tolist() == [0, 0, 1, 0, 1]
    cases = {"so -3": -3.0, "1 + 1 = 2.": 2.0, "12,000 dollars": 12000.0, ".5": 0.5, "none": None, "10-4": -4.0}
    assert {text: text_metrics.last_number(text) for text in cases} == cases
    assert text_metrics.numeric_answer(["no number"], [("none",)]).tolist() == [0]  # two texts without one are not equal


def test_rouge_is_the_best_of_the_references():
    # 5 of 6 words in order with the first reference, 3 of 6 ("cat", "on the mat" minus ...) with the second.
    found = text_metrics.of_texts(["rougeL", "rouge1"])(TEXTS[:1], RIGHT[:1])
    assert found == pytest.approx({"rougeL": 100 * 5 / 6, "rouge1": 100 * 5 / 6})


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_corpus_metrics_are_sacrebleus(name):
    scorer = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[name]
    streams = [
        ["the cat sat on a mat", "a dog barks", "#### 1234.5", "no", "he reads 4 books"],
        ["a cat is on the mat", None, "none", None, "she reads 3 books"],
        [None, None, None, None, "books"],
    ]
    found = text_metrics.of_texts([name])(TEXTS, RIGHT)[name]
    assert found == pytest.approx(scorer(TEXTS, streams).score) and 0 < found < 100


def test_nist_is_doddingtons_in_words_of_lower_case():
    """Eq. 3 of Doddington (2002) by hand: two texts, one right text each, so that every count is plain to see."""
    texts, right = ["A cat sat.", "the dog"], [("a cat ran.",), ("the dog",)]
    # 6 words in the right texts, each once; 2 words as a pair after 1 of that word: information log2(6 / 1) and log2(1 / 1).
    matched, pairs = 5 * math.log2(6) / 6, 0.0  # "a", "cat", ".", "the", "dog" of the 6 words of the texts
    found = text_metrics.of_texts(["nist"])(texts, right)["nist"]
    assert found == pytest.approx(matched + pairs)
    # Half as long as its right text: exp(b log(1/2)^2), where b makes a text of 2 / 3 the length count half.
    b = math.log(0.5) / math.log(2 / 3) ** 2
    short = text_metrics.of_texts(["nist"])(["a b"], [("a b c d",)])["nist"]
    assert short == pytest.approx(math.log2(4) * math.exp(b * math.log(0.5) ** 2))
    assert text_metrics.of_texts(["nist"])(["", " "], [("a",), ("b",)]) == {"nist": 0.0}
    with pytest.raises(ValueError, match="is not known"):
        text_metrics.resampled("nists")


@pytest.mark.parametrize("name", text_metrics.NAMES)
def test_a_resample_is_scored_as_the_texts_that_it_holds(name):
    weights = resample_weights(len(TEXTS))[:6]
    found = text_metrics.resampled(name)(TEXTS, RIGHT, weights)
    for value, row in zip(found, weights, strict=True):
        drawn = np.repeat(np.arange(len(TEXTS)), row)
        again = text_metrics.of_texts([name])([TEXTS[i] for i in drawn], [RIGHT[i] for i in drawn])[name]
        assert value == pytest.approx(again)
    assert len(set(found.tolist())) > 1


@pytest.mark.parametrize(
    ("names", "message"), [(["rouge_l"], '"rouge_l" is not known.*rougeL.*there are: exact_match'), ([], "name at least one")]
)
def test_an_unknown_metric_is_refused_with_the_nearest_name(names, message):
    with pytest.raises(ValueError, match=message):
        text_metrics.of_texts(names)


def test_a_choice_has_an_accuracy_for_each_normalisation():
    chosen = np.array([[0, 1, 1], [2, 2, 0], [1, 1, 1], [0, 1, 0]])
    found = text_metrics.choice_accuracy(chosen, np.array([0, 2, 1, 1]))
    assert found == {"accuracy": 75.0, "accuracy_per_token": 75.0, "accuracy_sum": 25.0}
