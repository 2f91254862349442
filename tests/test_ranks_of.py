"""Controls that need another run: its final ranks, frozen and trained from scratch, or permuted over the sites."""

from pathlib import Path
from typing import Any

import pytest
import rankwise.experiments.study.runner
import torch
from rankwise import variants
from rankwise.experiments import checks, config
from rankwise.experiments.records import read_object
from rankwise.experiments.study import Runner, budget
from rankwise.experiments.training.trainer import Trainer
from rankwise.variants.adapter.probe import fill
from rankwise.variants.settings import check, together

from tests.loop import Loop
from tests.test_study import cache, contents, model, no_training, nothing_committed, ran, result, study  # noqa: F401
from tests.tiers import quick
from tests.tiny import batch, packed_batch, tiny

SEEDS = [0, 1, 2]
SOURCE = {"method": "adalora", "initial_rank": 4, "target_rank": 1, "alpha": 6, "warmup_steps": 1, "final_steps": 1}
SOURCE |= {"learning_rate": 3e-2, "targets": ["query", "output.dense"]}
FROZEN = {"method": "lora", "label": "frozen", "ranks_of": "adalora", "learning_rate": 1e-2}
PERMUTED = {"method": "dora", "label": "permuted", "ranks_of": "adalora", "permuted": True, "learning_rate": 1e-2}
WHOLE = [FROZEN, SOURCE, PERMUTED]  # what takes ranks may stand before whose ranks they are


def runs(out: Path, label: str) -> list[dict[str, Any]]:
    return [result(out, setting=label, seed=seed, phase="final") for seed in SEEDS]


def settings_of(out: Path, run: dict[str, Any]) -> dict[str, Any]:
    return read_object(out / run["fingerprint"] / "config.json")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rankwise.experiments.study.runner, "COMMITTED", out / "committed")
        assert all(r["status"] == "completed" for r in ran(study(model, WHOLE, seeds=SEEDS), out))
    return out


def test_each_seed_trains_the_final_ranks_of_the_same_seed_s_run(whole):
    sources, frozen = runs(whole, "adalora"), runs(whole, "frozen")
    assert len({tuple(run["ranks"].values()) for run in sources}) > 1  # the seeds differ
    assert any(0 in run["ranks"].values() for run in sources)
    for source, run in zip(sources, frozen, strict=True):
        assert run["ranks"] == run["nominal_ranks"] == source["ranks"]
        assert run["scale"] == source["scale"] == 6 / 4  # every site's, that without a rank too
        assert run["pack_size"] == 3
        facts = settings_of(whole, run)
        assert facts["ranks_of"] == "adalora" and facts["allocation"] == "taken"
        own = check("lora", facts["method_settings"])
        assert all(isinstance(value, int) for value in [own.rank, *own.rank_pattern.values()])
    assert len({run["fingerprint"] for run in frozen}) == 3


def test_ranks_may_be_those_of_the_partner_s_run(model, tmp_path):  # noqa: F811
    """Seeds 0 and 1 take each other's ranks, 2 and 3 too; the sweep's first seed, which is no final one, those of seed 0."""
    seeds = [0, 1, 2, 3]
    taker = FROZEN | {"label": "learned", "ranks_seed": "other", "learning_rates": [1e-2, 2e-2]}
    taker.pop("learning_rate")
    what = study(model, [SOURCE, taker], seeds=seeds, sweep={"seeds": [100], "trials": 2}, quick=True)
    assert all(r["status"] == "completed" for r in ran(what, tmp_path))
    ranks = {seed: result(tmp_path, setting="adalora", seed=seed, phase="final")["ranks"] for seed in seeds}
    assert ranks[0] != ranks[1] and ranks[2] != ranks[3]
    for seed, partner in ((0, 1), (1, 0), (2, 3), (3, 2)):
        run = result(tmp_path, setting="learned", seed=seed, phase="final")
        assert run["ranks"] == ranks[partner]
        assert settings_of(tmp_path, run)["ranks_seed"] == "other"
    assert result(tmp_path, setting="learned", seed=100, phase="sweep", learning_rate=1e-2)["ranks"] == ranks[0]


