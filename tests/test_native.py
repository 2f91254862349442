"""The CPU's compiled passes compute what the plain versions compute, and are left out where they cannot be had."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rankwise import variants
from rankwise.experiments.data.draws import shuffled
from rankwise.variants import native
from rankwise.variants.adapter.draws import Draw, Dropping
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.rows import Rows
from rankwise.variants.adapter.step import Step
from rankwise.variants.lowrank.magnitude import Recomposed
from rankwise.variants.lowrank.products import LowRankProduct, NativeProduct

from tests.tiny import tiny

ROOT = Path(__file__).parent.parent
needed = pytest.mark.skipif(native.library() is None, reason=f"no compiled passes here: {native.library.reason}")
# K members, N rows, I in, O out, R slots: nothing divides anything, more features than a chunk of 1024, one row.
SHAPES = [(3, 7, 33, 41, 5), (1, 1, 8, 8, 1), (2, 10, 1500, 1031, 9), (1, 64, 130, 67, 4), (16, 3, 24, 40, 12)]


def dropping(K: int, pitch: int, rate: float = 0.3) -> Dropping:
    draw = Draw(list(range(K)))
    draw.begin(3, 1)
    return Dropping(draw.keys("here"), rate, pitch)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@needed
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("K, N, I, O, R", SHAPES)
def test_the_product_and_its_gradients_are_the_plain_ones(K, N, I, O, R, rate, dtype, tolerance):
    y, x = random(K * N, O, seed=0, dtype=dtype), random(K * N, I, seed=1, dtype=dtype)
    A, B, c = random(K, R, I, seed=2), random(K, O, R, seed=3), random(K, R, seed=4)
    g = random(K * N, O, seed=5, dtype=dtype)
    which = dropping(K, I, rate) if rate else None

    leaves = [t.clone().requires_grad_() for t in (y, x, A, B, c)]
    out = NativeProduct.apply(leaves[0].clone(), *leaves[1:], which, Rows(K))
    out.backward(g)

    plain = [t.double().requires_grad_() for t in (y, x, A, B, c)]
    apart = [t.view(K, N, -1) for t in plain[:2]]
    dropped = apart[1] * which.factor(apart[1]) if rate else apart[1]
    expected = LowRankProduct.apply(apart[0], dropped, *plain[2:]).view(K * N, O)
    expected.backward(g.double())

    assert out.dtype == dtype
    for name, ours, theirs in zip(
        ["outputs", "y", "x", "A", "B", "c"],
        [out, *(t.grad for t in leaves)],
        [expected, *(t.grad for t in plain)],
        strict=True,
    ):
        scale = theirs.abs().max()
        assert (ours.double() - theirs).abs().max() <= tolerance * scale, name


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 6])
def test_the_same_elements_are_dropped_bit_for_bit(dtype, tokens):
    x = random(3, 5, 37, seed=0, dtype=dtype)
    which = dropping(3, 37 * tokens, 0.4)
    expected = (x.float() * which.factor(x.float())).to(dtype)
    assert torch.equal(native.drop(x, which), expected)
    assert 0.3 < (expected == 0).double().mean() < 0.5


@needed
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_gain_is_the_plain_one_and_leaves_the_bias_alone(has_bias, dtype, tolerance):
    K, N, O = 3, 7, 70
    t, gain, bias = random(K, N, O, seed=0, dtype=dtype), random(K, O, seed=1), random(O, seed=2) if has_bias else None
    expected = gain[:, None] * t if bias is None else gain[:, None] * (t - bias) + bias
    narrow, wide = Recomposed.apply(t, gain, bias, True), Recomposed.apply(t, gain, bias)
    assert narrow.dtype == dtype and wide.dtype == torch.float32
    torch.testing.assert_close(narrow.float(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(wide, expected, rtol=1e-5, atol=1e-5)


@needed
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_gain_s_gradients_are_the_plain_ones(has_bias):
    K, N, O = 3, 7, 70
    t, gain, bias, g = (
        random(K, N, O, seed=0),
        random(K, O, seed=1),
        random(O, seed=2) if has_bias else None,
        random(K, N, O, seed=3),
    )
    found = []
    for kind in (torch.float32, torch.float64):  # float64 has no compiled pass
        leaves = [t.detach().to(kind, copy=True).requires_grad_(), gain.detach().to(kind, copy=True).requires_grad_()]
        Recomposed.apply(*leaves, None if bias is None else bias.to(kind)).backward(g.to(kind))
        found.append([leaf.grad.double() for leaf in leaves])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@needed
def test_results_do_not_depend_on_the_number_of_threads():
    K, N, I, O, R = 3, 29, 200, 130, 7
    x, y, A, B, c = (random(*s, seed=i) for i, s in enumerate([(K * N, I), (K * N, O), (K, R, I), (K, O, R), (K, R)]))
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, A, B)]
            out = NativeProduct.apply(y.clone(), *leaves, c, dropping(K, I), Rows(K))
            out.sum().backward()
            found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@needed
def test_infinities_and_nan_stay_what_they_are():
    x = torch.ones(1, 2, 40)
    x[0, 0, 3], x[0, 1, 5] = torch.inf, torch.nan
    z = native.dots(x, torch.ones(1, 5, 40), None)
    assert z[0, 0].isinf().all() and z[0, 1].isnan().all()
    y = torch.zeros(1, 2, 3, dtype=torch.bfloat16)
    native.update_(y, torch.tensor([[[torch.inf], [torch.nan]]]), torch.ones(1, 1, 3))
    assert y[0, 0].isinf().all() and y[0, 1].isnan().all()


@needed
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_sums_are_fp32_whatever_torch_takes_by_default(default):
    x, A, z = random(2, 5, 24, seed=0), random(2, 3, 24, seed=1), random(2, 5, 3, seed=2)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        found = [native.dots(x, A, None), *native.outer(x, z, A, None), *native.scale_rows_backward(x, x, A[:, 0], None)]
    finally:
        torch.set_default_dtype(before)
    expected = [x @ A.mT, z.mT @ x, z @ A, x * A[:, :1], (x * x).sum(1)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@needed
def test_what_a_hook_kept_of_the_base_s_output_is_left_alone():
    base = torch.nn.Linear(6, 5)
    kept = []
    base.register_forward_hook(lambda module, args, output: kept.append(output))
    model = torch.nn.Sequential(base)
    adapter = variants.create("lora", rank=2).attach(model, ["0"])
    fill(adapter)
    x = random(3, 6, seed=0)
    changed = model(x)
    assert torch.equal(kept[0], x @ base.weight.T + base.bias) or torch.allclose(kept[0], base(x))
    assert not torch.allclose(changed, kept[0])


@needed
@pytest.mark.slow
def test_a_cut_off_file_in_the_cache_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "rankwise" / "native"
    folder.mkdir(parents=True, mode=0o700)
    built = native._built(folder)
    built.write_bytes(b"cut")
    assert native.library.__wrapped__() is not None and built.stat().st_size > 1000


@needed
def test_a_cache_that_others_may_write_to_is_not_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "rankwise" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert native.library.__wrapped__() is None and "not this user's alone" in native.library.reason


PROGRAM = """
import torch
from rankwise import variants
from tests.tiny import tiny
from rankwise.variants import native
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
fixed = {"rank": [2, 3, 5]}
for method, settings in (("lora", fixed), ("dora", fixed), ("adalora", {"initial_rank": 4, "target_rank": 2})):
    model = tiny("bert").float().train()
    adapter = variants.create(method, members=3, dropout=0.3, **settings).attach(model)
    fill(adapter)
    adapter.begin(Step(2, 1000))
    ids = torch.arange(1, 55).view(9, 6)
    out = model(input_ids=ids).logits
    out.square().sum().backward()
    print(*(f"{v:.4e}" for v in [*out.flatten().tolist(), *(p.grad.norm().item() for p in adapter.parameters())]))
