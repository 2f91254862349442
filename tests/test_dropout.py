"""Dropout's keyed draws: the right rate, independent of one another, the same whatever happens around them."""

import functools
import itertools

import pytest
import torch
import torch.utils.checkpoint
from rankwise import variants
from rankwise.variants.adapter.draws import Draw, Dropping, KeyedDropout, drop
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
from torch import nn

from tests.loop import Loop, outputs, task_losses
from tests.tiny import packed_batch, tiny

CPU = torch.device("cpu")
COUNT = 200_000


def draw(seeds: list[int], step: int = 1, micro_batch: int = 0) -> Draw:
    made = Draw(seeds)
    made.begin(step, micro_batch)
    return made


def keep_mask(keys: torch.Tensor, count: int, rate: float) -> torch.Tensor:
    """Which of `count` elements of each member survive, (K, count) bool."""
    return Dropping(keys, rate, count).factor(torch.ones(len(keys), 1, count, device=CPU))[:, 0] != 0


def mask(seed: int = 0, step: int = 1, micro_batch: int = 0, site: str = "a", call: int = 0, rate: float = 0.3) -> torch.Tensor:
    keyed = draw([seed], step, micro_batch)
    for _ in range(call):
        keyed.keys(site)
    return keep_mask(keyed.keys(site), COUNT, rate)[0]


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.3, 0.5, 0.9])
def test_the_rate_is_right(rate):
    dropped = sum((~mask(seed=seed, rate=rate)).sum().item() for seed in range(5))
    sigma = (5 * COUNT * rate * (1 - rate)) ** 0.5
    assert abs(dropped - 5 * COUNT * rate) < 4 * sigma


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_survivors_are_scaled_so_that_the_mean_stays(dtype):
    x = torch.ones(1, COUNT, dtype=dtype)
    out = drop(x, 0.3, draw([0]), "a")
    assert out.unique().tolist() == [0.0, torch.tensor(1 / 0.7, dtype=dtype).item()]
    assert abs(out.double().mean().item() - 1) < 4 * (0.3 / 0.7 / COUNT) ** 0.5 + (0.01 if dtype == torch.bfloat16 else 0)


