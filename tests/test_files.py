"""Files that are there whole or not at all."""

import os
import subprocess
import sys

import pytest
from rankwise.experiments.files import replacing, write_file


def test_what_a_killed_process_left_of_a_file_goes_when_it_is_written_again(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, anothers, of_a_live_one = (
        tmp_path / name for name in (f".a[1].csv.{ended.pid}.tmp", f".b.csv.{ended.pid}.tmp", f".a[1].csv.{os.getppid()}.tmp")
    )
    for path in (left, anothers, of_a_live_one):
        path.write_text("half")
    write_file(tmp_path / "a[1].csv", "whole")
    assert (tmp_path / "a[1].csv").read_text() == "whole"
    assert not left.exists() and anothers.exists() and of_a_live_one.exists()


def test_a_file_whose_writing_fails_is_as_it_was(tmp_path):
    write_file(tmp_path / "a.csv", "whole")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a.csv") as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"] and (tmp_path / "a.csv").read_text() == "whole"
