"""A frozen base that several processes share: each holds a part of every layer, and gathers a layer while it is computed.

    layers     members of the model's module lists.  Their weights are cut along the first axis into a part for each process,
               gathered before the layer's forward pass and again before its backward pass, and let go of behind it
    the rest   embeddings, last norm, output layer, what is tied: whole in each process, as fully_shard's root is in a step
    adapters   whole in each process.  They come after the cut, so that fully_shard knows none of them; their gradients are
               summed as those over a whole base are (parallel.py)

torch's FSDP2 (torch.distributed.fsdp.fully_shard; Zhao et al. 2023, "PyTorch FSDP", sec. 3).  A frozen weight has no gradient,
so that weights are all that the processes tell each other.  A weight that is read outside of its layer's forward pass is
gathered alone (variants/adapter/shards.py).  parallel.md says what was tried.
"""

import dataclasses
import gc
import hashlib
import json
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from rankwise.experiments import models
from rankwise.experiments.config import Study
from rankwise.experiments.training.pack import Pack
from rankwise.experiments.training.parallel import Processes
from rankwise.variants.settings import method
from torch import Tensor, nn

Held = dict[str, Tensor | None]  # a module's parameters, or its buffers
Place = tuple[Held, str]  # and under which name


def faults(study: Study) -> list[str]:
    """Why several processes cannot share the base of a study that asks for it, one line for each fault."""
    if not study.training.shard_base:
        return []
    found = []
    for entry in study.methods:
        if method(entry.method).trains_base:
            found.append(
                f"{entry.label}: {entry.method} trains the base's own weights, and training.shard_base = true leaves each "
                f"process a part of them: take the entry out, or shard_base"
            )
        if entry.scheme is not None:
            found.append(
                f"{entry.label}: its base is quantised ({entry.scheme}), and training.shard_base = true cannot cut codes and "
                f"their scales into parts: take the quantization out, or shard_base"
            )
    for name in ("knock_out", "across_tasks"):
        if getattr(study, name):
            found.append(
                f"{name} = {json.dumps(getattr(study, name))} is measured in the first process, which has no whole base with "
                f"training.shard_base = true: take one of them out"
            )
    return found


def load(pack: Pack, precision: str, processes: Processes) -> tuple[nn.Module, Any, models.ModelInfo]:
    """As `models.load`: the model, each layer of it shared by the processes, on their devices.

    The first process reads the model into its own memory, and sends one layer after the other; no other process ever has more
    than its parts, the rest, and one whole layer.

    Raises:
        ValueError: as `models.load`; a model without layers, one that is quantised, or another one than the first process's.
    """
    gc.collect()  # a model of before: fully_shard's hooks are cycles

    def read(heads: list[str] | None = None) -> tuple[nn.Module, Any, models.ModelInfo]:
        return models.load(pack.model, pack.task, precision, "cpu", pack.training.image_size, heads=heads)

    loaded = processes.attempt(lambda: read() if processes.is_first else None)
    facts = processes.told(None if loaded is None else {"heads": loaded[2].heads, "form": _form(loaded[0])})
    loaded = processes.attempt(lambda: read(facts["heads"]) if loaded is None else loaded)
    model, processor, info = loaded
    processes.attempt(lambda: _check(pack.model, model, facts["form"]))
    share(model, pack.device, processes)
    return model, processor, dataclasses.replace(info, heads=tuple(facts["heads"]))


def share(model: nn.Module, device: torch.device, processes: Processes) -> None:
    """Cuts the layers of a model that the first process has, and the others have the shapes of; all of it is frozen then."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.size,))
    places = _places(model)
    sent: set[tuple[int, str]] = set()
    for layer in layers(model):
        uncut = _uncut(layer, places) | sent  # what was sent with an earlier layer is tied to it
        _send(layer, places, sent, device, processes)
        whole = {held[name] for held, name, _ in _tensors(layer) if (id(held), name) in uncut}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        del whole
    _send(model, places, sent, device, processes)
    form = type(model)
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=set(model.parameters()))
    # A view that a model returns says nothing here: the root has no weights of its own to gather in the backward pass.
    warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \({form.__name__}\) returned a view", UserWarning)
    model.__class__ = form  # which is asked for by name; what a layer is called nobody asks
    # fully_shard takes what runs first for the root of all: an encoder that is generated from would be.
    fully_shard.state(model)._lazy_init()


def layers(model: nn.Module) -> list[nn.Module]:
    """The members of the model's outermost module lists that have parameters.

    Raises:
        ValueError: there are none.
    """
    found: list[nn.Module] = []

    def descend(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
                if child not in found and next(child.parameters(), None) is not None:
                    found.append(child)
            else:
                descend(child)

    descend(model)
    if not found:
        raise ValueError(
            f"training.shard_base = true: {type(model).__name__} has no list of layers (nn.ModuleList) to share: take it out"
        )
    return found


def _check(model_id: str, model: nn.Module, form: str) -> None:
    """
    Raises:
        ValueError: a model that cannot be shared, or another one than the first process's.
    """
    layers(model)
    if _form(model) != form:
        raise ValueError(f"{model_id}: its tensors differ from the first process's: give all the same packages and files")


def _tensors(module: nn.Module) -> Iterator[tuple[Held, str, Tensor]]:
    """What holds each parameter and buffer of a module and those inside it, under which name, and the tensor."""
    for inner in module.modules():
        for held in (inner._parameters, inner._buffers):
            yield from ((held, name, tensor) for name, tensor in held.items() if tensor is not None)


def _places(model: nn.Module) -> dict[int, list[Place]]:
    """Of each tensor, by its id, every place where it stands."""
    places: dict[int, list[Place]] = {}
    for held, name, tensor in _tensors(model):
        places.setdefault(id(tensor), []).append((held, name))
    return places


def _uncut(layer: nn.Module, places: dict[int, list[Place]]) -> set[tuple[int, str]]:
    """Where in a layer tensors stand that stay whole: of no axis, or tied to what lies outside."""
    inside = {id(held) for held, _, _ in _tensors(layer)}

    def is_tied(tensor: Tensor) -> bool:
        return any(id(held) not in inside for held, _ in places.get(id(tensor), ()))

    return {(id(held), name) for held, name, tensor in _tensors(layer) if not tensor.dim() or is_tied(tensor)}


@torch.no_grad()
def _send(
    module: nn.Module,
    places: dict[int, list[Place]],
    sent: set[tuple[int, str]],
    device: torch.device,
    processes: Processes,
) -> None:
    """Brings what the module and those inside it hold to every process's device, but for what was sent before."""
    for held, name, tensor in list(_tensors(module)):
        if (id(held), name) in sent:
            continue
        if processes.is_first:
            value = tensor.detach().to(device).contiguous()
        else:
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        processes.give(value)
        new = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
        for place, key in places.pop(id(tensor)):
            place[key] = new
            sent.add((id(place), key))


def _form(model: nn.Module) -> str:
    """Changes with the names, shapes, types and ties of a model's tensors."""
    numbers: dict[int, int] = {}
    lines = [
        f"{name} {numbers.setdefault(id(tensor), len(numbers))} {tuple(tensor.shape)} {tensor.dtype}"
        for _, name, tensor in _tensors(model)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
