"""The archive of a committed study: what git keeps of its runs is read back byte for byte, or refused in one line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rankwise.experiments import archive, files, records
from rankwise.reports import page, results

from tests.synthetic_runs import write_anatomy, write_run, write_study

COMMITTED = Path(__file__).parent.parent / "reports" / "studies"


@pytest.fixture
def runs(tmp_path) -> Path:
    """A study with a failed run, one that is not finished, sites, predictions, and a line that a kill cut off."""
    folder = write_study(tmp_path / "runs", methods=("full", "lora", "adalora"))
    finals = [run.folder for run in results.load(folder).runs if run.config.phase == "final"]
    write_anatomy(finals[0])
    records.write_predictions(finals[0], "test", np.arange(12, dtype=np.float32).reshape(6, 2))
    with (finals[1] / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    write_run(folder, method="lora", seed=9, finished=False)
    for run in results.load(folder).runs:
        run.folder.rename(folder / run.config.fingerprint)  # as real ones are called
    return folder


def everything(study: results.Study) -> list:
    return [(run.config, run.result, run.contents(), run.train, run.evaluations, run.rank_history, run.sites, run.knock_out,
             len(run.notes)) for run in study.runs if run.result is not None]  # fmt: skip


def test_what_is_read_back_are_the_same_files(runs, tmp_path):
    path = results.archive_finished(runs, tmp_path / "kept")
    stored = archive.read(path)
    finished = {run.config.fingerprint: run for run in results.load(runs).runs if run.result is not None}
    assert list(stored) == sorted(finished)
    for fingerprint, content in stored.items():
        on_disk = {name: (finished[fingerprint].folder / name).read_bytes() for name in records.FILES
                   if (finished[fingerprint].folder / name).is_file()}  # fmt: skip
        assert content == on_disk
    assert sum(records.PREDICTIONS in content for content in stored.values()) == 1
    assert everything(results.load(tmp_path / "kept")) == everything(results.load(runs))


def test_equal_runs_give_equal_bytes_in_whatever_order(runs, tmp_path):
    found = [run.contents() for run in results.load(runs).runs if run.result is not None]
    archive.write(tmp_path / "a.parquet", found)
    archive.write(tmp_path / "b.parquet", reversed(found))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_an_archive_has_a_column_of_samples_only_where_a_run_has_some(runs, tmp_path):
    """Those that were written before there were any keep their bytes."""
    import pyarrow.parquet

    found = [run.contents() for run in results.load(runs).runs if run.result is not None]
    archive.write(tmp_path / "a.parquet", found)
    assert records.SAMPLES not in pyarrow.parquet.read_schema(tmp_path / "a.parquet").names
    some = [{**files, **({records.SAMPLES: b"{}"} if number == 0 else {})} for number, files in enumerate(found)]
    archive.write(tmp_path / "b.parquet", some)
    assert sum(records.SAMPLES in files for files in archive.read(tmp_path / "b.parquet").values()) == 1


def test_it_opens_as_a_table_of_results(runs, tmp_path):
    import pyarrow.parquet

    path = results.archive_finished(runs, tmp_path / "kept")
    rows = pyarrow.parquet.read_table(path, columns=list(archive.FACTS)).to_pylist()
    by_fingerprint = {run.config.fingerprint: run.result for run in results.load(runs).runs if run.result is not None}
    assert {row["status"] for row in rows} == {"completed", "failed"}
    for row in rows:
        assert row == {name: getattr(by_fingerprint[row["fingerprint"]], name) for name in archive.FACTS}


def test_runs_that_were_archived_before_stay(runs, tmp_path):
    results.archive_finished(runs, tmp_path / "kept")
    later = write_run(tmp_path / "later", method="dora", seed=3)
    results.archive_finished(tmp_path / "later", tmp_path / "kept")
    labels = [run.config.setting for run in results.load(tmp_path / "kept").runs]
    assert labels.count("dora") == 1 and labels.count("lora") > 1
    stored = archive.read(tmp_path / "kept" / archive.NAME)
    assert stored[json.loads((later / "config.json").read_text())["fingerprint"]] == records.contents(later)


def test_runs_in_the_folder_and_in_the_archive_are_one_study(runs, tmp_path):
    whole = results.load(runs)
    results.archive_finished(runs, runs)
    for number, run in enumerate(whole.runs):
        if run.result is not None and number % 2:  # half of them are in the archive only
            for path in run.folder.iterdir():
                path.unlink()
            run.folder.rmdir()
    mixed = results.load(runs)
    assert [run.config for run in mixed.runs] == [run.config for run in whole.runs]
    assert {run.archived is None for run in mixed.runs} == {True, False}
    # A run that was begun again in the folder does not hide the finished one of the archive.
    run = next(run for run in mixed.runs if run.archived is None and run.result is not None)
    (run.folder / "result.json").unlink()
    (again,) = (one for one in results.load(runs).runs if one.config.fingerprint == run.config.fingerprint)
    assert again.result == run.result


@pytest.mark.parametrize("drawn", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_report_of_the_archive_is_that_of_the_folders(runs, tmp_path, drawn, request):
    if not drawn:
        request.getfixturevalue("figures_undrawn")
    for run in results.load(runs).runs:
        if run.result is None:  # an archive holds finished runs only
            for path in run.folder.iterdir():
                path.unlink()
            run.folder.rmdir()
    results.archive_finished(runs, tmp_path / "kept")
    page.write(runs, tmp_path / "of-folders")
    page.write(tmp_path / "kept", tmp_path / "of-archive")
    texts = [path.relative_to(tmp_path / "of-folders") for path in (tmp_path / "of-folders").rglob("*") if path.is_file()]
    texts = [path for path in texts if path.suffix in (".md", ".csv", ".tex", ".html")]
    assert len(texts) > 5
    for path in texts:
        assert (tmp_path / "of-archive" / path).read_bytes() == (tmp_path / "of-folders" / path).read_bytes(), path


@pytest.mark.slow
def test_a_kill_while_archiving_leaves_the_old_state(runs, tmp_path):
    path = results.archive_finished(runs, tmp_path / "kept")
    old = path.read_bytes()
    write_run(runs, method="dora", seed=5)
    code = (
        "import os, signal, sys; from rankwise.reports import results;"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "results.archive_finished(sys.argv[1], sys.argv[2])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(runs), str(tmp_path / "kept")], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == old
    assert everything(results.load(tmp_path / "kept"))
    results.archive_finished(runs, tmp_path / "kept")
    assert len(archive.read(path)) == len(archive_rows(old, tmp_path)) + 1


def archive_rows(content: bytes, tmp_path: Path) -> dict:
    files.write_file(tmp_path / "old.parquet", content)
    return archive.read(tmp_path / "old.parquet")


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("damage", [cut, flipped, lambda content: b"", lambda content: b"{}\n" * 20])
def test_a_damaged_archive_is_one_clear_line(runs, tmp_path, damage):
    path = results.archive_finished(runs, tmp_path / "kept")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"runs\.parquet .*take it from git again") as error:
        results.load(tmp_path / "kept")
    assert len(str(error.value).splitlines()) == 1


def test_a_foreign_table_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / archive.NAME)
    with pytest.raises(ValueError, match=r"no archive of runs: it has no column config\.json, fingerprint, result\.json"):
        results.load(tmp_path)


def test_a_file_of_a_run_in_the_archive_that_is_no_result_is_refused_by_name(runs, tmp_path):
    found = [dict(run.contents()) for run in results.load(runs).runs if run.result is not None]
    found[0]["result.json"] = found[0]["result.json"].replace(b'"seed": ', b'"seed": 1')
    archive.write(tmp_path / archive.NAME, found)
    with pytest.raises(ValueError, match=rf"{archive.NAME}/\w+/result\.json: seed"):
        results.load(tmp_path)


@pytest.mark.slow
def test_no_flipped_bit_is_read_as_something_else(runs, tmp_path):
    """Of 200 bytes of the pages, and of every third of the footer, each bit in turn: Parquet does not check its footer."""
    path = results.archive_finished(runs, tmp_path / "kept")
    whole, content = archive.read(path), path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    assert 4 < footer < len(content) - 8
    for at in (*range(4, footer, max(footer // 200, 1)), *range(footer, len(content), 3)):
        bit = 1 << at % 8
        path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
        try:
            assert archive.read(path) == whole, at  # a bit that says nothing of the runs
        except ValueError as error:
            assert "runs.parquet" in str(error)


def test_an_archive_without_a_digest_is_read_as_before(runs, tmp_path):
    import pyarrow.parquet as pq

    path = results.archive_finished(runs, tmp_path / "kept")
    whole, table = archive.read(path), pq.read_table(path)
    assert archive.DIGEST in table.schema.metadata
    pq.write_table(table.replace_schema_metadata(None), path)
    assert archive.read(path) == whole