@pytest.mark.parametrize(
    ("entry", "seeds", "words"),
    [
        (FROZEN | {"ranks_seed": "other"}, [0, 1, 2], "of 3 seeds the last has none"),
        (FROZEN | {"ranks_seed": "next"}, [0, 1], "ranks_seed"),
        ({k: v for k, v in FROZEN.items() if k != "ranks_of"} | {"rank": 2, "ranks_seed": "other"}, [0, 1], "without ranks_of"),
        ({"method": "adalora", "label": "b", "initial_rank": 2, "target_rank": 1, "learning_rate": 1e-2, "ranks_seed": "other"},
         [0, 1], "adalora takes no ranks"),
    ],
)  # fmt: skip
def test_a_partner_s_ranks_that_cannot_be_taken_are_refused(entry, seeds, words):
    raw = {"name": "s", "model": "m", "tasks": ["glue/stsb"], "quick": True, "seeds": seeds, "methods": [SOURCE, entry]}
    with pytest.raises(ValueError) as error:
        config.parse(raw, "s")
    assert words in str(error.value)


def test_permuted_ranks_stay_among_sites_of_one_shape_and_cost_as_much(whole):
    sources, moved = runs(whole, "adalora"), runs(whole, "permuted")
    shapes = {"query": [], "attention.output": [], "ends in output": []}
    for source, run in zip(sources, moved, strict=True):
        for names in shapes.values():
            names.clear()
        for name in source["ranks"]:
            kind = "query" if "query" in name else "attention.output" if "attention.output" in name else "ends in output"
            shapes[kind].append(name)
        squares = shapes["query"] + shapes["attention.output"]  # (32, 32); the other (32, 48)
        for names in (squares, shapes["ends in output"]):
            assert sorted(run["ranks"][n] for n in names) == sorted(source["ranks"][n] for n in names)
        assert settings_of(whole, run)["allocation"] == "permuted"
        frozen = result(whole, setting="frozen", seed=run["seed"])
        magnitudes = 32 * len(source["ranks"])
        assert run["active_parameters"] - magnitudes == frozen["active_parameters"]
    assert any(run["ranks"] != source["ranks"] for source, run in zip(sources, moved, strict=True))


def test_a_permutation_is_the_seed_s_and_keeps_shapes_apart():
    ranks = {f"a{i}": i for i in range(8)} | {"b0": 90, "b1": 91}
    shapes = {name: (4, 4) if name[0] == "a" else (4, 6) for name in ranks}
    drawn = [budget.permuted(ranks, shapes, seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0].values()) == sorted(ranks.values()) and {drawn[0]["b0"], drawn[0]["b1"]} == {90, 91}


@pytest.mark.slow
def test_packed_and_alone_agree(whole, model, tmp_path):  # noqa: F811
    ran(study(model, WHOLE, seeds=SEEDS, pack=1), tmp_path / "alone")
    for label in ("frozen", "permuted"):
        for one, other in zip(runs(whole, label), runs(tmp_path / "alone", label), strict=True):
            assert one["fingerprint"] == other["fingerprint"] and other["pack_size"] == 1
            assert one["ranks"] == other["ranks"]
            assert one["final_train_loss"] == pytest.approx(other["final_train_loss"], rel=1e-4)


@pytest.mark.parametrize("interrupted", quick(["lora", "dora"], ["dora"]))
def test_an_interrupted_study_ends_with_the_same_files(whole, model, tmp_path, monkeypatch, interrupted):  # noqa: F811
    step = Trainer.train_step

    def cut(self: Trainer) -> None:
        if self.pack.method == interrupted and self.step == 3:
            raise KeyboardInterrupt
        step(self)

    what = study(model, WHOLE, seeds=SEEDS)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", cut)
        with pytest.raises(KeyboardInterrupt):
            ran(what, tmp_path / "runs")
    ran(what, tmp_path / "runs")
    assert contents(tmp_path / "runs") == contents(whole)


def narrowed(what: config.Study, *labels: str) -> config.Study:
    return what.model_copy(update={"methods": [e for e in what.methods if e.label in labels]})


