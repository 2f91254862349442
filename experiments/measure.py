"""What a run is measured on: device, precision, threads, memory, versions."""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rankwise.variants import native

PACKAGES = ("rankwise", "torch", "transformers", "numpy", "tokenizers", "safetensors")


def device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one.

    Raises:
        ValueError: a device that is not there, with the ones that are.
    """
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name == "auto":
        return torch.device("cuda" if len(there) > 1 else "cpu")
    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: no such device; this machine has: {', '.join(there)}") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= len(there) - 1:
        raise ValueError(f"--device {name}: this machine has no such GPU; it has: {', '.join(there)}")
    if wanted.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: Rankwise runs on cpu and cuda; this machine has: {', '.join(there)}")
    return wanted


def device_name(where: torch.device) -> str:
    """What the device calls itself."""
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def precision(wanted: str, where: torch.device) -> str:
    """ "auto" resolved: bf16 where the device multiplies it faster than fp32."""
    if wanted != "auto":
        return wanted
    if where.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(where) >= (8, 0) else "fp32"
    # torch has no public question for this; without either unit bf16 is emulated and several times slower than fp32.
    fast = [getattr(torch.cpu, name, lambda: False)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    return "bf16" if any(fast) else "fp32"


def make_deterministic(where: torch.device) -> None:
    """On a GPU a run that was cut off ends bit for bit as it would have; on a CPU it does anyhow."""
    if where.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # warn_only leaves the attention's backward pass as it is


def keep_freed_memory() -> None:
    """Lets glibc keep what torch frees, for the next tensor, instead of returning it to the system.

    A step makes and frees hundreds of tensors of megabytes; by default each is mapped anew and its pages cleared one by
    one, which is a good part of a step on a CPU.  Nothing happens where the C library is another.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": f"{sys.platform}-{platform.machine()}"}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["cpu passes"] = "plain" if native.library() is None else "compiled"
    return found


def commit() -> dict[str, Any]:
    """The commit of this code and whether it has changes, where it runs from a checkout; else None."""
    root = Path(__file__).parent.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    changed = git("status", "--porcelain", "--", "variants", "experiments", "pyproject.toml")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}
