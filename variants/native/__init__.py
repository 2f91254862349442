"""The CPU's compiled passes (native.c): built once with the machine's C compiler, and left out where there is none.

Every function here has a plain version elsewhere that says what it computes (products.LowRankProduct, draws.drop,
magnitude.Recomposed), takes over where `usable` says no, and is what the tests compare with.  RANKWISE_NATIVE=0 turns this off.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SOURCE = Path(__file__).with_name("native.c")
# Sums may be reordered so that they vectorize; infinities and NaN keep their meaning, which divergence is found by.
FLAGS = ["-O3", "-march=native", "-fPIC", "-fopenmp"]
FLAGS += ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"]
WIDE = {"dtype": torch.float32, "device": "cpu"}  # of every sum, whatever the process's defaults are
SUFFIX = {torch.float32: "_f32", torch.bfloat16: "_bf16"}


class _Drop(ctypes.Structure):
    _fields_ = [("keys", ctypes.c_void_p), ("threshold", ctypes.c_int32), ("scale", ctypes.c_float)]
    _fields_ += [("pitch", ctypes.c_int64), ("first", ctypes.c_int64)]


def usable(*tensors: Tensor, wide: Sequence[Tensor | None] = ()) -> bool:
    """Whether the compiled passes take these: `tensors` all of one type of fp32 and bf16, `wide` of fp32.

    They read addresses, so every tensor must have memory of its own on the CPU, and nobody may be recording operations.
    """
    wide = [t for t in wide if t is not None]
    kind = tensors[0].dtype
    if _pretends:
        is_known = kind in SUFFIX and all(t.dtype == kind for t in tensors) and all(t.dtype == torch.float32 for t in wide)
        return is_known and library() is not None
    return (
        kind in SUFFIX
        and all(t.dtype == kind and _has_memory(t) for t in tensors)
        and all(t.dtype == torch.float32 and _has_memory(t) for t in wide)
        and not _is_recorded()
        and library() is not None
    )


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """While tensors have shapes and no values: the passes are taken where they would be, and compute nothing."""
    global _pretends
    before, _pretends = _pretends, True
    try:
        yield
    finally:
        _pretends = before


_pretends = False


def is_pretending() -> bool:
    """Whether tensors have shapes and no values."""
    return _pretends


def _has_memory(t: Tensor) -> bool:
    """Whether it is a plain dense tensor on the CPU: no fake or other subclass, not meta, not sparse."""
    return type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.layout is torch.strided


def _is_recorded() -> bool:
    """Whether a tracer, a compiler, a transform of torch.func or a dispatch mode must see each operation."""
    return (
        torch._C._is_tracing()
        or torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled passes; None where they are turned off or cannot be built, which `library.reason` then explains."""
    try:
        return _load()
    except (OSError, ValueError, subprocess.SubprocessError, RuntimeError) as error:
        words = f"{error} {getattr(error, 'stderr', None) or ''}"
        library.reason = " ".join(words.split())[:300]
        return None


library.reason = None


def _load() -> ctypes.CDLL:
    if os.environ.get("RANKWISE_NATIVE", "1") == "0":
        raise RuntimeError("turned off by RANKWISE_NATIVE=0")
    if not sys.platform.startswith("linux"):
        raise RuntimeError(f"not built on {sys.platform}")
    # torch's own OpenMP, so that there is one pool of threads: a second one would spin against the first.
    mapped = [line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line]
    threads = [path for path in dict.fromkeys(mapped) if Path(path).name.startswith(("libgomp", "libiomp5"))]
    if not threads:
        raise RuntimeError("torch's OpenMP library was not found")
    ctypes.CDLL(min(threads, key=lambda path: "torch" not in Path(path).parts), mode=ctypes.RTLD_GLOBAL)
    with _folder() as folder:
        path = _built(folder)
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError:  # cut off by a full disk or a power failure
            path.unlink()
            loaded = ctypes.CDLL(str(_built(folder)))
    for name in ("drop", "dots", "update", "outer", "scale_rows", "scale_rows_backward"):
        for suffix in SUFFIX.values():
            getattr(loaded, name + suffix).restype = None
    return loaded


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Where the compiled passes are kept: the user's cache, or, where it cannot be written to, a folder for this process.

    Raises:
        RuntimeError: others may write to the cache, so that what lies there is not to be trusted.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankwise" / "native"
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        usable_cache = os.access(cache, os.W_OK)
    except (OSError, RuntimeError):  # read-only, or no home at all
        usable_cache = False
    if not usable_cache:
        with tempfile.TemporaryDirectory(prefix="rankwise-native-") as folder:
            yield Path(folder)
        return
    facts = cache.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RuntimeError(f"{cache} is not this user's alone to write to: chmod go-w it")
    yield cache


