"""The compiled passes under AddressSanitizer and UndefinedBehaviorSanitizer: shapes that nothing divides, empty tensors, odd
strides, tensors in the middle of others, any number of threads.  Each result is that of the plain version, too.

Every tensor is allocated to its size under a sanitizer's allocator, so that a read or a write beside it ends the process.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rankwise.variants import native

ROOT = Path(__file__).parent.parent

PROGRAM = """
import itertools, random, sys
import torch
from rankwise.variants import native
from rankwise.variants.adapter.draws import Draw, Dropping

native.FLAGS[:] = ["-O1", "-g", "-fPIC", "-fopenmp", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
                   "-fno-sanitize-recover=all"]
if len(sys.argv) > 2:
    native.SOURCE = __import__("pathlib").Path(sys.argv[2])
assert native.library() is not None, native.library.reason
draw, generator = random.Random(int(sys.argv[1])), torch.Generator().manual_seed(0)
SIZES = {"K": (0, 1, 2, 3), "N": (0, 1, 2, 3, 5, 8), "F": (0, 1, 3, 63, 64, 65, 1023, 1024, 1025), "R": (0, 1, 3, 4, 5, 9)}


def tensor(*shape, dtype=torch.float32):
    # Alone, or every second element of another, or transposed, or in the middle of a larger one.
    how = draw.choice(["alone", "strided", "transposed", "inside"])
    if how == "strided" and shape[-1:]:
        return torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).to(dtype)[..., ::2]
    if how == "transposed" and len(shape) > 1:
        return torch.randn(*shape[:-2], shape[-1], shape[-2], generator=generator).to(dtype).mT
    if how == "inside":
        return torch.randn(shape[0] + 2, *shape[1:], generator=generator).to(dtype)[1:-1]
    return torch.randn(*shape, generator=generator).to(dtype)


def close(ours, theirs, dtype):
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    scale = 1 + (theirs.abs().max().item() if theirs.numel() else 0)
    assert not ours.numel() or (ours.double() - theirs).abs().max().item() <= tolerance * scale


for case in range(400):
    K, N, F, R = (draw.choice(SIZES[name]) for name in "KNFR")
    dtype, threads = draw.choice([torch.float32, torch.bfloat16]), draw.choice([1, 2, 3])
    torch.set_num_threads(threads)
    x, M, z, y = tensor(K, N, F, dtype=dtype), tensor(K, R, F), tensor(K, N, R), tensor(K, N, F, dtype=dtype).contiguous()
    gain, bias = tensor(K, F), draw.choice([None, tensor(F)])
    dropping, factor = None, 1.0
    if draw.random() < 0.5 and K and N and F:
        keys = Draw(list(range(K)))
        keys.begin(case, 1)
        dropping = Dropping(keys.keys("here"), 0.4, F * draw.choice([1, 3]))
        factor = dropping.factor(x.float()).double()
        close(native.drop(x, dropping), x.double() * factor, dtype)
    dropped = x.double() * factor
    close(native.dots(x, M, dropping), dropped @ M.double().mT, dtype)
    expected = y.double() + z.double() @ M.double()
    native.update_(y, z, M)
    close(y, expected, dtype)
    others = tensor(2, R, F)
    places = torch.tensor([draw.choice([0, 1]) for _ in range(K)], dtype=torch.int64)
    close(native.dots(x, others, dropping, places), dropped @ others[places].double().mT, dtype)
    expected = y.double() + z.double() @ others[places].double()
    native.update_(y, z, others, places)
    close(y, expected, dtype)
    for given in (M, None):
        dM, dx = native.outer(x, z, given, dropping)
        close(dM, z.double().mT @ dropped, dtype)
        if given is not None:
            close(dx, (z.double() @ M.double()) * factor, dtype)
    shift = 0.0 if bias is None else bias.double()
    close(native.scale_rows(x, gain, bias), (x.double() - shift) * gain.double()[:, None] + shift, dtype)
    g = tensor(K, N, F, dtype=dtype)
    dt, dgain = native.scale_rows_backward(g, x, gain, bias)
    close(dt, g.double() * gain.double()[:, None], dtype)
    close(dgain, ((x.double() - shift) * g.double()).sum(1), dtype)
print("all cases")
"""


def library(name: str) -> str | None:
    """The sanitizer's run-time library of the compiler that is used; None where it has none."""
    compiler = (os.environ.get("CC") or "cc").split()
    if shutil.which(compiler[0]) is None:
        return None
    path = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return os.path.realpath(path) if os.path.isabs(path) else None


PRELOADED = [library(name) for name in ("libasan.so", "libubsan.so")]
needed = pytest.mark.skipif(
    native.library() is None or None in PRELOADED, reason="no compiled passes here, or a compiler without sanitizers"
)


def sanitized(tmp_path: Path, *words: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path), "LD_PRELOAD": " ".join(PRELOADED)}
    environment["ASAN_OPTIONS"] = (
        "detect_leaks=0:abort_on_error=0:exitcode=86:allocator_may_return_null=1"  # Python leaks by design
    )
    command = [sys.executable, "-c", PROGRAM, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


@needed
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_no_pass_reads_or_writes_beside_its_tensors(tmp_path, seed):
    done = sanitized(tmp_path, seed)
    assert done.returncode == 0 and "all cases" in done.stdout, done.stderr[-4000:]


PLANTED = {
    "a read beside": (
        "for (size f = 0; f < count; f++) out[f] = LOAD(x[f]);",
        "for (size f = 0; f <= count; f++) out[f] = LOAD(x[f]);",
    ),
    "a write beside": ("for (size r = 0; r < rows * R; r++) out[r] = 0;", "for (size r = 0; r <= rows * R; r++) out[r] = 0;"),
}


@needed
@pytest.mark.slow
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(tmp_path, fault):
    """By one element, at a place that only some shapes reach."""
    before, after = PLANTED[fault]
    source = native.SOURCE.read_text()
    assert before in source
    (tmp_path / "native.c").write_text(source.replace(before, after, 1))
    done = sanitized(tmp_path, 0, tmp_path / "native.c")
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr and "overflow" in done.stderr, done.stderr[-4000:]
