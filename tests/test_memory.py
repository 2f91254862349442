"""Peak memory is that of tensors: equal runs have equal peaks, in whichever order they run, and a plan says as much."""

import gc

import pytest
import torch
from rankwise.experiments import kinds, memory
from rankwise.experiments.plan import step
from torch import nn

from tests import small_world
from tests.test_trainer import Stop, stopping_after

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("RANKWISE_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield small_world.model(tmp_path_factory.mktemp("model"))
    patch.undo()


def peak(model, folder, rows=8, **changes) -> int:
    """Of a whole run, its evaluations among it."""
    one = small_world.pack(model, batch_size=rows, **changes)
    _, [outcome] = small_world.trained(one, folder)
    assert outcome.facts["peak_memory_bytes"] == outcome.facts["pack_peak_memory_bytes"]
    return outcome.facts["peak_memory_bytes"]


def test_equal_runs_have_equal_peaks_whatever_ran_before_them(model, tmp_path):
    first = peak(model, tmp_path / "first")
    larger = peak(model, tmp_path / "larger", rows=16)
    again = peak(model, tmp_path / "again")
    assert again == pytest.approx(first, rel=0.01) and larger > 1.2 * first


def test_a_run_that_goes_on_has_the_same_peak(model, tmp_path):
    whole = peak(model, tmp_path / "whole")
    one = small_world.pack(model, batch_size=8)
    with pytest.raises(Stop):
        small_world.trained(one, tmp_path / "cut", progress=stopping_after(7), checkpoint_seconds=0)
    [outcome] = small_world.trained(one, tmp_path / "cut")[1]
    assert outcome.facts["peak_memory_bytes"] == pytest.approx(whole, rel=0.01)


def test_the_fullest_step_is_counted_and_no_other(model, tmp_path, monkeypatch):
    counted, growth = [], memory.growth
    monkeypatch.setattr(memory, "growth", lambda device: counted.append(trainer.step) or growth(device))
    trainer = small_world.trainer(small_world.pack(model, batch_size=8), tmp_path)
    sizes = {at: trainer.batches.size(at) for at in range(1, trainer.total + 1)}
    for trainer.step in sizes:
        trainer.train_step()
    assert counted == [max(sizes, key=sizes.get)] and len(set(sizes.values())) > 1


def test_under_another_profiler_the_peak_is_not_known(model, tmp_path):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert peak(model, tmp_path / "run") is None


def test_the_peak_is_that_of_a_plan(model, tmp_path):
    """Both count the step alone where nothing is evaluated; a step's own batch is the one difference."""
    one = small_world.pack(model, batch_size=8)
    trainer = small_world.trainer(one, tmp_path)
    trainer.step = max(range(1, trainer.batches.per_epoch + 1), key=trainer.batches.size)
    trainer.train_step()
    rows, length = trainer.batches.rows(trainer.step)[0]
    settings = one.settings.model_dump(exclude_unset=True)
    shape = step.Shape(len(rows), length, targets=one.targets)
    planned = step.cost(model, kinds.get(one.task.kind), one.task.num_labels, one.method, settings, shape).peak
    assert trainer.memory.read() == pytest.approx(planned, rel=0.1)


def test_what_an_earlier_run_left_to_the_collector_is_not_taken_off():
    """The profiler knows a block of an earlier count, and would see it go in this one."""

    gc.collect()
    gc.disable()
    try:
        with memory.growth(CPU):
            ring = [torch.zeros(10_000)]  # which nothing frees but the collector
            ring.append(ring)
            del ring
        with memory.growth(CPU) as found:
            gc.collect()
            held = torch.zeros(5_000)
        assert found.peak == held.untyped_storage().nbytes()
    finally:
        gc.enable()


def test_what_a_step_frees_is_seen_after_a_step_before_it():
    """Blocks of before the count are not seen to be freed in it: those of a first step are."""
    held = nn.ParameterList([torch.randn(1000)])

    def replace():
        held[0].data = torch.randn(1000)

    assert memory.peak_growth(replace, CPU) == 4000
    assert memory.peak_growth(lambda: (replace(), replace()), CPU, before=replace) == 4000
