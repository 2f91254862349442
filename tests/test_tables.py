"""Tables: what a row says, what a caption must say, and the four ways to write it."""

import csv
import io
import json

import numpy as np
import pytest
from rankwise.reports import results, tables
from scipy import stats

from tests.synthetic_runs import write_json, write_run, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return results.load(write_study(tmp_path_factory.mktemp("study")))


def load(folder):
    (part,) = results.load(folder).parts()
    return part


def row(table, setting):
    (found,) = [dict(zip(table.columns, cells, strict=True)) for cells in table.rows if cells[0] == setting]
    return found


def has(caption, words):
    return any(words in sentence for sentence in caption)


def test_one_row_a_setting_in_the_studys_order(study):
    table = tables.comparison(study)
    assert [cells[0] for cells in table.rows] == ["full", "head", "lora", "adalora", "dora", "adalora+dora"]
    assert "test score (mean)" in table.columns


def test_score_and_interval_are_scipys(study):
    lora = next(arm for arm in study.arms if arm.setting == "lora")
    scores = np.array(list(lora.scores.values()))
    estimate = row(tables.comparison(study), "lora")["test score (mean)"]
    low, high = stats.t.interval(0.95, 2, scores.mean(), stats.sem(scores))
    assert (estimate.mean, estimate.low, estimate.high, estimate.n) == pytest.approx((scores.mean(), low, high, 3))
    assert str(estimate) == f"{scores.mean():.2f} +- {high - scores.mean():.2f}"


def test_difference_is_paired_by_seed(tmp_path):
    for seed, full, lora in ((0, 80.0, 81.0), (1, 90.0, 92.0), (2, 70.0, 73.0)):
        write_run(tmp_path, method="full", seed=seed, score=full)
        write_run(tmp_path, method="lora", seed=seed, score=lora)
    write_run(tmp_path, method="lora", seed=3, score=0.0)  # full fine-tuning has no seed 3
    difference = row(tables.comparison(load(tmp_path)), "lora")["difference to full fine-tuning"]
    half = 4.302652729911275 / 3**0.5  # t(0.975, 2), sd of 1, 2, 3 is 1
    assert (difference.mean, difference.low, difference.high, difference.n) == pytest.approx((2.0, 2 - half, 2 + half, 3))
    assert str(difference) == "+2.00 (-0.48 to +4.48)"


def test_a_named_reference_gets_its_own_column(tmp_path):
    write_study(tmp_path, methods=("full", "lora", "adalora"), sweep=False)
    path = tmp_path / "study.json"
    write_json(path, json.loads(path.read_text()) | {"reference": "lora"})
    table = tables.comparison(load(tmp_path))
    assert "difference to full fine-tuning" in table.columns
    assert row(table, "lora")["difference to lora"] is None
    assert row(table, "full")["difference to lora"] is not None


def test_without_full_fine_tuning_or_reference_there_is_no_difference(tmp_path):
    write_study(tmp_path, methods=("lora", "adalora"), sweep=False)
    assert not any("difference" in column for column in tables.comparison(load(tmp_path)).columns)


def test_one_seed_has_no_interval_and_supports_no_claim(tmp_path):
    write_study(tmp_path, seeds=(0,), sweep=False)
    table = tables.comparison(load(tmp_path))
    assert "+-" not in table.text().replace("adalora+", "")
    assert has(table.caption, "one seed supports no claim")
    assert has(table.caption, "n >= 8 seeds")  # m = 5 against full fine-tuning


def test_a_quick_study_says_so_in_every_table(tmp_path):
    study = load(write_study(tmp_path, quick=True))
    for table in (tables.comparison(study), tables.rate_sweep(study), tables.ranks(study)):
        assert table.caption[0].startswith("A quick look, no fair comparison")


def test_a_full_study_does_not_say_that_it_is_quick(study):
    assert not has(tables.comparison(study).caption, "quick")