print(native.library() is not None)
"""


def program(monkeypatch, tmp_path, **environment: str) -> tuple[list[float], bool]:
    for name, value in {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path), **environment}.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    *lines, used = done.stdout.split("\n")[:-1]
    return [float(word) for line in lines for word in line.split()], used == "True"


@pytest.mark.slow
def test_a_model_trains_the_same_with_and_without_them_and_without_a_compiler(monkeypatch, tmp_path):
    plain, used = program(monkeypatch, tmp_path, RANKWISE_NATIVE="0")
    assert not used
    without, used = program(monkeypatch, tmp_path, RANKWISE_NATIVE="1", CC="/no/such/compiler")
    assert not used and without == plain
    monkeypatch.delenv("CC")
    if native.library() is not None:
        compiled, used = program(monkeypatch, tmp_path, RANKWISE_NATIVE="1")
        assert used and any(tmp_path.rglob("*.so"))
        torch.testing.assert_close(torch.tensor(compiled), torch.tensor(plain), rtol=2e-3, atol=1e-5)


@needed
def test_gradients_reach_the_base_when_its_output_is_changed_in_place():
    """The site writes onto the base's own output: nothing that the base keeps for its backward pass may change by it."""
    model = tiny("bert").float().train()
    found = []
    for enabled in (True, False):
        adapter = variants.create("lora", rank=3, dropout=0.2).attach(model)
        fill(adapter)
        adapter.begin(Step(1, 10))
        if not enabled:
            adapter.double()
            model.double()
        ids = torch.tensor(shuffled(60, 1) % 60 + 1).view(6, 10)
        model(input_ids=ids).logits.square().sum().backward()
        found.append([p.grad.double() for p in adapter.parameters()])
        adapter.detach()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())
