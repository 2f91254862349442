"""AdamW's averages in 8 bits: the codes against a plain search, members apart, resumed to the bit, and how far it strays."""

import pytest
import torch
from rankwise.experiments import config
from rankwise.experiments.training.optim import MemberAdamW
from rankwise.experiments.training.stored_states import (
    BLOCK,
    LEAST,
    EightBitAdamW,
    OffloadedAdamW,
    decoded,
    dynamic_map,
    encoded,
)
from rankwise.variants.adapter.step import Group

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; on one: pytest -m gpu")
SHAPES = ((72, 61), (70,), (LEAST,), (48, 96))  # 4392 and 4608 numbers, no multiples of a block; one too small; at the least
SPREAD = 4  # orders of magnitude between the columns of a gradient
RATES = (1e-3, 3e-2, 5e-3)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(ks, kind=EightBitAdamW, device="cpu", rates=None):
    """Members `ks`, each with tensors of its own, and an optimizer over them."""
    params = [
        torch.nn.Parameter(torch.stack([draw(10 * k + i, *shape) for k in ks]).to(device)) for i, shape in enumerate(SHAPES)
    ]
    groups = [Group([p], lr_scale=1.0 + i, weight_decay=float(i % 2)) for i, p in enumerate(params)]
    rates = torch.tensor(rates or [RATES[k] for k in ks], dtype=torch.float64, device=device)
    return kind(groups, rates, 0.1), params


def stepped(optimizer, params, ks, step, taken=None):
    for i, p in enumerate(params):
        uneven = 10.0 ** torch.linspace(-SPREAD, 0, SHAPES[i][-1])
        p.grad = torch.stack([draw(1000 * step + 10 * k + i, *SHAPES[i]) * uneven for k in ks]).to(p)
    optimizer.step(0.7, taken)
    optimizer.zero_grad()


