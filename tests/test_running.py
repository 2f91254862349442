"""experiments/running.md: runs that jobs of their own made are one study when they lie in one folder."""

import inspect
import re
import shutil
from pathlib import Path

import pytest
import rankwise.experiments.study.runner as study_runner
from rankwise.experiments.cli import compare
from rankwise.experiments.study import Runner
from rankwise.experiments.training.trainer import Trainer

from tests import small_world
from tests.test_study import contents

PAGE = (Path(study_runner.__file__).parents[1] / "running.md").read_text(encoding="utf-8")
TRAINING = small_world.training(epochs=1, max_steps=3, train_examples=24, evaluation_examples=12, log_every=1).model_dump()


def ran(what, out):
    runner = Runner(what, out, device="cpu")
    runner.prepare()
    return runner.run()


def test_the_parts_of_an_array_are_the_study(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(study_runner, "COMMITTED", tmp_path / "committed")
    small_world.register(monkeypatch.setitem)
    what = small_world.study(small_world.model(tmp_path / "model"), ["head", "lora"], training=TRAINING, anatomy=False)
    whole = contents_of_runs(tmp_path / "whole", ran(what, tmp_path / "whole"))
    (tmp_path / "study").mkdir()
    for entry in what.methods:
        part = tmp_path / "parts" / entry.label
        ran(what.model_copy(update={"methods": [entry]}), part)
        for folder in part.glob("[0-9a-f]*"):  # as `cp -rn runs/parts/*/[0-9a-f]* runs/study/` takes them
            if folder.is_dir():
                shutil.copytree(folder, tmp_path / "study" / folder.name)
    monkeypatch.setattr(Trainer, "train_step", lambda self: pytest.fail("it trained"))
    found = contents_of_runs(tmp_path / "study", ran(what, tmp_path / "study"))
    assert found == whole and "study.json" in found


def contents_of_runs(out, results):
    """Without where each run stood in its pack, which a part of the study numbers by itself."""
    assert all(result["status"] == "completed" for result in results)
    found = {name: value for name, value in contents(out).items() if name != "packs.json"}
    for name, value in found.items():
        if isinstance(value, dict):  # config.json and result.json
            found[name] = {key: inner for key, inner in value.items() if key not in ("pack", "pack_index")}
    return found


def test_the_page_s_array_is_ten_lines_or_fewer_and_names_options_that_are_there():
    (script,) = re.findall(r"```sh\n(#!/bin/bash.*?)```", PAGE, re.DOTALL)
    assert len(script.splitlines()) <= 10 and "--array" in script
    known = {f"--{name.replace('_', '-')}" for name in inspect.signature(compare).parameters} | {"--json"}
    used = re.findall(r"--[a-z-]+", " ".join(re.findall(r"rankwise compare[^`\n]*", PAGE)))
    assert used and set(used) <= known
