"""A study whose process is killed at three moments ends with the same bytes; tests/test_study.py kills it at every one."""

import pytest

from tests import small_world
from tests.test_study import child, contents
from tests.tiers import quick


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A study of two packed runs, and the folder of its cache."""
    folder = tmp_path_factory.mktemp("killed")
    model = small_world.model(folder / "model")
    return small_world.study(model, ["adalora"], quick=True), str(folder / "cache")


def ended(world, out, *kill) -> int:
    process = child(world[0], out, world[1], *kill)
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "runs"
    assert ended(world, out) == 0
    return contents(out)


@pytest.mark.parametrize(("kill_at", "after"), quick([(4, False), (9, True), (14, False)], [(9, True)]))
def test_killed_once_a_study_ends_with_the_same_bytes(world, whole, tmp_path, kill_at, after):
    out = tmp_path / "runs"
    assert ended(world, out, kill_at, after) < 0
    assert contents(out) != whole
    assert ended(world, out) == 0
    assert contents(out) == whole
