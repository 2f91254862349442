"""The benchmark's checks on a few of its cases; tests/test_bench.py makes them of every case, in the slow tier."""

import pytest
from rankwise.experiments.bench import cases, run

from tests import small_world, test_bench
from tests.test_bench import CPU, bench_of, model, setup, tiny_plan  # noqa: F401  (three of them are fixtures)

SOME = ("train/adalora/k16", "eval/dora/k1", "images/train/lora/k1", "allocator/adalora/k1", "throughput/lora/k1")


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory):  # noqa: F811
    """As in tests/test_bench.py: what was measured, the cases, the lines; of few cases."""
    chosen = [case for case in cases.select(None, full=True) if case.name.startswith(SOME)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKWISE_CACHE", str(tmp_path_factory.mktemp("cache")))
        small_world.register(patch.setitem)
        lines = []
        found = run.Bench(tiny_plan(model), CPU, chosen, say=lines.append).run()
    return found, chosen, lines


def test_every_case_comes_once(measured):
    test_bench.test_every_case_comes_once_and_is_told_when_done(measured)


def test_ratio_tax_and_memory(measured):
    test_bench.test_ratio_tax_and_memory_are_what_they_are_called(measured)


def test_allocator_is_left_as_it_was(measured, model, setup):  # noqa: F811
    assert measured[0]["allocator"]
    test_bench.test_allocator_is_a_part_of_its_step_and_left_as_it_was(measured, model, setup)


def test_interrupted_leaves_the_old_file(tmp_path, bench_of, capsys):  # noqa: F811
    test_bench.test_interrupted_bench_leaves_the_old_file(tmp_path, bench_of, capsys)


def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path, bench_of, monkeypatch):  # noqa: F811
    test_bench.test_write_that_is_cut_off_leaves_the_old_file(tmp_path, bench_of, monkeypatch)
