"""Partial and gradual unfreezing beside torch's own optimizer over the parameters that they name, and what is refused."""

import pytest
import torch
from rankwise import variants
from rankwise.experiments.training.optim import MemberAdamW
from rankwise.variants.adapter.step import Step
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from tests.loop import outputs
from tests.tiny import batch, tiny

RATE, DECAY, TOTAL = 1e-2, 0.1, 8
FREE = ["bias", "layer.1"]  # every bias, and all of the upper layer


def loss_of(model: nn.Module, step: int) -> Tensor:
    return nn.functional.cross_entropy(outputs(model, batch(3, step)), batch(3, step)["labels"])


def trained(adapter: variants.Adapter, steps: range, state: dict | None = None) -> tuple[list[float], dict]:
    """Losses of these steps under the trainer's optimizer, and all that a run which goes on needs."""
    optimizer = MemberAdamW(adapter.parameter_groups(), torch.tensor([RATE], dtype=torch.float64), DECAY)
    if state is not None:
        adapter.load_state_dict(state["adapter"])
        optimizer.load_state(state["optimizer"])
    adapter.model.eval()
    losses = []
    for index in steps:
        step = Step(index, TOTAL)
        adapter.begin(step)
        loss = loss_of(adapter.model, index)
        loss.backward()
        adapter.before_step(step)
        optimizer.step(1.0)
        adapter.after_step(step)
        optimizer.follow(adapter.take_changes())
        optimizer.zero_grad()
        losses.append(loss.item())
    kept = {"adapter": adapter.state_dict(), "optimizer": optimizer.state()}
    return losses, {name: {key: value.clone() for key, value in one.items()} for name, one in kept.items()}


def plain(names_at, steps: int = TOTAL) -> tuple[list[float], nn.Module]:
    """torch.optim.AdamW over the model's parameters; `names_at(step)` says which have a gradient then."""
    model = tiny("bert").eval()
    norms = {f"{n}.{key}" for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) for key in ("weight", "bias")}
    named = dict(model.named_parameters())
    bare = [p for n, p in named.items() if n.endswith("bias") or n in norms]
    rest = [p for n, p in named.items() if not (n.endswith("bias") or n in norms)]
    groups = [{"params": rest, "weight_decay": DECAY}, {"params": bare, "weight_decay": 0.0}]
    optimizer, losses = torch.optim.AdamW(groups, lr=RATE), []
    for index in range(1, steps + 1):
        loss = loss_of(model, index)
        loss.backward()
        for name, parameter in named.items():
            if name not in names_at(index):
                parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def free(name: str) -> bool:
    return name.endswith(".bias") or ".layer.1." in name or name.startswith("classifier")


def test_partial_trains_what_is_named_as_torch_does_and_nothing_else():
    adapter = variants.create("partial", patterns=FREE).attach(tiny("bert"))
    names = {name for name in dict(tiny("bert").named_parameters()) if free(name)}
    assert adapter.trained_names() == names
    losses, _ = trained(adapter, range(1, TOTAL + 1))
    expected, reference = plain(lambda step: names)
    assert losses == pytest.approx(expected, rel=1e-11)
    before = dict(tiny("bert").named_parameters())
    for name, value in reference.named_parameters():
        module, _, key = name.rpartition(".")
        now = adapter.model.get_submodule(module)._parameters.get(key)
        now = getattr(adapter.model.get_submodule(module), key) if now is None else now
        torch.testing.assert_close(now, value, rtol=1e-9, atol=1e-11)
        assert torch.equal(now, before[name]) == (name not in names)
    sizes = sum(value.numel() for name, value in before.items() if name in names and not name.startswith("classifier"))
    assert adapter.parameter_counts()["trainable"].tolist() == [sizes]
    assert adapter.changed_weights() and all(".layer.1." in name for name in adapter.changed_weights())


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("bert", "embeddings", "classifier"), ("gpt2", "wte", "ln_f"), ("llama", "embed_tokens", "model.norm")],
)
def test_top_layers_are_the_last_ones_and_what_follows_them(name, before, after):
    adapter = variants.create("partial", patterns=["top-1"]).attach(tiny(name, torch.bfloat16))
    names = adapter.trained_names()
    assert any(after in one for one in names) and not any(before in one for one in names)
    assert any(".1." in one for one in names) and not any(".layer.0." in one or ".layers.0." in one for one in names)
    loss_of(adapter.model, 1).backward()  # over a 16-bit base, which is frozen in full precision beside them
    assert all(parameter.dtype == torch.float32 and parameter.grad is not None for parameter in adapter.parameters())
    assert {p.dtype for p in adapter.detach().parameters()} == {torch.bfloat16}


