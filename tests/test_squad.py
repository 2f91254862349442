"""SQuAD: records by hand and a made-up hub; windows and spans against plain loops; scores by hand and against torchmetrics."""

import copy
import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rankwise import variants
from rankwise.experiments import kinds, models, tasks
from rankwise.experiments.data import draws
from rankwise.experiments.data import questions as spans
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.data.questions import Questions
from rankwise.experiments.kinds import Undefined
from rankwise.experiments.tasks import metrics, squad
from rankwise.variants.adapter.probe import fill

from tests import small_world

SECRET = "xylophone"  # stands for corpus text; no message may show it
NONE = {"text": [], "answer_start": []}


def record(question, context, answer=None, title="Frost"):
    """One row of the hub's form; the answer where it first stands in the context."""
    answers = NONE if answer is None else {"text": [answer], "answer_start": [context.index(answer)]}
    return {"id": question, "title": title, "context": context, "question": question, "answers": answers}


def columns(records):
    return {name: [one[name] for one in records] for name in squad.COLUMNS}


def fake_hub(monkeypatch, version, train, dev):
    squad.official.cache_clear(), squad.hub_identity.cache_clear()
    parts = {"train": train, "validation": dev}
    asked = []

    def hub_columns(name, path, config, split, tried):
        asked.append(path)
        return columns(parts[split])

    monkeypatch.setattr(squad, "hub_columns", hub_columns)
    monkeypatch.setitem(squad.OFFICIAL, version, {split: len(rows) for split, rows in parts.items()})
    return asked


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    yield
    squad.official.cache_clear(), squad.hub_identity.cache_clear()


# ---------------------------------------------------------------------------------------------------------- the data


def test_whole_articles_are_kept_out_of_training_and_every_split_has_its_questions(monkeypatch):
    train = [record(f"q{i}", f"c {i} x", "x", title=f"article {i % 37}") for i in range(400)]
    asked = fake_hub(monkeypatch, "v1", train, [record("d", "c x", "x")])
    parts = tasks.get("squad/v1").load()
    article = {one["id"]: one["title"] for one in train}
    kept, out = ({article[name] for name in parts[split].ids} for split in ("train", "validation"))
    assert not kept & out and len(kept | out) == 37
    assert 40 <= len(parts["validation"]) < 40 + 11  # 10 %, up to a whole article of 10 or 11 questions
    assert sorted(parts["train"].ids + parts["validation"].ids) == sorted(parts["official-train"].ids) == sorted(article)
    assert parts["dev"].ids == ["d"] and set(asked) == {"rajpurkar/squad"}
    assert tasks.get("squad/v1").load(["validation"])["validation"].ids == parts["validation"].ids


def test_first_articles_drawn_are_kept_out_until_they_hold_a_tenth():
    titles = ["a"] * 5 + ["b"] * 50 + ["c"] * 5 + ["d"] * 40
    order = draws.shuffled(4, draws.SPLIT_SEED, 5)
    wanted, count = set(), 0
    for index in order:
        if count >= 10:
            break
        wanted.add("abcd"[index])
        count += [5, 50, 5, 40][index]
    assert {t for t, out in zip(titles, squad.kept_out(titles), strict=True) if out} == wanted


def test_the_raw_data_s_hash_knows_questions_answers_ids_and_articles(monkeypatch):
    base = [record("q", "c x y", "x"), record("r", "c x y", None)]
    others = [base]
    for column, value in (("title", "T"), ("id", "z"), ("answers", {"text": ["y"], "answer_start": [4]}), ("context", "c x z")):
        others.append([{**base[0], column: value}, base[1]])
    found = set()
    for train in others:
        asked = fake_hub(monkeypatch, "v2", train, base)
        found.add(tasks.get("squad/v2").data_hash())
        assert asked[0] == "rajpurkar/squad_v2"
    assert len(found) == len(others)
    examples = squad.parse("here", columns(base), "v2")
    assert examples.answers == [("x",), ()] and [starts.tolist() for starts in examples.labels] == [[2], []]
    assert examples.content_hash() == examples.select([0, 1]).content_hash() != examples.select([1, 0]).content_hash()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answers": NONE}, "row 2: a question without an answer"),
        ({"answers": {"text": [SECRET], "answer_start": []}}, "row 2: answers should be texts and as many places"),
        ({"answers": {"text": [SECRET], "answer_start": [-1]}}, "row 2: answers should be"),
        ({"answers": [SECRET]}, "row 2: answers should be"),
        ({"answers": {"text": [3], "answer_start": [3]}}, "row 2: answers should be"),
        ({"context": " "}, "row 2: context is empty or no text"),
        ({"question": None}, "row 2: question is empty or no text"),
    ],
)
def test_malformed_record_is_named_and_never_shown(monkeypatch, change, said):
    good = record(SECRET, f"{SECRET} x", "x")
    fake_hub(monkeypatch, "v1", [good, {**good, **change}], [good])
    with pytest.raises(ValueError, match=f"squad/v1, train, {said}") as error:
        squad.official("v1", "train")
    assert SECRET not in str(error.value) and "\n" not in str(error.value)


