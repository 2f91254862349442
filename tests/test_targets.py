"""Which modules a target means, and what is refused with the nearest name."""

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.surgery import Adapted
from rankwise.variants.adapter.targets import find_head, matches, resolve
from torch import nn

from tests.tiny import TINY, packed_batch, tiny


def names(model: nn.Module, targets) -> list[str]:
    return resolve(model, targets, find_head(model))


def ends(model: nn.Module, targets) -> set[str]:
    return {name.rpartition(".")[2] for name in names(model, targets)}


@pytest.mark.parametrize(
    "model, count, attention, mlp",
    [
        ("bert", 12, 8, 4),
        ("deberta", 12, 8, 4),
        ("gpt2", 8, 4, 4),
        ("llama", 14, 8, 6),
        ("albert", 6, 4, 2),  # one layer, called twice
    ],
)
def test_keywords_take_the_linears_of_the_layers(model, count, attention, mlp):
    found = names(tiny(model), "all-linear")
    assert len(found) == len(set(found)) == count
    assert not any("pooler" in n or n in ("classifier", "score", "lm_head") for n in found)
    parts = names(tiny(model), "attention"), names(tiny(model), "mlp")
    assert [len(part) for part in parts] == [attention, mlp]
    assert sorted(parts[0] + parts[1]) == sorted(found)


def test_all_linear_peft_keeps_the_pooler_and_not_the_head():
    extra = set(names(tiny("bert"), "all-linear-peft")) - set(names(tiny("bert"), "all-linear"))
    assert extra == {"bert.pooler.dense"}
    extra = set(names(tiny("albert"), "all-linear-peft")) - set(names(tiny("albert"), "all-linear"))
    assert extra == {"albert.encoder.embedding_hidden_mapping_in", "albert.pooler"}


