"""Models that a plain attach got wrong: fused layers, wrappers, and attaches or merges that fail."""

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.probe import fill
from torch import nn


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True), 2)


@pytest.mark.parametrize("padded", [False, True])
def test_a_fused_encoder_layer_calls_the_adapter_in_evaluation(padded):
    model, x = encoder(), torch.randn(2, 5, 32)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    nested = model.use_nested_tensor
    adapter = variants.create("lora", rank=4, alpha=6).attach(model, targets=["linear1", "linear2"], head=[])
    fill(adapter)
    seen = ~mask if padded else torch.ones(2, 5, dtype=torch.bool)
    trained = model.train()(x, src_key_padding_mask=mask).detach()
    with torch.no_grad():
        scored = model.eval()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(scored[seen], trained[seen], atol=1e-5, rtol=1e-5)
    adapter.detach()
    assert model.use_nested_tensor == nested
    assert not any(module._forward_hooks for module in model.modules())


def test_a_compiled_model_is_attached_to_by_its_plain_names():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    adapter = variants.create("lora", rank=2, alpha=3).attach(torch.compile(model, backend="eager"), head=[])
    assert adapter.model is model
    assert [name for name, _ in adapter.named_sites()] == ["0", "1"]


class Experts(nn.Module):
    """Four experts in one parameter (4, 6, 5), beside what is no stack of weights: a class token (1, 1, 5)."""

    def __init__(self, fused: bool):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 5))
        self.router, self.conv = nn.Linear(5, 4), nn.Conv1d(2, 3, 2)
        if fused:
            self.down = nn.Parameter(torch.zeros(4, 6, 5))


def test_fused_experts_that_all_linear_leaves_out_are_named_with_their_share():
    layer = Experts(fused=True)
    with pytest.warns(UserWarning, match=r"leaves out 73% .*\(0\)"):  # 120 of 120 + 5 + 24 + 15 = 164: 73.2
        variants.create("lora", rank=2).attach(nn.Sequential(layer), head=[])


@pytest.mark.filterwarnings("error")
def test_tokens_convolutions_and_chosen_targets_are_not_warned_of():
    variants.create("lora", rank=2).attach(nn.Sequential(Experts(fused=False)), head=[])
    variants.create("lora", rank=2).attach(nn.Sequential(Experts(fused=True)), targets=["router"], head=[])
    several = variants.create("lora", rank=2, members=3)  # whose own factors are stacks (K, R, I)
    several.attach(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), head=[])


def test_an_attach_that_fails_at_its_last_step_leaves_the_model_as_it_was(monkeypatch):
    def fail(adapter):
        raise RuntimeError("planted")

    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    with monkeypatch.context() as patch:
        patch.setattr(variants, "open_door", fail, raising=False)
        with pytest.raises(RuntimeError, match="planted"):
            variants.create("lora", rank=2).attach(model, head=[])
    assert [type(module) for module in model] == [nn.Linear, nn.Linear]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_wrappers_are_refused_with_the_remedy():
    for wrapped, remedy in (
        (nn.DataParallel(nn.Linear(5, 7)), "attach first, wrap afterwards"),
        (nn.Sequential(torch.compile(nn.Linear(5, 7), backend="eager")), "attach first, compile afterwards"),
    ):
        with pytest.raises(ValueError, match=remedy):
            variants.create("lora", rank=2).attach(wrapped, head=[])


def test_a_method_that_cannot_be_merged_says_so():
    adapter = variants.create("lora", rank=2).attach(nn.Sequential(nn.Linear(5, 7)), head=[])
    adapter.mergeable = False
    with pytest.raises(ValueError, match="lora cannot be merged"):
        adapter.merge()
