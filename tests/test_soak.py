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
    machine = {"device_name": "a CPU", "versions": {"torch": "2"}}
    return {"rows": rows, "asked": len(rows), "methods": 5, "seconds": 1.0, "machine": machine}


def test_growth_is_that_of_the_runs_after_the_start():
    steep_start = [100, 200, *(1000 + 7 * i for i in range(6))]
    assert report.growth(found(steep_start), "resident_bytes") == pytest.approx(7)
    assert report.growth(found(steep_start), "files") == pytest.approx(1)
    assert "+0.01 kB a run" in " ".join(report.sentences(found(steep_start)))


def test_runs_are_counted_and_not_the_rows():
    every_tenth = found([100, 200, 300])
    for row in every_tenth["rows"]:
        row["run"] *= 10
    assert report.sentences(every_tenth | {"asked": 30})[0].startswith("30 runs of 5 methods")
    assert report.sentences(every_tenth | {"asked": 40})[0].startswith("30 runs, of 40 asked for, of 5 methods")


@pytest.mark.parametrize("number, counted", [(3, [1, 2, 3]), (401, [*range(2, 401, 2), 401])])
def test_many_runs_are_not_counted_one_by_one(number, counted, monkeypatch):
    class Quick:
        def __init__(self, study, out, device):
            out.mkdir()

        def prepare(self):
            pass

        def run(self):
            return [{"status": "completed"}]

    monkeypatch.setattr(soak, "Runner", Quick)
    monkeypatch.setattr(soak, "held", dict)
    assert [row["run"] for row in soak.run(number)] == counted


def test_an_interrupted_soak_keeps_the_runs_until_then(tmp_path, capsys, monkeypatch):
    def rows(number, progress):
        yield from found([100.0, 200.0, 300.0, 400.0])["rows"]
        raise KeyboardInterrupt

    monkeypatch.setattr(soak, "run", rows)
    assert rankwise("bench", "--soak", "9", "--out", tmp_path, "--threads", "1") == 130
    assert "4 runs, of 9 asked for," in capsys.readouterr().out and (tmp_path / "soak.svg").exists()


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
