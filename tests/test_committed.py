"""One table of all committed studies, and the record page: made from the archives, and committed as they are made."""

import csv
import io
import json
import re

import pytest
from rankwise.experiments.cli.app import app
from rankwise.reports import committed, figures, page
from rankwise.reports.page import facts
from rankwise.reports.results import load
from typer.testing import CliRunner

from tests.synthetic_runs import write_json, write_study
from tests.test_verdicts import BASE, plus, study

REMEDY = "run `rankwise analysis results`, and commit what it writes"


@pytest.fixture(scope="module")
def found():
    return committed.studies()


def test_the_committed_table_is_that_of_the_archives(found):
    assert (committed.STUDIES.parent / "results.csv").read_text() == committed.results_table(found).csv(), REMEDY


def test_the_committed_record_is_that_of_the_archives(found):
    assert (committed.STUDIES.parent / "record.md").read_text() == committed.record_page(found), REMEDY


def test_it_has_every_setting_with_its_score_and_verdict(found):
    rows = list(csv.DictReader(io.StringIO(committed.results_table(found).csv())))
    assert {row["study"] for row in rows} >= {"fair", "allocation", "default", "calibration", "adalora-1"}
    [dora] = [row for row in rows if (row["study"], row["task"], row["setting"]) == ("fair", "conll2003", "dora")]
    part = next(part for part in load(committed.STUDIES / "fair").parts() if part.task == "conll2003")
    arm = next(arm for arm in part.arms if arm.setting == "dora")
    assert float(dora["score mean"]) == pytest.approx(sum(arm.scores.values()) / 8, abs=1e-4)
    assert dora["verdict"] == "equivalent" and dora["reference"] == "lora"


def test_the_line_that_makes_a_table_again_names_the_options_of_its_runs():
    lines = {name: facts.reproduce([load(committed.STUDIES / name)]) for name in ("fair", "quick-look", "papers/lora-2")}
    assert lines["fair"].startswith(
        'rankwise compare fair --seeds 8 --methods "full,head,lora,adalora,dora,adalora+dora". '
        "Commit of the runs: b05149cae63e. Hash of the data: conll2003 f782a6c4d20c, glue/stsb "
    )
    assert lines["quick-look"].startswith("rankwise compare default. Commit")
    assert lines["papers/lora-2"].startswith("rankwise paper lora-2. Commit")


def test_a_page_has_that_line_under_every_table(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw_all", lambda study: [])
    folder = write_study(tmp_path / "runs", methods=("full", "lora"), sweep=False)
    written = page.write(folder, tmp_path / "report")
    text = written.read_text()
    tables = len(re.findall(r"^\| :--", text, re.MULTILINE)) - 1  # one is the settings'
    assert text.count("<details><summary>Reproduce</summary>") == tables >= 3
    assert "rankwise compare stsb-minilm" in text and "Commit of the runs: 0123456789ab" in text
    assert written.with_suffix(".html").read_text().count("<summary>Reproduce</summary>") >= 3


def placed(folder, shift, active=committed.PARAMETERS):
    """A study in which AdaLoRA, with so many active parameters, is so many points above LoRA; random ranks do better still."""
    study(folder, {"lora": BASE, "adalora": plus(shift), "random-rank": plus(9)})
    for path in folder.glob("*/result.json"):
        result = json.loads(path.read_text())
        write_json(path, result | {"active_parameters": active if result["method"] == "adalora" else committed.PARAMETERS})


def test_a_placement_that_is_better_than_uniform_takes_the_record_and_a_control_never(tmp_path):
    placed(tmp_path / "none", 0)
    page = committed.record_page(committed.studies(tmp_path / "none"))
    assert "| none yet |" in page and "random-rank" not in page
    placed(tmp_path / "some" / "a", 2)
    placed(tmp_path / "some" / "b", 3, active=committed.PARAMETERS + 1_000)
    page = committed.record_page(committed.studies(tmp_path / "some"))
    record = page.split("## What was tried")[0]
    assert "| adalora |" in record and "+2.00" in record and "+3.00" not in page and "none yet" not in page


def test_the_command_writes_both(tmp_path):
    placed(tmp_path / "studies" / "a", 2)
    done = CliRunner().invoke(app, ["analysis", "results", str(tmp_path / "studies")])
    assert done.exit_code == 0, done.output
    assert "adalora" in (tmp_path / "results.csv").read_text() and "adalora" in (tmp_path / "record.md").read_text()