def test_caption_carries_task_n_splits_and_what_was_equal(study):
    caption = tables.comparison(study).caption
    assert has(caption, "MiniLM was tuned for sentence similarity already")
    assert has(caption, "on the test split; n = 3 seeds; rates were chosen on the validation split alone")
    assert has(caption, "Equal in steps: 540 optimizer steps each")
    assert has(caption, "adalora+dora has 2.1 % more than lora: lora 663,552, adalora 663,840")
    assert has(caption, "Smallest detectable difference to")


def test_fixed_rates_are_not_said_to_be_chosen(tmp_path):
    caption = tables.comparison(load(write_study(tmp_path, sweep=False))).caption
    assert has(caption, "rates were fixed beforehand, not tuned")
    assert not has(caption, "were chosen on")


@pytest.mark.parametrize(("dora", "equal"), [(1_004_000, True), (1_006_000, False)])
def test_half_a_percent_of_parameters_is_the_border(tmp_path, dora, equal):
    write_run(tmp_path, method="lora", active_parameters=1_000_000)
    write_run(tmp_path, method="dora", active_parameters=dora)
    write_run(tmp_path, method="full", active_parameters=99_000_000)  # not a low-rank budget
    caption = tables.comparison(load(tmp_path)).caption
    assert has(caption, "Equal in active parameters") is equal
    assert has(caption, "dora has 0.6 % more than lora") is not equal
    assert has(caption, "1,000,000")


def test_other_scales_are_warned_of_and_pefts_epsilon_is_not(tmp_path):
    write_run(tmp_path, method="lora", scale=2.0)
    write_run(tmp_path, method="adalora", scale=24 / (12 + 1e-5))
    assert not has(tables.comparison(load(tmp_path)).caption, "scales")
    write_run(tmp_path, method="lora", scale={"a": 2.0, "b": 2.0000001})
    assert row(tables.comparison(load(tmp_path)), "lora")["alpha/r"] == "2"
    write_run(tmp_path, method="dora", scale={"a": 2.0, "b": 4.0})
    caption = tables.comparison(load(tmp_path)).caption
    assert has(caption, "Warning: scales (alpha/r) differ")
    assert has(caption, "dora 2 to 4")


def test_unequal_steps_are_said(tmp_path):
    write_run(tmp_path, method="lora", total_steps=540)
    write_run(tmp_path, method="dora", total_steps=1080)
    assert has(tables.comparison(load(tmp_path)).caption, "Not equal in steps: ")


def test_times_of_packed_runs_are_marked(tmp_path):
    write_run(tmp_path, method="lora", seed=0, pack_size=3, seconds=30.0)
    write_run(tmp_path, method="lora", seed=1, pack_size=3, seconds=40.0)
    write_run(tmp_path, method="lora", seed=2, pack_size=1, seconds=84.0)
    found = row(tables.comparison(load(tmp_path)), "lora")
    assert str(found["time"]) == "84 s, 35 s (pack of 3)"
    assert str(found["peak memory"]) == "913 MiB, 1.28 GiB (pack of 3)"
    assert has(tables.comparison(load(tmp_path)).caption, "pack")


def test_parameters_do_not_count_the_head(study):
    found = row(tables.comparison(study), "adalora")
    assert (found["trainable"], found["active"], found["head"]) == (995_760, 663_840, 148_225)


def test_a_failed_seed_is_a_row_that_says_why(tmp_path):
    for seed in range(5):
        write_run(tmp_path, seed=seed, error="collapsed" if seed < 2 else None)
    table = tables.comparison(load(tmp_path))
    assert row(table, "lora")["status"] == "failed (2 of 5): collapsed"
    assert row(table, "lora")["n"] == 3
    assert has(table.caption, "lora failed (2 of 5): collapsed")


def test_a_setting_that_failed_altogether_still_has_its_row(tmp_path):
    write_run(tmp_path, method="full")
    write_run(tmp_path, method="lora", error="out of memory\nTraceback of many lines")
    found = row(tables.comparison(load(tmp_path)), "lora")
    assert found["status"] == "failed (1 of 1): out of memory"
    assert found["test score (mean)"] is None