def test_missing_columns_and_questions_are_refused(monkeypatch):
    good = record("q", "c x", "x")
    fake_hub(monkeypatch, "v1", [good], [good])
    monkeypatch.setitem(squad.OFFICIAL, "v1", {"train": 2, "validation": 1})
    with pytest.raises(ValueError, match="squad/v1: 1 questions in train, expected 2"):
        tasks.get("squad/v1").load(["train"])
    monkeypatch.setattr(squad, "hub_columns", lambda *_: {"id": ["q"]})
    with pytest.raises(ValueError, match="no column title in the hub's copy; expected id, title, context, question, answers"):
        tasks.get("squad/v1").load(["dev"])


# ----------------------------------------------------------------------------------------------------------- windows


def encoded(examples, max_length=24):
    return kinds.get("span").encode(examples, models.tiny_tokenizer(), max_length)


def letters(count, seed=0):
    return " ".join(np.random.default_rng(seed).choice(list("abcdefghijklm"), count))


def examples_of(*triples):
    """(question, context, answer or None)."""
    records = [record(*triple) for triple in triples]
    return squad.parse("here", columns([{**one, "id": str(i)} for i, one in enumerate(records)]), "v2")


def test_windows_cover_the_context_and_overlap_by_the_stride():
    examples = examples_of(("x y", letters(40), None), ("x", "n o p", "o p"))
    found = encoded(examples)
    tokenizer = models.tiny_tokenizer()
    plain = tokenizer("x y", letters(40), truncation="only_second", max_length=24, stride=8, return_overflowing_tokens=True)
    number = len(plain["input_ids"])
    assert len(found) == number + 1 == 4 and found.num_examples == 2 and found.questions.rows.tolist() == [0, 0, 0, 1]
    for row in range(number):
        own = slice(found.offsets[row], found.offsets[row + 1])
        assert found.ids[own].tolist() == plain["input_ids"][row]
        assert found.token_type_ids[own].tolist() == plain["token_type_ids"][row]
    places = [found.questions.characters[found.offsets[r] : found.offsets[r + 1]] for r in range(number)]
    held = [at[at[:, 0] >= 0] for at in places]
    assert held[0][0].tolist() == [0, 1] and held[-1][-1].tolist() == [78, 79]
    assert all(a[-8:].tolist() == b[:8].tolist() for a, b in itertools.pairwise(held))  # a third of 24
    assert all((at[:4] == -1).all() and (at[-1] == -1).all() for at in places)  # [CLS] x y [SEP] ... [SEP]


def test_the_papers_384_tokens_have_a_stride_of_128_and_questions_of_64():
    tokenizer = models.tiny_tokenizer()
    tokenizer.model_max_length = 384
    context = letters(600)
    found = kinds.get("span").encode(examples_of((letters(70, 1), context, None)), tokenizer, 384)
    first, second = (found.questions.characters[found.offsets[r] : found.offsets[r + 1]] for r in (0, 1))
    assert found.lengths[:2].tolist() == [384, 384] and (first[: 1 + 64 + 1] == -1).all() and first[66].tolist() == [0, 1]
    held = first[first[:, 0] >= 0]
    assert len(held) == 384 - 64 - 3 and held[-128].tolist() == second[66].tolist()


