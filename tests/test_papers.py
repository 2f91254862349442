"""The published tables: transcription, averages, parameter counts, and what the loader refuses.

The single values below were typed from the papers' text, apart from the files; the sums hold the files as they were checked.
"""

import subprocess
import sys

import numpy as np
import pytest
from rankwise import variants
from rankwise.experiments import tasks
from rankwise.experiments.data.questions import Questions
from rankwise.experiments.tasks import commonsense
from rankwise.reports import papers
from rankwise.reports.papers.quoted import quoted

TABLES = {  # name: rows, values, sum of the values, sum of the spreads
    "adalora-1": (12, 132, 11674.81, 0),
    "adalora-15": (12, 24, 1205.71, 0),
    "adalora-2": (17, 68, 5981.3, 0),
    "adalora-3": (9, 54, 1866.02, 0),
    "adalora-4": (12, 36, 3020.5, 0),
    "adalora-5": (18, 36, 3342.47, 0),
    "dora-1": (19, 171, 13285.4, 0),
    "dora-15": (10, 90, 5936.0, 0),
    "dora-5": (8, 8, 43.1, 0),
    "dora-7": (4, 8, 420.5, 0),
    "eva-commonsense": (42, 42, 3673.6, 0),
    "eva-glue": (18, 162, 14420.5, 51.4),
    "lora-18": (11, 66, 911.2784, 0),
    "lora-2": (14, 126, 11052.0, 61.4),
    "lora-3": (12, 60, 2366.73, 3.05),
    "lora-4": (8, 40, 2286.5, 0),
    "lora-6": (15, 30, 2455.3, 0),
    "peft-metamathqa": (8, 32, 9992.254, 0),
    "qlora-3": (5, 29, 1587.2, 0),
    "qlora-4": (3, 27, 1424.0, 0),
    "vera-glue": (5, 35, 3028.3, 0),
}