def test_methods_asked_for_take_ranks_of_finished_runs_or_say_what_is_missing(whole, model, tmp_path, monkeypatch):  # noqa: F811
    swept = {**SOURCE, "learning_rates": [3e-2, 1e-2]}
    swept.pop("learning_rate")
    choice = {"seeds": [0, 1], "max_steps": 3, "trials": 3}
    what = study(model, [swept, {**FROZEN}], seeds=SEEDS, quick=True, sweep=choice)
    out = tmp_path / "runs"
    with pytest.raises(ValueError, match=r'frozen: takes its ranks from "adalora", of which 4 of 4 runs \(sweep, .* --methods'):
        ran(narrowed(what, "frozen"), out)
    ran(narrowed(what, "adalora"), out)
    before = {path.name for path in out.iterdir()}
    trained = Trainer.train_step
    methods = []
    monkeypatch.setattr(Trainer, "train_step", lambda self: (methods.append(self.pack.method), trained(self)))
    runner = Runner(narrowed(what, "frozen"), out, device="cpu")
    runner.prepare()
    found = runner.run()
    assert set(methods) == {"lora"} and [r["setting"] for r in found] == ["frozen"] * 3
    assert [r["ranks"] for r in runs(out, "frozen")] == [r["ranks"] for r in runs(out, "adalora")]
    assert before < {path.name for path in out.iterdir()}
    no_training(monkeypatch)
    assert len(ran(what, out)) == 3 + 3 + len(list(out.glob("*/result.json"))) - 6


def test_sweeps_of_them_come_after_the_finals_they_take_ranks_of(model, tmp_path):  # noqa: F811
    taker = {**FROZEN, "learning_rates": [1e-2, 3e-3]}
    taker.pop("learning_rate")
    what = study(model, [SOURCE, taker], seeds=SEEDS, quick=True, sweep={"seeds": [1], "max_steps": 2, "trials": 2})
    ran(what, tmp_path)
    trials = [r for r in map(read_object, tmp_path.glob("*/result.json")) if r["phase"] == "sweep"]
    assert len(trials) == 2
    assert all(r["ranks"] == result(tmp_path, setting="adalora", seed=1)["ranks"] for r in trials)
    beside = study(model, [SOURCE, taker], seeds=SEEDS, quick=True, sweep={"seeds": [1, 7]})
    with pytest.raises(ValueError, match=r"frozen: the sweep has seeds \[7\], with which \"adalora\" has no final run"):
        checks.check(beside)


def test_committed_results_give_ranks_too(whole, model, tmp_path, monkeypatch):  # noqa: F811
    committed = tmp_path / "committed" / "small" / "runs"
    for run in runs(whole, "adalora"):
        folder = committed / run["fingerprint"]
        folder.mkdir(parents=True)
        for name in ("config.json", "result.json"):
            (folder / name).write_bytes((whole / run["fingerprint"] / name).read_bytes())
    found = ran(narrowed(study(model, WHOLE, seeds=SEEDS), "frozen"), tmp_path / "runs")
    assert [r["ranks"] for r in found] == [r["ranks"] for r in runs(whole, "adalora")]


