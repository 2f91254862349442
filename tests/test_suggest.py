"""Ranks that a probe suggests: those of the method that it is named after, a total met exactly, and what PEFT makes of them."""

import json

import pytest
import torch
from rankwise.experiments import cli, suggest
from rankwise.experiments.cli.suggest import agreement_of
from rankwise.experiments.suggest import Suggestion, mean_ranks
from rankwise.variants.adapter.linears import weight_of
from rankwise.variants.stable_rank import stable_rank

from tests import small_world
from tests.tiny import tiny

OF_SEEDS = {0: {"a": 4, "b": 1, "c": 1}, 1: {"a": 3, "b": 3, "c": 0}, 2: {"a": 4, "b": 1, "c": 1}}


def test_the_mean_over_seeds_keeps_the_total():
    """By hand: 11/3, 5/3, 2/3 are 3, 1, 0 and two over, which go to the equal remainders of 2/3 in the order of the sites."""
    assert mean_ranks(OF_SEEDS, 6) == {"a": 4, "b": 2, "c": 0}
    assert mean_ranks({0: {"a": 2, "b": 5}}, 7) == {"a": 2, "b": 5}


def test_agreement_is_over_pairs_of_seeds():
    found = Suggestion("gradient", 6, 2.0, OF_SEEDS, mean_ranks(OF_SEEDS, 6), dict.fromkeys("abc", (3, 5)))
    agreement = agreement_of(found)
    # Ranks of the sites with ties: (3, 1.5, 1.5) against (2.5, 2.5, 1): correlation 0.5; overlap (3 + 1 + 0) / (4 + 3 + 1).
    assert agreement["rank_correlation"] == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert agreement["overlap"] == pytest.approx((4 / 8 + 1 + 4 / 8) / 3)
    assert agreement_of(Suggestion("spectral", 6, 2.0, {0: OF_SEEDS[0]}, OF_SEEDS[0], {})) is None
    assert found.parameters == 6 * 8


def test_peft_gets_the_ranks_and_one_scale_for_every_site():
    peft = pytest.importorskip("peft")
    model = tiny("bert")
    names = [name for name, module in model.named_modules() if name.endswith(("query", "value", "output.dense"))]
    assert len(names) == 8
    ranks = {name: i % 4 for i, name in enumerate(names)}
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in names}
    found = Suggestion("gradient", sum(ranks.values()), 1.5, {0: ranks}, ranks, shapes)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**json.loads(json.dumps(found.as_peft()))))
    layers = {n.removeprefix("base_model.model."): m for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert {name: m.r["default"] for name, m in layers.items()} == {name: rank for name, rank in ranks.items() if rank}
    assert {m.scaling["default"] for m in layers.values()} == {1.5}
    assert sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n) == found.parameters


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("world")
    patch.setenv("RANKWISE_CACHE", str(folder / "cache"))
    yield small_world.model(folder / "model"), small_world.task("classification")
    patch.undo()


def test_the_spectral_probe_is_the_stable_rank(world):
    model, task = world
    found = suggest.suggest(model, task, 15, "spectral", targets=["query", "intermediate.dense"], max_length=24)
    loaded, _, _ = suggest.models.load(model, task)
    worth = {name: stable_rank(weight_of(loaded.get_submodule(name)).detach()) for name in found.ranks}
    share = {name: 15 * one / sum(worth.values()) for name, one in worth.items()}
    assert sum(found.ranks.values()) == 15 and len(found.of_seeds) == 1
    assert all(abs(rank - share[name]) < 1 for name, rank in found.ranks.items())


def test_the_gradient_probe_is_goras_measure(world):
    """Of the batches that each seed draws, packed as alone; tests/test_gora.py has the measure written out."""
    model, task = world
    where = ["query", "intermediate.dense"]
    found = suggest.suggest(model, task, 14, "gradient", (3, 4), where, batches=2, batch_size=6, max_length=24)
    assert list(found.of_seeds) == [3, 4] and all(sum(ranks.values()) == 14 for ranks in found.of_seeds.values())
    settings = {"rank": 4, "alpha": 8.0, "total_rank": 14, "rounding": "exact", "least_rank": 0, "calibration_batches": 2}
    training = suggest.Training(max_steps=2, batch_size=6, max_length=24, precision="fp32")
    alone = suggest._measured(model, task, "gora", settings, where, training, [4], "cpu")
    assert {name: int(rank[0]) for name, rank in alone.ranks().items()} == found.of_seeds[4]  # packed and alone agree


def test_more_than_the_sites_hold_is_refused(world):
    with pytest.raises(ValueError, match="--budget 100000: the 4 sites hold 1 to 128 ranks together"):
        suggest.suggest(*world, 100_000, "spectral", targets=["query", "intermediate.dense"], max_length=24)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--budget", "0"), "--budget 0: give at least 1"),
        (("--budget", "4", "--probe", "gradeint"), '--probe gradeint: no such probe; did you mean "gradient"?'),
        (("--budget", "4", "--scale", "-1"), "--scale -1.0: give a number above 0"),
    ],
)
def test_what_is_no_probe_is_refused_in_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["suggest", "m", "--data", "rows.jsonl", *words])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and len(error.splitlines()) == 1


@pytest.mark.slow
def test_the_command_prints_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    model = small_world.model(tmp_path / "model")
    random = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(60):
        text = [small_world.LETTERS[i] for i in torch.randint(0, 26, (6,), generator=random)]
        rows.append(json.dumps({"text": " ".join(text), "label": "low" if text[0] < "m" else "high"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    for probe in ("gradient", "activation"):
        with pytest.raises(SystemExit) as ended:
            data = str(tmp_path / "rows.jsonl")
            cli.main(["suggest", model, "--data", data, "--budget", "24", "--probe", probe, "--json", "--batches", "2"])
        assert ended.value.code in (0, None)
        found = json.loads(capsys.readouterr().out)
        assert found["probe"] == probe and sum(found["ranks"].values()) == 24 and len(found["ranks_of_seeds"]) == 3
        assert 0 <= found["agreement"]["overlap"] <= 1
        assert set(found["peft"]) == {"r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"}
