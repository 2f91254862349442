"""Ray's part: a cluster that is joined or started, its nodes, and workers on them.  Nothing else of Rankwise knows Ray.

A worker is an actor that is bound to one node, holds the CPUs and the GPU of `Need`, and is never started again by Ray itself:
what becomes of its pack is the driver's to decide.
"""

import contextlib
import importlib.util
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rankwise.experiments.cluster.places import Need, Node, WorkerLost
from rankwise.experiments.cluster.worker import Errand, Worker

HERE = "local"  # in place of an address: a cluster of this machine alone, which ends with the command
STORE = 256 << 20  # bytes of shared memory that a cluster of this machine has for what travels; more goes to the disk
CLOSING = 5.0  # seconds that workers have to remove their folders
REMEDY = "pip install 'rankwise[ray]'"


def missing() -> str | None:
    """What to install, where Ray is not there."""
    if importlib.util.find_spec("ray") is None:
        return f"--ray needs ray, which is not installed: {REMEDY}"
    return None


def check(address: str) -> None:
    """
    Raises:
        ValueError: no address of a cluster, or nothing answers there; or there is no Ray.
    """
    if (lacking := missing()) is not None:
        raise ValueError(lacking)
    if address in (HERE, "auto"):
        return
    if address.startswith("ray://"):
        raise ValueError(
            f"--ray {address}: Ray's client is not supported: run this on a machine of the cluster, and give HOST:PORT or auto"
        )
    found = re.fullmatch(r"([^\s:/]+|\[[0-9a-fA-F:]+\]):(\d{1,5})", address)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ValueError(
            f"--ray {address}: this is no address: give HOST:PORT as `ray start` prints it, auto, or nothing for this machine "
            f"alone; a study stands before --ray"
        )
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=10).close()
    except OSError as error:
        raise ValueError(
            f"--ray {address}: nothing answers there ({error.strerror or error}): start the cluster with `ray start --head`"
        ) from None


@contextlib.contextmanager
def joined(address: str) -> Iterator["RayPool"]:
    """The cluster at that address; or one of this machine's CPUs and GPUs, which ends with the block.

    Raises:
        ValueError: it cannot be joined.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no report of use to others
    import ray

    _keep_output_clean()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == HERE:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        options |= {"address": "local", "num_cpus": cpus, "object_store_memory": STORE, "include_dashboard": False}
    else:
        options |= {"address": address}
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises Exception itself where a node does not start in time
        ray.shutdown()
        if address == HERE:
            raise ValueError(f"--ray: no cluster could be started here ({_line(error)}): again, or leave --ray out") from None
        raise ValueError(
            f"--ray {address}: the cluster cannot be joined from here ({_line(error)}): this machine must be one of its nodes "
            f"(ray start --address=HOST:PORT), with the same versions of Ray and Python"
        ) from None
    try:
        yield RayPool()
    finally:
        ray.shutdown()


def _keep_output_clean() -> None:
    """Ray prints the last words of a node that died to standard output, which is for results."""
    from ray._private import worker

    if hasattr(worker, "_worker_logs_enabled"):
        worker._worker_logs_enabled = False


class RayPool:
    """The nodes and workers of the cluster that this process has joined; see `driver.Pool`."""

    def nodes(self) -> list[Node]:
        import ray

        found = [node for node in ray.nodes() if node["Alive"]]
        return [
            Node(
                node["NodeID"],
                node["NodeManagerHostname"],
                int(node["Resources"].get("CPU", 0)),
                int(node["Resources"].get("GPU", 0)),
            )
            for node in sorted(found, key=lambda node: node["NodeID"])
        ]

    def precision(self, need: Need) -> str | None:
        """What "auto" is on GPUs of the cluster, by its first node that has one; None on CPUs, where this machine decides.

        Raises:
            ValueError: every GPU is in use.
        """
        if need.device != "cuda":
            return None
        import ray

        asked = ray.remote(_precision).options(num_cpus=0, num_gpus=1, max_retries=0).remote()
        ready, _ = ray.wait([asked], timeout=120)
        if not ready:
            raise ValueError("--device cuda: every GPU of the cluster is in use: wait for one, and give the same command again")
        try:
            return ray.get(asked)
        except ray.exceptions.RayTaskError as error:
            raise ValueError(f"--device cuda: a node of the cluster says that it has a GPU, and: {error.cause}") from None

    def start(self, node: Node, need: Need, errand: Errand) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return (
            ray.remote(Worker)
            .options(
                num_cpus=need.threads,
                num_gpus=1 if need.device == "cuda" else 0,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            )
            .remote(errand)
        )

    def call(self, worker: Any, name: str, *arguments: Any) -> Any:
        return getattr(worker, name).remote(*arguments)

    def answered(self, tickets: Sequence[Any], seconds: float) -> list[Any]:
        import ray

        if not tickets:
            time.sleep(seconds)
            return []
        found, _ = ray.wait(list(tickets), timeout=seconds)
        return found

    def answer(self, ticket: Any) -> Any:
        import ray

        try:
            return ray.get(ticket)
        except ray.exceptions.RayTaskError as error:  # an error in the worker's code
            raise RuntimeError(str(error)) from None
        except ray.exceptions.RayError as error:
            raise WorkerLost(_why(error)) from None

    def stop(self, workers: Sequence[Any]) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            closing = [worker.close.remote() for worker in workers]
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=CLOSING)
        for worker in workers:
            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                ray.kill(worker)


def _precision() -> str:
    from rankwise.experiments import measure

    return measure.precision("auto", measure.device("cuda"))


def _why(error: Exception) -> str:
    """Why a worker is gone, of what Ray says."""
    text = str(error)
    known = {"node has died": "its node has died", "NodeAffinity": "its node is gone", "unavailable": "it does not answer"}
    return next((why for words, why in known.items() if words in text), _line(error))


def _line(error: Exception) -> str:
    """The first line of what Ray says that tells a reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if "died" in line and "unexpectedly" not in line]
    return (reasons or lines or [type(error).__name__])[0].rstrip(".:")[:200]
