"""The papers' recipes: their numbers as the papers have them, as studies, scaled, refused; and published beside ours."""

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rankwise import reports
from rankwise.experiments import checks, cli, config, models, recipes, sources, tasks
from rankwise.reports import papers
from rankwise.reports.papers import beside, beside_table, listing
from rankwise.reports.papers import published as published_tables
from rankwise.reports.results import load
from rankwise.reports.statistics import summary
from rankwise.variants.adapter import targets as module_names
from scipy.stats import ttest_ind_from_stats

from tests import small_world

MINILM = recipes.STAND_IN
GLUE = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")  # the order of LoRA's appendix
ROWS = {"mnli": 392702, "sst2": 67349, "mrpc": 3668, "cola": 8551, "qnli": 104743, "qqp": 363846, "rte": 2490, "stsb": 5749}


def runnable(recipe: recipes.Recipe) -> list[tuple[str, str, str]]:
    """(row, cell, variant) of every cell that can run."""
    keys = [(row, cell, variant) for variant in recipe.variants for row in recipe.rows for cell in recipe.tasks]
    return [key for key in keys if not recipes.waits(recipe, *key)]


def planned(table: str, row: str, cell: str, variant: str = "paper", **options) -> recipes.Plan:
    return recipes.plan(recipes.load(table), row, cell, variant, **options)


# -- the files ------------------------------------------------------------------------------------------------------------


def test_every_published_table_has_a_recipe_and_every_recipe_a_table():
    of = {name: recipes.load(name).table for name in recipes.names()}
    assert set(of.values()) == set(papers.names())
    assert [name for name, table in of.items() if name != table] == [
        "adalora-4-miniature",
        "adalora-5-miniature",
        "dora-1-miniature",
        "lora-18-miniature",
    ]


@pytest.mark.parametrize("name", recipes.names())
def test_every_cell_of_a_recipe_is_a_row_of_its_table_and_a_sound_study(name):
    recipe = recipes.load(name)
    published = papers.load(recipe.table)
    labels = [row.label for row in published.rows]
    assert [row for row in recipe.rows if row not in labels] == []
    if not recipe.waits and not recipe.miniature:
        assert list(recipe.rows) == labels  # every row is there, if only to say what it waits for
    for row, cell, variant in runnable(recipe):
        one = recipes.plan(recipe, row, cell, variant)
        checks.check(one.study)
        assert one.study.tasks == [recipe.tasks[cell]]
        # Of generated texts the release and the comparison score the last step, on the test part.
        last = {"lora-3": 3, "lora-18": 1, "peft-metamathqa": 1, "dora-1": 1, "dora-15": 1, "qlora-4": 1}
        assert one.study.protocol == ("held-out" if name in last else "best-dev-epoch")
        assert list(one.study.seeds) == list(range(recipe.seeds)) and recipe.seeds == last.get(name, 5)
        assert one.stands_in_for is None
        method = published.row(row).method
        assert method is None or method == one.study.methods[0].method
        assert beside.columns_of(published, recipe.tasks[cell], recipe.beside, cell)


def test_what_can_run_is_what_the_methods_and_tasks_allow():
    counts = {name: len(runnable(recipes.load(name))) for name in recipes.names()}
    assert {name: count for name, count in counts.items() if count} == {
        "adalora-1": 2 * 12 * 8,
        "adalora-4": 2 * 12 * 3,
        "adalora-4-miniature": 2 * 12,
        "adalora-5": 2 * 18 * 2,
        "adalora-5-miniature": 2 * 18,
        "lora-2": 2 * 8 * 8,  # four of LoRA, four of adapters
        "lora-3": 2,
        "lora-18": 11,
        "lora-18-miniature": 7,
        "dora-1": 3 * 4,
        "dora-1-miniature": 3,
        "dora-15": 2 * 5,
        "peft-metamathqa": 8,
        "qlora-4": 2 * 4,
        "vera-glue": 6,
    } | ({"adalora-2": 2 * 17 * 2} if "squad/v1" in tasks.names() else {})


def test_what_waits_says_for_what():
    lora = recipes.load("lora-2")
    assert recipes.waits(lora, "RoBERTa-base BitFit, 0.1M", "rte", "paper").startswith("a recipe: the paper copied the row")
    of_data = {"qlora-3": "instruction sets", "dora-5": "GPT-4 as the judge", "adalora-3": "XSum"}
    for name, data in of_data.items():
        assert data in recipes.load(name).waits
    assert "read from a hub" in recipes.load("adalora-3").waits
    assert recipes.load("lora-6").waits == "weights that were never released"
    assert not any("decoder tasks" in recipes.load(name).waits for name in recipes.names())  # these kinds are there


def test_a_miniature_of_a_decoder_adapts_the_modules_that_the_paper_names():
    recipe = recipes.load("dora-1-miniature")
    for row, (method, rank, rate) in zip(
        recipe.rows, (("lora", 32, 3e-4), ("dora", 16, 2e-4), ("dora", 32, 1e-4)), strict=True
    ):
        (entry,) = recipes.plan(recipe, row, "siqa").study.methods
        assert (entry.method, entry.settings["rank"], entry.settings["alpha"]) == (method, rank, 2 * rank)
        assert entry.targets == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"] and entry.learning_rates == [rate]
    with pytest.raises(ValueError, match=r'a bert has no module for the role "up"; it has: query'):
        recipes.plan(recipe, row, "siqa", model=recipes.STAND_IN)


def test_doras_commonsense_tables_are_trained_as_its_table_8_says():
    """Table 8 of the paper, but the rates of Table 15's other ranks: the release's README."""
    rates = {"LLaMA-7B": (2e-4, 1e-4), "LLaMA-13B": (3e-4, 2e-4), "LLaMA2-7B": (2e-4, 2e-4), "LLaMA3-8B": (1e-4, 1e-4)}
    first, ranks = recipes.load("dora-1"), recipes.load("dora-15")
    found = {}
    for recipe in (first, ranks):
        for row, cell, variant in runnable(recipe):
            study = recipes.plan(recipe, row, cell, variant).study
            (entry,), training = study.methods, study.training
            assert entry.targets == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
            assert (entry.settings["dropout"], entry.settings["alpha"]) == (0.05, 2 * entry.settings["rank"])
            assert (training.batch_size, training.epochs, training.max_length) == (16, 3, 256)
            assert round(training.warmup_ratio * training.total_steps(170_300)) == 100
            found[row] = (entry.method, entry.settings["rank"], entry.learning_rates)
    for model, (half, whole) in rates.items():
        of_model = [one for row, one in found.items() if row.startswith(f"{model} ")]
        assert of_model == [("lora", 32, [3e-4]), ("dora", 16, [half]), ("dora", 32, [whole])]
    for rank in (4, 8, 16, 32, 64):
        assert found[f"LoRA, r = {rank}"] == ("lora", rank, [3e-4])
        assert found[f"DoRA, r = {rank}"] == ("dora", rank, [1e-4 if rank == 32 else 2e-4])
    # Weights of 27 GB, and 16 x 256 x 4096 numbers: once into each of 32 layers, 136 bytes of each within one.
    given = recipes.settings_of(first, "LLaMA-7B DoRA, 0.84 %", "commonsense", "paper")
    inside, between = 136 * 16 * 256 * 4096, 32 * 4 * 16 * 256 * 4096
    assert recipes.memory_bytes(given) == 0.7e9 + 4 * 6_738_415_616 + inside + between
    assert recipes.memory_bytes({**given, "gradient_checkpointing": False}) == 0.7e9 + 4 * 6_738_415_616 + 32 * inside
    waiting = [row for row in first.rows if recipes.waits(first, row, "commonsense", "paper")]
    assert len(waiting) == 7 and "ChatGPT" in waiting[0]


