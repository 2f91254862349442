"""Several processes of one run, as torchrun would start them, in the small world."""

import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rankwise.experiments.training import parallel
from safetensors.torch import load_file, save_file
from torch.distributed import TCPStore

from tests import small_world

STORES: list[TCPStore] = []


def start(size: int, work: Callable[..., None], *arguments: Any, is_joined: bool = True) -> list[multiprocessing.Process]:
    """So many processes that are joined and then each do `work(processes, *arguments)`; forks, which start at once.

    is_joined: otherwise they do `work(rank, *arguments)`, with what torchrun sets in the environment.
    """
    context = multiprocessing.get_context("fork")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # outlives them, as torchrun's does
    STORES.append(store)
    port = store.port
    made = [context.Process(target=_do, args=(rank, size, port, work, arguments, is_joined)) for rank in range(size)]
    for process in made:
        process.start()
    return made


def ended(processes: list[multiprocessing.Process], seconds: float = 120) -> list[int | None]:
    """Their exit codes; None of one that did not end."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def run(size: int, work: Callable[..., None], *arguments: Any, is_joined: bool = True) -> None:
    assert ended(start(size, work, *arguments, is_joined=is_joined)) == [0] * size


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    return {**{name: str(value) for name, value in names.items()}, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"} | {
        "TORCHELASTIC_USE_AGENT_STORE": "True"
    }


def _do(
    rank: int, size: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...], is_joined: bool
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    os.environ.update(environment(rank, size, port))
    if not is_joined:
        work(rank, *arguments)
        return
    with parallel.joined(size, "cpu") as processes:
        work(processes, *arguments)


# -- packs -------------------------------------------------------------------------------------------------------------


def train(processes: parallel.Processes, folder: Path, model: str, changes: dict[str, Any], is_double: bool = False) -> None:
    """Trains a pack, and leaves state-RANK.safetensors and, of the first process, predictions and what Trainer wrote."""
    with pytest.MonkeyPatch.context() as patch:
        if is_double:
            small_world.in_float64(patch.setattr)
        made, outcomes = small_world.trained(small_world.pack(model, **changes), folder, processes=processes)
    state = made.adapter.state_dict() | {f"optimizer.{name}": value for name, value in made.optimizer.state().items()}
    state |= {"last_loss": made.last_loss}
    save_file({name: value.detach().contiguous().clone() for name, value in state.items()}, folder / f"state-{processes.rank}")
    if processes.is_first:
        found = [{split: one.tolist() for split, one in outcome.predictions.items()} for outcome in outcomes]
        (folder / "predictions.json").write_text(json.dumps(found))
        (folder / "facts.json").write_text(json.dumps([outcome.facts for outcome in outcomes]))


def state(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / f"state-{rank}")


def losses(folder: Path, member: int = 0) -> list[float]:
    lines = [json.loads(line) for line in (folder / f"member-{member}" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]