def test_labels_are_the_tokens_of_the_answer_or_the_first_token_where_a_window_lacks_some_of_it():
    context = letters(14) + " nop " + letters(20, 1)
    found = encoded(examples_of(("x", context, "nop"), ("x", context, "nop " + letters(20, 1)[:3]), ("x", context, None)))
    seen = []
    for row in range(len(found)):
        start, end = found.labels[row] + found.offsets[row]
        question = found.questions.rows[row]
        if found.labels[row].tolist() == [0, 0]:
            seen.append((int(question), None))
            continue
        at = slice(found.questions.characters[start, 0], found.questions.characters[end, 1])
        seen.append((int(question), context[at]))
    assert [text for question, text in seen if question == 0] == ["nop", "nop", None]  # three windows, two hold it
    assert {text for question, text in seen if question == 1} == {"nop " + letters(20, 1)[:3], None}
    assert {text for question, text in seen if question == 2} == {None}
    assert found.labels.dtype == np.int64


def test_an_answer_inside_a_word_takes_the_tokens_that_hold_it():
    """Tokens are letters here: W ##o ##r ##d; an answer that ends within a word ends at its own letter."""
    found = encoded(examples_of(("x", "a worded b", "ord")))
    start, end = found.labels[0]
    assert found.questions.characters[[start, end]].tolist() == [[3, 4], [5, 6]]
    characters = np.array([[-1, -1], [0, 5], [5, 11], [11, 12], [-1, -1]])  # as sentence pieces have them, blanks included
    inside = characters[:, 0] >= 0
    assert spans.token_span(characters, inside, 6, 11) == (2, 2) and spans.token_span(characters, inside, 3, 12) == (1, 3)
    assert spans.token_span(characters, inside, 3, 13) == (0, 0)
    assert spans.token_span(characters[[0, 2, 3, 4]], inside[[0, 2, 3, 4]], 4, 11) == (0, 0)
    assert spans.token_span(characters[[0, 4]], inside[[0, 4]], 0, 1) == (0, 0)


def test_leading_blanks_of_a_question_go_and_long_ones_are_cut():
    assert spans.shortened(["  ab cd", "a b c d e", "word x"], models.tiny_tokenizer(), 4) == ["ab cd", "a b c d", "word"]
    with pytest.raises(ValueError, match="max_length 15 is too short"):
        encoded(examples_of(("x", "n", "n")), 15)


def test_windows_are_kept_and_read_back_with_their_questions(monkeypatch):
    records = [record("x", letters(40) + "\u00e9 \u2028 n", "n"), record("y", "n o", None), record("z", "n o", "o")]
    fake_hub(monkeypatch, "v2", records, records)
    task, tokenizer = tasks.get("squad/v2"), models.tiny_tokenizer()
    first = task.encode(tokenizer, "dev", 24)
    monkeypatch.setattr(kinds.get("span"), "encode", None)
    again = task.encode(tokenizer, "dev", 24)
    assert [*again.content()] == [*first.content()] and again.max_length == 24 and not again.is_by_token
    for name in ("ids", "contexts", "answers"):
        assert getattr(again.questions, name) == getattr(first.questions, name)
    assert again.questions.answers == [("n",), (), ("o",)] and again.questions.characters.dtype == np.int32


def test_examples_are_drawn_with_all_their_windows():
    found = encoded(examples_of(("x", letters(40), None), ("y", "n o", "o"), ("z", letters(30) + " p", "p")))
    part = found.select_examples([2, 1])
    assert part.questions.rows.tolist() == [0, *[1] * (len(part) - 1)] and len(part) > 2
    assert part.questions.ids == ["1", "2"] and part.questions.answers == [("o",), ("p",)]
    assert len(part.questions.characters) == len(part.ids) == part.offsets[-1]
    start, end = part.questions.characters[part.labels[0]][[0, 1], [0, 1]]
    assert part.questions.contexts[0][start:end] == "o"
    whole = found.select_examples(range(3))
    assert [*whole.content()] == [*found.content()] != [*part.content()]
    rows = small_world.encoded(small_world.task("regression"))["test"]
    assert rows.select_examples([4, 1]).labels.tolist() == rows.labels[[4, 1]].tolist() and rows.num_examples == len(rows)


def test_content_knows_the_right_answers_that_no_label_shows():
    found = encoded(examples_of(("x", "n o", "o")))
    other = replace(found, questions=replace(found.questions, answers=[("n", "o")]))
    assert b"".join(found.content()) != b"".join(other.content())
    rows = small_world.encoded(small_world.task("classification"))["test"]
    assert [*rows.content()] == [a.tobytes() for a in (rows.ids, rows.offsets, rows.labels, rows.token_type_ids)]


# ------------------------------------------------------------------------------------------------------- the best span