# -- LoRA's appendix D, column by column ----------------------------------------------------------------------------------

LORA = {  # row: alpha, warm-up ratio, then a number for each task in the order of GLUE
    "RoBERTa-base LoRA, 0.3M": {
        "fixed": ("FacebookAI/roberta-base", 8, 8, 0.06),
        "batch": (16, 16, 16, 32, 32, 16, 32, 16),
        "epochs": (30, 60, 30, 80, 25, 25, 80, 40),
        "rate": (5e-4, 5e-4, 4e-4, 4e-4, 4e-4, 5e-4, 5e-4, 4e-4),
        "length": (512,) * 8,
        "decay": (0.1,) * 8,
    },
    "RoBERTa-large LoRA, 0.8M": {
        "fixed": ("FacebookAI/roberta-large", 8, 16, 0.06),
        "batch": (4, 4, 4, 4, 4, 4, 8, 8),
        "epochs": (10, 10, 20, 20, 10, 20, 20, 30),
        "rate": (3e-4, 4e-4, 3e-4, 2e-4, 2e-4, 3e-4, 4e-4, 2e-4),
        "length": (128, 128, 512, 128, 512, 512, 512, 512),
        "decay": (0.1,) * 8,
    },
    "RoBERTa-large LoRA (dagger), 0.8M": {
        "fixed": ("FacebookAI/roberta-large", 8, 16, 0.06),
        "batch": (4,) * 8,
        "epochs": (10, 10, 20, 20, 10, 20, 20, 10),
        "rate": (3e-4, 4e-4, 3e-4, 2e-4, 2e-4, 3e-4, 4e-4, 2e-4),
        "length": (128,) * 8,
        "decay": (0.1,) * 8,
    },
    "DeBERTa-XXL LoRA, 4.7M": {
        "fixed": ("microsoft/deberta-v2-xxlarge", 8, 8, 0.1),
        "batch": (8, 8, 32, 4, 6, 8, 4, 4),
        "epochs": (5, 16, 30, 10, 8, 11, 11, 10),
        "rate": (1e-4, 6e-5, 2e-4, 1e-4, 1e-4, 1e-4, 2e-4, 2e-4),
        "length": (256, 128, 128, 64, 512, 320, 320, 128),
        "decay": (0, 0.01, 0.01, 0, 0.01, 0.01, 0.01, 0.1),
        "cls": (0.15, 0, 0, 0.1, 0.1, 0.2, 0.2, 0.2),
    },
}


@pytest.mark.parametrize("row", LORA)
def test_loras_numbers_are_the_papers(row):
    table, recipe = LORA[row], recipes.load("lora-2")
    for at, cell in enumerate(GLUE):
        study = recipes.plan(recipe, row, cell, "paper").study
        entry, training = study.methods[0], study.training
        names = ["query", "value"] if "RoBERTa" in row else ["query_proj", "value_proj"]
        assert (study.model, entry.settings["rank"], entry.settings["alpha"], training.warmup_ratio) == table["fixed"]
        assert entry.method == "lora" and entry.targets == [f"attention.self.{name}" for name in names]
        assert (training.batch_size, training.epochs, training.max_length, training.weight_decay) == (
            table["batch"][at], table["epochs"][at], table["length"][at], table["decay"][at])  # fmt: skip
        assert entry.learning_rates == [table["rate"][at]] and study.sweep is None
        assert training.schedule == "linear" and training.accumulation == 1
        said = recipes.settings_of(recipe, row, cell, "paper")
        assert said.get("cls_dropout") == table.get("cls", (None,) * 8)[at]
        starts = cell in ("mrpc", "rte", "stsb") and "dagger" not in row
        assert ("start_from" in said) == starts
        assert [r.tag for r in recipes.plan(recipe, row, cell, "paper").reasons] == (["start"] if starts else [])


SCRIPTS = {  # what the scripts have otherwise: alpha, effective batch, micro-batches, and single cells
    "RoBERTa-base LoRA, 0.3M": (8, 16, (128, 128, 128, 64, 256, 128, 256, 128), (8, 8, 8, 2, 8, 8, 8, 8), {}),
    "RoBERTa-large LoRA, 0.8M": (8, 16, (32, 64, 32, 32, 32, 32, 64, 32), (8,) * 8,
        {"sst2": {"max_length": 512}, "cola": {"rate": 3e-4}, "stsb": {"rate": 3e-4, "epochs": 10, "max_length": 128}}),
    "DeBERTa-XXL LoRA, 4.7M": (16, 32, (64, 64, 256, 32, 48, 64, 32, 32), (8,) * 8,
        {"cola": {"rate": 1.3e-4}, "rte": {"rate": 2.6e-4}}),
}  # fmt: skip
WARMUP = {"cola": 100, "mnli": 1000, "qnli": 500, "qqp": 10000, "rte": 50, "sst2": 1000, "stsb": 100}  # DeBERTa-XXL's scripts


@pytest.mark.parametrize("row", SCRIPTS)
def test_loras_scripts_differ_where_they_do_and_nowhere_else(row):
    rank, alpha, batches, micro, single = SCRIPTS[row]
    for at, cell in enumerate(GLUE):
        paper, script = (planned("lora-2", row, cell, variant) for variant in ("paper", "script"))
        training, own = script.study.training, single.get(cell, {})
        entry = script.study.methods[0]
        assert (entry.settings["rank"], entry.settings["alpha"]) == (rank, alpha)
        assert (training.batch_size, training.accumulation) == (batches[at], micro[at])
        assert entry.learning_rates == [own.get("rate", LORA[row]["rate"][at])]
        assert training.epochs == own.get("epochs", LORA[row]["epochs"][at])
        assert training.max_length == own.get("max_length", LORA[row]["length"][at])
        assert training.weight_decay == LORA[row]["decay"][at]
        if "DeBERTa" in row and cell in WARMUP:
            assert round(training.warmup_ratio * script.total_steps) == WARMUP[cell]
        else:
            assert training.warmup_ratio == paper.study.training.warmup_ratio


# -- AdaLoRA's Tables 7, 8 and 10 -----------------------------------------------------------------------------------------

TABLE_8 = {  # rate, epochs, gamma, t_i, Delta_T, t_f | length, warm-up, cls dropout, decay, alpha (scripts)
    "mnli": (5e-4, 7, 0.1, 8000, 100, 50000, 256, 1000, 0.15, 0, 16),
    "rte": (1.2e-3, 50, 0.3, 600, 1, 1800, 320, 200, 0.2, 0.01, 32),
    "qnli": (1.2e-3, 5, 0.1, 2000, 100, 8000, 512, 500, 0.1, 0.01, 32),
    "mrpc": (1e-3, 30, 0.1, 600, 1, 1800, 320, "10 %", 0, 0.01, 32),
    "qqp": (5e-4, 5, 0.1, 8000, 100, 25000, 320, 2000, 0.15, 0.01, 16),
    "sst2": (8e-4, 24, 0.1, 6000, 100, 22000, 128, 1000, 0, 0.01, 16),
    "cola": (5e-4, 25, 0.5, 800, 10, 3500, 64, 100, 0.1, 0, 32),
    "stsb": (2.2e-3, 25, 0.1, 800, 10, 2000, 128, 100, 0.2, 0.1, 32),
}
SCRIPT_8 = {"qnli": {"rate": 5e-4}, "qqp": {"rate": 8e-4}, "cola": {"rate": 8e-4, "gamma": 0.1}, "stsb": {"gamma": 0.3}}
GRID = [3e-5, 5e-5, 8e-5, 1e-4, 3e-4, 5e-4, 8e-4, 1e-3]
ALL_SIX = ["attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj", "attention.output.dense"]
ALL_SIX += ["intermediate.dense", r"layer\.\d+\.output\.dense"]


