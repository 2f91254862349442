"""The report: whole, honest about what failed, and without a word of a corpus."""

import csv
import json
import re

import pytest
from rankwise.experiments import files
from rankwise.reports import page, results

from tests.synthetic_runs import write_json, write_run, write_study


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = write_study(tmp_path_factory.mktemp("study"), quick=True, complete=False)
    write_run(folder, method="dora", seed=7, finished=False)
    return page.write(folder, folder / "report")


def test_every_link_of_the_report_leads_to_a_file(report):
    links = re.findall(r"\]\(([^)]+)\)", report.read_text())
    assert len(links) >= 2 * 5 + 2 * 4
    assert all((report.parent / link).is_file() for link in links)
    assert not list(report.parent.rglob("*.tmp"))


def test_the_report_says_what_it_is_and_what_failed(report):
    text = report.read_text()
    assert "**A quick look, no fair comparison" in text
    assert "37 runs: 35 completed, 1 failed, 1 unfinished" in text
    assert "- lora, sweep, rate 5e-3, seed 0: failed after 540 steps: collapsed" in text
    assert "- dora, final, rate 1e-3, seed 7: unfinished, 539 steps written" in text
    assert "**The study is not complete" in text


def test_the_report_says_how_its_numbers_were_made(report):
    text = report.read_text()
    for words in ("Commit: 0123456789ab", "torch 2.13.0", "Device: cpu (a processor)", "Threads: 2", "float32",
                  "dropout inside fused attention is off", '"alpha": 16', '"batch_size": 32', "36 sites"):  # fmt: skip
        assert words in text


def test_no_traceback_and_no_path_of_the_machine_reaches_the_report(report):
    for path in report.parent.rglob("*"):
        if path.is_file():
            assert b"Traceback" not in path.read_bytes()
            assert str(report.parent.parent).encode() not in path.read_bytes()


def test_the_same_runs_give_the_same_report(tmp_path):
    write_study(tmp_path / "runs", methods=("full", "bitfit"), seeds=(0,), sweep=False)
    once, again = (page.write(tmp_path / "runs", tmp_path / name) for name in ("a", "b"))
    assert once.read_bytes() == again.read_bytes()


def test_a_report_inside_the_folder_of_runs_is_no_run(tmp_path):
    write_study(tmp_path, methods=("full",), seeds=(0,), sweep=False)
    assert page.write(tmp_path, tmp_path).read_bytes() == page.write(tmp_path, tmp_path).read_bytes()
    assert len(results.load(tmp_path).runs) == 1


def test_two_tasks_get_a_section_and_files_each(tmp_path):
    write_run(tmp_path, method="head")
    write_run(tmp_path, method="head", task="reuters/r8")
    path = page.write(tmp_path, tmp_path / "out")
    assert path.read_text().count("## Comparison") == 2
    names = {file.name for file in (tmp_path / "out" / "tables").glob("*comparison.csv")}
    assert len(names) == 2


def test_a_report_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    folder = write_study(tmp_path / "runs", methods=("full",), seeds=(0,), sweep=False)
    path = page.write(folder, tmp_path / "out")
    before = path.read_bytes()
    write_run(folder, method="lora")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        page.write(folder, tmp_path / "out")
    assert path.read_bytes() == before
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_settings_that_differ_between_runs_are_all_listed(tmp_path):
    write_run(tmp_path, seed=0)
    path = write_run(tmp_path, seed=1) / "config.json"
    changed = json.loads(path.read_text())
    write_json(path, changed | {"dirty": True, "versions": changed["versions"] | {"torch": "2.11.0"}})
    text = page.write(tmp_path, tmp_path / "out").read_text()
    assert "torch 2.11.0 (1 runs), 2.13.0 (1 runs)" in text
    assert "0123456789ab (1 runs), 0123456789ab with changes (1 runs)" in text


HOSTILE = "a *b* <script>alert(1)</script> | `c` [d](http://e) ![f](http://g)\n-1 +-2 {{ 3 }} \U0001f600"


def test_generated_samples_are_shown_as_they_are_and_cannot_change_the_page(tmp_path):
    for seed, setting in ((0, "lora"), (1, "lora"), (0, "dora")):
        run = write_run(tmp_path, method=setting, seed=seed)
        text = {"lora": HOSTILE, "dora": " "}[setting] if seed == 0 else "of seed 1"
        row = {"row": 3, "prompt": "what | is?", "target": "that", "text": text}
        write_json(run / "samples.json", {"schema": 1, "split": "test", "samples": [row]})
    write_run(tmp_path, method="full", seed=0)
    text = page.write(tmp_path, tmp_path / "report").read_text()
    part = text.partition("## Generated samples\n")[2].partition("\n#")[0]
    rows = [line for line in part.splitlines() if line.startswith("| 3 |")]
    assert rows[:2] == ["| 3 | prompt | what \\| is? |", "| 3 | target | that |"] and "of seed 1" not in text
    lora, dora = sorted(rows[2:], reverse=True)
    assert dora == "| 3 | dora | (nothing) |"
    assert "<script" not in lora and "](" not in lora and "\\`c\\`" in lora and "\\| " in lora and " -1 +-2 " in lora
    html = (tmp_path / "report" / "report.html").read_text()
    assert "a *b* &lt;script&gt;alert(1)&lt;/script&gt; | `c`" in html and "-1 +-2 {{ 3 }}" in html
    assert "What seed 0 wrote, greedily, for rows of the test split" in text and "look at them before you pass it on" in html
    assert HOSTILE in list(csv.DictReader((tmp_path / "report/tables/samples.csv").open(newline="")))[2]["text"]


def test_a_study_without_texts_has_no_section_of_them(report):
    assert "Generated samples" not in report.read_text()
    assert "Generated samples" not in (report.parent / "report.html").read_text()
    assert not (report.parent / "tables" / "samples.csv").exists()
