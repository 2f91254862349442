"""A pack's checkpoint: one file of tensors, and beside them what else a killed run needs to end as it would have ended."""

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rankwise.experiments.files import replacing
from rankwise.variants import native
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
    with replacing(path) as temporary:
        try:
            state = {"state": json.dumps({**facts, **machine})}
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary, state)
        except SafetensorError as error:  # safetensors' word for a full disk
            raise as_os_error(error, path) from None


def read(path: Path, pack: str, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of a good checkpoint of this pack; None where there is none."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            facts = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError):
        return None  # cut off by a power failure: the run starts again
    return (tensors, facts) if facts.get("pack") == pack else None


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


def as_os_error(error: SafetensorError, path: Path) -> OSError:
    """What the system said, out of the words of safetensors: "... I/O error: ... (os error 28)"."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(str(error)) if number is None else OSError(int(number[1]), os.strerror(int(number[1])), str(path))
