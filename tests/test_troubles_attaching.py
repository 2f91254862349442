"""What people report of attaching and merging: fused layers, heads, wrappers, experts, and attaches that fail half-way."""

import warnings

import pytest
import torch
import transformers
from rankwise import variants
from rankwise.variants.adapter.probe import fill
from torch import nn

from tests import contract
from tests.tiny import tiny

SIZES = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0}
IDS = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(0))


def bert(dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, hidden_dropout_prob=dropout))


# -- layers that read weights without calling their modules ---------------------------------------------------------------


class ReadsAWeight(nn.Module):
    """Applies one linear by its weight alone, as attention that is written by hand does."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(5, 5), nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.called(nn.functional.linear(x, self.read.weight, self.read.bias))


@pytest.mark.parametrize("members", [1, 3])
def test_a_linear_whose_weight_is_read_without_a_call_is_named_once(members):
    model, x = ReadsAWeight(), torch.randn(6, 5)
    variants.create("lora", members=members, rank=2).attach(model, ["read", "called"], head=[], calibration=x)
    with pytest.warns(UserWarning, match=r"lora has no effect at 1 of 2 modules, .* did not call: read\. "):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)


def test_a_model_that_calls_every_adapted_module_is_not_warned_of():
    model = bert()
    variants.create("lora", rank=2).attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS)


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


@pytest.mark.parametrize("target", ["self_attention.dense", "dense_4h_to_h", "all-linear"])
def test_blooms_sliced_weights_are_refused_and_its_plain_ones_adapted(target):
    sizes = {"vocab_size": 67, "hidden_size": 32, "n_layer": 1, "n_head": 4, "pretraining_tp": 2}
    model = transformers.BloomModel(transformers.BloomConfig(**sizes, slow_but_exact=True)).eval()
    with pytest.raises(ValueError, match=r"slices of its weight without calling.*slow_but_exact=False"):
        variants.create("lora", rank=2).attach(model, target, head=[])
    variants.create("lora", rank=2).attach(model, "query_key_value", head=[]).detach()
    plain = transformers.BloomModel(transformers.BloomConfig(**sizes, slow_but_exact=False)).eval()
    before = plain(input_ids=IDS)[0]
    fill(variants.create("lora", rank=2).attach(plain, target, head=[]))
    assert not torch.allclose(plain(input_ids=IDS)[0], before, atol=1e-4)


# -- the task head -------------------------------------------------------------------------------------------------------


def head_of(model: nn.Module) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapter = variants.create("lora", rank=2).attach(model, fresh_head=True)
    names = list(adapter.head_names)
    assert bool(names) == any("task head" in str(one.message) for one in said)  # its fresh start is said
    return names


@pytest.mark.parametrize("method", ["lora", "head", "full"])
@pytest.mark.filterwarnings("error")
def test_a_head_that_was_trained_before_is_kept(method):
    model = bert(0.0).eval()
    nn.init.normal_(model.classifier.weight)
    nn.init.normal_(model.classifier.bias)
    before = model(input_ids=IDS).logits
    variants.create(method, **({"rank": 2} if method == "lora" else {})).attach(model)
    assert torch.allclose(model(input_ids=IDS).logits, before, atol=1e-6)


def test_the_head_is_what_stands_outside_the_base_model():
    common = {"vocab_size": 67, "pad_token_id": 0, "num_labels": 3}
    bart = transformers.BartConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, eos_token_id=2,
                                   decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, bos_token_id=1,
                                   max_position_embeddings=64, **common)  # fmt: skip
    distil = transformers.DistilBertConfig(dim=32, n_layers=1, n_heads=4, hidden_dim=48, **common)
    assert head_of(transformers.BartForSequenceClassification(bart)) == ["classification_head"]
    assert head_of(transformers.DistilBertForSequenceClassification(distil)) == ["pre_classifier", "classifier"]
    assert head_of(bert()) == ["classifier"]
    llama = transformers.LlamaConfig(**{k: v for k, v in SIZES.items() if k != "num_labels"})
    assert head_of(transformers.LlamaForCausalLM(llama)) == []
    assert head_of(transformers.BartForConditionalGeneration(bart)) == []


# -- wrapped models ------------------------------------------------------------------------------------------------------


def test_a_compiled_model_is_attached_to_by_its_plain_names():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    adapter = variants.create("lora", rank=2, alpha=3).attach(torch.compile(model, backend="eager"), head=[])
    assert adapter.model is model
    assert [name for name, _ in adapter.named_sites()] == ["0", "1"]


def test_a_compiled_model_is_unwrapped_and_a_spread_one_refused(tmp_path):
    adapter = variants.create("lora", rank=2).attach(torch.compile(bert(), backend="eager"), targets=["query"], head=[])
    assert all(name.startswith("bert.") for name, _ in adapter.named_sites())
    variants.save_pretrained(adapter, tmp_path)
    variants.load_pretrained(bert(), tmp_path)
    with pytest.raises(ValueError, match=r"wrapped in DataParallel.*attach first, wrap afterwards"):
        variants.create("lora", rank=2).attach(nn.DataParallel(bert()), head=[])


def test_wrappers_are_refused_with_the_remedy():
    for wrapped, remedy in (
        (nn.DataParallel(nn.Linear(5, 7)), "attach first, wrap afterwards"),
        (nn.Sequential(torch.compile(nn.Linear(5, 7), backend="eager")), "attach first, compile afterwards"),
    ):
        with pytest.raises(ValueError, match=remedy):
            variants.create("lora", rank=2).attach(wrapped, head=[])


# -- experts in one tensor -----------------------------------------------------------------------------------------------


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


def test_fused_experts_that_all_linear_leaves_out_are_said():
    config = transformers.MixtralConfig(vocab_size=67, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                        num_key_value_heads=2, intermediate_size=48, num_local_experts=4)  # fmt: skip
    with pytest.warns(UserWarning, match=r"leaves out \d\d% of the parameters.*stacks of weights .*experts"):
        variants.create("lora", rank=2).attach(transformers.MixtralForCausalLM(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variants.create("lora", rank=2).attach(bert(), head=["classifier"])


# -- what fails ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("method", ["adalora", "truncated"])
def test_an_attach_that_fails_after_its_sites_are_in_leaves_the_model_as_it_was(method):
    """A target above what there is can only be seen once the sites are there."""
    model = bert()
    kinds = [type(module) for module in model.modules()]
    adapter = variants.create(method, initial_rank=3, target_rank=2, target_total=10**6)
    with pytest.raises(ValueError, match="1000000"):
        adapter.attach(model, ["query"], head=[])
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())
    variants.create("lora", rank=2).attach(model, ["query"], head=[])


@pytest.mark.parametrize("method", variants.METHODS)
def test_on_a_model_of_shapes_alone_ranks_and_counts_are_those_of_the_real_one(method):
    """On the meta device, before anything is downloaded: all but the methods that place rank by values, which say so."""
    real = contract.attached(method)
    kept, shapes_alone = {n: real.ranks()[n].tolist() for n in real.ranks()}, tiny("bert").to("meta")
    modules = [(name, type(module)) for name, module in shapes_alone.named_modules()]
    adapter = contract.create(method)
    if getattr(adapter, "reads_values", False):
        with pytest.raises(ValueError, match=f"{method} .*meta device"):
            contract.attach(adapter, shapes_alone, contract.TARGETS, fresh_head=False)
        assert [(name, type(module)) for name, module in shapes_alone.named_modules()] == modules
        assert all(parameter.requires_grad for parameter in shapes_alone.parameters())
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing was trained, and nobody is told that it was
        contract.attach(adapter, shapes_alone, contract.TARGETS, fresh_head=False)
        assert {name: rank.tolist() for name, rank in adapter.ranks().items()} == kept
    for what, count in real.parameter_counts().items():
        assert torch.equal(adapter.parameter_counts()[what].cpu(), count.cpu()), what
    trained = {name: parameter.shape for name, parameter in real.named_parameters()}
    assert {name: parameter.shape for name, parameter in adapter.named_parameters()} == trained
    if not adapter.trains_base:
        assert all(parameter.is_meta for name, parameter in adapter.named_parameters()), "memory for values that are not there"
    adapter.detach()
    assert [(name, type(module)) for name, module in shapes_alone.named_modules()] == modules


def test_a_method_that_cannot_be_merged_says_so():
    adapter = variants.create("lora", rank=2).attach(nn.Sequential(nn.Linear(5, 7)), head=[])
    adapter.mergeable = False
    with pytest.raises(ValueError, match="lora cannot be merged"):
        adapter.merge()
