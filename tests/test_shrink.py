"""When the pattern is final, the slots that were cut leave the tensors: nothing else changes, and memory falls."""

import copy

import pytest
import torch
from rankwise import variants
from rankwise.experiments.training.optim import MemberAdamW
from rankwise.variants.adapter.step import Step
from rankwise.variants.lowrank.slots import NONE, Rearranged

from tests import small_world
from tests.contract import RATES, SEEDS, TARGETS, of_member, settings
from tests.loop import Loop, outputs
from tests.test_trainer import Stop, assert_same, logs, model, stopping_after  # noqa: F401  (model is a fixture)
from tests.tiers import quick
from tests.tiny import packed_batch, tiny

TOTAL, FINAL = 12, 8
KINDS = {
    "adalora": {},
    "adalora+dora": {},
    "doublets": {"form": "doublet"},
}


def made(kind: str, members: int = 3, **others):
    name = "allocated" if kind == "doublets" else kind
    values = {k: v[:members] if isinstance(v, list) else v for k, v in settings(name, **KINDS[kind], **others).items()}
    return variants.create(name, members=members, seeds=SEEDS[:members], **values).attach(tiny("bert"), TARGETS)


@torch.no_grad()
def excluded(adapter) -> None:
    """What shrinking amounts to, at the full size: the slots that were cut are no slots, at zero for good."""
    for site in adapter.triplets():
        size = site.kept.shape[1]
        places = torch.arange(size).expand(site.kept.shape).masked_fill(~site.kept, NONE)  # averages are zero there too
        site.slots.mul_(site.kept)
        site.A.mul_(site.kept[:, :, None])
        site.B.mul_(site.kept[:, None])
        if hasattr(site, "E"):
            site.E.mul_(site.kept)
        for name in ("A", "B", "E"):
            if hasattr(site, name):
                site.changes.append((getattr(site, name), Rearranged(places, site.slot_axes[name], size)))


@pytest.mark.parametrize("kind", quick(KINDS, ["adalora+dora"]))
def test_a_run_that_shrinks_is_one_whose_dead_slots_are_left_out_of_penalty_and_clipping(kind):
    small, large, whole = made(kind, shrink=True), made(kind), made(kind)
    loops = [Loop(adapter, RATES, TOTAL, clip=0.05) for adapter in (small, large, whole)]
    for index in range(1, TOTAL + 1):
        batch = packed_batch(SEEDS, index)
        values = [loop.step(batch) for loop in loops]
        if index == FINAL:
            excluded(large)
            loops[1]._follow()
            for adapter in (small, large, whole):
                adapter.model.eval()
            shown = [outputs(adapter.model, batch) for adapter in (small, large, whole)]
            for adapter in (small, large, whole):
                adapter.model.train()
            torch.testing.assert_close(shown[0], shown[2], rtol=1e-12, atol=1e-13)
            assert torch.equal(shown[1], shown[2])
        torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=0)
    if kind != "doublets":  # which have no penalty; there only clipping differs, as every gradient here is clipped
        assert not torch.allclose(values[0], values[2], rtol=1e-6, atol=0)
    ranks = small.ranks()
    assert {n: r.tolist() for n, r in ranks.items()} == {n: r.tolist() for n, r in large.ranks().items()}
    for name in ranks:
        torch.testing.assert_close(small.delta(name), large.delta(name), rtol=1e-8, atol=1e-11)
    for site, (_, rank) in zip(small.triplets(), ranks.items(), strict=True):
        assert site.slots.shape[1] == rank.max()
        assert torch.equal(site.slots.bool(), site.kept)


def test_parameters_gradients_and_averages_are_small_and_both_sizes_are_told():
    adapter = made("adalora", shrink=True)
    optimizer = MemberAdamW(adapter.parameter_groups(), torch.tensor(RATES, dtype=torch.float64))
    sizes = []
    for index in range(1, TOTAL + 1):
        adapter.begin(Step(index, TOTAL))
        batch = packed_batch(SEEDS, index)
        labels = batch["labels"]
        logits = adapter.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none").view(3, -1).mean(1)
        (loss + adapter.penalty(Step(index, TOTAL))).sum().backward()
        optimizer.step(1.0)
        adapter.after_step(Step(index, TOTAL))
        optimizer.follow(adapter.take_changes())
        body = [p for p in adapter.parameters() if all(p is not h for h in adapter.heads.parameters())]
        assert all(p.grad is None or p.grad.shape == p.shape for p in body)
        optimizer.zero_grad()
        assert [t.shape for t in optimizer.first] == [t.shape for t in optimizer.second] == [p.shape for p in optimizer.params]
        assert all(born is None for born in optimizer.born), "no slot was new"
        sizes.append(sum(p.numel() for p in body))
    counts = adapter.parameter_counts()
    assert len(set(sizes[: FINAL - 1])) == 1
    assert sizes[FINAL - 1] == sizes[-1] < sizes[0]
    held = sum(int(r.max()) * (s.A.shape[2] + s.B.shape[1] + 1) for s, r in zip(adapter.triplets(), adapter.ranks().values(),
               strict=True))  # fmt: skip
    assert sizes[-1] == 3 * held
    for k, initial in enumerate((6, 3, 5)):
        each = [s.A.shape[2] + s.B.shape[1] + 1 for s in adapter.triplets()]
        assert counts["nominal"][k] == initial * sum(each)
        assert counts["trainable"][k] == sum(int(r[k]) * n for r, n in zip(adapter.ranks().values(), each, strict=True))
        assert counts["active"][k] == counts["trainable"][k]
        assert {r[k].item() for r in adapter.nominal_ranks().values()} == {initial}