def test_a_suffix_a_whole_name_and_a_pattern():
    model = tiny("bert")
    assert names(model, "query") == [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    assert names(model, "bert.pooler.dense") == ["bert.pooler.dense"]
    assert names(model, r"bert\.encoder\.layer\.1\..*dense") == [
        f"bert.encoder.layer.1.{end}" for end in ("attention.output.dense", "intermediate.dense", "output.dense")
    ]
    assert names(model, r"layer\.0\..*(query|value)") == [
        f"bert.encoder.layer.0.attention.self.{n}" for n in ("query", "value")
    ]
    assert ends(model, ["query", "value"]) == {"query", "value"}


def test_a_suffix_ends_at_a_dot():
    assert matches("dense", "a.output.dense") and not matches("ense", "a.output.dense")
    assert not matches("output", "a.output.dense")
    assert matches("dense", "dense")


def test_several_targets_come_in_the_models_order_once():
    model = tiny("bert")
    assert names(model, ["value", "query", "query"]) == names(model, ["query", "value"])
    assert names(model, ["mlp", "attention"]) == names(model, "all-linear")


def test_conv1d_is_a_linear_stored_the_other_way():
    adapter = variants.create("lora", rank=3).attach(tiny("gpt2"), ["c_attn"])
    name, site = next(adapter.named_sites())
    base = adapter.base(name)
    assert type(base).__name__ == "Conv1D" and base.weight.shape == (32, 96)
    assert site.A.shape == (1, 3, 32) and site.B.shape == (1, 96, 3)
    assert adapter.delta(name).shape == (1, 96, 32)


@pytest.mark.parametrize(
    "target, message",
    [
        ("q_prj", 'target "q_prj" matches no module; closest: q_proj'),
        ("all-liner", 'target "all-liner" matches no module; closest: all-linear'),
        (
            "model.layers.0.mlp.up_prj",
            'target "model.layers.0.mlp.up_prj" matches no module; closest: model.layers.0.mlp.up_proj',
        ),
        ("zzzzzz", r'target "zzzzzz" matches no module; closest: .*q_proj'),
        ("(", r'target "\(" matches no module'),
        (
            "input_layernorm",
            'target "input_layernorm" matches model.layers.0.input_layernorm, a LlamaRMSNorm, not a linear module',
        ),
    ],
)
def test_a_target_that_matches_nothing_offers_the_nearest(target, message):
    with pytest.raises(ValueError, match=message):
        names(tiny("llama"), ["v_proj", target])


def test_no_target_at_all_is_refused():
    with pytest.raises(ValueError, match="name at least one module"):
        names(tiny("bert"), [])


@pytest.mark.parametrize("target", ["classifier", "bert.pooler.dense|classifier"])
def test_the_head_is_refused_as_a_target(target):
    with pytest.raises(ValueError, match='"classifier" belongs to the task head, which is trained whole'):
        names(tiny("bert"), target)


def test_multihead_attention_is_refused():
    model = nn.TransformerEncoderLayer(16, 2, 24)
    with pytest.raises(ValueError, match=r'"self_attn.out_proj" lies in an nn.MultiheadAttention.*no effect'):
        resolve(model, "out_proj", [])
    with pytest.raises(ValueError, match=r"nn.MultiheadAttention"):
        resolve(model, "all-linear", [])
    assert resolve(model, ["linear1", "linear2"], []) == ["linear1", "linear2"]


def test_a_module_at_several_paths_is_one_site_and_is_replaced_at_all():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": nn.Sequential(shared), "two": nn.Sequential(nn.Linear(4, 4), shared)})
    before = {name: id(module) for name, module in model.named_modules(remove_duplicate=False)}
    adapter = variants.create("lora", rank=2).attach(model)
    assert list(adapter.ranks()) == ["one.0", "two.0"]
    assert model["one"][0] is model["two"][1] and isinstance(model["two"][1], Adapted)
    assert sum(1 for _ in adapter.parameters()) == 4
    adapter.detach()
    assert {name: id(module) for name, module in model.named_modules(remove_duplicate=False)} == before


def test_a_shared_target_may_be_named_by_any_of_its_paths():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": nn.Sequential(shared), "two": nn.Sequential(nn.Linear(4, 4), shared)})
    assert resolve(model, "two.1", []) == ["one.0"]


def test_an_output_layer_that_is_tied_to_the_embedding_is_no_target():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=1))
    for keyword in ("all-linear", "all-linear-peft"):
        assert not any("lm_head" in name for name in names(model, keyword))


@pytest.mark.parametrize("model", TINY)
def test_what_the_base_shows_its_wrapper_shows(model):
    plain, wrapped = tiny(model), tiny(model)
    adapter = variants.create("lora", rank=2).attach(wrapped, "all-linear")
    for name, _ in adapter.named_sites():
        one, other = plain.get_submodule(name), wrapped.get_submodule(name)
        assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)
        for shown in ("in_features", "out_features", "nf"):
            assert getattr(one, shown, None) == getattr(other, shown, None)
        with pytest.raises(AttributeError):
            _ = other.no_such_name


def test_a_head_of_several_modules_is_trained_whole():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = RobertaForSequenceClassification(RobertaConfig(**sizes, max_position_embeddings=34, num_labels=3))
    adapter = variants.create("lora", rank=2, members=2).attach(model)
    assert list(adapter.heads) == ["classifier/dense", "classifier/out_proj"]
    assert not any("classifier" in name for name, _ in adapter.named_sites())
    logits = model(**{k: v for k, v in packed_batch([0, 1]).items() if k != "labels"}).logits
    assert logits.shape == (8, 3)


@pytest.mark.parametrize(
    "head, message",
    [(["clasifier"], r'head module "clasifier" is not in BertFor.*which has bert, dropout, classifier')],
)
def test_a_head_that_is_not_there_is_refused(head, message):
    model = tiny("bert")
    with pytest.raises(ValueError, match=message):
        variants.create("lora", rank=2).attach(model, head=head)
    assert not any(isinstance(module, Adapted) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