CELLS = [  # table, row, {column: value or (value, spread)}
    ("lora-2", "RoBERTa-base BitFit, 0.1M", {"mrpc": 92.7, "qqp": 84.0, "rte": 81.5, "average": 85.2}),
    ("lora-2", "RoBERTa-base AdapterD, 0.3M", {"mnli": (87.1, 0.0), "rte": (71.5, 2.7), "mrpc": (88.5, 1.1)}),
    ("lora-2", "RoBERTa-base LoRA, 0.3M", {"mnli": (87.5, 0.3), "cola": (63.4, 1.2), "rte": (86.6, 0.7), "stsb": (91.5, 0.2)}),
    ("lora-2", "RoBERTa-large AdapterH (dagger), 0.8M", {"cola": (66.3, 2.0), "rte": (72.9, 2.9), "average": 86.4}),
    ("lora-2", "RoBERTa-large LoRA (dagger), 0.8M", {"mrpc": (90.2, 1.0), "rte": (85.2, 1.1), "qqp": (91.6, 0.2)}),
    ("lora-2", "RoBERTa-large LoRA, 0.8M", {"mrpc": (90.9, 1.2), "rte": (87.4, 2.5), "qqp": (91.6, 0.1)}),
    ("lora-3", "GPT-2 M LoRA, 0.35M", {"bleu": (70.4, 0.1), "nist": (8.85, 0.02), "cider": (2.53, 0.02)}),
    ("lora-3", "GPT-2 L AdapterL, 23.00M", {"meteor": (46.1, 0.1), "cider": (2.45, 0.02)}),
    ("lora-4", "BitFit, 14.2M", {"wikisql": (71.3, 0.5), "mnli_m": (91.0, 0.1), "samsum_rl": (43.5, 0.1)}),
    ("lora-6", "Wq Wk Wv Wo, r = 2", {"wikisql": (73.7, 0.5), "mnli_m": (91.7, 0.1)}),
    ("lora-6", "Wq Wv, r = 64", {"wikisql": (73.5, 0.5), "mnli_m": (91.4, 0.1)}),
    ("lora-18", "r = 16", {"val_loss": 1.16, "bleu": 69.61, "nist": 8.7483, "rouge_l": 0.7177, "cider": 2.4985}),
    ("adalora-1", "AdaLoRA, 1.27M", {"mnli_m": 90.76, "mnli_mm": 90.79, "qqp_acc": 92.23, "qqp_f1": 89.74, "stsb": 91.84}),
    ("adalora-1", "LoRA, 0.33M", {"mnli_mm": 90.38, "cola": 68.71, "rte": 85.56, "mrpc": 89.71, "average": 88.15}),
    ("adalora-1", "HAdapter, 0.31M", {"mnli_m": 90.10, "sst2": 95.41, "qnli": 93.52, "average": 87.60}),
    ("adalora-2", "LoRA, 0.16 %", {"v1_em": 86.6, "v1_f1": 92.9, "v2_em": 83.6, "v2_f1": 86.7}),
    ("adalora-2", "AdaLoRA, 0.65 %", {"v1_em": 87.6, "v1_f1": 93.7, "v2_em": 86.0, "v2_f1": 88.9}),
    ("adalora-3", "AdaLoRA, 1.10 %", {"xsum_r1": 44.35, "xsum_r2": 21.13, "xsum_rl": 36.13, "cnn_rl": 42.09}),
    ("adalora-4", "Prune LoRA, 0.16 %", {"sst2": 94.50, "rte": 86.15, "cola": 69.29}),
    ("adalora-4", "AdaLoRA, score |lambda|, 0.65 %", {"sst2": 95.87, "rte": 88.00, "cola": 70.38}),
    ("adalora-5", "LoRA with orthogonality, 0.32 %", {"sst2": 94.72, "mnli": 90.40}),
    ("adalora-15", "SST-2 AdaLoRA, 0.65 %", {"memory_gb": 13.226, "epoch_minutes": 71}),
    ("dora-1", "LLaMA-7B DoRA (half rank), 0.43 %", {"boolq": 70.0, "hellaswag": 83.2, "arc_c": 65.4, "average": 77.5}),
    ("dora-1", "LLaMA3-8B LoRA, 0.70 %", {"boolq": 70.8, "hellaswag": 91.7, "obqa": 79.0, "average": 80.8}),
    ("dora-1", "LLaMA-13B Series, 0.80 %", {"piqa": 83.0, "winogrande": 82.4, "average": 79.5}),
    ("dora-5", "LLaMA-7B DVoRA, 0.04 %", {"mt_bench": 5.0}),
    ("dora-7", "LLaMA-7B DoRA without the modification", {"memory_gb": 37.3, "average": 78.3}),
    ("dora-15", "LoRA, r = 4", {"boolq": 2.3, "siqa": 18.3, "average": 39.5}),
    ("dora-15", "DoRA, r = 64", {"hellaswag": 40.7, "arc_e": 80.9, "average": 72.1}),
    ("qlora-3", "QLoRA Int8", {"roberta_large": 88.8, "t5_780m": 45.4, "t5_3b": 56.5}),
    ("qlora-4", "Float4", {"llama_7b_alpaca": 37.2, "llama_33b_flan": 58.5, "llama_65b_flan": 63.3, "average": 52.2}),
    ("vera-glue", "RoBERTa-base VeRA, 0.043M", {"cola": 65.6, "rte": 78.7, "stsb": 90.7}),
    ("eva-glue", "DeBERTaV3-base LoRA", {"cola": (72.0, 1.3), "rte": (88.9, 0.5), "sst2": (95.2, 0.3), "average": 89.6}),
    ("eva-glue", "RoBERTa-large CorDA", {"qnli": (92.6, 0.0), "mrpc": (90.1, 0.9), "average": 87.9}),
    ("eva-commonsense", "Gemma-2-27B PiSSA", {"average": 88.7}),
    ("eva-commonsense", "Llama-3.1-8B CorDA", {"average": 80.9}),
    ("peft-metamathqa", "AdaLoRA r64 to 32", {"gsm8k": 37.3, "train_seconds": 1169, "memory_gb": 21.2, "forgetting": 0.022}),
    ("peft-metamathqa", "rsLoRA r64", {"gsm8k": 51.3, "train_seconds": 966, "forgetting": 0.111}),
]

COUNTED = {  # table: rows whose printed count is reproduced, rows whose count is not, rows that cannot be counted
    "adalora-1": (8, 4, 0),
    "adalora-15": (0, 0, 12),
    "adalora-2": (2, 14, 0),
    "adalora-3": (3, 6, 0),
    "adalora-4": (0, 0, 12),
    "adalora-5": (0, 0, 18),
    "dora-1": (11, 1, 6),
    "dora-15": (8, 2, 0),
    "dora-5": (4, 4, 0),
    "dora-7": (2, 0, 2),
    "lora-2": (7, 5, 2),
    "lora-3": (6, 4, 2),
    "lora-4": (5, 3, 0),
    "peft-metamathqa": (8, 0, 0),
    "vera-glue": (5, 0, 0),
}