def test_an_unfinished_study_says_so(tmp_path):
    write_run(tmp_path, method="full")
    write_run(tmp_path, method="lora", seed=1, finished=False)
    write_run(tmp_path, method="dora", phase="sweep")
    table = tables.comparison(load(tmp_path))
    assert row(table, "lora")["status"] == "unfinished (1 of 1)"
    assert row(table, "dora")["status"] == "no final run (1 in the sweep)"
    assert has(table.caption, "not complete")


def test_a_score_before_the_budget_was_reached_is_warned_of(tmp_path):
    path = write_run(tmp_path, method="adalora") / "ranks.jsonl"
    assert not has(tables.comparison(load(tmp_path)).caption, "before its rank budget")
    last = json.loads(path.read_text().splitlines()[-1])
    path.write_text(path.read_text() + json.dumps(last | {"step": 541, "active": last["active"] + 1}) + "\n")
    assert has(tables.comparison(load(tmp_path)).caption, "before its rank budget was reached: adalora")


def test_runs_of_two_devices_are_warned_of(tmp_path):
    write_run(tmp_path, method="full")
    path = write_run(tmp_path, method="lora") / "config.json"
    assert not has(tables.comparison(load(tmp_path)).caption, "places")
    write_json(path, json.loads(path.read_text()) | {"device_name": "another", "device": "cuda"})
    assert has(tables.comparison(load(tmp_path)).caption, "Warning: made in 2 places")


def test_a_sweep_marks_the_best_and_what_failed(study):
    table = tables.rate_sweep(study)
    assert table.columns == ("setting", "2e-5", "5e-5", "1e-4", "5e-4", "1e-3", "5e-3", "2e-2", "status")
    assert [str(cell) for cell in row(table, "lora").values()][4:] == [
        "86.20",
        "86.80 *",
        "failed",
        "-",
        "best inside the grid",
    ]


def test_a_best_rate_at_the_edge_names_no_winner(tmp_path):
    for rate, score in ((1e-3, 84.0), (2e-3, 85.0)):
        write_run(tmp_path, rate=rate, phase="sweep", selection_score=score)
    write_run(tmp_path, rate=2e-3)
    study = load(tmp_path)
    assert row(tables.rate_sweep(study), "lora")["status"] == "best rate at the edge of its grid: no winner named"
    assert str(row(tables.rate_sweep(study), "lora")["2e-3"]) == "85.00 * (edge)"
    assert has(tables.comparison(study).caption, "at the edge of its grid: no winner named (lora)")


def test_grids_of_unequal_size_are_warned_of(tmp_path):
    for method, grid in (("lora", (1e-3, 2e-3)), ("dora", (1e-3, 2e-3, 4e-3))):
        for rate in grid:
            write_run(tmp_path, method=method, rate=rate, phase="sweep")
    assert has(tables.rate_sweep(load(tmp_path)).caption, "not every setting had the same number of rates: ")


def test_final_runs_at_a_rate_that_is_no_longer_the_best_are_told(tmp_path):
    for rate, score in ((1e-3, 84.0), (2e-3, 85.0), (4e-3, 83.0)):
        write_run(tmp_path, rate=rate, phase="sweep", selection_score=score)
    write_run(tmp_path, rate=1e-3)
    assert has(tables.comparison(load(tmp_path)).caption, "the final runs used 1e-3, but 2e-3 is the best rate now")


def test_without_a_sweep_there_is_no_rate_table_and_without_ranks_no_rank_table(tmp_path):
    study = load(write_study(tmp_path, methods=("full", "head"), sweep=False))
    assert tables.rate_sweep(study) is None
    assert tables.ranks(study) is None


def test_the_rank_table_sums_to_the_budget(study):
    table = tables.ranks(study)
    assert table.columns == ("site", "lora", "adalora", "dora", "adalora+dora")
    assert [str(cell) for cell in table.rows[-1]] == ["total", "288", "288/432", "288", "288/432"]
    assert len(table.rows) == 36 + 1


# --- the renderers -------------------------------------------------------------------------------------------------

TRICKY = tables.Table(
    "tricky",
    "50 % of a_b & c",
    ("setting", "x|y", "score", "status"),
    (
        ("a|b_c", 1234, tables.Estimate(85.125, 84.0, 86.25, 0.5, 3), "failed: {x} \\ ~"),
        ("d", None, None, "completed"),
    ),
    ("A # caption.",),
)


