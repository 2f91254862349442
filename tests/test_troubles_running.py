"""Troubles of a running model: activations recomputed by any door, two passes in a step, tracing, batch norms."""

import functools

import pytest
import torch
import transformers
from rankwise import variants
from rankwise.variants import native
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.loop import task_losses
from tests.tiny import packed_batch, tiny


def gradients(method: str, door: str, when: str = "after", name: str = "bert", **settings: object) -> list[torch.Tensor]:
    model = tiny(name)
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.p = 0.2  # of the base
    options = {"default": None, "reentrant": {"use_reentrant": True}, "plain": {"use_reentrant": False}}
    turn_on = functools.partial(model.gradient_checkpointing_enable, options.get(door))
    if door in options and when == "before":
        turn_on()
    adapter = variants.create(method, dropout=0.3, **settings).attach(model)
    if door in options and when == "after":
        turn_on()
    if door == "by hand":
        layers = [m for n, m in model.named_modules() if n.endswith(("layer.0", "layer.1", "albert_layers.0"))]
        assert layers
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    fill(adapter)
    adapter.begin(Step(1, 10))
    task_losses(adapter, packed_batch([0])).sum().backward()
    return [p.grad for p in adapter.parameters() if p.grad is not None]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("door", ["default", "plain", "reentrant", "by hand"])
def test_checkpointing_by_any_door_gives_the_gradients_of_the_plain_run(door, when):
    for one, other in zip(gradients("lora", "none", rank=2), gradients("lora", door, when, rank=2), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_shared_layer_computed_again_by_hand_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"context_fn=adapter\.draw\.recompute_contexts"):
        gradients("lora", "by hand", name="albert", rank=2)


def test_detach_restores_the_function_that_checkpoints():
    model = tiny("bert")
    model.gradient_checkpointing_enable()
    own = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    adapter = variants.create("lora", rank=2).attach(model)
    model.train()
    task_losses(adapter, packed_batch([0]))
    now = [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    assert not any(a is b for a, b in zip(own, now, strict=True))
    adapter.detach()
    assert own == [m._gradient_checkpointing_func for m in model.modules() if hasattr(m, "gradient_checkpointing")]


def test_a_second_pass_of_a_micro_batch_draws_anew_and_the_next_micro_batch_starts_over(tmp_path):
    model = tiny("bert").float()
    adapter = variants.create("lora", rank=2, dropout=0.3).attach(model)
    callback = variants.AdapterCallback(adapter)
    fill(adapter)
    batch = packed_batch([0])
    model.train()
    state = transformers.TrainerState(max_steps=4)

    def passes() -> list[torch.Tensor]:
        return [model(**batch).logits.detach() for _ in range(2)]

    callback.on_step_begin(None, state, None)
    one, two = passes()
    callback.on_substep_end(None, state, None)
    three, four = passes()
    callback.on_step_begin(None, state, None)
    assert not torch.equal(one, two) and not torch.equal(one, three) and not torch.equal(two, four)
    assert all(torch.equal(a, b) for a, b in zip((one, two), passes(), strict=True))


@pytest.mark.skipif(native.library() is None, reason="the compiled passes cannot be built here")
def test_the_compiled_passes_take_only_plain_memory_that_nobody_records():
    x = torch.ones(1, 2, 3)
    assert native.usable(x, wide=(nn.Parameter(x), None))
    for other in (x.to("meta"), x.to_sparse(), x.double(), nn.Buffer(x).as_subclass(type("Own", (torch.Tensor,), {}))):
        assert not native.usable(x, wide=(other,))
        assert not native.usable(other)
    asked = []
    torch.func.vmap(lambda t: asked.append(native.usable(x)) or t)(x)
    torch.jit.trace(lambda t: asked.append(native.usable(x)) or t + 1, x, check_trace=False)
    assert asked == [False, False]


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.classifier = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.norm(self.inner(x)))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_frozen_bases_batch_norm_never_moves_and_its_flag_is_its_own(method):
    model = Normed()
    before = {k: v.clone() for k, v in model.norm.named_buffers()}
    adapter = variants.create(method, **({"rank": 2} if method == "lora" else {})).attach(model, head=["classifier"])
    x = 3 + torch.randn(10, 8)
    trained = model.train()(x)
    assert model.norm.training
    torch.testing.assert_close(trained, model.eval()(x))
    adapter.detach()
    model.train()
    assert all(torch.equal(v, before[k]) for k, v in model.norm.named_buffers())
    model(x)
    assert not torch.equal(model.norm.running_mean, before["running_mean"])  # its own again
