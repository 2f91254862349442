"""A fingerprint tells a run from every other, for as long as `NUMERICS` stays: those of committed runs are made again."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rankwise.experiments import archive
from rankwise.experiments.config import Entry, Training
from rankwise.experiments.records import Config
from rankwise.experiments.study import NUMERICS, PackPlan, runs
from rankwise.experiments.tasks import get

STUDIES = sorted((Path(__file__).parents[1] / "reports" / "studies").glob(f"*/{archive.NAME}"))


def made_again(config: dict, result: dict, monkeypatch: pytest.MonkeyPatch) -> str:
    """The fingerprint of a run by what its config.json says, without its model and data."""
    targets = {config["setting"]: config["targets_resolved"]}
    prepared = SimpleNamespace(targets=targets, data_hash=config["data_hash"], task=get(config["task"]))
    context = SimpleNamespace(
        study=SimpleNamespace(protocol=result.get("protocol", "held-out"), model=config["model"]),
        tasks={config["task"]: prepared},
        precision=config["precision"],
        device=torch.device(config["device"]),
    )
    monkeypatch.setattr(runs.models, "content_hash", lambda model: config["model_hash"])
    base = config.get("quantization") or {"name": "none", "is_double": False}
    form = {"quantization": base["name"], "double_quantization": base["is_double"]}
    entry = Entry(method=config["method"], label=config["setting"], learning_rates=[config["learning_rate"]], **form)
    pack = PackPlan(config["phase"], entry, config["task"], 0, ())
    settings, training = Config.model_validate(config).settings(), Training(**config["training"])
    return runs.planned(context, pack, settings, training, config["seed"], config["learning_rate"]).fingerprint


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.parent.name)
def test_committed_runs_keep_their_fingerprints(path, monkeypatch):
    wrong, counted = [], 0
    for fingerprint, files in archive.read(path).items():
        config, result = json.loads(files["config.json"]), json.loads(files["result.json"])
        if config.get("numerics") == NUMERICS:
            counted += 1
            wrong += [fingerprint] * (made_again(config, result, monkeypatch) != fingerprint)
    assert not wrong, f"{len(wrong)} of {counted}"
    assert counted or path.parent.name == "quick-look"  # made under NUMERICS 1


def test_there_are_hundreds_of_them():
    assert sum(len(archive.read(path)) for path in STUDIES) > 700
