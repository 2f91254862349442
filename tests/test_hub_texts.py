"""E2E NLG and MetaMathQA, which come from the hub alone: a copy of their columns stands in for it."""

from dataclasses import replace

import numpy as np
import pytest
from rankwise.experiments import recipes, tasks
from rankwise.experiments.tasks import e2e_nlg, metamathqa
from rankwise.reports.papers import beside

from tests import language_models, paper_cells

MEANINGS = [
    "name[Blue Spice], eatType[coffee shop], area[city centre]",
    "name[The Punter], food[Indian, or so], customer rating[5 out of 5]",
    "name[Blue Spice], eatType[coffee shop], area[city centre]",
]
TEXTS = ["Blue Spice is a coffee shop.", "The Punter serves Indian food.", " A coffee shop in the centre is Blue Spice. "]
PROMPTS = [
    "name : Blue Spice | eatType : coffee shop | area : city centre",
    "name : The Punter | food : Indian, or so | customer rating : 5 out of 5",
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    e2e_nlg.read.cache_clear()
    yield
    e2e_nlg.read.cache_clear()


def restaurants(monkeypatch, meanings=MEANINGS, texts=TEXTS, rows=None):
    """The hub's copy with these rows in every part."""
    asked = []

    def columns(name, path, config, split, tried, revision=None):
        asked.append((path, config, split, revision))
        return {"meaning_representation": list(meanings), "human_reference": list(texts)}

    monkeypatch.setattr(e2e_nlg, "hub_columns", columns)
    distinct = len(set(meanings))
    parts = {split: (rows or len(texts), len(texts) if split == "train" else distinct) for split in e2e_nlg.PARTS}
    monkeypatch.setattr(e2e_nlg, "PARTS", parts)
    return asked


def questions(monkeypatch, of_training=6, of_school=8):
    def columns(name, path, config, split, tried, revision=None):
        if path == "meta-math/MetaMathQA":
            assert (config, split) == (None, "train")
            found = {"query": [f"a {i} b" for i in range(of_training)], "response": [f"it is {i}" for i in range(of_training)]}
            found["response"][2] = "x" * 1295  # one character more than fits
            return {**found, "type": ["GSM_Rephrased"] * of_training}
        assert (path, config) == ("openai/gsm8k", "main")
        return {"question": [f"{split} {i}" for i in range(of_school)], "answer": [f"so #### {i}" for i in range(of_school)]}

    monkeypatch.setattr(metamathqa, "hub_columns", columns)


def test_every_text_of_a_restaurant_is_right_but_in_training(monkeypatch):
    asked = restaurants(monkeypatch)
    train, test = (e2e_nlg.read(split) for split in ("train", "test"))
    assert train.first == [PROMPTS[0], PROMPTS[1], PROMPTS[0]] and train.answers is None
    assert train.labels == [text.strip() for text in TEXTS]
    assert test.first == PROMPTS and test.labels == [TEXTS[0], TEXTS[1]]
    assert test.answers == [(TEXTS[0], TEXTS[2].strip()), (TEXTS[1],)]
    assert asked[0] == ("tuetschek/e2e_nlg", None, "train", "refs/convert/parquet")
    task = tasks.get("e2e-nlg")
    scores = task.metrics([TEXTS[2].strip(), "The Punter serves Indian food."], test.answers)
    assert scores["bleu"] == pytest.approx(100) and scores["rougeL"] == pytest.approx(100) and scores["nist"] > 1


def test_the_parts_are_those_of_the_challenge():
    assert e2e_nlg.PARTS == {"train": (42_061, 42_061), "validation": (4_672, 547), "test": (4_693, 630)}
    assert tasks.get("e2e-nlg").sizes == {"train": 42_061, "validation": 547, "test": 630}


@pytest.mark.parametrize(
    "meaning", ["", "name Blue Spice", "name[Blue Spice", "name[Blue Spice] area[riverside]", "name[A], [B]", None, 3]
)
def test_a_meaning_of_another_form_is_named_with_its_row(monkeypatch, meaning):
    restaurants(monkeypatch, [MEANINGS[0], meaning, MEANINGS[1]])
    with pytest.raises(ValueError, match=r"^e2e-nlg, test, row 2: the meaning representation is not of the form name\[value\]"):
        e2e_nlg.read("test")


def test_other_faults_of_the_hub_s_copy_are_one_line_each(monkeypatch):
    restaurants(monkeypatch, rows=4)
    with pytest.raises(ValueError, match="e2e-nlg, test: 3 texts in the hub's copy, where the challenge has 4"):
        e2e_nlg.read("test")
    restaurants(monkeypatch, texts=[TEXTS[0], " ", TEXTS[2]])
    with pytest.raises(ValueError, match="row 2: the text is empty or none"):
        e2e_nlg.read("test")
    monkeypatch.setattr(e2e_nlg, "hub_columns", lambda *_, **__: {"mr": [], "human_reference": []})
    with pytest.raises(ValueError, match="no column meaning_representation in the hub's copy"):
        e2e_nlg.read("test")


def test_mathematics_is_trained_on_and_school_is_asked(monkeypatch):
    questions(monkeypatch, of_school=80)
    train, validation, test = (metamathqa.read(split) for split in ("train", "validation", "test"))
    assert train.first == [f"Question: a {i} b Think step by step.\nAnswer:" for i in (0, 1, 3, 4, 5)]
    assert train.labels == [f"it is {i}" for i in (0, 1, 3, 4, 5)]  # question, blank and answer have 1,301 characters
    np.random.seed(0)  # the comparison's own draw, in its own words
    indices = np.arange(80)
    np.random.shuffle(indices)
    assert validation.first == [f"Question: train {i} Think step by step.\nAnswer:" for i in indices[:50]]
    assert len(test) == 80 and test.labels[3] == "so #### 3"
    assert tasks.get("metamathqa").metrics(["#### 3", "it is 5"], [("so #### 3",), ("so #### 4",)]) == {"numeric_answer": 50.0}


def test_what_1300_characters_hold_is_kept(monkeypatch):
    def columns(*_, **__):
        return {"query": ["q" * 4, "q" * 5], "response": ["r" * 1295, "r" * 1295]}

    monkeypatch.setattr(metamathqa, "hub_columns", columns)
    assert [len(text) for text in metamathqa.read("train").labels] == [1295]


def test_faults_of_questions_are_one_line_each(monkeypatch):
    monkeypatch.setattr(metamathqa, "hub_columns", lambda *_, **__: {"query": ["a"], "answer": ["b"]})
    with pytest.raises(ValueError, match=r"metamathqa: no column response in meta-math/MetaMathQA; expected query, response"):
        metamathqa.read("train")
    monkeypatch.setattr(metamathqa, "hub_columns", lambda *_, **__: {"question": ["a", ""], "answer": ["b", "c"]})
    with pytest.raises(ValueError, match="openai/gsm8k, test, row 2: question is empty or no text"):
        metamathqa.read("test")


def test_without_a_hub_it_says_what_was_tried_and_which_model_can_stand_in(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plans = [recipes.plan(recipes.load("lora-3"), "GPT-2 M LoRA, 0.35M", "e2e")]
    plans.append(recipes.plan(recipes.load("peft-metamathqa"), "DoRA r32", "gsm8k"))
    with pytest.raises(ValueError) as error:
        recipes.check_at_hand(plans)
    lines = str(error.value).splitlines()
    assert len(lines) == 4 and all("could not be obtained; tried:" in line for line in lines)
    assert all("--model SmolLM2-135M-Instruct-Q4_1" in line for line in lines[:2])
    assert "data e2e-nlg" in lines[2] and "data metamathqa" in lines[3]


@pytest.mark.parametrize(
    ("table", "row", "cell", "model", "modules"),
    [
        ("lora-3", "GPT-2 M LoRA, 0.35M", "e2e", "gpt2", ["attn.c_attn"]),
        ("peft-metamathqa", "LoRA r10 MLP only", "gsm8k", "llama", ["gate_proj", "up_proj", "down_proj"]),
        pytest.param("lora-3", "GPT-2 L LoRA, 0.77M", "e2e", "llama", ["q_proj", "v_proj"], marks=pytest.mark.slow),
        pytest.param("peft-metamathqa", "AdaLoRA r64 to 32", "gsm8k", "llama", ["q_proj", "v_proj"], marks=pytest.mark.slow),
    ],
)
def test_a_cell_runs_and_stands_beside_the_paper(tmp_path, monkeypatch, table, row, cell, model, modules):
    """On tiny models and a few rows: every step of a real run but its length."""
    recipe = recipes.load(table)
    folder = language_models.saved(model, tmp_path / model)
    plan = recipes.plan(recipe, row, cell, model=folder, scale=2e-4 if table == "lora-3" else 1e-3, seeds=1)
    assert plan.total_steps == 5
    restaurants(monkeypatch, 16 * MEANINGS, 16 * TEXTS), questions(monkeypatch, of_training=24)
    task = tasks.get(recipe.tasks[cell])
    monkeypatch.setitem(tasks._TASKS, task.name, replace(task, sizes=None))  # a few rows
    (entry,) = plan.study.methods
    assert entry.targets == modules and plan.stands_in_for
    result = paper_cells.run(plan, tmp_path / "runs", max_length=48)  # as long as these models read
    made = paper_cells.lines(plan, result)
    columns = {"lora-3": ["bleu", "nist", "rouge_l"], "peft-metamathqa": ["gsm8k"]}[table]
    assert [line.column for line in made] == columns
    tags = {reason.tag for reason in made[0].reasons}
    assert {"model", "scaled"} <= tags and ({"decoding", "labels"} <= tags) == (table == "lora-3")
    assert beside.agreement(made[0]).kind == beside.NOT_COMPARABLE
