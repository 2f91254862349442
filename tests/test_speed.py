"""The tables and the plot of `rankwise bench`, from a hand-written file."""

import subprocess
import sys

import pytest
from rankwise.reports import speed

from tests.test_cli import ROOT

NAMES = (
    *("case", "seconds", "peft_seconds", "floor_seconds", "ratio", "tax", "peak_memory_bytes", "peft_peak_memory_bytes"),
    *("improved_floor_seconds", "peft_cached_seconds", "ratio_spread", "tax_spread", "floor_precision"),
    *("floor_rate_share", "improved_floor_rate_share", "target_ratio", "target_tax", "target_memory_ratio"),
)


def row(case, seconds, peft, floor, **further):
    """A row as the bench writes it; what the table does not read is left out."""
    found = dict.fromkeys(NAMES)
    found |= {
        "case": case,
        "seconds": seconds,
        "peft_seconds": peft,
        "floor_seconds": floor,
        "floor_precision": "bf16",
        "repetitions": 3 if seconds > 0.1 else 7,
    }
    found |= {"ratio": peft and peft / seconds, "tax": seconds / floor, "peak_memory_bytes": 123e6}
    return found | {"tax_spread": [0.9, 1.6]} | further


@pytest.fixture
def bench():
    return {
        "schema": 1,
        "machine": {
            "device_name": "Abacus",
            "threads": 2,
            "memory_bytes": 8 * 2**30,
            "precision": "bf16",
            "versions": {"torch": "2.13.0", "peft": "0.21.2"},
            "commit": "0123456789abcdef",
            "dirty": True,
            "matrix_product_gflops": {"fp32": 100.0, "bf16": 1234.5},
        },
        "recipe": {
            "rank": 8,
            "adalora": {"initial_rank": 12, "target_rank": 8, "interval": 1, "orthogonality": 0.1},
            "lora_dropout": 0.1,
            "attention_dropout": 0.0,
            "clip": 1.0,
            "tokens": "random",
            "memory": "kept",
            "data": "ready",
        },
        "peft_precisions": {"MiniLM 32 x 32": {"fp32": 0.5, "bf16 weights": 0.25}},
        "rows": [
            row("train/lora/k1", 0.2, 0.21998, 0.16, target_ratio=1.1, target_tax=1.25, ratio_spread=[1.05, 1.2]),
            row("train/dora/k1", 0.2, 0.5, 0.16, target_ratio=1.9, target_tax=1.2, peft_peak_memory_bytes=9.5e6),
            row("train/adalora+dora/k1", 0.28, None, 0.16, floor_rate_share=0.55, improved_floor_rate_share=0.66),
            row("eval/dora/k1", 0.004, 0.008, 0.003, peft_cached_seconds=0.006, floor_rate_share=0.4),
        ],
        "allocator": [
            {"case": "allocator/adalora/k1", "seconds": 0.002, "share": 0.0301, "target_share": 0.03}
            | {"peft_seconds": 0.02, "peft_share": 0.1},
            {"case": "allocator/adalora+dora/k1", "seconds": 0.002, "share": 0.02, "target_share": 0.03}
            | {"peft_seconds": None, "peft_share": None},
        ],
        "throughput": [
            throughput("lora", 1, 2.0, 1.5),
            throughput("lora", 16, 12.0, 1.5),
            throughput("adalora+dora", 1, 1.0, None),
            throughput("adalora+dora", 64, None, None) | {"note": "not measured: too large"},
        ],
        "study": None,
    }


def throughput(method, members, ours, peft):
    found = {"case": f"throughput/{method}/k{members}", "method": method, "members": members, "runs_per_minute": ours}
    return found | {"peft_runs_per_minute": peft, "steps_per_run": 180, "evaluated_per_run": 1379, "note": None}


def by_case(table):
    return {line[0]: dict(zip(table.columns, line, strict=True)) for line in table.cells()}


def test_times_ratio_ceiling_and_tax_by_hand(bench):
    lora = by_case(speed.steps(bench))["train/lora/k1"]
    assert (lora["ours ms"], lora["PEFT ms"], lora["floor ms"], lora["improved floor ms"]) == ("200", "220", "160", "-")
    assert lora["ratio"] == "1.10 [1.05, 1.20]" and lora["ceiling"] == "1.37"
    assert lora["tax"] == "1.25 [0.90, 1.60]" and (lora["ours MB"], lora["PEFT MB"]) == ("123", "-")
    assert by_case(speed.steps(bench))["train/dora/k1"]["PEFT MB"] == "9.5"


def test_target_is_met_by_the_number_not_by_its_rounding(bench):
    found = by_case(speed.steps(bench))
    lora, dora = found["train/lora/k1"], found["train/dora/k1"]
    assert lora["target ratio"] == ">= 1.10" and lora["ratio met"] == "NO"  # 1.0999
    assert lora["target tax"] == "<= 1.25" and lora["tax met"] == "yes"  # exactly
    assert dora["ratio met"] == "yes" and dora["tax met"] == "NO"
    assert found["eval/dora/k1"]["ratio met"] == found["eval/dora/k1"]["target ratio"] == "-"


