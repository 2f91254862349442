"""What enters a run's fingerprint, and what a budget makes of a method, as they were when they were written down.

One line for each method at its least settings and at some others: the values given, `identity()`, the dump, and the settings
that a budget of parameters gives; all as JSON.  Finished runs are found again by `identity()`, so that it may never change; a
new setting enters the dumps alone.  `python -m tests.test_frozen_settings` adds the lines of a new method and leaves those that
are there as they are.
"""

import json
from pathlib import Path

import pytest
import torch
from rankwise import variants
from rankwise.experiments.config import Entry, unsolved_ranks
from rankwise.experiments.study import budget
from rankwise.variants.settings import FROM_BUDGET, METHODS, check

FILE = Path(__file__).parent / "frozen_settings.txt"
OTHERS = {  # for each method, further values beside the least that it takes
    "lora": [{"rank": 3, "alpha": [8.0], "magnitude": True}, {"rank": 3, "rank_pattern": {"a": 2}, "scaling": "alpha/sqrt(r)"}],
    "lora-fa": [{"rank": 2, "dropout": 0.1}],
    "vera": [{"rank": 5, "projection_seed": 0, "save_projection": False}],
    "lora+": [{"rank": 2, "lr_ratio": 4.0}],
    "trained-alpha": [{"rank": 2, "alpha_lr_ratio": 0.5}],
    "loftq": [{"rank": 2, "magnitude": True}],
    "pissa": [{"rank": 2, "magnitude": True}],
    "olora": [{"rank": 2, "scaling": "alpha/sqrt(r)"}],
    "orthogonal": [{"rank": 4, "rank_pattern": {"a": 2}}],
    "dora": [{"rank": 3, "lr_ratio": 4.0, "initialization": "gaussian"}],
    "adalora": [
        {"initial_rank": 4, "target_rank": 2, "score": "magnitude", "cost": "parameters", "shrink": True},
        {"initial_rank": 4, "target_rank": 2, "score": "uniform", "most_rank": 6, "rank_bounds": {"a": [0, 5]}},
        {"initial_rank": 4, "target_rank": 6, "direction": "grow", "most_rank": 8, "target_total": 12},
        {"initial_rank": 4, "target_rank": 4, "direction": "both", "exchange": 2, "most_rank": 8},
    ],
    "adalora+dora": [{"initial_rank": 4, "target_rank": 2, "orthogonality": 0.1, "schedule": "linear"}],
    "allocated": [{"initial_rank": 4, "target_rank": 2, "form": "doublet", "beta1": 0.5, "warmup_steps": 5, "final_steps": 5}],
    "dynamic-dora": [{"initial_rank": 4, "target_rank": 2, "modulator": 0.2, "alpha": 3.0}],
    "eva": [{"rank": 3, "cost": "parameters", "rho": 1.5}, {"rank": 3, "magnitude": True, "scale_by": "own rank"}],
    "gora": [{"rank": 3, "rounding": "exact", "cost": "parameters", "total_parameters": 900}],
    "stable-rank": [{"rank": 3, "least_rank": 1, "total_rank": 7}],
    "fim-lora": [{"rank": 3, "most_rank": 5, "scale_by": "own rank"}],
    "spectral-rank": [{"rank": 3, "cost": "parameters", "calibration_batches": 2}],
    "heavy-tail": [{"rank": 3, "statistic": "spikes", "more_to": "heavy", "beta": 1.0}],
    "random-rank": [{"rank": 3, "group_bounds": {"a": [0, 5]}}],
    "increlora": [{"target_rank": 3, "cost": "parameters", "top_sites": 2}, {"target_rank": 3, "magnitude": True}],
    "elalora": [{"initial_rank": 3, "optimizer_reset": "release", "cost": "parameters", "schedule": "steady"}],
    "flexlora": [{"initial_rank": 3, "weakest": "signed", "undefined_entropy": "highest", "added_std": 0.02}],
    "l1ra": [{"initial_rank": 3, "sparsity": 0.1, "cost": "parameters", "least_rank": 2}],
    "sora": [
        {"initial_rank": 4, "target_rank": 2, "final_steps": 3, "shrink": True},
        {"initial_rank": 4, "threshold": "release", "tau": 0.01, "cost": "parameters", "target_parameters": 80},
    ],
    "geolora": [
        {"initial_rank": 4, "tolerance": 0.3, "interval": 5, "core_step": "release", "scale_by": "release"},
        {"initial_rank": 4, "cost": "parameters", "target_rank": 2, "most_rank": 9, "truncate_after": 7},
    ],
    "bayeslora": [
        {"initial_rank": 4, "threshold": 2.0, "variance": "A", "sampling": "weights"},
        {"initial_rank": 4, "cost": "parameters", "target_rank": 2, "least_rank": 1, "interval": 9},
    ],
    "weightlora": [
        {"rank": 3, "kept_sites": 2, "kept_by": "release", "interval": 2},
        {"rank": 3, "growth": "smart", "doublings": 1, "scaling": "alpha/sqrt(r)"},
    ],
    "dylora": [{"rank": 4, "least_rank": 2, "update": "frozen"}],
    "partial": [{"patterns": ["bias", "layer.1"]}],
    "gradual": [{"interval": 3}],
    "houlsby": [{"bottleneck": 8, "nonlinearity": "relu"}],
    "pfeiffer": [{"bottleneck": [8, 4], "after": ["intermediate.dense"]}],
    "prompt-tuning": [{"tokens": 5, "initialization": "normal"}],
    "prefix-tuning": [{"tokens": 5, "spread": 0.1}],
    "ia3": [{"outputs": ["value"], "inputs": ["intermediate.dense"]}],
    "truncated": [{"initial_rank": 4, "target_rank": 2, "cost": "parameters", "normalisation": "weight"}],
}
CASES = [(name, values) for name in METHODS for values in (None, *OTHERS.get(name, []))]
PARAMETERS, SCALE = 1000, 2.0  # of the budget


