"""What of an adapter goes into a file, whatever the format."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rankwise.variants.adapter import experts
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.kinds.quantised import scheme_of
from rankwise.variants.adapter.surgery import Adapted, name_of
from rankwise.variants.adapter.targets import KEYWORDS, matches
from rankwise.variants.lowrank.adapter import LowRankAdapter
from rankwise.variants.settings import Settings
from torch import Tensor, nn

ADAPTER_STATE = "adapter_state."  # before the names of an adapter's own tensors in the state of a model that is trained


def check_member(adapter: Adapter, member: int) -> None:
    """
    Raises:
        ValueError: no such member, or an adapter that is not attached.
    """
    if not 0 <= member < adapter.members:
        raise ValueError(f"member = {member}: there are {adapter.members}, counted from 0")
    _ = adapter.model  # raises where there is none


def as_fact(model: nn.Module) -> dict[str, Any] | None:
    """How the base is quantised, as the metadata of its adapter says it; None where it is not.

    skipped: what transformers was told to leave in floating point; absent where it was told nothing.
    """
    scheme = scheme_of(model)
    if scheme is None:
        return None
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    fact = scheme.as_fact() | {"dtype": str(dtype).removeprefix("torch.")}
    asked = getattr(getattr(model, "config", None), "quantization_config", None)
    skipped = getattr(asked, "llm_int8_skip_modules", None)
    return fact if skipped is None else {**fact, "skipped": sorted(skipped)}


def own_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of a model with an adapter in it, by the names that the model has without, and nothing of the adapter."""
    names = own_names(model, state)
    return {names[key]: value for key, value in state.items() if key in names} | experts.merged(model)


def own_names(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Of each key that belongs to the model itself, the name that it has without an adapter."""
    adapted = [f"{name}." for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Adapted)]
    names = {}
    for key in keys:
        owner = next((name for name in adapted if key.startswith((f"{name}base.", f"{name}site."))), None)
        if owner is None:
            names[key] = key
        elif key.startswith(f"{owner}base."):
            names[key] = owner + key.removeprefix(f"{owner}base.")
    return experts.folded(model, {key: name for key, name in names.items() if not name.startswith(ADAPTER_STATE)})


def has_low_rank_form(adapter: Adapter) -> bool:
    """Whether a LORA of PEFT's can hold it."""
    return isinstance(adapter, LowRankAdapter) or not len(adapter.sites)


def first_rank(settings: Settings) -> Any:
    """The rank that a site without a pattern starts with."""
    return settings.get("rank", settings.get("initial_rank"))


def trained(modules: nn.ModuleDict) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(module name, parameter name, parameter) of an adapter's sites or heads."""
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            yield name_of(name), key, parameter


@torch.no_grad()
def copy(parameter: nn.Parameter, tensors: Mapping[str, Tensor], name: str) -> None:
    """Takes over the tensor of that name as the one member.

    Raises:
        ValueError: it is missing, or has another shape.
    """
    if name not in tensors:
        raise ValueError(f"tensor {name} is missing: the file is not whole or was trained on another model; save it again")
    if tensors[name].shape != parameter.shape[1:]:
        shapes = f"{tuple(tensors[name].shape)} where the model needs {tuple(parameter.shape[1:])}"
        raise ValueError(f"tensor {name} has shape {shapes}: load the model it was trained on")
    parameter[0].copy_(tensors[name])


@contextlib.contextmanager
def detached_if_it_fails(adapter: Adapter) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(ValueError):  # it was not attached yet
            adapter.detach()
        raise


def pattern_of(name: str, names: Sequence[str]) -> str:
    """What names this module and no other of `names`, here and in PEFT: its name, or else an anchored expression."""
    plain = name not in KEYWORDS and all(other == name or not matches(name, other) for other in names)
    return name if plain else f"^{re.escape(name)}"