def test_two_layers_of_gpt2_medium_are_the_papers_25_million():
    """LoRA's Table 3: 25.19M of GPT-2 M; the output layer, which is tied to the embeddings, stays."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    adapter = variants.create("partial").attach(model)
    assert adapter.parameter_counts()["trainable"].tolist() == [2 * (12 * 1024**2 + 13 * 1024) + 2 * 1024]


def depth(name: str) -> int:
    """Of BERT's two layers, from the top: the head and the pooler, two layers, the embeddings."""
    return 3 if "embeddings" in name else 2 if ".layer.0." in name else 1 if ".layer.1." in name else 0


@pytest.mark.parametrize(("interval", "opened"), [(2, [1, 1, 2, 2, 3, 3, 4, 4]), (3, [1, 1, 1, 2, 2, 2, 3, 3]), (None, None)])
def test_gradual_opens_layer_after_layer_as_torch_would(interval, opened):
    opened = opened or [1, 1, 2, 2, 3, 3, 4, 4]  # four groups share eight steps
    adapter = variants.create("gradual", interval=interval).attach(tiny("bert"))
    losses, _ = trained(adapter, range(1, TOTAL + 1))
    every = list(dict(tiny("bert").named_parameters()))
    expected, _ = plain(lambda step: {name for name in every if depth(name) < opened[step - 1]})
    assert losses == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("stop", [2, 3, 6])
def test_gradual_goes_on_bit_for_bit(stop):
    def attached() -> variants.Adapter:
        return variants.create("gradual", interval=2).attach(tiny("bert"))

    losses, final = trained(attached(), range(1, TOTAL + 1))
    first, state = trained(attached(), range(1, stop + 1))
    rest, again = trained(attached(), range(stop + 1, TOTAL + 1), state)
    assert first + rest == losses
    for part, tensors in final.items():
        assert tensors.keys() == again[part].keys()
        assert all(torch.equal(value, again[part][name]) for name, value in tensors.items())


def test_the_file_holds_what_was_trained_alone(tmp_path):
    adapter = variants.create("partial", patterns=FREE).attach(tiny("bert"))
    trained(adapter, range(1, 4))
    variants.save_pretrained(adapter, tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == adapter.trained_names()
    model = tiny("bert").eval()
    again = variants.load_pretrained(model, tmp_path)
    assert again.settings == adapter.settings and torch.equal(outputs(model, batch(0)), outputs(adapter.model, batch(0)))


def test_what_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match=r'patterns: "qeury" means no parameter of BertFor.* outside its head; did you mean "query"'
    ):
        variants.create("partial", patterns=["qeury"]).attach(tiny("bert"))
    with pytest.raises(ValueError, match=r'patterns.*is empty.*take the method "head"'):
        variants.create("partial", patterns=[])
    for settings in ({"patterns": ["top-2"]}, {}):
        method = "partial" if settings else "gradual"
        with pytest.raises(ValueError, match=r"Sequential has no stack of layers \(nn\.ModuleList\)"):
            variants.create(method, **settings).attach(nn.Sequential(nn.Linear(3, 2)), head=[])
    with pytest.raises(variants.NotPackable):
        variants.create("gradual", members=2)