def test_packed_is_alone_when_both_shrink():
    def run(adapter, seeds, rates):
        adapter.attach(tiny("bert"), TARGETS)
        loop = Loop(adapter, rates, TOTAL, clip=0.5)
        return torch.stack([loop.step(packed_batch(seeds, i)) for i in range(TOTAL)])

    values = settings("adalora", shrink=True)
    together = run(variants.create("adalora", members=3, seeds=SEEDS, **values), SEEDS, RATES)
    for k, seed in enumerate(SEEDS):
        alone = run(variants.create("adalora", seeds=[seed], **of_member(values, k)), [seed], [RATES[k]])
        torch.testing.assert_close(together[:, k], alone[:, 0], rtol=1e-9, atol=0)


def test_a_shrunk_state_is_loaded_at_once():
    adapter = made("adalora+dora", shrink=True)
    loop = Loop(adapter, RATES, TOTAL)
    for index in range(FINAL + 1):
        loop.step(packed_batch(SEEDS, index))
    state = copy.deepcopy(loop.state())
    again = made("adalora+dora", shrink=True)
    resumed = Loop(again, RATES, TOTAL)
    resumed.load(state)
    assert {n: r.tolist() for n, r in again.physical_ranks().items()} == {n: r.tolist() for n, r in adapter.ranks().items()}
    for index in range(FINAL + 1, TOTAL):
        assert torch.equal(loop.step(packed_batch(SEEDS, index)), resumed.step(packed_batch(SEEDS, index)))


def test_a_shrunk_adapter_is_saved_and_loaded(tmp_path):
    adapter = made("adalora", shrink=True)
    loop = Loop(adapter, RATES, TOTAL)
    for index in range(TOTAL):
        loop.step(packed_batch(SEEDS, index))
    adapter.model.eval()
    batch = packed_batch(SEEDS, TOTAL)
    live = outputs(adapter.model, batch).unflatten(0, (3, -1))
    for k in range(3):
        for name, write in (("own", variants.save_pretrained), ("plain", variants.export_lora)):
            write(adapter, tmp_path / f"{name}-{k}", member=k)
            loaded = tiny("bert").eval()
            variants.load_pretrained(loaded, tmp_path / f"{name}-{k}")
            own = {key: value.unflatten(0, (3, -1))[k] for key, value in batch.items()}
            torch.testing.assert_close(outputs(loaded, own), live[k], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", quick(["adalora", "adalora+dora"], ["adalora+dora"]))
def test_a_run_killed_after_it_shrank_goes_on_bit_for_bit(model, tmp_path, name):  # noqa: F811
    changes = {"shrink": True}
    pack = small_world.pack(model, name, seeds=(3, 8), learning_rates=(1e-2, 3e-3), changes=changes)
    whole, expected = small_world.trained(pack, tmp_path / "whole")
    outcomes, resumed = None, set()
    for calls in (7, 4, 4, 8, 9, 99):
        trainer = small_world.trainer(pack, tmp_path / "cut", checkpoint_seconds=0.0, progress=stopping_after(calls))
        try:
            outcomes = trainer.run()
        except Stop:
            resumed.add(trainer.step - 1)
    assert resumed & {5, 6, 7, 8}
    assert resumed & {9, 10, 11}
    assert_same(trainer, whole)
    assert logs(trainer) == logs(whole)
    for got, want in zip(outcomes, expected, strict=True):
        assert got.metrics == want.metrics
        facts = want.facts
        for fact in ("trainable_parameters", "nominal_parameters", "ranks", "nominal_ranks", "physical_ranks"):
            assert got.facts[fact] == facts[fact], fact
        assert facts["trainable_parameters"] < facts["nominal_parameters"]
        assert facts["physical_ranks"] == facts["ranks"]
        assert set(facts["nominal_ranks"].values()) == {4}


def test_a_pack_that_shrinks_trains_the_same_until_it_does(model, tmp_path):  # noqa: F811
    one, _ = small_world.trained(small_world.pack(model, "adalora", changes={"shrink": True}), tmp_path / "small")
    other, _ = small_world.trained(small_world.pack(model, "adalora"), tmp_path / "large")
    early = [[line for line in log.splitlines() if b'"step": 1' not in line] for log in (logs(one)[0], logs(other)[0])]
    assert early[0] == early[1]
    assert (one.logs[0] / "ranks.jsonl").read_text() == (other.logs[0] / "ranks.jsonl").read_text()


def test_shrinking_belongs_to_what_tells_runs_apart_only_where_it_is_asked_for():
    plain, asked = (variants.check("adalora", {"initial_rank": 4, "target_rank": 2, **more}) for more in ({}, {"shrink": True}))
    assert "shrink" not in plain.identity()
    assert asked.identity() == plain.identity() | {"shrink": True}