def tables() -> list[papers.Published]:
    return [papers.load(name) for name in papers.names()]


def every_row() -> list[tuple[papers.Published, papers.PrintedRow]]:
    return [(table, row) for table in tables() for row in table.rows]


# --- transcription -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_no_value_of_a_table_has_changed(name: str) -> None:
    table = papers.load(name)
    rows, cells, values, spreads = TABLES[name]
    assert (len(table.rows), sum(len(row.values) for row in table.rows)) == (rows, cells)
    assert sum(sum(row.values.values()) for row in table.rows) == pytest.approx(values, abs=1e-6)
    assert sum(sum(row.spread.values()) for row in table.rows) == pytest.approx(spreads, abs=1e-6)


def test_these_are_the_tables() -> None:
    assert papers.names() == sorted(TABLES)


@pytest.mark.parametrize("name, row, cells", CELLS)
def test_a_cell_is_what_the_paper_prints(name: str, row: str, cells: dict) -> None:
    for column, expected in cells.items():
        found = papers.load(name).value(row, column)
        value, spread = expected if isinstance(expected, tuple) else (expected, None)
        assert (found.value, found.spread) == (value, spread), column


def test_many_cells_are_checked_one_by_one() -> None:
    assert sum(len(cells) for *_, cells in CELLS) >= 100
    assert {name for name, *_ in CELLS} == set(TABLES)


def test_what_was_not_verified_is_not_here() -> None:
    labels = ["BF16 full", "LoRA BF16", "QLoRA Int8", "QLoRA FP4", "QLoRA NF4+DQ"]  # no second full fine-tuning
    assert [row.label for row in papers.load("qlora-3").rows] == labels
    for table, row in every_row():
        assert "verified" not in row.model_dump_json() and "memory," not in row.note, (table.where, row.label)


def test_rows_that_papers_share_agree() -> None:
    """A paper that copies a row prints the same numbers; where two papers' tables share a run, so do these files."""

    def same(one: tuple[str, str], other: tuple[str, str], columns: list[str], digits: int | None = None) -> None:
        for column in columns:
            a, b = (papers.load(name).value(row, column).value for name, row in (one, other))
            assert a == b if digits is None else abs(a - b) <= 0.5 * 10**-digits + 1e-9, (one, other, column)

    six = ["sst2", "mrpc", "cola", "qnli", "rte", "stsb"]
    same(("vera-glue", "RoBERTa-base full fine-tuning, 125M"), ("lora-2", "RoBERTa-base full fine-tuning, 125.0M"), six)
    same(("vera-glue", "RoBERTa-base LoRA, 0.3M"), ("lora-2", "RoBERTa-base LoRA, 0.3M"), six)
    same(("vera-glue", "RoBERTa-large LoRA, 0.8M"), ("lora-2", "RoBERTa-large LoRA (dagger), 0.8M"), six)
    full = "RoBERTa-large full fine-tuning"
    same(("eva-glue", full), ("lora-2", full + ", 355.0M"), [*six, "qqp", "average"])
    rounded = ["mnli_m", "sst2", "cola", "qnli", "rte", "mrpc", "stsb"]
    same(("eva-glue", "DeBERTaV3-base AdaLoRA"), ("adalora-1", "AdaLoRA, 1.27M"), rounded, digits=1)
    same(("eva-glue", "DeBERTaV3-base full fine-tuning"), ("adalora-1", "Full FT, 184M"), rounded[1:], digits=1)
    eight = ["boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_e", "arc_c", "obqa", "average"]
    same(("dora-15", "LoRA, r = 32"), ("dora-1", "LLaMA-7B LoRA, 0.83 %"), eight)
    same(("dora-15", "DoRA, r = 32"), ("dora-1", "LLaMA-7B DoRA, 0.84 %"), eight)
    same(("dora-15", "DoRA, r = 16"), ("dora-1", "LLaMA-7B DoRA (half rank), 0.43 %"), eight)
    same(("adalora-5", "AdaLoRA, 0.65 %"), ("adalora-1", "AdaLoRA, 1.27M"), ["sst2"])
    same(("adalora-4", "AdaLoRA, 0.65 %"), ("adalora-1", "AdaLoRA, 1.27M"), ["sst2", "rte", "cola"])


