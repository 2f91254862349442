"""The schedule "on-plateau" against its rule written out; each member its own; resumed bit for bit; in Trainer and alone."""

import json
import math

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.step import Step
from rankwise.variants.allocation.plateau import Plateau

from tests import small_world
from tests.loop import Loop
from tests.test_adalora import NAMES, Net, data, squared_error

TOTAL, WARMUP, FINAL, INTERVAL = 40, 3, 6, 2
INITIAL, TARGET, RATES, SEEDS = [5, 3, 4], [2, 1, 3], [1e-1, 1e-3, 5e-2], [5, 3, 8]
PLATEAU = {"plateau_patience": 3, "plateau_threshold": 0.05, "plateau_smoothing": 0.7, "plateau_stages": 2}


def plain_stages(losses: list[float], warmup: int, patience: int, threshold: float, smoothing: float) -> list[int]:
    """Plateaus found by the end of each step; a loss that is NaN is of a step that did not count."""
    smoothed, best, waited, found, stages = None, math.inf, 0, 0, []
    for t, loss in enumerate(losses, 1):
        if not math.isnan(loss):
            smoothed = loss if smoothed is None else smoothing * smoothed + (1 - smoothing) * loss
            if t > warmup:
                if best == math.inf or smoothed < best - threshold * abs(best):
                    best, waited = smoothed, 0
                else:
                    waited += 1
                if waited == patience:
                    best, waited, found = math.inf, 0, found + 1
        stages.append(found)
    return stages


@pytest.mark.parametrize("warmup, patience, threshold, smoothing", [(0, 3, 0.01, 0.9), (5, 2, 0.1, 0.0), (2, 4, 0.0, 0.5)])
def test_plateaus_are_found_by_the_rule(warmup, patience, threshold, smoothing):
    random = torch.Generator().manual_seed(1)
    t = torch.arange(60, dtype=torch.float64)
    losses = torch.stack([2 ** (-t / 20), 1 + 0.1 * torch.randn(60, generator=random), torch.full_like(t, -3.0), 1 / (1 + t)])
    losses[1, [4, 20, 21]] = torch.nan
    counted = torch.ones(4, 60, dtype=torch.bool)
    counted[3, 7:15] = False
    plateau = Plateau(4, patience, threshold, smoothing, 3)
    found = []
    for i in range(60):
        plateau.update(losses[:, i], counted[:, i], i + 1 > warmup)
        found.append(plateau.found.tolist())
    for k in range(4):
        of_member = [float(x) if c else math.nan for x, c in zip(losses[k], counted[k], strict=True)]
        assert [row[k] for row in found] == plain_stages(of_member, warmup, patience, threshold, smoothing), k
    assert len({tuple(row) for row in found}) > 2


def test_totals_go_in_equal_parts_and_end_at_the_target():
    plateau = Plateau(5, 1, 0.0, 0.0, 3)
    plateau.found.copy_(torch.tensor([0, 1, 2, 3, 9]))
    assert plateau.budgets([32] * 5, [16] * 5) == [32, 26, 21, 16, 16]
    assert plateau.budgets([4] * 5, [10] * 5) == [4, 6, 8, 10, 10]


def made(members: list[int], **settings) -> variants.Adapter:
    several = {"initial_rank": INITIAL, "target_rank": TARGET, "alpha": [7.0, 2.0, 11.0]}
    values = {key: [value[k] for k in members] for key, value in several.items()}
    phases = {"warmup_steps": WARMUP, "final_steps": FINAL, "interval": INTERVAL}
    values |= {"schedule": "on-plateau", **phases, **PLATEAU, **settings}
    seeds = [SEEDS[k] for k in members]
    return variants.create("adalora", members=len(members), seeds=seeds, **values).attach(Net(), list(NAMES), head=[])


def steps(loop: Loop, members: list[int], until: int) -> tuple[list[list[float]], list[list[int]]]:
    """For each step the losses and the total ranks."""
    losses, totals = [], []
    while loop.index < until:
        batches = [data(k, loop.index + 1) for k in members]
        losses.append(loop.step(tuple(torch.cat(parts) for parts in zip(*batches, strict=True))).tolist())
        totals.append(sum(loop.adapter.ranks().values()).tolist())
    return losses, totals


def test_each_member_prunes_at_its_own_plateaus():
    adapter = made([0, 1, 2])
    losses, totals = steps(Loop(adapter, RATES, TOTAL, losses=squared_error), [0, 1, 2], TOTAL)
    when = []
    for k in range(3):
        rule = (WARMUP, PLATEAU["plateau_patience"], PLATEAU["plateau_threshold"], PLATEAU["plateau_smoothing"])
        stages = plain_stages([row[k] for row in losses], *rule)
        expected, now = [], 3 * INITIAL[k]
        for t in range(1, TOTAL + 1):
            if t >= TOTAL - FINAL:
                now = 3 * TARGET[k]
            elif t > WARMUP and t % INTERVAL == 0:
                now = 3 * INITIAL[k] + 3 * (TARGET[k] - INITIAL[k]) * min(stages[t - 1], 2) // 2
            expected.append(now)
        assert [row[k] for row in totals] == expected, k
        when.append(next(t for t, total in enumerate(expected) if total < 3 * INITIAL[k]))
    assert len(set(when)) > 1 and min(when) < TOTAL - FINAL - 1, "no member was ahead of another"
    assert adapter.final_budget().tolist() == [3 * rank for rank in TARGET]


