"""One process may run studies for ever: what it holds does not grow with their number."""

import pytest
from rankwise.experiments.bench import soak
from rankwise.reports import soak as report

from tests.command import rankwise


def found(numbers, files=20):
    rows = [
        {"run": i + 1, "method": "lora", "resident_bytes": n, "files": files + i, "threads": 1, "objects": 5}
        for i, n in enumerate(numbers)
    ]
    return {"rows": rows, "seconds": 1.0, "machine": {"device_name": "a CPU", "versions": {"torch": "2"}}}


def test_growth_is_that_of_the_runs_after_the_start():
    steep_start = [100, 200, *(1000 + 7 * i for i in range(6))]
    assert report.growth(found(steep_start), "resident_bytes") == pytest.approx(7)
    assert report.growth(found(steep_start), "files") == pytest.approx(1)
    assert "+0.01 kB a run" in " ".join(report.sentences(found(steep_start)))


def test_two_runs_leave_no_file_open(monkeypatch):
    monkeypatch.setattr(soak, "METHODS", {"head": {}})
    rows = list(soak.run(3))
    assert [row["run"] for row in rows] == [1, 2, 3]
    assert rows[1]["files"] == rows[2]["files"] and rows[1]["threads"] == rows[2]["threads"]


@pytest.mark.slow
def test_sixty_runs_hold_no_more_than_twenty(tmp_path, capsys):
    assert rankwise("bench", "--soak", "60", "--out", tmp_path, "--threads", "1") == 0
    assert "60 runs of 5 methods in one process" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"soak.json", "soak.md", "soak.png", "soak.svg"}
    import json

    rows = json.loads((tmp_path / "soak.json").read_text())["rows"]
    assert rows[-1]["files"] <= rows[19]["files"] and rows[-1]["threads"] <= rows[19]["threads"]
    assert rows[-1]["objects"] - rows[19]["objects"] < 40 * 20  # a site's modules alone would be hundreds a run
    assert rows[-1]["resident_bytes"] < rows[19]["resident_bytes"] + (40 << 20)
