"""Which machine of a cluster gets the next worker: decisions over numbers, without torch and without Ray."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

MOST_THREADS = 4  # that a worker has by itself: small models gain little from more, and packs gain from more workers


class WorkerLost(Exception):
    """A worker, or its node, is gone."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster that is alive, and what it offers to workers."""

    id: str
    host: str
    cpus: int
    gpus: int

    def __str__(self) -> str:
        return f"node {self.host} ({self.id[:8]})"


@dataclass(frozen=True)
class Need:
    """What every worker of a study needs: a device of the type that its fingerprints name, and CPU threads."""

    device: str
    threads: int

    def room(self, node: Node) -> int:
        """How many workers a node holds."""
        workers = node.cpus // self.threads
        return min(workers, node.gpus) if self.device == "cuda" else workers


def need(nodes: Sequence[Node], device: str, threads: int | None) -> Need:
    """
    Args:
        device: "auto" is a GPU where any node has one.
        threads: of each worker; None: its share of the smallest node that has the device, so that all have the same number.

    Raises:
        ValueError: no node has room for a worker; says what is missing.
    """
    if device == "auto":
        device = "cuda" if any(node.gpus for node in nodes) else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: with --ray each worker takes the GPU that Ray gives it: give cuda")
    fit = [node for node in nodes if node.cpus and (device == "cpu" or node.gpus)]
    share = min((node.cpus // max(2, node.gpus if device == "cuda" else 0) for node in fit), default=1)
    found = Need(device, threads or max(1, min(share, MOST_THREADS)))
    if not any(found.room(node) for node in nodes):
        raise ValueError(lacking(nodes, found))
    return found


def lacking(nodes: Sequence[Node], wanted: Need) -> str:
    """What no node has, where none has room for a worker."""
    there = f"the cluster has {len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}"
    if wanted.device == "cuda" and not any(node.gpus for node in nodes):
        return (
            f"--device cuda: {there}, none with a GPU: join one that has (ray start --address=HOST:PORT --num-gpus=1), or give "
            f"--device cpu"
        )
    most = max((node.cpus for node in nodes if wanted.device == "cpu" or node.gpus), default=0)
    beside = " beside its GPU" if wanted.device == "cuda" else ""
    remedy = "join a machine with more" if wanted.threads == 1 else "give fewer --threads, or join a machine with more"
    return f"{there}, and a worker needs {wanted.threads} CPUs{beside}; the most that one has is {most}: {remedy}"


def next_node(
    nodes: Sequence[Node], wanted: Need, workers: Mapping[str, int], starting: Collection[str], barred: Collection[str]
) -> Node | None:
    """The node that gets the next worker: the one with the most room left; None where there is no room.

    On each node one worker at a time starts, so that what the first one fetches is in the cache for the others.

    Args:
        workers: node -> workers that it has, starting ones among them.
        starting: nodes with a worker that is not ready yet.
        barred: nodes that cannot train this study.
    """
    left = {
        node.id: wanted.room(node) - workers.get(node.id, 0)
        for node in nodes
        if node.id not in starting and node.id not in barred
    }
    return max((node for node in nodes if left.get(node.id, 0) > 0), key=lambda node: left[node.id], default=None)
