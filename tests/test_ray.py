"""Packs on a Ray cluster of two nodes on this machine, by the command: what dies, joins or is missing.

tests/test_cluster.py says the same without Ray, in the quick tier.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rankwise.experiments.cluster.worker import _own_folder

from tests import small_world
from tests.test_study import contents

ray = pytest.importorskip("ray", reason="pip install 'rankwise[ray]'")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
PATIENCE = 900  # seconds; a machine that does nothing else needs twenty
SMALL = {"object_store_memory": 80 << 20, "include_dashboard": False}
METHODS = ("adalora", "dora")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, data and a study of four packs of many small checkpoints; what one process leaves of it."""
    folder = tmp_path_factory.mktemp("ray")
    small_world.model(folder / "model")
    rows = [f"{'a b c' if i % 2 else 'x y z'} {chr(97 + i % 26)},{i % 2}" for i in range(60)]
    (folder / "mine.csv").write_text("\n".join(["text,label", *rows]))
    text = 'model = "model"\ntasks = ["mine"]\nseeds = 2\nquick = true\npack = 1\ncheckpoint_seconds = 1e-6\n'
    text += '[[data]]\nname = "mine"\ntrain = "mine.csv"\nkind = "classification"\n'
    text += '[training]\nepochs = 12\nbatch_size = 6\nprecision = "fp32"\nmax_length = 24\n'
    for method in METHODS:
        settings = {"method": method, "learning_rate": 1e-2, **small_world.settings(method)}
        text += "[[methods]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    (folder / "study.toml").write_text(text)
    done = command(folder, "alone").wait(PATIENCE)
    assert done == 0, said(folder, "alone")
    return folder


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANKWISE_CACHE": str(folder / "cache")}


def command(folder: Path, out: str, *words: str) -> subprocess.Popen:
    """`rankwise compare` of the study, which writes what it says beside its runs."""
    line = [sys.executable, "-m", "rankwise", "compare", "study.toml", "--out", out, "--threads", "1", *words]
    with (folder / f"{out}.out").open("w") as stdout, (folder / f"{out}.err").open("w") as stderr:
        return subprocess.Popen(line, cwd=folder, env=environment(folder), stdout=stdout, stderr=stderr)


def said(folder: Path, out: str) -> str:
    return (folder / f"{out}.err").read_text()


def assert_equals_one_process(folder: Path, out: str) -> None:
    """Every run once, with the bytes of the runs of one process."""
    expected, found = (runs(folder / name) for name in ("alone", out))
    assert found == expected and sum(name.endswith("result.json") for name in found) == 4
    assert not list((folder / out / "packs").glob("*")) and not [*(folder / out).rglob("*.tmp")]


def runs(out: Path) -> dict:
    return {name: value for name, value in contents(out).items() if not name.startswith("report/")}


@contextlib.contextmanager
def cluster(folder: Path, **head: int):
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(folder).items():
            patch.setenv(name, value)
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **SMALL, **head})
        try:
            yield made
        finally:
            made.shutdown()


def wait_for(condition, process: subprocess.Popen) -> None:
    until = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < until:
        assert process.poll() is None, "it ended before"
        time.sleep(0.05)
    assert condition()


def workers() -> dict[int, Path]:
    """Processes that are Ray's workers of ours -> their folders."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            target = os.readlink(path)
            if "/rankwise-worker-" in target and target.endswith("/.lock"):
                found[int(path.parts[2])] = Path(target).parent
    return found


def have_ended(seconds: float = 60) -> bool:
    """Whether all workers end, which Ray's raylet sees to once the command has."""
    until = time.monotonic() + seconds
    while workers() and time.monotonic() < until:
        time.sleep(0.1)
    return not workers()


def test_of_two_nodes_one_is_killed_in_the_middle_and_every_result_is_there_once(world):
    with cluster(world) as nodes:
        other = nodes.add_node(num_cpus=1, **SMALL)
        process = command(world, "killed", "--ray", nodes.address)
        wait_for(lambda: len(list((world / "killed").glob("packs/*/checkpoint.safetensors"))) >= 2, process)  # on both
        assert len(workers()) == 2
        nodes.remove_node(other, allow_graceful=False)
        assert process.wait(PATIENCE) == 0, said(world, "killed")
    assert "is gone (" in said(world, "killed") and "it goes on from its last checkpoint" in said(world, "killed")
    assert (world / "killed.out").read_text().startswith("study: mine, model")  # what Ray says is not in it
    assert_equals_one_process(world, "killed")


def test_a_node_that_joins_gets_packs_and_a_worker_that_is_killed_is_replaced(world):
    with cluster(world) as nodes:
        process = command(world, "joined", "--ray", nodes.address)
        wait_for(lambda: list((world / "joined").glob("packs/*/checkpoint.safetensors")), process)
        nodes.add_node(num_cpus=1, **SMALL)
        wait_for(lambda: len(workers()) == 2, process)
        (victim, folder), *_ = workers().items()
        os.kill(victim, signal.SIGKILL)
        assert process.wait(PATIENCE) == 0, said(world, "joined")
        assert have_ended()
    lock, own = _own_folder()  # as the next worker on this machine, which removes what the killed one left
    shutil.rmtree(own)
    lock.close()
    assert not folder.exists()
    assert "has joined" in said(world, "joined") and "is gone" in said(world, "joined")
    assert_equals_one_process(world, "joined")


def test_a_cluster_of_this_machine_is_interrupted_and_goes_on_without_ray(world):
    process = command(world, "interrupted", "--ray")
    wait_for(lambda: list((world / "interrupted").glob("packs/*/checkpoint.safetensors")), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    lines = [line for line in said(world, "interrupted").splitlines() if line.startswith("rankwise: ")]
    assert lines[-1] == "rankwise: interrupted; the same command goes on where this one stopped"
    assert have_ended()
    assert command(world, "interrupted").wait(PATIENCE) == 0, said(world, "interrupted")
    assert_equals_one_process(world, "interrupted")


def test_what_no_node_has_is_said_in_one_line(world):
    with cluster(world) as nodes:
        for words, line in (
            (["--device", "cuda"], "rankwise: --device cuda: the cluster has 1 node, none with a GPU"),
            (["--threads", "64"], "rankwise: the cluster has 1 node, and a worker needs 64 CPUs; the most that one has is 1"),
        ):
            assert command(world, "refused", "--ray", nodes.address, *words).wait(PATIENCE) == 2
            assert said(world, "refused").startswith(line) and said(world, "refused").count("\n") == 1
    assert not (world / "refused").exists()