def plain_best(scores, questions, offsets):
    """Every pair of one of the 20 likeliest starts and ends of each window, one by one."""
    best, null = {}, {}
    for row, question in enumerate(questions.rows):
        own, at = (values[offsets[row] : offsets[row + 1]] for values in (scores, questions.characters))
        null[question] = min(null.get(question, np.inf), own[0].sum())
        for start in np.argsort(-own[:, 0])[:20]:
            for end in np.argsort(-own[:, 1])[:20]:
                if at[start, 0] < 0 or at[end, 0] < 0 or end < start or end - start + 1 > 30:
                    continue
                score = own[start, 0] + own[end, 1]
                if score > best.get(question, (-np.inf,))[0]:
                    best[question] = score, questions.contexts[question][at[start, 0] : at[end, 1]]
    return best, null


def test_the_best_span_is_that_of_a_plain_search():
    tokenizer = models.tiny_tokenizer()
    tokenizer.model_max_length = 96
    triples = [("x", letters(int(count), seed), None) for seed, count in enumerate([200, 3, 90, 45, 1])]
    found = kinds.get("span").encode(examples_of(*triples), tokenizer, 96)
    for seed in range(20):
        scores = np.random.default_rng(seed).normal(size=(len(found.ids), 2)).astype(np.float32)
        scores[found.offsets[:-1]] += 2  # so that some have no answer
        texts, gaps = spans.best(scores, found.questions, found.offsets)
        best, null = plain_best(scores.astype(np.float64), found.questions, found.offsets)
        assert texts == [best[question][1] for question in range(5)]
        assert gaps == pytest.approx([null[question] - best[question][0] for question in range(5)])
    assert (found.lengths > 30).any() and len(found) > 6


def one_row(context, count):
    """Questions of one row: [CLS], then `count` tokens of one letter each, at every second character."""
    at = np.array([[-1, -1], *([2 * i, 2 * i + 1] for i in range(count))], dtype=np.int32)
    return Questions(np.zeros(1, int), at, ["0"], [context], [("x",)]), np.array([0, count + 1])


def test_a_span_has_at_most_thirty_tokens_and_ends_at_or_after_its_start():
    context = letters(40)
    questions, offsets = one_row(context, 40)
    scores = np.zeros((41, 2))
    scores[3, 0], scores[33, 1], scores[32, 1] = 9, 9, 5  # tokens 3..33 are 31
    texts, gaps = spans.best(scores, questions, offsets)
    assert texts == [context[4:63]] and gaps.tolist() == [-14]
    scores[2, 1] = 50  # before the start; nothing but the two tokens before it can start there
    texts, _ = spans.best(scores, questions, offsets)
    assert texts in ([context[0:3]], [context[2:3]])


@pytest.mark.parametrize(("others", "found"), [(19, "f g"), (20, "")])
def test_the_twenty_likeliest_starts_and_ends_are_combined_and_no_others(others, found):
    """The start at f is the 20th or the 21st likeliest; all likelier ones come after every likely end."""
    context = "a b c d e f g h " + letters(52)
    questions, offsets = one_row(context, 60)
    scores = np.zeros((61, 2))
    scores[:, 1] = -np.arange(61)
    scores[30 : 30 + others, 0], scores[6, 0], scores[7, 1] = 10, 9, 30
    texts, _ = spans.best(scores, questions, offsets)
    assert texts == [found]


def test_without_a_valid_span_the_text_is_empty():
    questions, offsets = one_row("a b c", 3)
    nothing = replace(questions, characters=np.full((4, 2), -1, dtype=np.int32))
    texts, gaps = spans.best(np.ones((4, 2)), nothing, offsets)
    assert texts == [""] and gaps.tolist() == [0]
    with pytest.raises(ValueError, match="scores of 3 tokens for 4"):
        spans.best(np.ones((3, 2)), questions, offsets)


