"""The benchmark's checks on a few of its cases; tests/test_bench.py makes them of every case, in the slow tier."""

import pytest
from rankwise.experiments.bench import cases, run

from tests import small_world
from tests.test_bench import (  # noqa: F401  (fixtures, and tests that are run here on the fixture below)
    CPU,
    model,
    setup,
    test_allocator_is_a_part_of_its_step_and_left_as_it_was,
    test_every_case_comes_once_and_is_told_when_done,
    test_ratio_tax_and_memory_are_what_they_are_called,
    tiny_plan,
)

SOME = ("train/adalora/k16", "eval/dora/k1", "linear/lora", "allocator", "throughput/lora/k1")


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
