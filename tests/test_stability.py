"""Allocations at another seed: what all sites agree on, and what the layers of one kind of module agree on."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from rankwise.reports import tables
from rankwise.reports.results import load
from rankwise.reports.stability import correlation_within, seed_pairs, setting_pairs
from scipy.stats import spearmanr

from tests.synthetic_runs import write_json, write_run

LAYERS = 12
KINDS = {"query": 2, "key": 5, "value": 8, "dense": 11}  # the rank that every layer of the kind is about given


def allocation(random: np.random.Generator) -> dict[str, int]:
    """A rank that follows the kind of module, with noise of its own at each layer."""
    return {f"layer.{i}.{kind}": rank + int(random.integers(-2, 3)) for i in range(LAYERS) for kind, rank in KINDS.items()}


def test_agreement_on_kinds_alone_is_none_within_kinds():
    random = np.random.default_rng(0)
    arm = SimpleNamespace(completed=[SimpleNamespace(ranks=allocation(random)) for _ in range(8)])
    pairs = seed_pairs(arm)
    assert len(pairs) == 28
    assert np.mean([pair.spearman for pair in pairs]) > 0.8
    assert abs(np.mean([pair.spearman_within for pair in pairs])) < 0.1


def test_within_kinds_is_the_mean_over_kinds_that_have_a_correlation():
    ones = {"a": (1, 2, 3), "b": (9, 8, 7), "c": (4, 4, 4)}
    others = {"a": (1, 2, 3), "b": (7, 9, 8), "c": (1, 4, 4)}  # a: 1; b: places 3 2 1 and 1 3 2; c: one rank in the first
    one, other = ({f"l.{i}.{kind}": ranks[i] for kind, ranks in of.items() for i in range(3)} for of in (ones, others))
    one["head"], other["head"] = 1, 5  # one site is no kind
    assert correlation_within(one, other) == pytest.approx((1 - 0.5) / 2)
    assert correlation_within({"l.0.a": 1, "l.1.a": 2}, {"l.0.a": 1, "l.1.a": 2}) is None


def test_two_settings_are_compared_at_the_seeds_that_both_have(tmp_path):
    """Where one has no run, or at another seed, nothing is compared; the diagonal is the setting's own two seeds."""
    random = np.random.default_rng(1)
    placed = {name: {seed: allocation(random) for seed in seeds} for name, seeds in {"a": (0, 1, 2), "b": (1, 2, 3)}.items()}
    even = {"c": {seed: dict.fromkeys(placed["a"][0], 4) for seed in (0, 1)}}
    for setting, runs in (placed | even).items():
        for seed, ranks in runs.items():
            run = write_run(tmp_path, method="adalora", setting=setting, seed=seed, score=80.0, sites=list(ranks))
            write_json(run / "result.json", json.loads((run / "result.json").read_text()) | {"ranks": ranks})
    write_json(tmp_path / "study.json", {"schema": 1, "study": "stsb-minilm", "quick": False, "title": "t",
               "methods": ["a", "b", "c"], "complete": True})  # fmt: skip
    part = load(tmp_path)
    arms = {arm.setting: arm for arm in part.arms}
    expected = [spearmanr(list(placed["a"][seed].values()), list(placed["b"][seed].values())).statistic for seed in (1, 2)]
    assert [pair.spearman for pair in setting_pairs(arms["a"], arms["b"])] == pytest.approx(expected)
    table = tables.agreement(part)
    assert table.columns == ("setting", "a", "b")  # one rank everywhere is no place to compare
    assert table.rows[0][2].startswith(f"{np.mean(expected):.2f} (") and table.rows[0][2] == table.rows[1][1]
    own = [pair.spearman for pair in seed_pairs(arms["a"])]
    assert table.rows[0][1].startswith(f"{np.mean(own):.2f} (")