def test_no_answer_scores_by_its_least_window_and_a_span_by_its_best():
    at = np.array([[-1, -1], [0, 1], [-1, -1], [2, 3]], dtype=np.int32)
    questions = Questions(np.zeros(2, int), at, ["0"], ["a b"], [()])
    scores = np.array([[3.0, 3], [1, 1], [0.5, 0.5], [2, 2]])
    texts, gaps = spans.best(scores, questions, np.array([0, 2, 4]))
    assert texts == ["b"] and gaps.tolist() == [1 - 4]


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("predicted", "right", "exact", "f1"),
    [
        ("The Denver Broncos!", ["Denver Broncos"], 1, 1),
        ("in Santa Clara, California", ["Santa Clara", "Levi's Stadium in Santa Clara, California"], 0, 0.8),
        ("a an the", ["x"], 0, 0),
        ("the", ["a", "x"], 0, 0),  # a right answer of nothing but an article counts only where there is no other
        ("the", ["a"], 1, 1),
        ("x", ["y", "X."], 1, 1),
        ("a b b", ["b b b c"], 0, 2 * 2 / (2 + 4)),  # the article a goes; two of b are shared
        ("", [], 1, 1),
        ("x", [], 0, 0),
        ("", ["x"], 0, 0),
        ("another", ["other"], 0, 0),
        ("co-op", ["coop"], 1, 1),
    ],
)
def test_exact_match_and_f1_by_hand(predicted, right, exact, f1):
    assert metrics.answer_scores([predicted], [tuple(right)])[0] == pytest.approx([exact, f1])


def test_scores_of_v1_are_torchmetrics():
    from torchmetrics.functional.text import squad as oracle

    rng = np.random.default_rng(0)
    words = ["The", "a", "cat,", "Cat", "sat!", "on", "an", "Mat.", "mat", "1.5", "\u00e9t\u00e9"]
    draw = lambda: " ".join(rng.choice(words, rng.integers(1, 5))) + " dog"  # noqa: E731
    texts = [draw() for _ in range(300)]
    answers = [tuple([draw() for _ in range(rng.integers(1, 4))] + [text] * (rng.random() < 0.2)) for text in texts]
    predictions = [{"prediction_text": text, "id": str(i)} for i, text in enumerate(texts)]
    targets = [{"answers": {"text": list(g), "answer_start": [0] * len(g)}, "id": str(i)} for i, g in enumerate(answers)]
    found = metrics.exact_match_and_f1(texts, np.zeros(300), SimpleNamespace(answers=answers))
    assert found == pytest.approx({name: float(value) for name, value in oracle(predictions, targets).items()}, rel=1e-5)
    assert 15 < found["exact_match"] < found["f1"] < 90


def v2_by_hand():
    """Gaps -2, -1, 1, 3: the first two are answered, the others not.

    right (1), wrong in part (F1 2/3), no answer and left empty (1), one with an answer but left empty (0).
    """
    texts, gaps = ["x", "y z", "w", "v"], np.array([-2.0, -1, 1, 3])
    return texts, gaps, SimpleNamespace(answers=[("x",), ("y",), (), ("v",)])


def test_v2_by_hand():
    found = metrics.exact_match_and_f1_with_empty(*v2_by_hand())
    assert found == pytest.approx(
        {
            "exact_match": 50,
            "f1": 100 * (1 + 2 / 3 + 1) / 4,
            "has_answer_exact_match": 100 / 3,
            "has_answer_f1": 100 * (1 + 2 / 3) / 3,
            "no_answer_accuracy": 100,
            # exact: answering the first only, or the first two, gives 1, 0, 1 (empty), 0; answering all 1, 0, 0, 1: the same
            "best_exact_match": 50,
            # F1: the first two 2.667; all four 1 + 2/3 + 0 + 1, the same; the first that reaches it counts
            "best_f1": 100 * (1 + 2 / 3 + 1) / 4,
            "best_f1_threshold": -1,
        }
    )
    texts, gaps, questions = v2_by_hand()
    shifted = metrics.exact_match_and_f1_with_empty(texts, gaps + 10, questions)  # all empty at the threshold 0
    assert (shifted["exact_match"], shifted["no_answer_accuracy"], shifted["has_answer_f1"]) == (25, 100, 0)
    assert (shifted["best_f1"], shifted["best_f1_threshold"]) == (pytest.approx(found["best_f1"]), 9)
    answerable = metrics.exact_match_and_f1_with_empty(texts[:2], gaps[:2], SimpleNamespace(answers=[("x",), ("y",)]))
    assert "no_answer_accuracy" not in answerable and answerable["has_answer_f1"] == answerable["f1"]
    alone = metrics.exact_match_and_f1_with_empty(["w"], np.array([-1.0]), SimpleNamespace(answers=[()]))
    assert (alone["f1"], alone["best_f1"], "has_answer_f1" in alone) == (0, 100, False)