@pytest.mark.parametrize(
    "name, words",
    [
        ("adalora-1", ["95.52", "95.64", "87.73", "87.36", "94.31", "lie outside both", "89.6"]),
        ("adalora-4", ["95.52", "95.64", "87.73"]),
        ("adalora-5", ["95.52", "90.57"]),
        ("adalora-15", ["SQuAD v2.0"]),
        ("dora-1", ["cut off", "78.1", "not tuned again", "copied from LLM-Adapters", "README", "76.3", "EVA, Table 7"]),
        ("dora-7", ["78.1", "78.4"]),
        ("dora-15", ["cut off", "could not be read", "76.8"]),
        ("lora-2", ["MNLI", "README", "87.24", "alpha 16", "seed 0"]),
        ("eva-glue", ["copied", "mismatched", "PEFT"]),
        ("peft-metamathqa", ["0.125", "1,319"]),
    ],
)
def test_known_inconsistencies_are_told(name: str, words: list[str]) -> None:
    told = " ".join(papers.load(name).inconsistencies)
    assert [word for word in words if word not in told] == []


# --- averages ------------------------------------------------------------------------------------------------------


def test_every_printed_average_is_reproduced_or_says_why_not() -> None:
    checked = set()
    for table, row in every_row():
        reproduced = table.average_is_reproduced(row.label)
        assert (reproduced is False) == (row.average_differs is not None), (table.where, row.label)
        checked |= {table.where} if reproduced is not None else set()
        if table.average in row.values:
            assert reproduced is not None, (table.where, row.label)  # no part of a printed average is missing
    averaged = {"lora-2", "adalora-1", "dora-1", "dora-15", "qlora-4", "vera-glue", "eva-glue"}
    assert checked == {papers.load(name).where for name in averaged}


def test_adalora_s_average_takes_pairs_as_one() -> None:
    gap = papers.load("adalora-1").average_gap("BitFit, 0.1M")
    by_hand = (89.64 + 94.84 + 66.96 + 86.68 + 92.24 + 78.70 + 87.75 + 91.35) / 8  # (89.37 + 89.91) / 2, (88.41 + 84.95) / 2
    assert gap == pytest.approx(86.02 - by_hand, abs=1e-9)


def test_dora_cuts_averages_off() -> None:
    table = papers.load("dora-1")
    gap = table.average_gap("LLaMA-13B Parallel, 2.89 %")
    assert gap == pytest.approx(81.4 - 81.475)
    assert table.average_is_reproduced("LLaMA-13B Parallel, 2.89 %")
    assert papers.load("qlora-4").average_gap("NFloat4+DQ") == pytest.approx(53.1 - 423.9 / 8)


def test_an_average_whose_parts_were_not_printed_has_no_gap() -> None:
    assert papers.load("eva-commonsense").average_gap("Gemma-2-9B EVA") is None
    assert papers.load("lora-18").average_gap("r = 8") is None


# --- parameter counts ----------------------------------------------------------------------------------------------


def test_every_printed_count_is_reproduced_or_says_why_not() -> None:
    found = {}
    for name in papers.names():
        table = papers.load(name)
        tally = [0, 0, 0]
        for row in table.rows:
            reproduced = table.count_is_reproduced(row.label)
            if reproduced is None:
                tally[2] += row.parameters is not None
                continue
            tally[not reproduced] += 1
            assert reproduced == (row.counts.differs is None), (name, row.label)
            if not reproduced:
                assert row.counts.count() == row.counts.gives, (name, row.label)
        if any(tally):
            found[name] = tuple(tally)
    assert found == COUNTED


@pytest.mark.parametrize(
    "name, row, count",
    [
        ("adalora-1", "LoRA, 1.33M", 1_327_104),
        ("adalora-1", "LoRA, 0.33M", 331_776),
        ("adalora-1", "AdaLoRA, 1.27M", 12 * 8 * (4 * 1537 + 2 * 3841)),
        ("lora-2", "DeBERTa-XXL LoRA, 4.7M", 48 * 2 * 16 * 2 * 1536),
        ("lora-3", "GPT-2 M LoRA, 0.35M", 393_216),
        ("lora-4", "LoRA, 37.7M", 96 * 2 * 8 * 2 * 12288),
        ("peft-metamathqa", "LoRA r32 (q v)", 9_175_040),
        ("peft-metamathqa", "DoRA r32", 9_289_728),
        ("peft-metamathqa", "AdaLoRA r64 to 32", 18_353_664),
        ("peft-metamathqa", "VeRA", 129_024),  # as in the result file itself
        ("dora-1", "LLaMA-7B DoRA, 0.84 %", 56_098_816 + 32 * (4 * 4096 + 11008)),
    ],
)
def test_a_count_worked_by_hand(name: str, row: str, count: int) -> None:
    assert papers.load(name).row(row).counts.count() == count


