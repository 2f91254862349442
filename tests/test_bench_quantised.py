"""`rankwise bench --quantised` at a size of milliseconds, and the table of what it found."""

import pytest
import torch
from rankwise.experiments.bench import quantised
from rankwise.experiments.bench.quantised import BASES, Subject
from rankwise.reports import quantised as report

from tests import small_world
from tests.command import rankwise
from tests.quantised_models import needed, wide_folder

MACHINE = {"device_name": "a CPU", "threads": 1, "cores": 2, "memory_bytes": 2**34, "commit": "0123456789abcdef"}
MACHINE |= {"shared": True, "versions": {"torch": "2.13.0", "bitsandbytes": "0.50.2"}}


@needed
def test_every_base_trains_on_the_same_rows_and_is_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quantised, "_task", lambda subject: small_world.task())
    subject = Subject(
        "tiny",
        wide_folder(tmp_path / "model"),
        "regression",
        rows=4,
        length=24,
        steps=3,
        evaluated=12,
        learning_rate=1e-2,
        members=2,
    )
    told = []
    rows = quantised.run(torch.device("cpu"), (subject,), lambda what, steps: told.append(what))
    assert [row["base"] for row in rows] == [base.name for base in BASES] and len(told) == 15
    by_base = {row["base"]: row for row in rows}
    # 12 linears of 65,536 weights together; bitsandbytes' tables of 16 and 256 levels weigh here, as in no real model.
    assert [round(row["linear_bits"], 1) for row in rows[:2]] == [32, 16]
    tables = 8 * 12 * (4 * 16) / 65536, 8 * 12 * (4 * (16 + 256) + 4 + 4) / 65536
    assert by_base["nf4"]["linear_bits"] == pytest.approx(4.5 + tables[0], rel=1e-3)
    assert by_base["nf4 + double quantization"]["linear_bits"] == pytest.approx(4.125 + tables[1], rel=1e-2)
    assert 8 < by_base["int8"]["linear_bits"] < 8.6
    sizes = [row["weights_bytes"] for row in rows]
    assert sizes[0] > sizes[2] > sizes[3] and sizes[0] / 2 == pytest.approx(sizes[1], rel=0.01)
    losses = [sum(row["losses"]) / 2 for row in rows]
    assert all(len(row["scores"]) == 2 and row["step_seconds"] > 0 for row in rows)
    assert all(loss != row["loss_before"] for loss, row in zip(losses, rows, strict=True))
    assert len(set(losses)) == 5 and abs(losses[2] - losses[0]) < 0.2 * losses[0]
    path = report.write({"machine": MACHINE, "rows": rows}, tmp_path)
    text = path.read_text()
    assert text.count("| tiny |") == 5 and "seconds are doubtful" in text and "commit 0123456789ab;" in text
    assert "| 32.000 |" in text and "| 1.00 |" in text and "| +0.0000 |" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tried"], "--tried and --quantised are two measurements: give one"),
        (["--full"], "--full has no effect with --quantised: leave it out"),
        (["--cases", "x"], "--cases has no effect with --quantised"),
    ],
)
def test_options_that_it_does_not_read_are_refused(options, words, capsys):
    assert rankwise("bench", "--quantised", *options) == 2
    assert words in capsys.readouterr().err