def test_a_source_that_failed_is_said(model, tmp_path, monkeypatch):  # noqa: F811
    step = Trainer.train_step

    def fail(self: Trainer) -> None:
        if self.pack.method == "adalora":
            raise RuntimeError("broken")
        step(self)

    monkeypatch.setattr(Trainer, "train_step", fail)
    with pytest.raises(ValueError, match=r'the run of "adalora" .* seed 0 failed \(RuntimeError: broken\).*--retry-failed'):
        ran(study(model, [SOURCE, FROZEN, "lora"]), tmp_path)
    assert len([r for r in tmp_path.glob("*/result.json") if '"lora"' in r.read_text()]) == 2  # the others were made before


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([{**FROZEN, "ranks_of": "adolora"}, SOURCE], r'ranks_of = "adolora" is no label of a method; did you mean "adalora"'),
        ([SOURCE, FROZEN, {**PERMUTED, "ranks_of": "frozen"}], r'ranks_of = "frozen": this takes its own ranks from "adalora"'),
        ([{"method": "full", "learning_rate": 1e-3}, {**FROZEN, "ranks_of": "full"}], "full has no ranks: name a low-rank"),
        ([SOURCE, {**FROZEN, "rank": 4}], r"\[1\]\.rank: follows from ranks_of: take it out"),
        ([SOURCE, {**FROZEN, "targets": ["key"]}], r"\[1\]\.targets: follows from ranks_of"),
        (
            [{**SOURCE, "label": "a"}, {**SOURCE, "ranks_of": "a"}],
            "adalora takes no ranks; methods that do: lora, ",
        ),
        ([SOURCE, {"method": "lora", "rank": 2, "permuted": True, "learning_rate": 1e-2}], "permuted has no effect without"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_the_remedy(model, entries, said):  # noqa: F811
    with pytest.raises(ValueError, match=said):
        study(model, entries)


def test_ranks_of_and_a_measured_budget_exclude_each_other(model):  # noqa: F811
    with pytest.raises(ValueError, match=r'ranks_of needs runs that are not made when budget\.equal = "time" measures a step'):
        study(model, [SOURCE, FROZEN], budget={"equal": "time"})


def test_a_budget_of_parameters_holds_for_whom_the_ranks_are_taken_of(model, tmp_path):  # noqa: F811
    free = {k: v for k, v in SOURCE.items() if k not in ("initial_rank", "target_rank", "alpha")}
    what = study(model, [free, FROZEN], budget={"equal": "parameters", "parameters": 2500, "scale": 1.5}, seeds=1)
    ran(what, tmp_path)
    source, taken = result(tmp_path, setting="adalora"), result(tmp_path, setting="frozen")
    assert taken["ranks"] == source["ranks"] and taken["scale"] == source["scale"] == 1.5


# -- the settings of a pack ----------------------------------------------------------------------------------------------

MINE = [
    {"rank": 3, "alpha": 6.0, "rank_pattern": {"^a$": 0, "^b$": 1}, "alpha_pattern": {"^a$": 2.0}},
    {"rank": 4, "alpha": 8.0, "rank_pattern": {"^b$": 2}},
    {"rank": 3, "alpha": 6.0, "rank_pattern": {"^a$": 5, "^b$": 3}},
]


def test_settings_of_members_are_put_together_and_taken_apart():
    apart = [check("lora", values) for values in MINE]
    pack = together(apart)
    assert pack.rank == [3, 4, 3] and pack.rank_pattern == {"^a$": [0, 4, 5], "^b$": [1, 2, 3]}
    assert pack.alpha_pattern == {"^a$": [2.0, 8.0, 6.0]}
    check("lora", pack.model_dump())
    for member, one in enumerate(apart):
        mine = pack.for_member(member)
        for name in ("^a$", "^b$"):
            assert mine.rank_pattern[name] == one.rank_pattern.get(name, one.rank)
        assert mine.alpha == one.alpha
    assert together(apart[:1]) is apart[0]
    assert pack.first_members(2).rank_pattern == {"^a$": [0, 4], "^b$": [1, 2]}
    with pytest.raises(ValueError, match=r'rank_pattern\["\^a\$"\] = \[1, 2\] has 2 values for 3 members'):
        variants.create("lora", members=3, rank=2, rank_pattern={"^a$": [1, 2]})


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_ranks_of_each_member_by_site_train_as_alone_rank_zero_too(method):
    """Member 0 has no rank at all at one site; every site has another rank for every member."""
    names = ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.intermediate.dense"]
    pattern = {f"^{names[0]}$": [0, 3, 1], f"^{names[1]}$": [2, 0, 4]}
    rates, seeds = [1e-2, 3e-3, 2e-2], [5, 3, 8]
    values = {"rank": [3, 2, 4], "alpha": [7.0, 3.0, 11.0], "rank_pattern": pattern, "dropout": 0.1}
    packed = variants.create(method, members=3, seeds=seeds, **values).attach(tiny("bert"), ["query", "intermediate.dense"])
    assert packed.ranks()[names[0]].tolist() == [0, 3, 1]
    assert packed.site(names[0]).scale.tolist() == [7.0, 1.0, 11.0]
    loop = Loop(packed, rates, 5)
    together_losses = torch.stack([loop.step(packed_batch(seeds, step)) for step in range(1, 6)])
    for k in range(3):
        alone = packed.alone(k).attach(tiny("bert"), ["query", "intermediate.dense"])
        assert alone.settings.rank_pattern == {name: rank[k] for name, rank in pattern.items()}
        one = Loop(alone, rates[k], 5)
        losses = torch.stack([one.step(batch(seeds[k], step)) for step in range(1, 6)])[:, 0]
        assert torch.allclose(together_losses[:, k], losses, rtol=1e-9)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_site_without_a_rank_saves_and_loads(tmp_path, method):
    adapter = variants.create(method, rank=2, rank_pattern={"query": 0}).attach(tiny("bert", torch.float32).eval())
    fill(adapter)
    variants.save_pretrained(adapter, tmp_path)
    again = variants.load_pretrained(tiny("bert", torch.float32).eval(), tmp_path)
    given = {k: v for k, v in batch(0).items() if k != "labels"}
    assert torch.equal(adapter.model(**given).logits, again.model(**given).logits)
