"""What people report of a running model: activations recomputed, two passes in a step, tracing, offloading, batch norms."""

import functools
import subprocess
import sys
import warnings

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
from tests.tiny import batch, packed_batch, tiny


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
    (task_losses(adapter, packed_batch([0])) + adapter.penalty(Step(1, 10))).sum().backward()
    return [p.grad for p in adapter.parameters() if p.grad is not None]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("door", ["default", "plain", "reentrant", "by hand"])
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_checkpointing_by_any_door_gives_the_gradients_of_the_plain_run(method, door, when):
    settings = {"initial_rank": 4, "target_rank": 2} if method == "adalora" else {"rank": 2}
    for one, other in zip(gradients(method, "none", **settings), gradients(method, door, when, **settings), strict=True):
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


def test_two_passes_in_one_step_of_trainer_draw_apart(tmp_path):
    model = tiny("bert").float()
    adapter = variants.create("lora", rank=4).attach(model, head=["classifier"])
    apart = []

    class Twice(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            one, two = model(**inputs), model(**inputs)
            apart.append((one.logits - two.logits).abs().max().item())
            return (one.loss + two.loss) / 2

    data = [{"input_ids": row, "labels": int(row.sum()) % 3} for row in batch(0, rows=16)["input_ids"]]
    optimizer = torch.optim.AdamW(variants.torch_groups(adapter, lr=1e-2))
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    callback = variants.AdapterCallback(adapter)
    Twice(model, arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=[callback]).train()
    assert len(apart) == 4 and min(apart) > 0


def test_the_compiled_passes_take_only_plain_memory_that_nobody_records():
    x = torch.ones(1, 2, 3)
    assert native.usable(x) == native.usable(x, wide=(nn.Parameter(x), None)) == (native.library() is not None)
    for other in (x.to("meta"), x.to_sparse(), x.double(), nn.Buffer(x).as_subclass(type("Own", (torch.Tensor,), {}))):
        assert not native.usable(x, wide=(other,))
        assert not native.usable(other)
    asked = []
    torch.func.vmap(lambda t: asked.append(native.usable(x)) or t)(x)
    torch.jit.trace(lambda t: asked.append(native.usable(x)) or t + 1, x, check_trace=False)
    assert asked == [False, False]


def test_an_adapted_model_can_be_traced():
    model, ids = tiny("bert").float().eval(), batch(0)["input_ids"]
    adapter = variants.create("lora", rank=2).attach(model, head=["classifier"])
    fill(adapter)
    model.config.return_dict = False
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, ids, check_trace=False)
    assert torch.allclose(traced(ids)[0], model(ids)[0], atol=1e-5)


OFFLOADED = """
import tempfile, torch, transformers
from rankwise import variants
torch.manual_seed(0)
folder = tempfile.mkdtemp()
sizes = dict(vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
places = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "pooler": "disk"}
def load():
    return transformers.AutoModel.from_pretrained(folder, device_map=places, offload_folder=tempfile.mkdtemp()).eval()

model = load()
ids = torch.arange(3, 17).view(2, 7)
before = model(input_ids=ids)[0]
variants.create("lora", rank=4).attach(model, targets=["query"], head=[])
print("same", torch.allclose(model(input_ids=ids)[0], before, atol=1e-5))
try:
    variants.create("dora", rank=4).attach(load(), targets=["query"], head=[])
except ValueError as error:
    print("refused:", error)
"""


@pytest.mark.slow
def test_a_base_that_is_partly_on_disk_works_or_is_refused():
    done = subprocess.run([sys.executable, "-c", OFFLOADED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "same True" in done.stdout and "refused: encoder.layer.1" in done.stdout


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.classifier = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.norm(self.inner(x)))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_frozen_bases_batch_norm_never_moves_and_its_flag_is_its_own(method):
    model = Normed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = variants.create(method, **({"rank": 2} if method == "lora" else {})).attach(model, head=["classifier"])
    x = 3 + torch.randn(10, 8)
    trained = model.train()(x)
    assert model.norm.training
    assert torch.equal(trained, model.eval()(x))  # rows do not see each other, and both modes are one function
    adapter.detach()
    assert not model.norm.training and model.train().norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(x)
    assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])  # its own again