def test_packed_is_alone():
    packed = made([0, 1, 2])
    losses, totals = steps(Loop(packed, RATES, TOTAL, losses=squared_error), [0, 1, 2], TOTAL)
    for k in range(3):
        single = made([k])
        own_losses, own_totals = steps(Loop(single, [RATES[k]], TOTAL, losses=squared_error), [k], TOTAL)
        assert own_totals == [[row[k]] for row in totals]
        torch.testing.assert_close(torch.tensor(own_losses)[:, 0], torch.tensor(losses)[:, k], rtol=1e-9, atol=0)
        copied = packed.alone(k)
        copied.attach(Net(), list(NAMES), head=[]).copy_member(packed, k)
        assert copied.plateau.found.tolist() == single.plateau.found.tolist()


def test_a_run_that_goes_on_decides_as_it_would_have():
    whole = Loop(made([0, 1, 2]), RATES, TOTAL, losses=squared_error)
    for stop in (5, 13, 20):
        steps(whole, [0, 1, 2], stop)
        kept = whole.state()
        again = Loop(made([0, 1, 2]), RATES, TOTAL, losses=squared_error)
        again.load(kept)
        expected = steps(whole, [0, 1, 2], stop + 4)
        assert steps(again, [0, 1, 2], stop + 4) == expected
        for name, buffer in whole.adapter.plateau.named_buffers():
            assert torch.equal(again.adapter.plateau.get_buffer(name), buffer), name


def test_the_trainer_s_run_that_was_cut_off_ends_bit_for_bit_the_same(tmp_path):
    model = small_world.model(tmp_path / "model")
    changes = {"schedule": "on-plateau", "plateau_patience": 1, "plateau_stages": 3, "interval": 1, "plateau_smoothing": 0.0}
    rates = {"learning_rates": (1e-2, 1e-3), "evaluations_per_epoch": 0}
    pack = small_world.pack(model, "adalora", seeds=(3, 8), changes=changes, **rates)
    whole, _ = small_world.trained(pack, tmp_path / "whole")
    left = list(range(8))  # of steps; the ninth ends the process, as it were
    cut = small_world.trainer(pack, tmp_path / "cut", checkpoint_seconds=0.0, progress=lambda rows: left.pop())
    with pytest.raises(IndexError):
        cut.run()
    assert cut.step == 9 and cut.adapter.plateau.found.any(), cut.adapter.plateau.state_dict()
    again, _ = small_world.trained(pack, tmp_path / "cut", checkpoint_seconds=0.0)
    for name, value in whole.adapter.state_dict().items():
        assert torch.equal(again.adapter.state_dict()[name], value), name
    budgets = []
    for member in (0, 1):
        found = [(tmp_path / run / f"member-{member}" / "ranks.jsonl").read_text() for run in ("whole", "cut")]
        assert found[0] == found[1]
        budgets.append([json.loads(line)["budget"] for line in found[0].splitlines()])
    assert all(len(set(one)) > 2 for one in budgets)


def test_growth_waits_for_a_plateau_too():
    settings = {"initial_rank": 1, "target_rank": 3, "direction": "grow", "most_rank": 5, "form": "doublet", "interval": 1}
    values = {"schedule": "on-plateau", "plateau_patience": 2, "plateau_stages": 1, "final_steps": 2, **settings}
    adapter = variants.create("allocated", **values).attach(Net(), list(NAMES), head=[])
    loop = Loop(adapter, 1e-9, 12, losses=lambda adapter, batch: 1.0 + 0 * squared_error(adapter, batch))  # never better
    totals = steps(loop, [0], 12)[1]
    assert [row[0] for row in totals] == [3, 3, *[9] * 10]


def test_a_step_without_its_loss_is_refused_and_settings_without_effect():
    adapter = made([0])
    squared_error(adapter, data(0, 1)).sum().backward()
    adapter.begin(Step(1, TOTAL))
    with pytest.raises(ValueError, match="goes by the loss of each step"):
        adapter.after_step(Step(1, TOTAL))
    with pytest.raises(ValueError, match='plateau_patience = 7 has no effect with schedule = "cubic"'):
        variants.check("adalora", {"initial_rank": 4, "target_rank": 2, "plateau_patience": 7})
    with pytest.raises(ValueError, match="schedule"):
        variants.check("elalora", {"initial_rank": 4, "schedule": "on-plateau"})


def test_an_adapter_without_the_schedule_has_no_state_of_it():
    settings = {"initial_rank": 4, "target_rank": 2}
    adapter = variants.create("adalora", **settings).attach(Net(), list(NAMES), head=[])
    assert not any("plateau" in name for name in adapter.state_dict())
    assert {"plateau.smoothed", "plateau.best", "plateau.waited", "plateau.found"} <= made([0]).state_dict().keys()
