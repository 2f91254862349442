"""`rankwise bench --planned`: its rows, what it takes from a sitting that was cut off, and its table."""

import json
from pathlib import Path

import pytest
from rankwise.experiments.bench import planned
from rankwise.experiments.plan import step
from rankwise.reports import planned as report

from tests import small_world
from tests.command import rankwise


@pytest.fixture
def cases(tmp_path, monkeypatch):
    """Two steps of a tiny model, the second one timed; what is measured is written down."""
    model = small_world.model(tmp_path / "model")
    made = [
        planned.Case(model, "classification", "lora", step.Shape(2, 8, optimizer_states="8-bit")),
        planned.Case(model, "classification", "full", step.Shape(2, 8)),
    ]
    monkeypatch.setattr(planned, "cases", lambda: made)
    real, measured = planned.measured, []
    monkeypatch.setattr(planned, "measured", lambda case, *a: measured.append(case.method) or real(case, *a))
    return made, measured


def test_a_run_that_was_cut_off_goes_on_from_its_file(tmp_path, cases, monkeypatch, capsys):
    made, measured = cases
    file = tmp_path / "planned.json"
    with monkeypatch.context() as patch:
        real = planned.compared
        patch.setattr(planned, "compared", lambda case, *a: real(case, *a) if case is made[0] else rankwise_is_killed())
        assert rankwise("bench", "--planned", "--json", file) == 130
    assert [row["method"] for row in json.loads(file.read_text())["rows"]] == ["lora"]
    assert rankwise("bench", "--planned", "--json", file) == 0
    assert measured == ["lora", "full"]  # each once
    found = json.loads(file.read_text())
    assert [row["method"] for row in found["rows"]] == ["lora", "full"]
    assert found["rows"][0]["measured_seconds"] is None and found["rows"][1]["measured_seconds"] > 0
    assert f"report: {tmp_path / 'planned.md'}" in capsys.readouterr().out
    text = (tmp_path / "planned.md").read_text()
    assert "Peak: 2 of 2 plans within 15%" in text and "8-bit averages" in text and "torch" in text
    found["machine"]["versions"]["torch"] = "another"
    file.write_text(json.dumps(found))
    assert rankwise("bench", "--planned", "--json", file) == 0
    assert measured == ["lora", "full"] * 2  # measured with other versions, and so again


def rankwise_is_killed():
    raise KeyboardInterrupt


def test_the_committed_rows_are_planned_within_15_percent():
    """Every method over every base on each of the three models, and the further cases."""
    folder = Path(__file__).parents[1] / "reports" / "bench"
    found = json.loads((folder / "planned.json").read_text(encoding="utf-8"))
    known = [case.facts() for case in planned.cases()]
    rows = found["rows"]
    assert [{key: row[key] for key in known[0]} for row in rows] == known
    assert all(abs(row["ratio"] - 1) <= report.CLOSE for row in rows)
    for row in rows:  # DINOv2's mask token has no gradient where no pixel is masked
        assert row["planned_optimizer_bytes"] == pytest.approx(row["measured_optimizer_bytes"], rel=1e-3)
    named = {(row["model"].rpartition("/")[2], row["method"], row["quantization"] or row["precision"]) for row in rows}
    for model in ("all-MiniLM-L6-v2", "dinov2-small-saliency", "SmolLM2-135M-Instruct-Q4_1"):
        for base in ("fp32", "bf16", "nf4 with double quantization"):
            methods = {method for one, method, form in named if (one, form) == (model, base)}
            assert methods == {"lora", "adalora", "dora"} | ({"full"} if base in ("fp32", "bf16") else set())
    text = (folder / "planned.md").read_text(encoding="utf-8")
    assert text.count("\n| ") == len(rows) + 2 and f"{len(rows)} of {len(rows)} plans within 15%" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tried"], "--tried and --planned are two measurements: give one"),
        (["--full"], "--full has no effect with --planned: leave it out"),
        (["--cases", "x"], "--cases has no effect with --planned"),
    ],
)
def test_options_that_it_does_not_read_are_refused(options, words, capsys):
    assert rankwise("bench", "--planned", *options) == 2
    assert words in capsys.readouterr().err