@pytest.mark.parametrize("variant", ["paper", "script"])
@pytest.mark.parametrize("row, ranks", [("AdaLoRA, 1.27M", (12, 8)), ("AdaLoRA, 0.32M", (4, 2))])
def test_adaloras_numbers_are_those_of_table_8(row, ranks, variant):
    for cell, (rate, epochs, gamma, first, interval, last, length, rising, cls, decay, alpha) in TABLE_8.items():
        one = planned("adalora-1", row, cell, variant)
        entry, training = one.study.methods[0], one.study.training
        other = SCRIPT_8.get(cell, {}) if variant == "script" else {}
        assert entry.settings == {
            "initial_rank": ranks[0], "target_rank": ranks[1], "alpha": alpha, "beta1": 0.85, "beta2": 0.85,
            "orthogonality": other.get("gamma", gamma), "warmup_steps": first, "interval": interval, "final_steps": last,
            "penalty_form": "paper" if variant == "paper" else "release",
        }  # fmt: skip
        assert one.study.model == "microsoft/deberta-v3-base" and entry.targets == ALL_SIX
        assert entry.learning_rates == [other.get("rate", rate)]
        assert (training.batch_size, training.epochs, training.max_length, training.weight_decay) == (32, epochs, length, decay)
        assert one.total_steps == epochs * -(-ROWS[cell] // 32) > first + last
        warmup = round(0.1 * one.total_steps) if rising == "10 %" else rising
        assert round(training.warmup_ratio * one.total_steps) == warmup
        assert any(f"dropout before the classifier, {cls:g}," in line for line in one.departures)


def test_adaloras_baselines_search_the_rates_that_the_paper_searched_with_full_runs():
    for row, method, settings in (
        ("Full FT, 184M", "full", {}), ("BitFit, 0.1M", "bitfit", {}),
        ("LoRA, 1.33M", "lora", {"rank": 8, "alpha": 32}), ("LoRA, 0.33M", "lora", {"rank": 2, "alpha": 32}),
    ):  # fmt: skip
        study = planned("adalora-1", row, "rte").study
        assert (study.methods[0].method, study.methods[0].settings) == (method, settings)
        assert study.methods[0].learning_rates == GRID
        assert (study.sweep.epochs, study.sweep.trials, study.sweep.halving) == (50, 8, None)  # as long, and never widened
    scaled = planned("adalora-1", "Full FT, 184M", "rte", scale=0.015).study
    assert (scaled.sweep.epochs, scaled.sweep.max_steps) == (scaled.training.epochs, scaled.training.max_steps) == (1, 58)


def test_adapters_are_as_wide_and_as_fast_as_the_papers_say():
    """AdaLoRA's Table 7; LoRA's appendix D, the adapters among the dagger rows: epochs and rates of MNLI, SST-2 and RTE."""
    for size, houlsby, pfeiffer in ((0, 32, 64), (1, 16, 32), (2, 8, 16)):
        for method, bottleneck, labels in (
            ("houlsby", houlsby, ("HAdapter, 1.22M", "HAdapter, 0.61M", "HAdapter, 0.31M")),
            ("pfeiffer", pfeiffer, ("PAdapter, 1.18M", "PAdapter, 0.60M", "PAdapter, 0.30M")),
        ):
            entry = planned("adalora-1", labels[size], "rte").study.methods[0]
            assert (entry.method, entry.settings, entry.learning_rates) == (method, {"bottleneck": bottleneck}, GRID)
    for row, method, bottleneck, epochs, rates in (
        ("AdapterP (dagger), 3.0M", "pfeiffer", 64, (10, 20, 20), (3e-5, 3e-5, 3e-4)),
        ("AdapterP (dagger), 0.8M", "pfeiffer", 16, (5, 20, 20), (3e-4, 3e-4, 3e-4)),
        ("AdapterH (dagger), 6.0M", "houlsby", 64, (10, 5, 20), (3e-5, 3e-4, 3e-4)),
        ("AdapterH (dagger), 0.8M", "houlsby", 8, (10, 5, 20), (3e-4, 3e-4, 3e-4)),
    ):
        for cell, length, rate in zip(("mnli", "sst2", "rte"), epochs, rates, strict=True):
            study = planned("lora-2", f"RoBERTa-large {row}", cell).study
            assert (study.methods[0].method, study.methods[0].settings) == (method, {"bottleneck": bottleneck})
            assert (study.training.epochs, study.methods[0].learning_rates) == (length, [rate])
            assert (study.training.batch_size, study.training.max_length) == (32, 128)


def test_adaloras_ablations_have_the_budgets_of_the_table():
    ranks = {"0.08": (2, 1), "0.16": (4, 2), "0.32": (6, 4), "0.65": (12, 8)}
    for share, (initial, target) in ranks.items():
        settings = planned("adalora-5", f"AdaLoRA, {share} %", "sst2").study.methods[0].settings
        assert (settings["initial_rank"], settings["target_rank"], settings["orthogonality"]) == (initial, target, 0.1)
        settings = planned("adalora-5", f"SVD-LoRA, {share} %", "sst2").study.methods[0].settings
        assert (settings["initial_rank"], settings["target_rank"]) == (target, target)  # nothing is ever pruned
        settings = planned("adalora-5", f"AdaLoRA without orthogonality, {share} %", "mnli").study.methods[0].settings
        assert (settings["initial_rank"], settings["orthogonality"]) == (initial, 0.0)
    for cell, initial in (("cola", 3), ("rte", 2), ("sst2", 2)):  # the scripts of the smallest budget
        settings = planned("adalora-4", "AdaLoRA, 0.08 %", cell, "script").study.methods[0].settings
        assert (settings["initial_rank"], settings["target_rank"]) == (initial, 1)
    assert planned("adalora-5", "AdaLoRA, 0.08 %", "mnli", "script").study.methods[0].settings["initial_rank"] == 3


def test_adaloras_ablations_are_settings_of_the_allocator():
    def settings(table: str, row: str, cell: str) -> dict:
        one = planned(table, row, cell)
        assert "schedule" not in one.study.methods[0].settings  # the rate's schedule is not the allocator's
        return {"method": one.study.methods[0].method, **one.study.methods[0].settings}

    for cell, table in (("rte", "adalora-4"), ("stsb", "adalora-4-miniature")):
        whole = settings(table, "AdaLoRA, 0.16 %", cell)
        weight = {"rte": 0.3, "stsb": 0.1}[cell]
        assert whole["orthogonality"] == weight and "score" not in whole
        assert settings(table, "AdaLoRA, score I, 0.16 %", cell) == whole | {"score": "raw-sensitivity"}
        assert settings(table, "AdaLoRA, score |lambda|, 0.16 %", cell) == whole | {"score": "magnitude"}
        pruned = {"method": "allocated", "form": "doublet", "score": "sensitivity", "orthogonality": 0.0}
        assert settings(table, "Prune LoRA, 0.16 %", cell) == whole | pruned
    for cell, table in (("sst2", "adalora-5"), ("stsb", "adalora-5-miniature")):
        one = settings(table, "LoRA with orthogonality, 0.32 %", cell)
        assert (one["method"], one["form"], one["initial_rank"], one["target_rank"]) == ("allocated", "doublet", 4, 4)
        assert one["orthogonality"] == 0.1
        svd = settings(table, "SVD-LoRA, 0.32 %", cell)
        assert one == svd | {"method": "allocated", "form": "doublet"}


@pytest.mark.parametrize("table", ["adalora-4-miniature", "adalora-5-miniature"])
def test_a_miniature_of_the_ablations_has_every_row_of_its_table_with_the_same_settings(table):
    whole, small = recipes.load(table.removesuffix("-miniature")), recipes.load(table)
    assert list(small.rows) == list(whole.rows)
    for label, row in small.rows.items():
        assert (row.groups, row.settings) == (whole.rows[label].groups, whole.rows[label].settings)
    assert recipes.plan(small, label, "stsb", scale=0.05).study.model == recipes.STAND_IN


def test_adaloras_numbers_on_squad_are_those_of_table_10():
    recipe = recipes.load("adalora-2")
    for cell, epochs, last, questions in (("squad_v1", 10, 25000, 87599), ("squad_v2", 12, 50000, 130319)):
        given = recipes.settings_of(recipe, "AdaLoRA, 0.08 %", cell, "paper")
        wanted = {"batch_size": 16, "learning_rate": 1e-3, "orthogonality": 0.1, "warmup_steps": 5000, "interval": 100}
        wanted |= {"epochs": epochs, "final_steps": last, "max_length": 384, "lr_warmup_steps": 1000, "alpha": 16}
        wanted |= {"initial_rank": 2, "target_rank": 1}
        assert {key: given[key] for key in wanted} == wanted
        assert epochs * questions // 16 > 5000 + last
    if "squad/v1" in tasks.names():
        assert planned("adalora-2", "AdaLoRA, 0.65 %", "squad_v1").total_steps == 10 * 5475


# -- scale ----------------------------------------------------------------------------------------------------------------


def test_scale_shrinks_every_count_of_steps_in_proportion():
    one = planned("adalora-1", "AdaLoRA, 1.27M", "stsb", scale=0.1)  # 25 epochs of 180 steps, 4,500
    training, settings = one.study.training, one.study.methods[0].settings
    assert (training.epochs, training.max_steps, one.total_steps) == (3, 450, 450)  # 2.5 epochs
    assert (settings["warmup_steps"], settings["final_steps"], settings["interval"]) == (80, 200, 1)
    assert round(training.warmup_ratio * 450) == 10
    assert [reason.tag for reason in one.reasons] == ["scaled"]
    said = "Scaled to 0.1: 450 steps, warm-up 80 (of 800), final phase 200 (of 2000), interval 1 (of 10), the rate rises for 10"
    assert any(line.startswith(said) for line in one.departures)


def test_scale_keeps_whole_epochs_and_a_ratio_as_they_are():
    one = planned("lora-2", "RoBERTa-base LoRA, 0.3M", "stsb", scale=0.1)
    training = one.study.training
    assert (training.epochs, training.max_steps, training.warmup_ratio) == (4, None, 0.06)
    assert one.total_steps == 4 * 360


def test_scale_never_goes_below_one_step():
    one = planned("adalora-1", "AdaLoRA, 1.27M", "stsb", scale=0.002)  # 9 steps: 1.6, 4 and 0.02
    settings = one.study.methods[0].settings
    assert (one.total_steps, settings["warmup_steps"], settings["final_steps"], settings["interval"]) == (9, 2, 4, 1)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.5, float("nan")])
