"""A pack's checkpoint: one file of tensors, and beside them what else a killed run needs to end as it would have ended."""

import json
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rankwise.experiments.files import replacing
from rankwise.variants import native
from rankwise.variants.files import json_text
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write(path: Path, pack: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], processes: int = 1) -> None:
    """Writes a checkpoint, whole or not at all.

    pack: the identity of the pack (`Pack.identity`). facts: what JSON can hold. processes: that train together.
    Raises: OSError: the disk is full, or another fault of the system.
    """
    machine = {"pack": pack, "threads": torch.get_num_threads(), "compiled": native.library() is not None}
    machine["processes"] = processes
    text = json.dumps({**facts, **machine})
    dense = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(dense, temporary, {"state": text, "checksum": _checksum(text, dense)})


def read(path: Path, pack: str, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of a good checkpoint of this pack; None where there is none.

    One that was cut off, or of which a bit was flipped, is none: the run starts again, and ends as it would have ended.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            facts = json_text.parse(metadata["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("checksum", "none") not in ("none", _checksum(metadata["state"], tensors)):  # older ones have none
            return None
    except (SafetensorError, KeyError, ValueError, OSError):
        return None
    return (tensors, facts) if facts.get("pack") == pack else None


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Of the facts, and of the name, type, shape and bytes of every tensor: safetensors checks lengths alone."""
    found = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        if tensor.numel():
            found = zlib.crc32(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy(), found)
    return f"{found:08x}"


def warn_of_changes(facts: Mapping[str, Any], processes: int = 1) -> None:
    """Warns where a run goes on with other threads or processes, or without the compiled passes it was begun with."""
    if (begun := facts.get("processes", 1)) != processes:
        warnings.warn(
            f"this run was begun with {begun} {'process' if begun == 1 else 'processes'} and goes on with {processes}: it ends "
            f"equal to rounding, not to the bit",
            stacklevel=3,
        )
    if facts["threads"] != torch.get_num_threads():
        warnings.warn(
            f"this run was begun with {facts['threads']} threads and goes on with {torch.get_num_threads()}: it ends equal "
            f"to rounding, not to the bit",
            stacklevel=3,
        )
    if facts.get("compiled") != (native.library() is not None):
        words = ("without", "with") if facts.get("compiled") is False else ("with", "without")
        warnings.warn(
            f"this run was begun {words[0]} the compiled passes and goes on {words[1]} them: it ends equal to rounding, "
            f"not to the bit",
            stacklevel=3,
        )
