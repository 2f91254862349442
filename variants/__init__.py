"""The methods: one file a method; read base.py, then any one file.

    import variants
    adapter = variants.create("lora", rank=8, alpha=16)
    adapter.attach(model)                       # then train adapter.parameters()
    variants.save_pretrained(adapter, folder)   # PEFT's files

Importing this package does not import torch; the first use of a method does.
"""

import importlib
from typing import Any

from variants.settings import METHODS, check, method

_PLACES = {
    "Adapter": "variants.base",
    "Adapted": "variants.base",
    "NotPackable": "variants.base",
    "Calibration": "variants.base",
    "Uncalibrated": "variants.base",
    "Step": "variants.base",
    "torch_groups": "variants.base",
    "LoRA": "variants.lora",
    "DoRA": "variants.dora",
    "AdaLoRA": "variants.adalora",
    "AdaLoRADoRA": "variants.dora",
    "Allocated": "variants.adalora",
    "DynamicDoRA": "variants.dynamic_dora",
    "EVA": "variants.eva",
    "GoRA": "variants.gora",
    "StableRank": "variants.stable_rank",
    "RandomRank": "variants.random_rank",
    "SoRA": "variants.sora",
    "DyLoRA": "variants.dylora",
    "HeadOnly": "variants.subset",
    "BitFit": "variants.subset",
    "FullFineTuning": "variants.subset",
    "save_pretrained": "variants.checkpoint",
    "load_pretrained": "variants.checkpoint",
    "export_lora": "variants.checkpoint",
    "export_merged": "variants.checkpoint",
    "truncate": "variants.truncation",
    "follow": "variants.lowrank",
    "AdapterCallback": "variants.callback",
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
    raise AttributeError(f"module 'variants' has no attribute {name!r}")