@pytest.mark.parametrize(
    "text, number, half, is_percent",
    [
        ("1.33M", 1.33e6, 5e3, False),
        ("184M", 184e6, 5e5, False),
        ("175,255.8M", 175_255.8e6, 5e4, False),
        ("3.21B", 3.21e9, 5e6, False),
        ("0.83 %", 0.83, 0.005, True),
    ],
)
def test_a_printed_count_is_read_with_its_precision(text: str, number: float, half: float, is_percent: bool) -> None:
    found = papers.printed(text)
    assert (found.number, found.half, found.is_percent) == (pytest.approx(number), pytest.approx(half), is_percent)
    assert found.is_rounded_from(number + 0.99 * half) and not found.is_rounded_from(number - 1.01 * half)


# --- what the files name exists --------------------------------------------------------------------------------------


def test_tasks_metrics_splits_and_methods_are_ours() -> None:
    for table, row in every_row():
        assert row.method is None or row.method in variants.METHODS, (table.where, row.label)
    for table in tables():
        for name, column in table.columns.items():
            if column.task is None:
                assert column.split is column.metric is None, (table.where, name)
                continue
            task = tasks.get(column.task)
            assert column.split is None or column.split in task.splits
            assert column.metric is None or column.metric in _measured(task), (table.where, name)


def _measured(task: tasks.Task) -> dict[str, float]:
    """Every metric of a task, on next to nothing."""
    if task.kind == "span":
        one = Questions(np.array([0]), np.zeros((1, 2), dtype=np.int32), ["0"], ["yes"], [("yes",)])
        return task.measure(["yes"], np.zeros(1), one)
    if task.name == "commonsense":  # of which each row says which test it is of
        answers = [("the correct answer is true", name) for name in commonsense.TESTS]
        return task.measure(["true"] * len(answers), answers)
    if task.kind == "generation":
        return task.measure(["yes 1"], [("yes 1",)])
    true = np.array([0, 1, 1, 0])
    if task.kind == "choice":
        return task.measure(np.stack([true] * 3, 1), true)
    values = true / 5 if task.kind == "regression" else true
    return task.measure(values, values)


def test_reading_a_table_imports_no_torch() -> None:
    code = "import sys; from rankwise.reports import papers; papers.load('adalora-1').row('Full FT, 184M').counts.count(); "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


# --- values and refusals ---------------------------------------------------------------------------------------------


def test_a_value_says_where_it_stands_and_how_many_runs_made_it() -> None:
    assert papers.load("adalora-1").value("AdaLoRA, 1.27M", "stsb") == papers.Value(91.84, None, 5, "AdaLoRA, Table 1")
    assert papers.load("lora-2").value("RoBERTa-base LoRA, 0.3M", "rte") == papers.Value(86.6, 0.7, 5, "LoRA, Table 2, p. 6")
    eva = papers.load("eva-glue")
    assert [eva.value("RoBERTa-large EVA", column).n for column in ("cola", "mnli_m")] == [5, 3]
    assert papers.load("dora-15").value("DoRA, r = 4", "boolq").n is None  # not said


def test_a_copied_row_has_no_runs_of_its_own() -> None:
    assert papers.load("lora-2").value("RoBERTa-base full fine-tuning, 125.0M", "rte").n is None
    assert papers.load("eva-glue").value("DeBERTaV3-base AdaLoRA", "rte").n is None


