"""The methods: one file a method; read adapter/interface.py, then any one file.

    from rankwise import variants
    adapter = variants.create("lora", rank=8, alpha=16)
    adapter.attach(model)                       # then train adapter.parameters()
    variants.save_pretrained(adapter, folder)   # PEFT's files

Importing this package does not import torch; the first use of a method does.
"""

import importlib
from typing import Any

from rankwise.variants.settings import METHODS, check, method

# A method's class is where the registry says; what else a user needs is named here.
_PLACES = {method.location.partition(":")[2]: method.location.partition(":")[0] for method in METHODS.values()} | {
    "Adapter": "rankwise.variants.adapter.interface",
    "torch_groups": "rankwise.variants.adapter.groups",
    "Adapted": "rankwise.variants.adapter.surgery",
    "Calibration": "rankwise.variants.adapter.step",
    "CannotMerge": "rankwise.variants.adapter.step",
    "NotPackable": "rankwise.variants.adapter.step",
    "Step": "rankwise.variants.adapter.step",
    "Uncalibrated": "rankwise.variants.adapter.step",
    "save_pretrained": "rankwise.variants.files.pretrained",
    "load_pretrained": "rankwise.variants.files.pretrained",
    "open_door": "rankwise.variants.files.doors",
    "save_diffusers": "rankwise.variants.files.diffusion",
    "load_diffusers": "rankwise.variants.files.diffusion",
    "export_lora": "rankwise.variants.files.export",
    "export_merged": "rankwise.variants.files.export",
    "truncate": "rankwise.variants.weights.truncation",
    "follow": "rankwise.variants.lowrank.slots",
    "Bank": "rankwise.variants.bank.bank",
    "AdapterCallback": "rankwise.variants.callback",
}

__all__ = ["METHODS", "check", "create", "method", *_PLACES]


def create(name: str, *, members: int = 1, seeds: list[int] | None = None, **settings: Any) -> Any:
    """An adapter of method `name`, not attached to a model yet.

    Args:
        name: a key of `METHODS`.
        members: K, how many members share the frozen model.
        seeds: one for each member; 0 .. K-1 if not given.
        settings: the method's settings; rank-like ones may be a list, one value for each member.

    Raises:
        ValueError: an unknown method or setting, or a value out of range.
    """
    return method(name).load()(members=members, seeds=seeds, **settings)


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'rankwise.variants' has no attribute {name!r}")