def test_a_scale_outside_0_to_1_is_refused(scale):
    with pytest.raises(ValueError, match=r"--scale .*at most 1"):
        planned("adalora-1", "AdaLoRA, 1.27M", "stsb", scale=scale)


def test_step_counts_that_do_not_fit_are_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError) as error:
        planned("adalora-1", "AdaLoRA, 1.27M", "stsb", scale=0.0005)
    assert str(error.value) == (
        'adalora-1, "AdaLoRA, 1.27M", stsb, paper, --scale 0.0005: warm-up 1 + final phase 1 leave no step to prune in a run '
        "of 2: give a larger --scale"
    )
    text = (config.PAPERS / "adalora-1.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("interval = 10,  final_steps = 2000", "interval = 10,  final_steps = 3700"))
    with pytest.raises(ValueError, match=r"warm-up 800 \+ final phase 3700 leave no step to prune in a run of 4500: lengthen"):
        recipes.plan(recipes.read(path), "AdaLoRA, 1.27M", "stsb")
    path.write_text(text.replace("max_length = 128, lr_warmup_steps = 100, ", "max_length = 128, lr_warmup_steps = 4500,"))
    with pytest.raises(ValueError, match="the rate would rise for 4500 of 4500 steps"):
        recipes.plan(recipes.read(path), "LoRA, 1.33M", "stsb")


# -- roles and stand-ins --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, architecture", [("bert", "bert"), ("deberta-v2", "deberta-v2")])
def test_roles_are_the_modules_that_they_name(name, architecture):
    model = models.tiny(name)
    assert model.config.model_type == architecture
    layers, of = model.config.num_hidden_layers, recipes.MODULES[architecture]
    every = module_names.resolve(model, list(of.values()), ["classifier"])
    assert every == module_names.resolve(model, "all-linear", ["classifier"]) and len(every) == 6 * layers
    for role, target in of.items():  # each role has one module in every layer, and no two roles share one
        found = module_names.resolve(model, [target], ["classifier"])
        assert len(found) == layers, role
        every = [one for one in every if one not in found]
    assert every == []


def test_a_stand_in_has_its_own_names_and_says_whose_place_it_takes():
    one = planned("adalora-1", "AdaLoRA, 1.27M", "stsb", model=MINILM)
    assert one.study.model == MINILM and one.stands_in_for == "microsoft/deberta-v3-base"
    assert one.study.methods[0].targets[:2] == ["attention.self.query", "attention.self.key"]
    assert [reason.tag for reason in one.reasons] == ["model"]
    assert one.departures[0].startswith('"all six" of microsoft/deberta-v3-base are here: attention.self.query, ')
    same = planned("adalora-1", "AdaLoRA, 1.27M", "stsb", model="microsoft/deberta-v3-base")
    assert same.stands_in_for is None and same.reasons == ()


def test_a_stand_in_without_the_roles_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "bloom", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 9}))  # fmt: skip
    with pytest.raises(ValueError, match='where "all six" is in a bloom is not known; known architectures: bert, roberta'):
        planned("adalora-1", "AdaLoRA, 1.27M", "stsb", model=str(tmp_path))
    with pytest.raises(ValueError, match='no role "querry"; did you mean "query"'):
        recipes.modules_of("querry, value", MINILM)


def test_variants_and_lengths_have_labels_of_their_own():
    labels = [planned("adalora-1", "AdaLoRA, 1.27M", "stsb", v, scale=s).study.methods[0].label
              for v, s in (("paper", 1.0), ("script", 1.0), ("script", 0.5))]  # fmt: skip
    assert labels == ["AdaLoRA, 1.27M", "AdaLoRA, 1.27M [script]", "AdaLoRA, 1.27M [script, scale 0.5]"]


