"""(IA)3 in PEFT's files.

base_model.model.<module>.ia3_l     (O, 1) where the module's output is scaled, (1, I) where its input is
target_modules, feedforward_modules   the modules, and those of them whose input is scaled
"""

import re
from collections.abc import Mapping
from typing import Any

from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.linears import find_kind, is_linear, kind_of, size_of
from rankwise.variants.files.facts import Facts
from rankwise.variants.files.folders import Contents
from rankwise.variants.files.peft import writing
from rankwise.variants.files.peft.base import put_base, take_base
from rankwise.variants.files.peft.checks import check_heads, check_targets, heads_of
from rankwise.variants.files.peft.config import PeftConfig
from rankwise.variants.files.peft.names import CONFIG, ORIGINAL_HEAD, PREFIX, WEIGHTS, head_tensor
from rankwise.variants.files.state import as_fact, copy, detached_if_it_fails, pattern_of, trained
from rankwise.variants.settings import method, nearest
from torch import Tensor, nn

VECTOR = "ia3_l"
_PART = re.compile(rf"^(?P<site>.+)\.{VECTOR}(?:\.(?P<adapter>[^.]+))?$")


def holds(adapter: Adapter) -> bool:
    return True


def written(adapter: Adapter, member: int) -> Contents:
    """PEFT's files of one member of an attached (IA)3."""
    alone, model, tensors, inputs = adapter.alone(member), adapter.model, {}, []
    for name, site in adapter.named_sites():
        vector = site.vector[member]
        tensors[f"{name}.{VECTOR}"] = vector[None] if site.at_input else vector[:, None]
        inputs += [name] if site.at_input else []
    sites = [name for name, _ in adapter.named_sites()]
    config = {
        **writing.common(adapter, sites),
        "peft_type": "IA3",
        "fan_in_fan_out": any(kind_of(adapter.base(name)).fan_in_fan_out for name in sites),
        "feedforward_modules": _feedforward(inputs, sites),
        "init_ia3_weights": True,
    }
    settings = alone.settings.model_dump(exclude_unset=True)
    own = {"seed": alone.seeds[0], "quantization": as_fact(model), "targets": adapter.targets}
    facts = Facts(adapter.method, settings, head=adapter.head_names, **own)
    tensors |= writing.beside_sites(adapter, member, sites)
    return Contents({PREFIX + name: value for name, value in tensors.items()}, config, facts)


def _feedforward(inputs: list[str], sites: list[str]) -> list[str] | str:
    """The names; as a pattern where PEFT, which goes by a name's end, dot or not, would also take another site."""
    others = [name for name in sites if name not in inputs]
    if any(other.endswith(name) for other in others for name in inputs):
        return "|".join(re.escape(name) for name in inputs)
    return inputs


def load(model: nn.Module, contents: Contents) -> Adapter:
    """
    Raises:
        ValueError: a configuration, or tensors, that do not fit each other or `model`.
    """
    raw, facts = contents.config, contents.facts
    config = PeftConfig.read_shared(raw)
    vectors, rest = _parts(contents.tensors)
    heads = heads_of(model, config)
    base = take_base(model, rest, heads)
    if not vectors:
        raise ValueError(f"{WEIGHTS} holds no {VECTOR} of an IA3: a foreign file; save the adapter again")
    inputs = _inputs(model, vectors, raw)
    check_heads(model, rest, heads, config)
    check_targets(model, {name: {} for name in vectors}, config)
    adapter = method("ia3").load()(seeds=[0 if facts is None else facts.seed], **_settings(model, vectors, inputs, facts))
    with detached_if_it_fails(adapter):
        adapter.attach(model, head=heads if facts is None else list(facts.head))
        there = {name: site.at_input for name, site in adapter.named_sites()}
        if there != {name: name in inputs for name in vectors}:
            raise ValueError(f"its metadata and {WEIGHTS} name other modules: the files were mixed; save the adapter again")
        for name, key, parameter in trained(adapter.heads):
            copy(parameter, rest, f"{name}.{key}")
        for name, site in adapter.named_sites():
            copy(site.vector, {name: vectors[name].flatten()}, name)
        put_base(adapter, base)
    return adapter


def _parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Vectors by site; and the rest by name, which belongs to heads or to the base."""
    vectors: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"tensor {key} does not start with {PREFIX}: no adapter file of PEFT's; save it there again")
        name = key.removeprefix(PREFIX)
        if (match := _PART.match(name)) is not None:
            if match["site"] in vectors:
                raise ValueError(f"{WEIGHTS} holds several adapters: save one of them in PEFT (selected_adapters=[...])")
            vectors[match["site"]] = value
        elif ORIGINAL_HEAD not in name:
            rest[head_tensor(name)[0]] = value
    return vectors, rest


def _inputs(model: nn.Module, vectors: Mapping[str, Tensor], raw: Mapping[str, Any]) -> set[str]:
    """Names of the sites whose input is scaled, by PEFT's rule; each vector has the shape that this asks for."""
    ends, modules, inputs = raw.get("feedforward_modules") or [], dict(model.named_modules()), set()
    if not isinstance(ends, str) and not (isinstance(ends, list) and all(isinstance(end, str) for end in ends)):
        raise ValueError(f"{CONFIG}: feedforward_modules = {ends!r} is no list of names: a foreign file; save it again")
    for name, vector in vectors.items():
        if name not in modules:
            raise ValueError(
                f"{name} is no module of {type(model).__name__}{nearest(name, modules)}: load the model it was for"
            )
        base = modules[name]
        if not is_linear(base):
            raise ValueError(f"{name} is a {type(base).__name__}: only an IA3 of linears can be loaded; choose other targets")
        at_input = re.fullmatch(ends, name) is not None if isinstance(ends, str) else name.endswith(tuple(ends))
        out_features, in_features = size_of(base)
        needed = (1, in_features) if at_input else (out_features, 1)
        if tuple(vector.shape) != needed:
            raise ValueError(
                f"{name}.{VECTOR} has shape {tuple(vector.shape)} where {type(model).__name__} and feedforward_modules need "
                f"{needed}: load the model it was trained on, or copy both files again"
            )
        inputs |= {name} if at_input else set()
    return inputs


def _settings(model: nn.Module, vectors: Mapping[str, Tensor], inputs: set[str], facts: Facts | None) -> Mapping[str, Any]:
    """Of the file's own settings, or of a file of PEFT's: its modules by name."""
    if facts is not None:
        return facts.settings
    known = [name for name, module in model.named_modules() if find_kind(module) is not None]
    return {
        "outputs": [pattern_of(name, known) for name in vectors if name not in inputs],
        "inputs": [pattern_of(name, known) for name in vectors if name in inputs],
    }