@pytest.mark.parametrize(
    "ask, message",
    [
        (
            lambda: papers.load("adalora-11"),
            r'no published table "adalora-11"; did you mean "adalora-1"\?; there are: adalora-1,',
        ),
        (lambda: papers.load("../shapes"), r'no published table "\.\./shapes"'),
        (
            lambda: papers.load("adalora-1").row("AdaLoRA, 1.28M"),
            r'AdaLoRA, Table 1 has no row .*did you mean "AdaLoRA, 1\.27M"\?',
        ),
        (lambda: papers.load("adalora-1").value("AdaLoRA, 1.27M", "stbs"), r'no column "stbs"; did you mean "stsb"\?'),
        (lambda: papers.load("adalora-5").value("LoRA with orthogonality, 0.08 %", "sst2"), r"has no row"),
        (lambda: papers.load("qlora-3").value("QLoRA NF4+DQ", "roberta_large"), r"prints no roberta_large for"),
        (lambda: papers.load("adalora-1").average_gap("AdaLoRA"), r"has no row"),
        (lambda: papers.printed("1.3 million"), r'parameters = "1\.3 million": a number and K, M, B or %'),
    ],
)
def test_what_is_not_there_is_refused_with_the_nearest(ask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask()


GOOD = """
paper = "P"
title = "T"
source = "S"
table = "Table 1"
page = 3
about = "A"
spread_is = "not said"
[reasons]
why = "Because."
[columns.a]
title = "A"
higher_is_better = true
[columns.b]
title = "B"
higher_is_better = true
averages = ["a"]
[[rows]]
label = "one"
parameters = "0.3M"
counts = { shape = "roberta-base", method = "lora", targets = ["query", "value"], rank = 8 }
values = { a = 1.0, b = 1 }
spread = { a = 0.1 }
[[rows]]
label = "two"
parameters = "7M"
not_counted = "why"
values = { a = 2.0 }
"""


def test_the_example_is_good() -> None:
    table = papers.read(GOOD, "good")
    assert table.value("one", "a") == papers.Value(1.0, 0.1, None, "P, Table 1, p. 3")
    assert table.average_gap("one") == 0 and table.average_gap("two") is None
    assert table.count_is_reproduced("one") is True and table.count_is_reproduced("two") is None


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('label = "two"', 'label = "one"', r'two rows are called "one"'),
        ("page = 3", "pgae = 3", r'good\.toml\.pgae: unknown setting; did you mean "page"\?'),
        ("page = 3", "page = 0", r"good\.toml\.page = 0: should be greater than 0"),
        ("page = 3\n", "", r"neither page nor page_note"),
        ("values = { a = 2.0 }", "values = { a = nan }", r"rows\.1\.values\.a = nan: .*finite"),
        ("values = { a = 2.0 }", 'values = { a = "2.0" }', r"rows\.1\.values\.a = '2\.0': .*valid number"),
        ("values = { a = 2.0 }", "values = { aa = 2.0 }", r'"two": no column "aa"'),
        ("values = { a = 2.0 }", "values = { }", r"no values"),
        ("values = { a = 1.0, b = 1 }", "values = { a = 1.0 }", r"columns without a value: b"),
        ("spread = { a = 0.1 }", "spread = { a = -0.1 }", r"rows\.0\.spread\.a = -0\.1: .*greater than or equal to 0"),
        ("values = { a = 2.0 }", "values = { a = 2.0 }\nspread = { b = 1 }", r"spread of b, which has no value"),
        ('spread_is = "not said"', "", r"spread_is says what the spread means"),
        ("spread = { a = 0.1 }", "", r"spread_is says what the spread means"),
        ('parameters = "7M"', "", r"counts without parameters"),
        ('not_counted = "why"', "", r'"two": parameters without counts'),
        ('not_counted = "why"', 'not_counted = "whi"', r'no reason "whi"; did you mean "why"\?'),
        ('why = "Because."', 'why = "Because."\nother = "x"', r'nothing names the reason "other"'),
        ('parameters = "7M"', 'parameters = "7 millions"', r'parameters = "7 millions": a number and'),
        ('averages = ["a"]', 'averages = ["b"]', r'b averages "b", which is no other column'),
        ('averages = ["a"]', 'averages = ["c"]', r'b averages "c", which is no other column'),
        ('title = "A"\n', 'title = "A"\naverages = ["b"]\n', r"columns a, b are all averages"),
        ("rank = 8 }", "rank = 8, gives = 5 }", r"gives and differs belong together"),
        ("rank = 8 }", 'rank = 8, differs = "why" }', r"gives and differs belong together"),
        ("rank = 8 }", 'rank = 8, inferred = "tokens" }', r'inferred = "tokens", which is not given'),
        (", rank = 8 }", " }", r'good\.toml\.rows\.0\.counts: "lora" needs rank'),
        ("higher_is_better = true\n[columns.b]", "[columns.b]", r"columns\.a\.higher_is_better: missing"),
        ("[[rows]]", "[rows", r"good\.toml: "),
    ],
)
def test_a_faulty_file_is_refused_with_the_rule(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ValueError, match=message):
        papers.read(GOOD.replace(old, new, 1), "good")


# -- numbers outside of tables -------------------------------------------------------------------------------------------


def test_quoted_factors_are_the_quotients_of_their_norms():
    rows = quoted().amplification.rows
    assert [row.factor for row in rows] == pytest.approx([row.update_norm / row.of_update for row in rows], rel=0.015)
    assert [f"{row.over_random:.2g}" for row in rows] == ["16", "5.8"]
