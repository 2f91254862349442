"""Alpaca's instructions and MMLU's questions, of QLoRA's Table 4: copies stand in for the hub and for QLoRA's repository."""

import json
from dataclasses import replace

import pytest
from rankwise.experiments import recipes, sources, tasks
from rankwise.experiments.sources import github
from rankwise.experiments.tasks import alpaca_mmlu
from rankwise.reports import papers
from rankwise.reports.papers import beside

from tests import language_models, paper_cells

ALPACA = {
    "instruction": ["Name a fruit.", "Add them.", "Say nothing."] * 8,
    "input": ["", "1 and 2", ""] * 8,
    "output": ["An apple.", "3", " "] * 8,
    "text": ["..."] * 24,
}


def question(letter: str) -> dict[str, str]:
    return {
        "subject": "astronomy",
        "input": f"Which one?\nA. a\nB. b\nC. c\nD. d\nAnswer: {letter}\n\nAnd?\nAnswer:",
        "output": letter,
    }


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """Alpaca's columns, and MMLU's files where a clone of QLoRA's repository would lie; writes other lines to one of them."""
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(alpaca_mmlu, "hub_columns", lambda *_, **__: ALPACA)

    def put(path: str, lines: list[str]) -> None:
        file = alpaca_mmlu.REPOSITORY.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{line}\n" for line in lines))
        files = {**alpaca_mmlu.REPOSITORY.files, path: github.blob_name(file)}
        monkeypatch.setattr(alpaca_mmlu, "REPOSITORY", replace(alpaca_mmlu.REPOSITORY, files=files))

    for path in alpaca_mmlu.QUESTIONS.values():
        put(path, [json.dumps(question(letter)) for letter in "CAB"])
    alpaca_mmlu.read.cache_clear()
    yield put
    alpaca_mmlu.read.cache_clear()


def test_instructions_are_asked_as_the_release_asks_them():
    train = alpaca_mmlu.read("train")
    assert len(train) == 16 and train.answers[:2] == [("An apple.",), ("3",)] and not train.labels.any()
    assert train.first[0] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a fruit.\n\n### Response: "
    )
    assert train.first[1] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd them.\n\n### Input:\n1 and 2\n\n### Response: "
    )


def test_questions_have_four_letters_of_which_one_is_right():
    test = alpaca_mmlu.read("test")
    assert test.labels.tolist() == [2, 0, 1] and test.answers == [("A", "B", "C", "D")] * 3
    assert test.first[0] == question("C")["input"]
    assert tasks.get("alpaca-mmlu").metrics([[2, 2, 2], [0, 1, 0], [0, 0, 0]], test.labels)["accuracy"] == pytest.approx(
        200 / 3
    )


@pytest.mark.parametrize("changed", [{"output": "E"}, {"output": None}, {"input": ""}, {"input": 3}])
def test_a_question_of_another_form_is_named(data, changed):
    data(alpaca_mmlu.QUESTIONS["test"], [json.dumps(question("A")), json.dumps({**question("A"), **changed})])
    with pytest.raises(ValueError, match=r"^alpaca-mmlu: data/mmlu/five_shot_mmlu_test.json, line 2: its input is empty"):
        alpaca_mmlu.read("test")


def test_faults_of_the_hub_s_copy_are_one_line_each(monkeypatch):
    monkeypatch.setattr(alpaca_mmlu, "hub_columns", lambda *_, **__: {"instruction": ["a"], "output": ["b"]})
    with pytest.raises(
        ValueError, match=r"^alpaca-mmlu: tatsu-lab/alpaca, train: no column input; expected instruction, input"
    ):
        alpaca_mmlu.read("train")
    for bad in ({"instruction": ["a", " "]}, {"output": ["a", None]}):
        rows = {"instruction": ["a", "b"], "input": ["", ""], "output": ["c", "d"], **bad}
        monkeypatch.setattr(alpaca_mmlu, "hub_columns", lambda *_, rows=rows, **__: rows)
        with pytest.raises(ValueError, match=r"row 2: its instruction is empty, or something in it is no text$"):
            alpaca_mmlu.instructions()


def test_without_a_network_it_says_what_was_tried(data, monkeypatch):
    (alpaca_mmlu.REPOSITORY.folder / alpaca_mmlu.QUESTIONS["test"]).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(sources.Unavailable, match=r"artidoro/qlora could not be obtained: cache: no .*; GitHub: not asked"):
        alpaca_mmlu.read("test")


def test_each_size_is_trained_as_section_5_says():
    """And stands in its own column alone; what was never released, and 4-bit floats, wait."""
    recipe, published = recipes.load("qlora-4"), papers.load("qlora-4")
    sizes = {"7b": (2e-4, 16, 0.1), "13b": (2e-4, 16, 0.1), "33b": (1e-4, 32, 0.05), "65b": (1e-4, 64, 0.05)}
    for size, (rate, batch, dropout) in sizes.items():
        cell = f"llama_{size}_alpaca"
        for row, form in (("BFloat16", None), ("NFloat4+DQ", "nf4 with double quantization")):
            plan = recipes.plan(recipe, row, cell)
            (entry,), training = plan.study.methods, plan.study.training
            assert (entry.learning_rates, training.batch_size, entry.settings["dropout"]) == ([rate], batch, dropout)
            assert (entry.settings["rank"], entry.settings["alpha"], training.clip) == (64, 16, 0.3)
            assert entry.targets == [f"{name}_proj" for name in "qkvo"] + ["gate_proj", "up_proj", "down_proj"]
            assert batch * plan.total_steps == 160_000 and batch // training.accumulation == 4
            assert (None if entry.scheme is None else str(entry.scheme)) == form
        assert beside.columns_of(published, "alpaca-mmlu", cell=cell) == [cell]
        assert recipes.waits(recipe, "BFloat16", f"llama_{size}_flan", "paper") == "the task flan-mmlu"
        assert recipes.waits(recipe, "Float4", cell, "paper").startswith("bases in 4-bit floats")


def test_a_quantised_base_is_estimated_by_its_bits():
    """LLaMA-7B: 32 layers of 4 x 4096^2 and 3 x 4096 x 11008 weights, and embeddings and norms that stay in fp32."""
    recipe = recipes.load("qlora-4")
    whole, packed = (
        recipes.memory_bytes(recipes.settings_of(recipe, row, "llama_7b_alpaca", "paper")) for row in ("BFloat16", "NFloat4+DQ")
    )
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)
    assert linears == 6_476_005_376 and whole - packed == pytest.approx((4 - 4.126953125 / 8) * linears)
    single = recipes.settings_of(recipe, "NFloat4+DQ", "llama_7b_alpaca", "paper") | {"double_quantization": False}
    assert recipes.memory_bytes(single) - packed == pytest.approx((4.5 - 4.126953125) / 8 * linears)


@pytest.mark.parametrize("row", ["BFloat16", pytest.param("NFloat4+DQ", marks=pytest.mark.slow)])
def test_a_cell_runs_and_stands_in_its_column(tmp_path, row):
    """On a tiny model and a few rows: every step of a real run but its length."""
    folder = language_models.saved("llama", tmp_path / "llama")
    recipe = recipes.load("qlora-4")
    plan = recipes.plan(recipe, row, "llama_13b_alpaca", model=folder, scale=2e-4, seeds=1)
    result = paper_cells.run(plan, tmp_path / "runs", max_length=48, precision="fp32")
    (line,) = paper_cells.lines(plan, result)
    assert line.column == "llama_13b_alpaca" and line.published in (47.2, 47.5)
    assert {"model", "scaled"} <= {reason.tag for reason in line.reasons}