# -- refusals -------------------------------------------------------------------------------------------------------------


def test_unknown_names_get_the_nearest():
    recipe = recipes.load("adalora-1")
    for call, words in (
        (lambda: recipes.load("adalora1"), 'did you mean "adalora-1"?'),
        (lambda: recipes.choose(recipe, ["stbs"], [], "paper"), 'no cell "stbs"; did you mean "stsb"?'),
        (lambda: recipes.choose(recipe, ["stsb"], ["AdaLoRA 1.27M"], "paper"), 'did you mean "AdaLoRA, 1.27M"?'),
        (lambda: recipes.choose(recipe, ["stsb"], [], "scrip"), 'did you mean "script"?'),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert words in str(error.value)


def test_what_waits_is_not_run_and_says_why():
    with pytest.raises(ValueError, match="dora-5 waits for GPT-4 as the judge"):
        recipes.choose(recipes.load("dora-5"), ["all"], [], "paper")
    with pytest.raises(ValueError, match=r'"RoBERTa-base BitFit, 0\.1M" waits for a recipe: the paper copied the row'):
        recipes.choose(recipes.load("lora-2"), ["stsb"], ["RoBERTa-base BitFit, 0.1M"], "paper")
    chosen = recipes.choose(recipes.load("lora-2"), ["stsb", "rte", "stsb"], [], "paper")
    assert len(chosen) == len(set(chosen)) == 8 * 2  # what waits among the rows is left out


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("batch_size = 32", "batch_sise = 32", ["variants.paper.glue.batch_sise", 'did you mean "batch_size"?']),
        ("mnli = { epochs = 7, ", "mnli = { epoch = 7, ", ["glue.tasks.mnli.epoch", 'did you mean "epochs"?']),
        ("rte  = { epochs", "rtee  = { epochs", ["glue.tasks.rtee: not in [tasks]", 'did you mean "rte"?']),
        ("rank = 8", "rnak = 8", ['rows."LoRA, 1.33M".rnak', 'did you mean "rank"?']),
        ('["glue", "lora"]', '["glue", "lroa"]', ['no variant has a group "lroa"', 'did you mean "lora"?']),
        ('like = "paper"', 'like = "papre"', ["no earlier variant of this file; there are: paper"]),
        ("seeds = 5", "sedes = 5", ["sedes", 'did you mean "seeds"?']),
        ("[tasks]", "[[tasks]]", ["tasks should be a table"]),
        ("[tasks]", "[tasks", ["not a TOML file"]),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_place_and_the_nearest(tmp_path, old, new, words):
    text = (config.PAPERS / "adalora-1.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError) as error:
        recipes.read(path)
    assert all(word in str(error.value) for word in (*words, "mine.toml"))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["adalora-1", "papers/adalora-1", config.PAPERS / "adalora-1.toml"])
def test_a_recipe_is_no_study_and_says_which_command_reads_it(name):
    assert not any("papers" in name for name in config.shipped())
    with pytest.raises(ValueError, match="this is a paper's recipe: rankwise paper adalora-1"):
        config.read(Path(name))


def test_a_file_of_ones_own_may_have_a_recipes_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("adalora-1").write_text("model = 3")
    with pytest.raises(ValueError, match="a study names at least one method"):
        config.read(Path("adalora-1"))


def test_what_cannot_be_had_is_named_with_what_was_tried_and_the_remedy(monkeypatch):
    def away(name):
        raise sources.Unavailable(name, ["catalogue: not in it", "hub: no connection"])

    monkeypatch.setattr(sources, "fetch", away)
    plans = [planned("adalora-1", row, "stsb") for row in ("AdaLoRA, 1.27M", "AdaLoRA, 0.32M")]
    monkeypatch.setattr(recipes, "get_task", lambda name: SimpleNamespace(
        official_train_split="train", dev_split="dev", load=lambda splits: away(name)))  # fmt: skip
    with pytest.raises(ValueError) as error:
        recipes.check_at_hand(plans)
    model, data = str(error.value).splitlines()  # a line for each model and data set, however many cells need it
    assert model.startswith(
        "model microsoft/deberta-v3-base could not be obtained; tried: catalogue: not in it; hub: no connection"
    )
    assert model.endswith(f"--model {MINILM}")
    assert data.startswith("data glue/stsb could not be obtained; tried: ") and "sarcasm" in data


# -- what a machine needs -------------------------------------------------------------------------------------------------


def test_at_hand_tells_the_cache_from_a_package_and_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert sources.at_hand(MINILM) == "package"
    assert sources.at_hand("microsoft/deberta-v3-base") is None
    (tmp_path / "hub" / "models--microsoft--deberta-v3-base" / "snapshots").mkdir(parents=True)
    assert sources.at_hand("microsoft/deberta-v3-base") == "cache"
    assert sources.at_hand(str(tmp_path)) == "cache"
    folder = tmp_path / "cache" / "data" / "glue--stsb"
    folder.mkdir(parents=True)
    for name in sources.CATALOGUE["glue/stsb"].files:
        assert sources.at_hand("glue/stsb") == "package"  # not before the last of them is there
        (folder / name).touch()
    assert sources.at_hand("glue/stsb") == "cache"


def test_the_shapes_are_those_of_the_papers():
    assert recipes.SHAPES["FacebookAI/roberta-base"].in_matrices == 84_934_656  # 12 x (4 x 768^2 + 2 x 768 x 3,072)
    lora = {"microsoft/deberta-v3-base": (8, 6, 1_327_104), "FacebookAI/roberta-base": (8, 2, 294_912)}
    for model, (rank, sites, count) in lora.items():
        of = recipes.SHAPES[model]
        square, wide = 2 * of.hidden * rank, (of.hidden + of.intermediate) * rank
        assert of.layers * (2 * square if sites == 2 else 4 * square + 2 * wide) == count


def test_llamas_have_the_parameters_of_their_shapes():
    """Both embeddings of 32,000 tokens, the layers' matrices and two norms each, and the last norm."""
    models = [name for name in recipes.SHAPES if name.startswith(("yahma/", "huggyllama/", "meta-llama/Llama-2"))]
    assert len(models) == 7
    for of in (recipes.SHAPES[name] for name in models):
        assert of.parameters == of.in_matrices + (2 * 32_000 + 2 * of.layers + 1) * of.hidden


def test_the_estimates_by_hand():
    given = {"model": MINILM, "method": "lora", "batch_size": 16, "accumulation": 4, "max_length": 10, "epochs": 2}
    weights, activations = 4 * 22_713_216, 34 * 2 * 2 * 4 * 10 * 384 * 6
    assert recipes.memory_bytes(given) == 0.7e9 + weights + activations
    assert recipes.memory_bytes({**given, "method": "full"}) == 0.7e9 + 4 * weights + activations
    task = tasks.get("glue/stsb")
    rows = 4 * 5749 + 2 * 1500  # operations of a row, and of one that is evaluated, for each parameter and token
    once = 2 * rows * 40 * 10_616_832 / (0.5 * 1e9)
    assert recipes.seconds(given, task, 3, 1e9) == pytest.approx(3 * once)
    assert recipes.seconds({**given, "learning_rates": [1, 2]}, task, 3, 1e9) == pytest.approx(5 * once)


def test_the_share_of_the_machine_is_that_of_the_committed_measurements():
    folder = Path(reports.__file__).parent
    (speed,) = [one.tokens_per_second for one in load(folder / "studies" / "quick-look").results() if one.method == "lora"]
    rate = json.loads((folder / "bench" / "bench.json").read_text())["machine"]["matrix_product_gflops"]["fp32"]
    reached = speed * 4 * recipes.SHAPES[MINILM].in_matrices / (rate * 1e9)
    assert abs(reached - recipes.REACHED) < 0.01


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(recipes, "matrix_product_rate", lambda: 100e9)


def test_the_list_says_what_runs_here(offline, monkeypatch):
    monkeypatch.setattr(recipes, "free_memory", lambda: 5 * 10**9)
    found = recipes.here([recipes.load(name) for name in recipes.names()], "paper")
    table = listing.overview(found)
    shown = {row[0]: row for row in table.rows}
    assert shown["lora-18-miniature"][1:5] == ("yes: stsb", "7 of 7", "package: all-MiniLM-L6-v2", "package: stsb")
    assert shown["adalora-1"][1:4] == ("with --model: stsb", "96 of 96", "hub: deberta-v3-base")
    assert shown["adalora-4"][1] == "no"
    assert shown["dora-1"][1:3] == ("no", "12 of 19") and shown["dora-15"][1:4] == ("no", "10 of 10", "hub: llama-7b-hf")
    assert "dora-5" not in shown and any("dora-5 waits for GPT-4" in line for line in table.caption)
    assert any("out of reach: not asked" in line for line in table.caption)
    cells = {(one["row"], one["cell"]): one for one in found["tables"][recipes.names().index("adalora-1")]["cells"]}
    assert cells["AdaLoRA, 1.27M", "stsb"]["lacking"] == ["model", "memory"]
    assert cells["AdaLoRA, 1.27M", "cola"]["lacking"] == ["model", "data"]  # 64 tokens: it would fit
    assert cells["HAdapter, 1.22M", "stsb"]["here"] == "with --model"
    json.dumps(found, allow_nan=False)


def test_with_a_hub_the_rest_runs_too(offline, monkeypatch):
    monkeypatch.setattr(recipes, "free_memory", lambda: None)
    monkeypatch.setattr(sources, "hub_out_of_reach", lambda: None)
    found = recipes.here([recipes.load("lora-2")], "script")
    assert {one["here"] for one in found["tables"][0]["cells"]} == {"yes", "waits"}


def test_the_detail_of_a_table_stands_beside_the_appendix(offline):
    found = recipes.here([recipes.load("adalora-1")], "paper")
    table = listing.detail(found, papers.load("adalora-1"))
    row = dict(zip(table.columns, next(r for r in table.rows if r[:2] == ("AdaLoRA, 1.27M", "stsb")), strict=True))
    wanted = {"published": "91.84", "epochs": "25", "learning_rate": "2.2e-3", "orthogonality": "0.1", "warmup_steps": "800"}
    assert {key: row[key] for key in wanted} == wanted
    assert any("All cells: model microsoft/deberta-v3-base, batch_size 32, schedule linear" in line for line in table.caption)
    table = listing.detail(recipes.here([recipes.load("lora-2")], "paper"), papers.load("lora-2"))
    copied = "Waits for a recipe: the paper copied the row from earlier work: RoBERTa-base full fine-tuning, 125.0M; "
    assert any(line.startswith(copied) for line in table.caption)
    waiting = listing.detail(recipes.here([recipes.load("adalora-3")], "paper"), papers.load("adalora-3"))
    assert waiting.rows == () and any("Waits for XSum and CNN/DailyMail as tasks" in line for line in waiting.caption)


# -- the verdict ----------------------------------------------------------------------------------------------------------


def line(scores=(91.0, 92.0, 93.0), published=90.0, **changes) -> beside.Line:
    values = {
        "table": "P, Table 1", "row": "A", "column": "stsb", "title": "STS-B", "cell": "stsb", "variant": "paper", "scale": 1.0,
        "model": "owner/model", "stands_in_for": None, "split": "dev", "metric": "accuracy", "higher_is_better": True,
        "published": published, "spread": None, "published_n": 5, "where": "P, Table 1", "tolerance": 0.05,
        "scores": dict(enumerate(scores)), "asked": len(scores), "failed": [], "miniature": False, "position": None,
        "reasons": [], "departures": [], "notes": [],
    }  # fmt: skip
    return beside.Line(**{**values, **changes})


def test_without_a_published_spread_our_interval_and_the_tolerance_decide():
    # mean 92, sd 1, n = 3: t(2, 0.975) = 4.302653, half-width 4.302653 / sqrt(3) = 2.484138; with 0.05: 2.534138
    assert beside.half_width(summary([91, 92, 93]), None, 5, 0.05) == pytest.approx(2.534138, abs=1e-6)
    said = beside.agreement(line(published=90.0))
    assert (said.kind, said.tags, said.difference.mean) == ("inside the combined interval", (), 2.0)
    assert (said.difference.low, said.difference.high) == pytest.approx((2 - 2.534138, 2 + 2.534138), abs=1e-6)
    assert beside.agreement(line(published=89.47)).kind == "inside the combined interval"  # 2.53
    assert beside.agreement(line(published=89.46)).kind == "better"  # 2.54
    assert beside.agreement(line(published=94.54)).kind == "worse"
    assert beside.agreement(line(published=94.54, higher_is_better=False)).kind == "better"
    assert beside.agreement(line(published=89.46, higher_is_better=False)).kind == "worse"


def test_with_a_published_spread_welchs_interval_decides():
    # v1 = 1/3, v2 = 1/5: sqrt(v1 + v2) = 0.730297; degrees (8/15)^2 / ((1/9)/2 + (1/25)/4) = 4.338983
    half = beside.half_width(summary([91, 92, 93]), 1.0, 5, 0.05)
    assert half == pytest.approx(2.692 * 0.730297, abs=2e-3)
    p = ttest_ind_from_stats(half, 1, 3, 0, 1, 5, equal_var=False).pvalue  # at the interval's end the test says 5 %
    assert p == pytest.approx(0.05, abs=1e-9)
    assert beside.agreement(line(published=90.1, spread=1.0)).kind == "inside the combined interval"
    assert beside.agreement(line(published=90.0, spread=1.0)).kind == "better"
    assert beside.half_width(summary([91, 92, 93]), 1.0, None, 0.05) == pytest.approx(2.534138, abs=1e-6)  # n not said
    assert beside.half_width(summary([92, 92]), 0.0, 5, 0.05) == 0.0
    assert beside.half_width(summary([92]), 1.0, 5, 0.05) is None


@pytest.mark.parametrize(
    "changes, tags",
    [
        ({"reasons": [beside.Reason(tag="model", text="x")]}, ("model",)),
        ({"reasons": [beside.Reason(tag=tag, text="x") for tag in ("model", "scaled")]}, ("model", "scaled")),
        ({"scores": {0: 91.0}}, ("one seed",)),
        ({"failed": ["collapsed"], "asked": 4}, ("failed (1 of 4)",)),
        ({"failed": ["a", "b"], "asked": 2, "scores": {}}, ("failed (2 of 2)",)),
        ({"scores": {}}, ("no run",)),
    ],
)
def test_not_comparable_comes_first_and_the_numbers_stay(changes, tags):
    said = beside.agreement(line(published=50.0, **changes))
    assert (said.kind, said.tags) == ("not comparable", tags)
    assert said.text == f"not comparable: {', '.join(tags)}"
    assert (said.difference is None) == (changes.get("scores") == {})


# -- lines, tables, curves ------------------------------------------------------------------------------------------------

PUBLISHED = """
paper = "P"
title = "A paper"
source = "Nobody, nowhere"
table = "Table 1"
page_note = "not checked"
about = "made up"
seeds = 5
statistic = "median"
spread_is = "not said"
inconsistencies = ["One sentence."]
[columns.main]
title = "Main"
task = "glue/mnli"
metric = "accuracy"
higher_is_better = true
[columns.second]
title = "Second"
task = "glue/mnli"
split = "dev-mismatched"
metric = "accuracy"
higher_is_better = true
[columns.overall]
title = "Overall"
task = "glue/mnli"
higher_is_better = true
[columns.mean]
title = "Mean"
task = "glue/mnli"
higher_is_better = true
averages = ["main", "second"]
[[rows]]
label = "A"
values = { main = 90.0, second = 89.0, overall = 89.5, mean = 89.5 }
spread = { main = 0.3 }
[[rows]]
label = "B"
values = { main = 80.0 }
"""


def result(seed: int, main: float, second: float, **changes) -> dict:
    metrics = {"dev": {"accuracy": main, "macro_f1": 1.0}, "dev-mismatched": {"accuracy": second}}
    values = {"status": "completed", "error": None, "seed": seed, "metric": "accuracy", "split": "dev", "metrics": metrics}
    return {**values, "precision": "fp32", "dropout_note": None, "scored_step": 80, "total_steps": 100, **changes}


def lines(results, row="A", **changes) -> list[beside.Line]:
    published = papers.read(PUBLISHED, "p-1")
    options = {"cell": "mnli", "variant": "paper", "scale": 1.0, "model": "m", "stands_in_for": None, "reasons": []}
    options |= {"departures": ["One departure."], **changes}
    return beside.lines(published, row, beside.columns_of(published, "glue/mnli"), results, **options)


def test_a_run_fills_every_column_of_its_task_from_its_own_split_and_metric():
    main, second, overall = lines([result(0, 90.0, 88.0), result(1, 91.0, 89.0)])
    assert (main.scores, main.split, main.published, main.spread) == ({0: 90.0, 1: 91.0}, "dev", 90.0, 0.3)
    assert (second.scores, second.split, second.spread) == ({0: 88.0, 1: 89.0}, "dev-mismatched", None)
    assert overall.scores == {} and [reason.tag for reason in overall.reasons] == ["no such score"]
    assert [one.column for one in lines([result(0, 90.0, 88.0)], row="B")] == ["main"]  # what the paper prints there


def test_what_only_the_runs_know_is_told():
    early = result(0, 90.0, 88.0, scored_step=40, precision="bf16", dropout_note="dropout is off")
    failed = {**result(1, 0, 0), "status": "failed", "error": "collapsed", "metrics": {}}
    (main, *_) = lines([early, result(2, 91.0, 88.0), failed], final_steps=50)
    assert main.asked == 3 and main.failed == ["collapsed"] and main.scores == {0: 90.0, 2: 91.0}
    assert main.departures == [
        "One departure.",
        "The paper reports the median of its seeds; ours is their mean.",
        "Dropout is off.",
        "Frozen weights in bf16.",
        "1 of 2 runs had their best epoch before the rank budget was reached.",
    ]
    # a step is at the final budget from total - final on
    assert "budget" not in " ".join(lines([result(0, 90.0, 88.0, scored_step=50)], final_steps=50)[0].departures)


def test_the_table_says_who_stands_in_and_what_is_not_as_in_the_paper():
    published = papers.read(PUBLISHED, "p-1")
    reasons = [("model", "small stands in for big.")]
    found = lines([result(s, 90.0 + s, 88.0) for s in range(3)], model="small", stands_in_for="big", reasons=reasons)
    found += lines([result(0, 79.0, 88.0)], row="B", model="small", stands_in_for="big", departures=["Of B alone."])
    table = beside_table.table(published, found)
    assert table.title == "P, Table 1, beside ours (small standing in for big)"
    assert table.columns == ("row", "column", "verdict", "published", "ours", "n", "difference")
    assert table.cells()[0] == ["A", "Main", "not comparable: model", "90.00 (sd 0.30)", "91.00 +- 2.48", "3",
                                "+1.00 (-1.32 to +3.32)"]  # fmt: skip
    assert table.cells()[3][:3] == ["B", "Main", "not comparable: one seed"]
    assert table.caption[0] == "Published: Nobody, nowhere; made up; median, 5 seeds."
    assert any(one.startswith("What the published spread is, the paper does not say") for one in table.caption)
    assert "Not comparable (model): small stands in for big." in table.caption
    assert "Departure (A, mnli): One departure." in table.caption and "Departure (B, mnli): Of B alone." in table.caption
    assert "Departure: The paper reports the median of its seeds; ours is their mean." in table.caption
    assert "The paper's own inconsistency: One sentence." in table.caption


def test_a_confidence_interval_of_unsaid_level_is_not_taken_as_a_deviation():
    published = papers.read(PUBLISHED.replace('"not said"', '"confidence interval; its level is not said"'), "p-1")
    found = beside.lines(published, "A", ["main"], [result(0, 90.0, 88.0)], cell="mnli", variant="paper", scale=1.0, model="m",
                         stands_in_for=None, reasons=[], departures=[])  # fmt: skip
    assert found[0].spread is None


def test_a_folder_keeps_the_cells_of_earlier_calls_and_replaces_its_own(tmp_path, monkeypatch):
    (tmp_path / "p-1.toml").write_text(PUBLISHED)
    monkeypatch.setattr(published_tables, "FOLDER", tmp_path)
    papers.load.cache_clear()
    assert beside_table.of_folder(tmp_path) is None
    beside.keep("p-1", lines([result(0, 79.0, 1.0), result(1, 79.5, 1.0)], row="B"), tmp_path)
    beside.keep("p-1", lines([result(0, 90.0, 88.0)])[:1], tmp_path)
    beside.keep("p-1", lines([result(0, 90.0, 88.0), result(1, 91.0, 88.0)])[:1], tmp_path)
    name, kept = beside.load(tmp_path)
    assert name == "p-1" and [(one.row, len(one.scores)) for one in kept] == [("A", 2), ("B", 2)]  # in the table's order
    table = beside_table.of_folder(tmp_path)
    assert table.title == "P, Table 1, beside ours (m)"
    assert table.csv().splitlines()[1].startswith("A,Main,inside the combined interval,90.0,0.3,5,90.5,")
    papers.load.cache_clear()
    with pytest.raises(ValueError, match="holds cells of p-1: give lora-2 a folder of its own"):
        beside.keep("lora-2", [], tmp_path)
    (tmp_path / "beside.json").write_text('{"schema": 2, "lines": []}')
    with pytest.raises(ValueError, match="schema 2, this version reads 1"):
        beside.load(tmp_path)


def test_a_miniature_compares_the_shape_of_a_curve_and_no_number():
    published, ours = (10.0, 12.0, 11.0), (50.0, 55.0, 57.0)
    curve = [line((score, score), value, miniature=True, position=float(rank), row=f"r = {rank}", metric="pearson")
             for rank, value, score in zip((1, 2, 4), published, ours, strict=True)]  # fmt: skip
    assert all(beside.agreement(one).difference is None for one in curve)
    (said,) = beside_table.shape(curve)
    assert "published STS-B is best at 2 and spans 2.00" in said and "is best at 4 and spans 7.00" in said
    assert "rank correlation of the two curves +0.50, 3 points" in said  # ranks 1 3 2 and 1 2 3
    falling = [one.model_copy(update={"higher_is_better": False}) for one in curve]
    assert "best at 1 " in beside_table.shape(falling)[0] and "-0.50" in beside_table.shape(falling)[0]
    assert "needs three points" in beside_table.shape(curve[:2])[0]
    apart = [one.model_copy(update={"row": f"{name}, {one.position:g} %"}) for name in ("this", "that") for one in curve]
    assert [text.split(":")[0] for text in beside_table.shape(apart)] == ["this", "that"]
    assert beside_table.shape([line()]) == []


# -- a cell, run ----------------------------------------------------------------------------------------------------------

SMALL = """
table = "small-1"
title = "Small, Table 1"
source = "nobody"
seeds = 3
[tasks]
letters = "small/regression"
[rows."LoRA"]
groups = ["all", "lora"]
rank = 2
[rows."AdaLoRA"]
groups = ["all", "adalora"]
[rows."Other"]
waits = "a method"
[variants.paper]
about = "made up"
[variants.paper.all]
model = "owner/not-here"
batch_size = 6
max_length = 24
lr_warmup_steps = 4
targets = "query, intermediate"
learning_rate = 1e-2
[variants.paper.all.tasks]
letters = { epochs = 2 }
[variants.paper.lora]
method = "lora"
[variants.paper.adalora]
method = "adalora"
initial_rank = 3
target_rank = 2
warmup_steps = 4
final_steps = 6
interval = 2
"""
SMALL_PUBLISHED = """
paper = "Small"
title = "Small"
source = "nobody"
table = "Table 1"
page_note = "made up"
about = "made up, mean of 3 seeds"
seeds = 3
statistic = "mean"
[columns.letters_mean]
title = "Letters"
task = "small/regression"
metric = "pearson_spearman"
higher_is_better = true
[columns.letters_r]
title = "Letters r"
task = "small/regression"
metric = "pearson"
higher_is_better = true
[[rows]]
label = "LoRA"
values = { letters_mean = 50.0, letters_r = 50.0 }
[[rows]]
label = "AdaLoRA"
values = { letters_mean = 50.0 }
[[rows]]
label = "Other"
values = { letters_mean = 50.0 }
"""


@pytest.fixture
def small(tmp_path, monkeypatch) -> dict:
    """A table, its recipe, and a tiny model that stands in; the options of a call of `rankwise paper`."""
    for folder, owner, key, text in (
        (tmp_path / "recipes", recipes, "PAPERS", SMALL), (tmp_path / "published", published_tables, "FOLDER", SMALL_PUBLISHED),
    ):  # fmt: skip
        folder.mkdir()
        (folder / "small-1.toml").write_text(text)
        monkeypatch.setattr(owner, key, folder)
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    small_world.register(monkeypatch.setitem)
    known = replace(tasks.get("small/regression"), about={"train": 60, "validation": 24})
    monkeypatch.setitem(tasks._TASKS, known.name, known)
    papers.load.cache_clear()
    yield {"name": "small-1", "cells": "letters", "model": small_world.model(tmp_path / "model"), "out": tmp_path / "out",
           "device": "cpu"}  # fmt: skip
    papers.load.cache_clear()


def test_a_cell_runs_resumes_and_stands_beside_the_paper(small, capsys, figures_undrawn):
    cli.paper(**small, rows=["LoRA"], seeds=2)
    printed = " ".join(capsys.readouterr().out.split())
    assert "not comparable: model" in printed and "standing in for owner/not-here" in printed
    assert "Departure: 2 seeds where the paper has 3." in printed
    runs = {path: path.stat().st_mtime_ns for path in small["out"].glob("*/result.json")}
    assert len(runs) == 2
    found = [json.loads(path.read_text()) for path in runs]
    assert {one["split"] for one in found} == {"validation"} and {one["protocol"] for one in found} == {"best-dev-epoch"}
    _, kept = beside.load(small["out"])
    assert [one.column for one in kept] == ["letters_mean", "letters_r"]
    assert kept[0].scores == {one["seed"]: one["score"] for one in found}
    assert kept[1].scores == {one["seed"]: one["metrics"]["validation"]["pearson"] for one in found} != kept[0].scores
    assert "Our best epoch is the best in pearson_spearman; the column is pearson." in kept[1].departures

    cli.paper(**small, rows=None, seeds=2, as_json=True)  # the other row too; the first one's runs are there already
    said = json.loads(capsys.readouterr().out)
    assert [row["row"] for row in said["table"]] == ["LoRA", "LoRA", "AdaLoRA"]
    assert all(path.stat().st_mtime_ns == before for path, before in runs.items())
    assert len(list(small["out"].glob("*/result.json"))) == 4
    report = Path(said["report"]).read_text()
    assert "LoRA" in report and "beside ours (" in report and "Departure: 2 seeds where the paper has 3." in report
    assert (small["out"] / "report" / "tables" / "beside.csv").is_file()
    assert "standing in for owner/not-here" in (small["out"] / "report" / "report.html").read_text()


@pytest.mark.slow
def test_a_column_names_its_cell_and_a_scaled_cell_says_so(small, capsys):
    cli.paper(**{**small, "cells": "letters_r"}, rows=["AdaLoRA"], seeds=1, scale=0.5)
    printed = " ".join(capsys.readouterr().out.split())
    assert "not comparable: model, scaled, one seed" in printed
    assert "Scaled to 0.5: 10 steps, warm-up 2 (of 4), final phase 3 (of 6), interval 1 (of 2)" in printed
    (path,) = small["out"].glob("*/result.json")
    assert json.loads(path.read_text())["steps"] == 10


def test_nothing_runs_where_the_model_cannot_be_had(small, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(recipes.SHAPES, "owner/not-here", recipes.SHAPES[MINILM])
    with pytest.raises(ValueError, match=r"model owner/not-here could not be obtained; tried: .*--model sentence-transformers"):
        cli.paper(**{**small, "model": None})
    assert not small["out"].exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"name": None}, "--cells has no effect without the name of a table"),
        ({"cells": None, "scale": 0.5, "model": None, "out": None}, "--scale has no effect without --cells"),
        ({"seeds": 0}, "--seeds 0: give at least 1"),
        ({"pack": 0}, "--pack 0: give at least 1"),
        ({"rows": ["Other"]}, '"Other" waits for a method'),
        ({"scale": 0.1, "rows": ["AdaLoRA"]}, "leave no step to prune"),
    ],
)
def test_what_makes_no_sense_is_refused_before_torch_has_anything_to_do(small, options, words):
    with pytest.raises(ValueError, match=words):
        cli.paper(**{**small, **options})
    assert not small["out"].exists()


def test_refusals_answer_without_torch():
    import subprocess
    import sys

    code = "import sys; from rankwise.experiments import cli, recipes\n"
    code += "try: cli.paper('adalora-1', cells='stbs')\nexcept ValueError as e: print(e)\nprint('torch' in sys.modules)"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False" and "stsb" in done.stdout, (done.stderr, time.perf_counter() - began)