def test_markdown_has_one_cell_a_column_whatever_is_in_it():
    lines = TRICKY.markdown().splitlines()
    assert [line.replace("\\|", "").count("|") for line in lines] == [5, 5, 5, 5]
    assert lines[2] == "| a\\|b\\_c | 1,234 | 85.12 &plusmn; 1.12 | failed: {x} \\ ~ |"


def test_csv_has_full_precision_and_one_value_a_column():
    rows = list(csv.DictReader(io.StringIO(TRICKY.csv())))
    assert rows[0] == {"setting": "a|b_c", "x|y": "1234", "score mean": "85.125", "score low": "84.0", "score high": "86.25",
                       "score sd": "0.5", "score n": "3", "status": "failed: {x} \\ ~"}  # fmt: skip
    assert rows[1]["score mean"] == ""


FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "-", "lora", "--"]


def test_no_name_of_a_user_is_a_formula_of_a_spreadsheet_and_numbers_stay_numbers():
    numbers = (-1.5, "-2.5e-4", "+3", "-inf", "-1;2;-3", "-3.71 to 14.63", "-0.07 (-0.46 to 0.38)", "-1 to +1 (95.3 %)")
    columns = ("=HYPERLINK(A1)", *"abcdefgh")
    made = tables.Table("t", "", columns, tuple((label, *numbers) for label in FORMULAS), ()).csv()
    head, *rows = csv.reader(io.StringIO(made, newline=""))
    assert head == ["'=HYPERLINK(A1)", *"abcdefgh"]
    assert [row[0] for row in rows] == [*(f"'{label}" for label in FORMULAS[:5]), "' =1", "-", "lora", "'--"]
    assert all(row[1:] == [str(number) for number in numbers] for row in rows)


def test_records_are_strict_json():
    assert json.loads(json.dumps(TRICKY.records(), allow_nan=False))[1]["score mean"] is None


def test_latex_is_booktabs_and_escaped():
    text = TRICKY.latex()
    assert r"\caption{50 \% of a\_b \& c. A \# caption.}" in text
    assert r"a|b\_c & 1,234 & 85.12 $\pm$ 1.12 & failed: \{x\} \textbackslash{} \textasciitilde{} \\" in text
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]
    assert r"\begin{tabular}{lrrl}" in text


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_text_fits_the_terminal_and_loses_no_cell(study, width):
    table = tables.comparison(study)
    text = table.text(width)
    assert max(map(len, text.splitlines())) <= width
    for cells in table.cells():
        for cell in cells:
            assert cell in text


def test_a_block_begins_with_the_columns_that_name_a_row():
    table = tables.Table("t", "T", ("row", "cell", "first", "second"), (("a", "x", 1, 2), ("a", "y", 3, 4)), (), 2, keys=2)
    assert [line.split() for line in table.text(20).splitlines() if line[:1] == "a"] == [
        ["a", "x", "1"], ["a", "y", "3"], ["a", "x", "2"], ["a", "y", "4"],
    ]  # fmt: skip
    assert [line.split() for line in table.text(80).splitlines() if line[:1] == "a"] == [
        ["a", "x", "1", "2"],
        ["a", "y", "3", "4"],
    ]


def test_every_render_is_ascii(study):
    for table in (tables.comparison(study), tables.rate_sweep(study), tables.ranks(study), tables.every_run(study)):
        (table.markdown() + table.csv() + table.latex() + table.text()).encode("ascii")


@pytest.mark.parametrize(("rate", "text"), [(5e-5, "5e-5"), (1e-3, "1e-3"), (2.5e-4, "2.5e-4"), (0.1, "1e-1"), (None, "-")])
def test_rates_read_as_people_write_them(rate, text):
    assert tables.rate_text(rate) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.25, "4.2 s"), (84.4, "84 s"), (119.7, "2 min 00 s"), (3725, "62 min 05 s"), (7260, "2 h 01 min")]
)
def test_times_read_as_people_write_them(seconds, text):
    assert tables.seconds_text(seconds) == text
