"""VeRA out of PEFT's files: two vectors of each site, and the pair of matrices that all sites share, or what draws it again."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.linears import check_adaptable, find_kind, is_linear, size_of
from rankwise.variants.files.folders import Contents
from rankwise.variants.files.peft.base import put_base, take_base
from rankwise.variants.files.peft.checks import check_heads, check_targets, heads_of
from rankwise.variants.files.peft.config import PeftConfig
from rankwise.variants.files.peft.names import CONFIG, PREFIX, PROJECTIONS, VECTORS, WEIGHTS, head_tensor
from rankwise.variants.files.state import copy, detached_if_it_fails, pattern_of, trained
from rankwise.variants.settings import method, nearest
from torch import Tensor, nn

_PART = re.compile(rf"^(?P<site>.+)\.(?P<part>{'|'.join(VECTORS)})(?:\.[^.]+)?$")


def load(model: nn.Module, contents: Contents) -> Adapter:
    """
    Raises:
        ValueError: as `reading.load`.
    """
    values, facts = contents.config, contents.facts
    config = PeftConfig.read(values)
    settings = _settings(values)
    sites, rest, pair = _parts(contents.tensors)
    heads = heads_of(model, config)
    base = take_base(model, rest, heads)
    _check_sites(model, sites, settings["rank"])
    check_heads(model, rest, heads, config)
    check_targets(model, sites, config)
    if values.get("save_projection", True) and not pair:
        raise ValueError(
            f"{CONFIG} says that {WEIGHTS} holds {', '.join(PROJECTIONS)}, and it does not: save or copy both again"
        )
    if facts is not None:
        own = {"projection_seed": facts.seed} | facts.settings
        if all(own.get(key, value) == value for key, value in settings.items()):  # else the configuration was edited
            settings = facts.settings
    adapter = method("vera").load()(seeds=[facts.seed if facts is not None else 0], **settings)
    with detached_if_it_fails(adapter):
        known = [name for name, module in model.named_modules() if find_kind(module) is not None]
        adapter.attach(model, [pattern_of(name, known) for name in sites], head=heads if facts is None else list(facts.head))
        adapter.targets = facts.targets if facts is not None and facts.targets is not None else list(sites)
        for name, key, parameter in trained(adapter.heads):
            copy(parameter, rest, f"{name}.{key}")
        for name, parts in sites.items():
            for key, parameter in zip(VECTORS, (adapter.site(name).d, adapter.site(name).b), strict=True):
                copy(parameter, {f"{name}.{key}": parts[key]}, f"{name}.{key}")
        if pair:
            _put_projections(adapter, pair)
        put_base(adapter, base)
    return adapter


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Ours of the same; 256, 0, 0.1 and 0 are PEFT's defaults."""
    return {
        "rank": values.get("r", 256),
        "dropout": values.get("vera_dropout", 0.0),
        "d_initial": values.get("d_initial", 0.1),
        "projection_seed": values.get("projection_prng_key", 0),
        "save_projection": values.get("save_projection", True),
    }


def _parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[Tensor]]:
    """Vectors by site and part; the rest by name, which belongs to heads or to the base; and A and B, or neither."""
    sites: dict[str, dict[str, Tensor]] = {}
    rest, pair = {}, {}
    for key, value in tensors.items():
        name = next((name for name in PROJECTIONS if key == name or key.startswith(f"{name}.")), None)
        if name is not None:
            pair[name] = value
            continue
        if not key.startswith(PREFIX):
            raise ValueError(f"tensor {key} does not start with {PREFIX}: no adapter file of PEFT's; save it there again")
        match = _PART.match(key.removeprefix(PREFIX))
        if match is not None:
            sites.setdefault(match["site"], {})[match["part"]] = value
        else:
            rest[head_tensor(key.removeprefix(PREFIX))[0]] = value
    if len(pair) == 1 or not sites:
        lacking = " and ".join(name for name in (PROJECTIONS if pair else VECTORS) if name not in pair)
        raise ValueError(f"{WEIGHTS} lacks {lacking}: the file is not whole; save or copy it again")
    return sites, rest, [pair[name] for name in PROJECTIONS if pair]


def _check_sites(model: nn.Module, sites: Mapping[str, Mapping[str, Tensor]], rank: int) -> None:
    modules = dict(model.named_modules())
    for name, parts in sites.items():
        if name not in modules:
            raise ValueError(
                f"{name} is no module of {type(model).__name__}{nearest(name, modules)}: load the model it was for"
            )
        if not is_linear(modules[name]):
            raise ValueError(f"{name} is a {type(modules[name]).__name__}, and VeRA adapts linears: load the model it was for")
        check_adaptable(name, modules[name])
        shapes = dict(zip(VECTORS, ((rank,), (size_of(modules[name])[0],)), strict=True))
        for key, shape in shapes.items():
            if key not in parts or tuple(parts[key].shape) != shape:
                found = tuple(parts[key].shape) if key in parts else "none"
                raise ValueError(
                    f"{name}.{key} has shape {found} where {type(model).__name__} needs {shape}: load its own model"
                )


@torch.no_grad()
def _put_projections(adapter: Adapter, pair: list[Tensor]) -> None:
    """Takes over A (r, I) and B (O, r), which may be larger than the largest site."""
    for name, into, value in zip(PROJECTIONS, (adapter.projections.A[0], adapter.projections.B[0]), pair, strict=True):
        rows, columns = into.shape
        is_fitting = len(value) == rows and value.shape[1] >= columns if name == PROJECTIONS[0] else value.shape[1] == columns
        if not is_fitting or len(value) < rows:
            raise ValueError(f"{name} has shape {tuple(value.shape)} where {(rows, columns)} is the least: load its own model")
        into.copy_(value[:rows, :columns])