def least(name: str) -> dict[str, int]:
    """The settings that the method cannot do without."""
    return {k: 2 for k, field in METHODS[name].settings.model_fields.items() if field.is_required()}


def line(name: str, values: dict | None) -> str:
    values = least(name) if values is None else values
    settings = check(name, values)
    facts = [name, values, settings.identity(), json.loads(settings.model_dump_json()), with_budget(name, values)]
    return "\t".join(map(json.dumps, facts))


def with_budget(name: str, values: dict) -> dict | None:
    """The settings of an entry whose ranks follow from a budget, over three sites of three costs; None without sites."""
    if not METHODS[name].takes_targets:
        return None
    model = torch.nn.ModuleDict({n: torch.nn.Linear(7 + i, 5 + 3 * i) for i, n in enumerate("abc")})
    lora = variants.create("lora", rank=1).attach(model, list("abc"), head=[])
    kind = METHODS[name].settings
    given = {k: v for k, v in values.items() if k not in kind.with_role(*FROM_BUDGET)} | unsolved_ranks(kind)
    entry = Entry(method=name, label="x", learning_rates=[1e-3], settings=given)
    return budget.solved(entry, lora, PARAMETERS, SCALE).settings


def written() -> dict[tuple[str, str], str]:
    """(method, values given), as JSON both -> its line."""
    lines = FILE.read_text().splitlines()
    found = {tuple(one.split("\t")[:2]): one for one in lines}
    assert len(found) == len(lines), "two lines of one method and the same values"
    return found


def key(name: str, values: dict | None) -> tuple[str, str]:
    return json.dumps(name), json.dumps(least(name) if values is None else values)


@pytest.mark.parametrize(("name", "values"), CASES, ids=[f"{name}-{index}" for index, (name, _) in enumerate(CASES)])
def test_identity_dump_and_budget_are_those_written_down(name, values):
    known = written().get(key(name, values))
    assert known is not None, f"{name} is new: add its lines by `python -m tests.test_frozen_settings`"
    assert line(name, values) == known


def test_every_line_is_tested():
    assert written().keys() == {key(*case) for case in CASES}


if __name__ == "__main__":  # pragma: no cover
    known = written()
    FILE.write_text(FILE.read_text() + "".join(line(*case) + "\n" for case in CASES if key(*case) not in known))