def test_every_type_has_the_same_elements_dropped():
    x = torch.randn(2, COUNT)
    zeros = [drop(x.to(dtype), 0.3, draw([0, 1]), "a") == 0 for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    assert torch.equal(zeros[0], zeros[1]) and torch.equal(zeros[0], zeros[2]) and zeros[0].any()


OTHERS = [{}, {"seed": 1}, {"step": 2}, {"micro_batch": 1}, {"site": "b"}, {"call": 1}, {"seed": 11}, {"step": 11}]


@pytest.mark.parametrize("one, other", list(itertools.combinations(OTHERS, 2)), ids=str)
def test_every_part_of_the_key_gives_an_independent_draw(one, other):
    agree = (mask(**one) == mask(**other)).double().mean().item()
    expected = 0.3**2 + 0.7**2
    assert abs(agree - expected) < 5 * (expected * (1 - expected) / COUNT) ** 0.5


@pytest.mark.parametrize("distance", [1, 2, 3, 7, 32, 48, 64, 1024, COUNT // 2])
def test_neighbouring_elements_are_independent(distance):
    kept = mask(rate=0.3)
    agree = (kept[distance:] == kept[:-distance]).double().mean().item()
    expected = 0.3**2 + 0.7**2
    assert abs(agree - expected) < 5 * (expected * (1 - expected) / len(kept[distance:])) ** 0.5


def test_no_stream_is_another_one_shifted():
    masks = [mask(seed=seed, rate=0.5)[:4000] for seed in range(6)]
    for one, other in itertools.combinations(masks, 2):
        agree = max((one[shift : shift + 2000] == other[:2000]).double().mean().item() for shift in range(0, 2000, 2))
        assert agree < 0.5 + 6 * 0.5 / 2000**0.5


def test_a_members_draw_does_not_depend_on_its_neighbours():
    x = torch.randn(3, 4, 7)
    packed = drop(x.flatten(0, 1), 0.4, draw([5, 3, 8]), "a").view(3, 4, 7)
    for k, seed in enumerate([5, 3, 8]):
        assert torch.equal(packed[k], drop(x[k], 0.4, draw([seed]), "a"))
    assert not torch.equal(packed[0] == 0, packed[1] == 0)


def test_members_of_one_seed_draw_the_same():
    x = torch.ones(2, 50)
    out = drop(x, 0.5, draw([4, 4]), "a")
    assert torch.equal(out[0], out[1])


def test_a_draw_does_not_depend_on_what_was_drawn_before():
    keyed = Draw([0])
    for step in range(5):
        keyed.begin(step, 0)
        keyed.keys("a"), keyed.keys("b")
    keyed.begin(7, 0)
    assert torch.equal(keyed.keys("a"), draw([0], 7).keys("a"))


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_odd_numbers_of_elements_are_drawn(count):
    assert keep_mask(draw([0, 1]).keys("a"), count, 0.5).shape == (2, count)


def test_a_rate_of_zero_changes_nothing_and_draws_nothing():
    keyed, x = draw([0]), torch.randn(3, 4)
    assert drop(x, 0.0, keyed, "a") is x and not keyed.calls


def test_the_gradient_is_dropped_where_the_value_was():
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: drop(v, 0.4, draw([0, 1]), "a"), x)


def test_rows_that_no_member_owns_are_refused():
    with pytest.raises(ValueError, match="dropout at here got 5 rows, which is no multiple of 2 members"):
        drop(torch.randn(5, 3), 0.1, draw([0, 1]), "here")


def test_without_a_trainer_dropout_is_pytorchs_own():
    model = tiny("bert")
    adapter = variants.create("lora", rank=2, dropout=0.3).attach(model)
    inputs = packed_batch([0])
    assert adapter.draw.step is None
    torch.manual_seed(0)
    first, second = outputs(model, inputs), outputs(model, inputs)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(outputs(model, inputs), first)
    module = KeyedDropout(0.3, Draw([0]), "a")
    torch.manual_seed(0)
    found = module(torch.ones(50))
    torch.manual_seed(0)
    assert torch.equal(found, nn.functional.dropout(torch.ones(50), 0.3))


def test_in_evaluation_nothing_is_dropped():
    adapter = variants.create("lora", rank=2, dropout=0.9).attach(tiny("bert"))
    fill(adapter)
    adapter.model.eval()
    plain = variants.create("lora", rank=2).attach(tiny("bert").eval())
    fill(plain)
    adapter.begin(Step(3, 10))
    assert torch.equal(outputs(adapter.model, packed_batch([0])), outputs(plain.model, packed_batch([0])))


def gradients(name: str, checkpointed: bool, keyed: bool = True) -> list[torch.Tensor]:
    model = tiny(name)
    model.config.use_cache = False
    adapter = variants.create("lora", rank=2, dropout=0.3, members=2).attach(model)
    if checkpointed:
        options = {"use_reentrant": False, "determinism_check": "none", "preserve_rng_state": False}
        options |= {"context_fn": adapter.draw.recompute_contexts} if keyed else {}
        layers = [m for n, m in model.named_modules() if n.endswith(("layer.0", "layers.0", "layer.1", "layers.1"))]
        for layer in layers:  # as transformers does it; by hand, because it does not for ALBERT
            layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, **options)
        assert layers
    fill(adapter)
    adapter.begin(Step(1, 10))
    losses = task_losses(adapter, packed_batch([0, 1]))
    losses.sum().backward()
    return [losses.detach(), *(p.grad for p in adapter.parameters())]


@pytest.mark.parametrize("name", ["bert", "llama", "albert"])
def test_gradient_checkpointing_with_recompute_contexts_changes_nothing(name):
    for one, other in zip(gradients(name, False), gradients(name, True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_gradient_checkpointing_without_the_contexts_draws_the_same_too():
    pairs = zip(gradients("bert", False), gradients("bert", True, keyed=False), strict=True)
    assert all(torch.allclose(one, other) for one, other in pairs)


def test_gradient_checkpointing_of_a_shared_layer_needs_recompute_contexts():
    with pytest.raises(ValueError, match="recompute_contexts"):
        gradients("albert", True, keyed=False)


def test_a_layer_that_is_called_many_times_draws_anew_each_time():
    model = tiny("albert")
    adapter = variants.create("lora", rank=2, dropout=0.3).attach(model)
    seen: dict[str, list[torch.Tensor]] = {}
    for module in model.modules():
        if isinstance(module, KeyedDropout) and module.site.endswith("output_dropout"):
            module.register_forward_hook(lambda m, args, out: seen.setdefault(m.site, []).append((out == 0) & (args[0] != 0)))
    adapter.begin(Step(1, 10))
    outputs(model, packed_batch([0], rows=8, length=12))
    ((first, second),) = seen.values()
    assert first.any() and not torch.equal(first, second)
    site = next(name for name, _ in adapter.named_sites())
    assert adapter.draw.calls[site] == 2
    adapter.begin(Step(1, 10))
    assert not adapter.draw.calls


def test_the_same_micro_batch_is_drawn_again_and_another_is_not():
    adapter = variants.create("lora", rank=2, dropout=0.3).attach(tiny("bert"))
    fill(adapter)

    def run(step: int, micro_batch: int) -> torch.Tensor:
        adapter.begin(Step(step, 10), micro_batch)
        return outputs(adapter.model, packed_batch([0]))

    assert torch.equal(run(2, 1), run(2, 1))
    assert len({run(step, micro).sum().item() for step, micro in ((2, 0), (2, 1), (3, 0), (1, 2))}) == 4


def test_dropout_inside_a_fused_kernel_is_off_and_named():
    for name, inside in (("bert", "attention.self.dropout"), ("llama", "self_attn.attention_dropout")):
        model = tiny(name)
        before = [getattr(layer, "attention_dropout", None) for layer in model.modules()]
        adapter = variants.create("lora", rank=2).attach(model)
        Loop(adapter).step(packed_batch([0]))
        silent = adapter.silent_dropout()
        assert len(silent) == 2 and all(site.endswith(inside) for site in silent)
        adapter.detach()
        assert [getattr(layer, "attention_dropout", None) for layer in model.modules()] == before
        assert name != "llama" or 0.1 in before


def test_drawn_dropout_is_not_called_silent():
    adapter = variants.create("lora", rank=2).attach(tiny("gpt2"))
    Loop(adapter).step(packed_batch([0]))
    assert all(site.endswith("attn_dropout") for site in adapter.silent_dropout())
    assert any(isinstance(m, KeyedDropout) and m.site.endswith("resid_dropout") for m in adapter.model.modules())