def _built(folder: Path) -> Path:
    """The shared object for this source and this processor, compiled where it is not there yet."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    processor = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith(("flags", "Features"))), "")
    step = {"check": True, "capture_output": True, "text": True, "timeout": 120}
    version = subprocess.run([*compiler, "--version"], **step).stdout
    parts = [SOURCE.read_text(), " ".join(FLAGS), version, processor, platform.machine()]
    path = folder / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            subprocess.run([*compiler, *FLAGS, "-c", str(SOURCE), "-o", f"{scratch}/native.o"], **step)
            # Linked without -fopenmp: its symbols are torch's, loaded above.
            subprocess.run([*compiler, "-shared", f"{scratch}/native.o", "-o", f"{scratch}/native.so"], **step)
            os.replace(f"{scratch}/native.so", path)
    return path


def _call(name: str, kind: torch.dtype, *arguments: Tensor | _Drop | int | None) -> None:
    """Calls a routine; tensors go as addresses, numbers as 64 bits, the number of threads last."""
    if _pretends:
        return
    passed = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor)
        else ctypes.byref(a) if isinstance(a, _Drop)
        else ctypes.c_void_p(None) if a is None
        else ctypes.c_int64(a)
        for a in arguments
    ]  # fmt: skip
    getattr(library(), name + SUFFIX[kind])(*passed, ctypes.c_int(torch.get_num_threads()))


def _structure(dropping: Any) -> _Drop:
    """A draws.Dropping, or None, as the compiled passes take it."""
    if dropping is None or _pretends:
        return _Drop(None, 0, 1.0, 0, 0)
    return _Drop(dropping.keys.data_ptr(), dropping.threshold, 1 / (1 - dropping.rate), dropping.pitch, dropping.first)


def drop(x: Tensor, dropping: Any) -> Tensor:
    """x (K, N, F) with elements dropped; `dropping` is a draws.Dropping, here and below."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _call("drop", x.dtype, y, x, _structure(dropping), *x.shape)
    return y


def dots(x: Tensor, M: Tensor, dropping: Any, places: Tensor | None = None) -> Tensor:
    """(K, N, R) fp32: drop(x) M^T for x (K, N, F), M (K, R, F) fp32.

    places: (K,) int64, of each of x its place in M, which is (any number, R, F) then; not checked against it.
    """
    K, N, F = x.shape
    z = torch.empty(K, N, M.shape[1], **WIDE)
    _call("dots", x.dtype, z, x.contiguous(), M.contiguous(), places, _structure(dropping), K, N, F, M.shape[1])
    return z


def update_(y: Tensor, z: Tensor, M: Tensor, places: Tensor | None = None) -> None:
    """y += z M in place, for y (K, N, F) dense, z (K, N, R) and M (K, R, F) fp32; places as in `dots`."""
    K, N, F = y.shape
    _call("update", y.dtype, y, z.contiguous(), M.contiguous(), places, K, N, F, M.shape[1])


def outer(x: Tensor, z: Tensor, M: Tensor | None, dropping: Any) -> tuple[Tensor, Tensor | None]:
    """(K, R, F) fp32: z^T drop(x); and, where M (K, R, F) is given, z M dropped in the same places (K, N, F)."""
    K, N, F = x.shape
    x = x.contiguous()
    dM, dx = torch.empty(K, z.shape[2], F, **WIDE), None if M is None else torch.empty_like(x)
    M = None if M is None else M.contiguous()
    _call("outer", x.dtype, dM, dx, x, z.contiguous(), M, _structure(dropping), K, N, F, z.shape[2])
    return dM, dx


def scale_rows(t: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """(t - bias) * factor + bias for t (K, N, F); factor (K, F) and bias (F,) fp32."""
    K, N, F = t.shape
    t = t.contiguous()
    y = torch.empty_like(t)
    _call("scale_rows", t.dtype, y, t, factor.contiguous(), None if bias is None else bias.contiguous(), K, N, F)
    return y


def scale_rows_backward(g: Tensor, t: Tensor, factor: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """g * factor (K, N, F), and the sum over rows of (t - bias) * g (K, F) fp32."""
    K, N, F = t.shape
    g, t = g.contiguous(), t.contiguous()
    dt, dgain = torch.empty_like(t), torch.empty(K, F, **WIDE)
    bias = None if bias is None else bias.contiguous()
    _call("scale_rows_backward", t.dtype, dt, dgain, g, t, factor.contiguous(), bias, K, N, F)
    return dt, dgain