def test_the_best_threshold_is_that_of_a_search_and_the_score_ignores_it():
    rng = np.random.default_rng(3)
    for _ in range(30):
        answers = [() if rng.random() < 0.5 else ("x y",) for _ in range(12)]
        texts = [str(rng.choice(["x y", "x", "z"])) for _ in answers]
        gaps = rng.normal(1, 2, 12)
        found = metrics.exact_match_and_f1_with_empty(texts, gaps, SimpleNamespace(answers=answers))
        tried = [[t if g <= limit else "" for t, g in zip(texts, gaps, strict=True)] for limit in [-np.inf, *gaps]]
        every = np.array([metrics.answer_scores(one, answers).mean(0) for one in tried])
        assert [found["best_exact_match"], found["best_f1"]] == pytest.approx(100 * every.max(0))
        zero = metrics.answer_scores([t if g <= 0 else "" for t, g in zip(texts, gaps, strict=True)], answers).mean(0)
        assert [found["exact_match"], found["f1"]] == pytest.approx(100 * zero)
        if found["best_f1_threshold"]:
            chosen = [t if g <= found["best_f1_threshold"] else "" for t, g in zip(texts, gaps, strict=True)]
            assert found["best_f1"] == pytest.approx(100 * metrics.answer_scores(chosen, answers)[:, 1].mean())


def test_a_task_scores_tokens_scores_as_they_come_from_a_model():
    """The right span scores highest, in the second of two windows; v2 leaves it out where [CLS] scores more."""
    examples = examples_of(("x", letters(30) + " nop", "nop"), ("y", "q r", "r"))
    found = encoded(examples)
    scores = np.zeros((len(found.ids), 2), dtype=np.float32)
    for row in range(len(found)):
        scores[found.offsets[row] + found.labels[row], [0, 1]] += 4 + row
    one, two = tasks.get("squad/v1"), tasks.get("squad/v2")
    assert one.metrics(scores, *found.truth) == {"exact_match": 100, "f1": 100}
    assert one.standard_error(scores, *found.truth) == 0
    assert two.metrics(scores, *found.truth)["f1"] == 100
    scores[found.offsets[:-1]] = 50
    assert one.metrics(scores, *found.truth)["f1"] == 100
    assert two.metrics(scores, *found.truth)["f1"] == 0 < two.metrics(scores, *found.truth)["best_f1"]
    with pytest.raises(Undefined, match="not finite"):
        one.metrics(np.full_like(scores, np.nan), *found.truth)


def test_standard_errors_are_over_questions_not_windows():
    rng = np.random.default_rng(0)
    examples = examples_of(*[("x", letters(30, seed) + " n o", "n o") for seed in range(60)])
    found = encoded(examples)
    assert len(found) > 100
    scores = rng.normal(size=(len(found.ids), 2)).astype(np.float32)
    for row in np.flatnonzero(found.labels[:, 0] & (rng.random(len(found)) < 0.5)):
        scores[found.offsets[row] + found.labels[row], [0, 1]] += 20
    scores[found.offsets[:-1][found.questions.rows % 4 == 0]] += 50  # no answer there, says v2
    for name in ("squad/v1", "squad/v2"):
        task = tasks.get(name)
        texts, gaps = spans.best(scores, found.questions, found.offsets)
        texts = metrics.with_empty(texts, gaps) if name == "squad/v2" else texts
        assert texts.count("") == (15 if name == "squad/v2" else 0)
        f1 = 100 * metrics.answer_scores(texts, examples.answers)[:, 1]
        drawn = [np.repeat(f1, weights).mean() for weights in metrics.resample_weights(60)]
        assert task.standard_error(scores, *found.truth) == pytest.approx(np.std(drawn, ddof=1))
        assert task.standard_error(scores, *found.truth) == pytest.approx(f1.std() / np.sqrt(60), rel=0.2)
        exact = replace(task, metric="exact_match", resampled=None)
        share = exact.metrics(scores, *found.truth)["exact_match"] / 100
        assert 0.2 < share < 0.8
        assert exact.standard_error(scores, *found.truth) == pytest.approx(100 * np.sqrt(share * (1 - share) / 60))


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_world.model(tmp_path_factory.mktemp("model"))


