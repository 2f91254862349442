"""What a process of several does whose base is shared (training.shard_base), for tests/test_sharding.py."""

import gc
import json
from pathlib import Path
from typing import Any

import torch
from rankwise.experiments.data.dataset import Dataset
from rankwise.experiments.training import sharding
from rankwise.experiments.training.pack import Pack
from rankwise.experiments.training.parallel import Processes
from rankwise.experiments.training.trainer import Trainer
from safetensors.torch import save_file
from torch import Tensor, nn

from tests import parallel_world as world
from tests import small_world


def train(processes: Processes, folder: Path, model: str, changes: dict[str, Any], is_double: bool = False) -> None:
    """As parallel_world.train; between steps a process holds its part of each layer, and no more."""
    step = Trainer.train_step

    def watched(trainer: Trainer) -> None:
        check_share(trainer.model, processes.size)
        step(trainer)
        check_share(trainer.model, processes.size)

    Trainer.train_step = watched
    try:
        world.train(processes, folder, model, changes, is_double)
    finally:
        Trainer.train_step = step


def frozen_layers(model: nn.Module) -> list[Tensor]:
    named = [pair for layer in sharding.layers(model) for pair in layer.named_parameters()]
    return [p for name, p in named if "site." not in name]


def check_share(model: nn.Module, size: int) -> None:
    frozen = frozen_layers(model)
    assert frozen and all(hasattr(p, "to_local") and not p.requires_grad for p in frozen)
    # A part is a number of rows, so that it is at most one row more than a share; the storage, not what it shows.
    held = sum(p.to_local().untyped_storage().nbytes() for p in frozen)
    assert held <= sum(-(-p.shape[0] // size) * (p.numel() // p.shape[0]) * p.element_size() for p in frozen)


def in_memory() -> int:
    """Bytes of all tensors that Python knows of, each storage once."""
    gc.collect()
    there = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and not o.is_meta]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in there}.values())


def watch_memory(processes: Processes, folder: Path, model: str) -> None:
    """While the base is dealt out no process but the first has more than its parts, the rest and one layer."""
    pack = small_world.pack(model, shard_base=True)
    send, most = sharding._send, 0

    def watched(module: nn.Module, *rest: Any) -> None:
        nonlocal most
        send(module, *rest)
        most = max(most, in_memory())

    sharding._send = watched
    before = in_memory()
    made, _, _ = sharding.load(pack, "fp32", processes)
    frozen = frozen_layers(made)
    rest = [t for t in (*made.parameters(), *made.buffers()) if not hasattr(t, "to_local")]
    one_layer = max(sum(p.numel() * 4 for p in layer.parameters()) for layer in sharding.layers(made))
    allowed = sum(p.to_local().untyped_storage().nbytes() for p in frozen) + sum(t.nbytes for t in rest) + one_layer
    if not processes.is_first:
        assert most - before <= allowed, (most, before, allowed)
    (folder / str(processes.rank)).write_text(str(most))


def fail_alone(processes: Processes, folder: Path, model: str, said: Path) -> None:
    """The second process fails in the middle of a layer of step 2, where the others wait for it."""
    from rankwise.experiments.training import parallel

    parallel.ALIKE = 1.0
    made = small_world.trainer(small_world.pack(model, "dora", shard_base=True), folder, processes=processes)
    layer, calls = sharding.layers(made.model)[1], 0

    def failing(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if processes.rank == 1 and calls == 2:
            raise torch.OutOfMemoryError("full")

    layer.register_forward_pre_hook(failing, prepend=True)
    try:
        made.run()
    except BaseException as error:
        with said.open("a") as file:
            file.write(f"{type(error).__name__}: {error}\n")
        raise


def fail_alike(processes: Processes, folder: Path, model: str) -> None:
    """All fail at the same place, which is a result, and the next pack trains."""
    import pytest

    made = small_world.trainer(small_world.pack(model, "dora", shard_base=True), folder, processes=processes)

    def failing(*_: Any) -> None:
        raise torch.OutOfMemoryError("full")

    sharding.layers(made.model)[1].register_forward_pre_hook(failing, prepend=True)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        made.run()
    assert processes.agreed(caught.value)
    again = small_world.trainer(small_world.pack(model, "lora", shard_base=True), folder, processes=processes)
    (outcome,) = again.run()
    assert not processes.is_first or outcome.error is None, outcome
    (folder / f"ended-{processes.rank}").touch()


def train_pack(processes: Processes, folder: Path, pack: Pack, data: dict[str, Dataset]) -> None:
    """Trains a pack of a language model, and evaluates it once more from its last checkpoint; what it predicted is left."""
    small_world.trained(pack, folder, data=data, processes=processes)
    made, outcomes = small_world.trained(pack, folder, data=data, processes=processes)
    if processes.size > 1:
        check_share(made.model, processes.size)
    if processes.is_first:
        found = [{split: one.tolist() for split, one in outcome.predictions.items()} for outcome in outcomes]
        (folder / "predictions.json").write_text(json.dumps(found))
        tensors = {name: value.detach().contiguous() for name, value in made.adapter.state_dict().items()}
        save_file(tensors, folder / "state-0")