def test_what_peft_lacks_is_a_dash(bench):
    both = by_case(speed.steps(bench))["train/adalora+dora/k1"]
    assert both["PEFT ms"] == both["ratio"] == both["ceiling"] == "-" and both["tax"].startswith("1.75")


def test_milliseconds_keep_three_digits():
    shown = [speed._milliseconds(s) for s in (0.00001234, 0.0099996, 0.9994, 0.99996, 5.1234)]
    assert shown == ["0.0123", "10.0", "999", "1,000", "5,123"]


def test_memory_target_has_a_column_where_there_is_one(bench):
    assert "target memory" not in speed.steps(bench).columns
    bench["rows"][0] |= {"target_memory_ratio": 0.8, "peft_peak_memory_bytes": 123e6 / 0.8}
    bench["rows"][1] |= {"target_memory_ratio": 0.8}
    found = by_case(speed.steps(bench))
    assert found["train/lora/k1"]["memory met"] == "yes" and found["train/dora/k1"]["memory met"] == "NO"


def test_notes_say_precisions_cache_and_the_floors_share(bench):
    notes = "\n".join(speed.steps(bench).caption)
    assert notes.startswith("Medians of 3 to 7 rounds")
    assert "MiniLM 32 x 32, a training step of LoRA: fp32 500 ms, bf16 weights 250 ms." in notes
    assert "eval/dora/k1 with PEFT's optional DoraCaching, off by default, warm here: 6.00 ms, a ratio of 1.50" in notes
    assert "(fp32 100 GFLOP/s, bf16 1,234 GFLOP/s)" in notes and "train/k1 55% / 66%, eval/k1 40%." in notes


def test_allocator_against_its_target(bench):
    found = by_case(speed.allocator(bench))
    one, other = found["allocator/adalora/k1"], found["allocator/adalora+dora/k1"]
    assert (one["ours ms"], one["share of step"], one["target"], one["met"]) == ("2.00", "3.0%", "<= 3%", "NO")
    assert (other["met"], other["PEFT ms"], other["PEFT share of step"]) == ("yes", "-", "-")


def test_throughput_and_study_tables(bench):
    table = speed.throughput(bench)
    assert [line[1:] for line in table.cells()][1] == ["16", "12.00", "1.50", "8.00"]
    assert "throughput/adalora+dora/k64: not measured: too large." in table.caption
    assert speed.study(bench) is None
    bench["study"] = {
        **{"task": "glue/stsb", "method": "lora", "runs": 32, "sweep_runs": 16, "final_runs": 16, "failed_runs": 1},
        **{"pack": 16, "train_rows": 512, "evaluated_rows": 128, "seconds": 50.0, "peft_seconds": 900.0, "ratio": 18.0},
        **{"peft_runs_made": 16, "peft_precision": "fp32", "target_ratio": 20.0},
    }
    table = speed.study(bench)
    assert table.cells() == [["lora, glue/stsb", "32", "50 s", "15 min 00 s", "18.00", ">= 20.00", "NO"]]
    assert table.caption[-1] == "1 of our runs failed."


def test_page_holds_every_table_and_the_plot(bench, tmp_path):
    path = speed.write(bench, tmp_path / "out")
    page = path.read_text()
    assert page.count("\n## ") == 3 and "| train/lora/k1 | 200 | 220 |" in page
    assert "Abacus, 2 threads, 8.00 GiB, bf16, torch 2.13.0, peft 0.21.2, commit 0123456789ab with changes" in page
    assert "(figures/throughput.svg)" in page and (tmp_path / "out" / "figures" / "throughput.png").stat().st_size > 1000
    assert speed.read(tmp_path / "out" / "bench.json") == bench


def test_same_numbers_give_the_same_bytes(bench, tmp_path):
    for name in "ab":
        speed.write(bench, tmp_path / name)
    for file in ("bench.md", "bench.json", "figures/throughput.svg", "figures/throughput.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_plot_has_a_line_a_method_and_peft_beside_it(bench):
    figure = speed.throughput_plot(bench).figure
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert set(lines) == {"lora", "PEFT, lora", "adalora+dora"}
    assert list(lines["lora"].get_xdata()) == [1, 16] and list(lines["lora"].get_ydata()) == [2.0, 12.0]
    assert set(lines["PEFT, lora"].get_ydata()) == {1.5}
    assert lines["lora"].get_color() == lines["PEFT, lora"].get_color() == "#0072b2"


def test_bench_without_throughput_leaves_no_old_plot(bench, tmp_path):
    speed.write(bench, tmp_path)
    bench["throughput"] = []
    assert speed.throughput_plot(bench) is None
    page = speed.write(bench, tmp_path).read_text()
    assert "figures/" not in page and not list((tmp_path / "figures").iterdir())


def test_foreign_file_is_refused(tmp_path):
    path = tmp_path / "bench.json"
    for content, said in (("{", "no JSON"), ('{"schema": 2}', "schema 2 where 1"), ("[]", "schema None")):
        path.write_text(content)
        with pytest.raises(ValueError, match=said):
            speed.read(path)


def test_reader_needs_neither_torch_nor_the_bench():
    code = (
        "import sys; from rankwise.reports import speed; assert not {'torch', 'rankwise.experiments.bench'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