def test_the_head_is_fresh_found_and_saved_where_peft_looks_for_it(model, tmp_path):
    found, _, info = models.load(model, tasks.get("squad/v1"))
    assert type(found).__name__ == "BertForQuestionAnswering" and info.heads == ("qa_outputs",)
    assert found.qa_outputs.weight.shape == (2, 32)
    adapter = variants.create("lora", rank=2, alpha=3).attach(found, targets=["query"], head=info.heads)
    fill(adapter)
    batch = {"input_ids": torch.arange(4, 16)[None], "attention_mask": torch.ones(1, 12, dtype=torch.int64)}
    adapter.model.eval()
    with torch.no_grad():
        mine = found(**batch).start_logits
    variants.save_pretrained(adapter, tmp_path / "a")
    import peft

    plain, _, _ = models.load(model, tasks.get("squad/v1"))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "a").eval()
    assert theirs.peft_config["default"].task_type == "QUESTION_ANS"
    again = variants.load_pretrained(plain, tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).start_logits, mine, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again.model(**batch).start_logits, mine, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", models.TINY)
def test_every_family_has_a_head_for_spans(name):
    made = models.tiny(name, num_labels=2, kind="span")
    assert kinds.get("span").head_names(made)[-1] == "qa_outputs"


@pytest.mark.slow
def test_packed_members_train_as_alone_and_a_stopped_run_ends_the_same(model, tmp_path):
    seeds, rates = (3, 8), (1e-2, 3e-3)
    pack = small_world.pack(model, "adalora", seeds=seeds, learning_rates=rates, kind="span")
    together, outcomes = small_world.trained(pack, tmp_path / "together")
    assert len(together.data["train"]) > together.data["train"].num_examples == 60
    for k, (seed, rate) in enumerate(zip(seeds, rates, strict=True)):
        one = small_world.pack(model, "adalora", seeds=(seed,), learning_rates=(rate,), kind="span")
        alone, (expected,) = small_world.trained(one, tmp_path / f"alone-{k}")
        for name, tensor in alone.adapter.state_dict().items():
            if torch.is_floating_point(tensor) and tensor.ndim and len(tensor) == 1:
                other = together.adapter.state_dict()[name][k : k + 1]
                torch.testing.assert_close(other, tensor, rtol=2e-3, atol=2e-5, msg=name)
        assert outcomes[k].metrics["test"] == pytest.approx(expected.metrics["test"], abs=0.5)

    calls = iter(range(10**6))

    def stop(rows):
        if next(calls) == 8:
            raise KeyboardInterrupt

    cut = small_world.trainer(pack, tmp_path / "cut", checkpoint_seconds=0.0, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    again, ended = small_world.trained(pack, tmp_path / "cut")
    assert [o.metrics for o in ended] == [o.metrics for o in outcomes]
    for name, tensor in together.adapter.state_dict().items():
        assert torch.equal(again.adapter.state_dict()[name], tensor), name


@pytest.mark.slow
def test_a_model_learns_to_point_at_the_answer(model, tmp_path, monkeypatch):
    """The answer is the digit: from records to exact match through the whole of it, with questions that have none."""
    rng = np.random.default_rng(0)

    def made(count):
        records = []
        for i in range(count):
            words = rng.choice(list("abcdefgh"), rng.integers(6, 25)).tolist()
            digit = str(rng.integers(10)) if i % 3 else None
            if digit is not None:
                words[rng.integers(len(words))] = digit
            records.append({**record("x", " ".join(words), digit, title=f"article {i % 20}"), "id": str(i)})
        return records

    fake_hub(monkeypatch, "v2", made(200), made(60))
    task = tasks.get("squad/v2")
    tokenizer = models.tiny_tokenizer()
    training = {"epochs": 12, "max_steps": None, "batch_size": 10, "max_length": 24, "evaluations_per_epoch": 0}
    pack = replace(small_world.pack(model, "full", learning_rates=[3e-3], **training), task=task, splits=("validation", "dev"))
    data = {split: task.encode(tokenizer, split, 24) for split in ("train", "validation", "dev")}
    _, (outcome,) = small_world.trained(pack, tmp_path, data=data)
    assert outcome.error is None and outcome.rows["dev"] == 60 < len(data["dev"])
    assert outcome.metrics["dev"]["exact_match"] > 90 and outcome.metrics["dev"]["no_answer_accuracy"] > 80
    assert outcome.metrics["dev"]["best_f1"] >= outcome.metrics["dev"]["f1"]
    assert 0 <= outcome.standard_errors["dev"] < 5
    assert isinstance(squad.parse("x", columns(made(3)), "v2"), Examples)