def test_the_codes_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        torch.testing.assert_close(
            dynamic_map(signed, "cpu"), functional.create_dynamic_map(signed=signed), rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("signed", [True, False])
def test_each_number_has_the_nearest_code_of_its_block(signed):
    values = draw(3, 2, 72, 61) * 10.0 ** torch.linspace(-5, 0, 61)
    values[0, 0, :2] = 0
    values = values if signed else values.abs()
    found, scales = encoded(values, signed)
    codes = dynamic_map(signed, "cpu")
    back = decoded(found, scales, signed).view(values.shape)
    for member in range(2):
        flat = values[member].flatten()
        for start in range(0, len(flat), BLOCK):
            block = flat[start : start + BLOCK]
            scale = block.abs().max()
            assert scales[member, start // BLOCK] == scale
            for value, code in zip(block, found[member, start : start + BLOCK].long(), strict=True):
                least = (value / scale - codes).abs().min()
                assert (value / scale - codes[code]).abs() <= least + 1e-9 or (not signed and value > 0 and code == 1)
    assert ((back - values).norm() / values.norm()).item() < 0.015
    assert signed or bool(((back > 0) == (values > 0)).all())


def test_members_packed_are_members_alone():
    ks = [0, 1, 2]
    packed, params = made(ks)
    for step in range(5):
        stepped(packed, params, ks, step)
    for k in ks:
        alone, own = made([k])
        for step in range(5):
            stepped(alone, own, [k], step)
        for p, q in zip(params, own, strict=True):
            assert torch.equal(p[k], q[0])
        for name, tensor in alone.state().items():
            assert torch.equal(tensor[0], packed.state()[name][k]), name


def test_a_member_that_is_not_taken_stays_bit_for_bit():
    ks = [0, 1, 2]
    optimizer, params = made(ks)
    stepped(optimizer, params, ks, 0)
    before = [t.detach().clone() for t in (*params, *optimizer.state().values())]
    stepped(optimizer, params, ks, 1, torch.tensor([True, False, True]))
    for old, new in zip(before, (*params, *optimizer.state().values()), strict=True):
        assert torch.equal(old[1], new[1]) and not torch.equal(old[0], new[0])


def test_a_run_that_goes_on_ends_bit_for_bit():
    ks = [0, 1]
    whole, params = made(ks)
    for step in range(3):
        stepped(whole, params, ks, step)
    other, copies = made(ks)
    for p, q in zip(copies, params, strict=True):
        p.data.copy_(q)
    other.load_state({name: tensor.clone() for name, tensor in whole.state().items()})
    for one, own in ((whole, params), (other, copies)):
        stepped(one, own, ks, 9)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_slots_that_go_take_their_averages_with_them():
    """A tensor of 8-bit averages shrinks below the least that is kept so, and its averages stay those of its rows."""
    optimizer, params = made([0])
    stepped(optimizer, params, [0], 0)
    optimizer._open(0)
    expected = optimizer.first[0][:, :8].clone()
    optimizer._close(0)

    def change(tensor):
        return tensor[:, :8].clone()

    change.new = lambda dim: torch.zeros(1, 8, dtype=torch.bool)
    params[0].data = change(params[0].data)
    optimizer.follow([(params[0], change)])
    optimizer._open(0)
    assert optimizer.first[0].shape == (1, 8, 61)
    torch.testing.assert_close(optimizer.first[0], expected, rtol=0.02, atol=float(expected.abs().max()) * 0.01)


def test_it_takes_a_quarter_of_the_memory_and_small_tensors_stay_exact():
    optimizer, params = made([0, 1])
    plain, _ = made([0, 1], MemberAdamW)
    sizes = [
        sum(t.numel() * t.element_size() for name, t in one.state().items() if f".{2}" in name) for one in (optimizer, plain)
    ]
    assert sizes[0] / sizes[1] == pytest.approx((1 + 4 / BLOCK) / 4, rel=0.01)
    for step in range(4):
        stepped(optimizer, params, [0, 1], step)
    exact, own = made([0, 1], MemberAdamW)
    for step in range(4):
        stepped(exact, own, [0, 1], step)
    assert torch.equal(params[1], own[1])  # 70 numbers
    assert not torch.equal(params[0], own[0])


def test_it_strays_little_from_the_exact_step_and_no_step_is_unbounded():
    """Columns of the gradient lie four orders of magnitude apart, so that small averages of a block have few codes."""
    optimizer, params = made([0, 1, 2])
    exact, own = made([0, 1, 2], MemberAdamW)
    start = [p.detach().clone() for p in params]
    for step in range(10):
        stepped(optimizer, params, [0, 1, 2], step)
        stepped(exact, own, [0, 1, 2], step)
    for p, q, first in zip(params, own, start, strict=True):
        moved = (q - first).norm()
        assert (p - q).norm() / moved < 0.25
        assert (p - first).abs().max() < 2.5 * (q - first).abs().max()


def test_codes_of_the_second_average_itself_would_stray_further():
    """What the root is for."""

    class OfTheAverage(EightBitAdamW):
        def store(self, average, is_second):
            return super().store(average.square() if is_second else average, is_second)

        def whole(self, parts, shape, like):
            found = super().whole(parts, shape, like)
            return found.sqrt() if "root_codes" in parts else found

    ended = {}
    for kind in (EightBitAdamW, OfTheAverage, MemberAdamW):
        optimizer, params = made([0], kind)
        start = params[0].detach().clone()
        for step in range(10):
            stepped(optimizer, params, [0], step)
        ended[kind] = params[0].detach()
    moved = (ended[MemberAdamW] - start).norm()
    root, average = (float((ended[kind] - ended[MemberAdamW]).norm() / moved) for kind in (EightBitAdamW, OfTheAverage))
    assert root < 0.1 and average > 0.25


def test_runs_of_before_keep_their_identity():
    assert "optimizer_states" not in config.Training().identity()
    assert config.Training(optimizer_states="8-bit").identity()["optimizer_states"] == "8-bit"


def test_offloading_on_a_cpu_is_refused():
    from rankwise.experiments.study import Runner

    raw = {"model": "m", "task": "glue/stsb", "quick": True, "training": {"optimizer_states": "offloaded"}}
    study = config.parse({**raw, "methods": [{"method": "lora", "rank": 2, "learning_rate": 1e-3}]}, "mine")
    with pytest.raises(ValueError, match="has no effect on a CPU"):
        Runner(study, "nowhere", device="cpu")


@pytest.mark.gpu
@NEEDS_GPU
def test_offloaded_averages_are_the_plain_ones_in_the_other_memory():
    optimizer, params = made([0, 1], OffloadedAdamW, "cuda")
    plain, own = made([0, 1], MemberAdamW, "cuda")
    for step in range(4):
        stepped(optimizer, params, [0, 1], step)
        stepped(plain, own, [0, 1], step)
    assert all(torch.equal(p, q) for p, q in zip(params, own, strict=True))
    assert all(t.device.type == "cpu" for name, t in optimizer.state().items() if name.startswith(("first", "second")))


@pytest.mark.gpu
@NEEDS_GPU
def test_eight_bits_on_a_gpu_are_those_of_the_cpu():
    optimizer, params = made([0, 1], EightBitAdamW, "cuda")
    here, own = made([0, 1])
    for step in range(4):
        stepped(optimizer, params, [0, 1], step)
        stepped(here, own, [0, 1], step)
    for p, q in zip(params, own, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-2, atol=1e-2)


def test_offloaded_averages_take_the_same_steps():
    """On a CPU, where there is nowhere else to put them, the arithmetic alone."""
    optimizer, params = made([0, 1], OffloadedAdamW)
    plain, own = made([0, 1], MemberAdamW)
    for step in range(4):
        stepped(optimizer, params, [0, 1], step)
        stepped(plain, own, [0, 1], step)
    assert all(torch.equal(p, q) for p, q in zip(params, own, strict=True))
