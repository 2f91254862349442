"""Parameter counts: every shape against the library's own model, every formula against our adapters on small models."""

import pytest
import torch
from rankwise import variants
from rankwise.reports.papers import shapes
from rankwise.reports.papers.shapes import ModelShape, Trained, shape
from transformers import (
    BartConfig,
    BartModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

NAMES = {  # kind of matrix -> end of the module's name
    "roberta": {
        "query": "query",
        "key": "key",
        "value": "value",
        "output": "attention.output.dense",
        "up": "intermediate.dense",
        "down": r"layer\.\d+\.output.dense",
    },
    "deberta": {
        "query": "query_proj",
        "key": "key_proj",
        "value": "value_proj",
        "output": "attention.output.dense",
        "up": "intermediate.dense",
        "down": r"layer\.\d+\.output.dense",
    },
    "gpt2": {"output": "attn.c_proj", "up": "c_fc", "down": "mlp.c_proj"},
    "llama": {
        "query": "q_proj",
        "key": "k_proj",
        "value": "v_proj",
        "output": "o_proj",
        "gate": "gate_proj",
        "up": "up_proj",
        "down": "down_proj",
    },
}


def config(one: ModelShape, heads: int = 2):
    """The library's configuration of a shape."""
    sizes = {
        "vocab_size": one.vocabulary,
        "hidden_size": one.hidden,
        "num_hidden_layers": one.layers,
        "intermediate_size": one.intermediate,
        "num_attention_heads": heads,
    }
    if one.family == "llama":
        groups = one.hidden // (one.key_value or one.hidden)
        return LlamaConfig(
            **(sizes | {"num_attention_heads": 2 * groups}), num_key_value_heads=2, tie_word_embeddings=one.tied, pad_token_id=0
        )
    if one.family == "gpt2":
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
        return GPT2Config(
            vocab_size=one.vocabulary,
            n_embd=one.hidden,
            n_layer=one.layers,
            n_head=heads,
            n_inner=one.intermediate,
            n_positions=one.positions,
            **tokens,
        )
    if one.family == "bart":
        stack = {"layers": one.layers, "ffn_dim": one.intermediate, "attention_heads": heads}
        both = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in stack.items()}
        return BartConfig(  # its position embeddings have two rows more than positions
            vocab_size=one.vocabulary, d_model=one.hidden, max_position_embeddings=one.positions - 2, **both
        )
    if one.relative:
        convolution = {"conv_kernel_size": one.convolution, "conv_act": "gelu"} if one.convolution else {}
        return DebertaV2Config(
            **sizes,
            type_vocab_size=0,
            relative_attention=True,
            position_biased_input=False,
            share_att_key=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=one.relative // 2,
            norm_rel_ebd="layer_norm",
            max_relative_positions=-1,
            **convolution,
        )
    return RobertaConfig(**sizes, max_position_embeddings=one.positions, type_vocab_size=one.token_types, pad_token_id=0)


@pytest.mark.parametrize("name", shapes.shapes())
def test_a_shape_has_as_many_parameters_and_biases_as_the_library_s_model(name: str) -> None:
    one = shape(name)
    kinds = {"llama": LlamaForCausalLM, "gpt2": GPT2Model, "bart": BartModel}
    kind = kinds.get(one.family, DebertaV2Model if one.relative else RobertaModel)
    with torch.device("meta"):
        model = kind(config(one))
    assert sum(p.numel() for p in model.parameters()) == one.total
    biases = {n: p.numel() for n, p in model.named_parameters() if n.endswith("bias") and not n.startswith("pooler")}
    assert sum(biases.values()) == one.biases
    if one.family != "bart":
        layer = model.get_submodule({"gpt2": "h", "llama": "model.layers", "bert": "encoder.layer"}[one.family])[-1]
        assert sum(p.numel() for p in layer.parameters()) == one.layer


SMALL = {  # sizes that tell inputs from outputs and one kind of matrix from another
    "roberta": {"family": "bert", "positions": 18, "token_types": 1},
    "deberta": {"family": "bert", "relative": 16},
    "gpt2": {"family": "gpt2", "positions": 16},
    "llama": {"family": "llama", "key_value": 8},
}
CLASSES = {
    "roberta": RobertaForSequenceClassification,
    "deberta": DebertaV2ForSequenceClassification,
    "gpt2": GPT2ForSequenceClassification,
    "llama": LlamaForSequenceClassification,
}


def small(name: str, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """A small model of that kind, whose shape is known as "small"."""
    one = ModelShape(hidden=24, layers=3, intermediate=40, vocabulary=50, **SMALL[name])
    monkeypatch.setattr(shapes, "shapes", lambda: {"small": one})
    return CLASSES[name](config(one))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("method", ["lora", "adalora", "dora"])
@pytest.mark.parametrize("kinds", ["all", "one"])
def test_a_formula_gives_what_our_adapter_trains(name: str, method: str, kinds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(name, monkeypatch)
    names = NAMES[name]
    for targets in [list(names)] if kinds == "all" else [[one] for one in names]:
        ranks = {"initial_rank": 7, "target_rank": 5} if method == "adalora" else {"rank": 5}
        adapter = variants.create(method, **ranks)
        adapter.attach(model, targets=[names[one] for one in targets])
        counts = adapter.parameter_counts()
        rank = 7 if method == "adalora" else 5
        assert counts["trainable"].item() == Trained(shape="small", method=method, targets=targets, rank=rank).count()
        adapter.detach()


@pytest.mark.parametrize("name", ["roberta", "deberta", "gpt2"])
def test_bitfit_s_count_is_that_of_our_adapter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(name, monkeypatch)
    adapter = variants.create("bitfit")
    adapter.attach(model)
    # The pooler of the library's DeBERTa classifier is a part of the head, which the papers' counts leave out.
    assert adapter.parameter_counts()["trainable"].item() == Trained(shape="small", method="bitfit").count()


@pytest.mark.parametrize(
    "values, expected",
    [
        # roberta-base by hand: 12 layers, width 768
        ({"method": "vera", "targets": ["query", "value"], "rank": 1024}, 24 * (768 + 1024)),
        ({"method": "dvora", "targets": ["query", "value"], "rank": 1024}, 24 * (768 + 1024 + 768)),
        ({"method": "dora", "targets": ["up"], "rank": 2}, 12 * (2 * (768 + 3072) + 3072)),
        ({"method": "dora", "targets": ["down"], "rank": 2}, 12 * (2 * (768 + 3072) + 768)),
        ({"method": "adapter-houlsby", "bottleneck": 8}, 24 * (768 * 8 + 8 + 8 * 768 + 768)),
        ({"method": "adapter-pfeiffer", "bottleneck": 8}, 12 * (768 * 8 + 8 + 8 * 768 + 768)),
        ({"method": "adapter-lin", "bottleneck": 8}, 12 * (768 * 8 + 8 + 8 * 768 + 768 + 2 * 768)),
        ({"method": "prefix-embedding", "tokens": 5}, 5 * 768),
        ({"method": "prefix-layer", "tokens": 5}, 12 * 5 * 768),
        ({"method": "top-layers", "layers": 2}, 2 * 7_087_872),
        ({"method": "full"}, 124_645_632),
    ],
)
def test_a_count_worked_by_hand(values: dict, expected: int) -> None:
    assert Trained(shape="roberta-base", **values).count() == expected


def test_counts_that_everyone_quotes() -> None:
    deberta = Trained(shape="deberta-v3-base", method="lora", targets="all", rank=8)
    assert deberta.count() == 1_327_104
    llama = Trained(shape="llama-7b", method="lora", targets=["query", "value"], rank=8)
    assert llama.count() == 4_194_304  # 4.2M
    assert f"{llama.percent('all'):.4f}" == "0.0622"  # PEFT's print_trainable_parameters
    assert round(llama.percent("pretrained"), 2) == 0.06


def test_percent_of_all_counts_what_was_added() -> None:
    one = Trained(shape="llama-7b", method="lora", targets="all", rank=64)
    assert one.percent("all") == pytest.approx(100 * one.count() / (6_738_415_616 + one.count()))
    assert one.percent("pretrained") == pytest.approx(100 * one.count() / 6_738_415_616)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"shape": "roberta-bse", "method": "full"}, r'no shape "roberta-bse"; did you mean "roberta-base"\?'),
        ({"method": "lora", "targets": "all"}, r'"lora" needs rank'),
        ({"method": "lora", "rank": 8}, r'"lora" needs targets'),
        ({"method": "full", "targets": "all"}, r'"full" takes no targets'),
        ({"method": "lora", "targets": "all", "rank": 8, "bottleneck": 4}, r'bottleneck = 4 has no effect on "lora"'),
        ({"method": "lora", "targets": ["vaule"], "rank": 8}, r'"vaule" is no matrix of roberta-base; did you mean "value"\?'),
        ({"method": "lora", "targets": ["value", "value"], "rank": 8}, r"each once"),
        ({"method": "lora", "targets": [], "rank": 8}, r"at least one matrix"),
        ({"method": "lora", "targets": "all", "rank": 0}, r"greater than 0"),
        ({"method": "lora", "targets": "all", "rank": 8.0}, r"valid integer"),
        ({"method": "top-layers", "layers": 13}, r"layers = 13: roberta-base has 12"),
        ({"method": "adapter-houlsby"}, r'"adapter-houlsby" needs bottleneck'),
    ],
)
def test_what_cannot_be_counted_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trained(**({"shape": "roberta-base"} | values))


def test_a_faulty_shape_is_refused_by_its_name() -> None:
    text = "[x]\nfamily = 'bert'\nhidden = 8\nlayers = -1\nintermediate = 16\nvocabulary = 9\nvocabularly = 9"
    with pytest.raises(ValueError, match=r"shapes\.toml: x\.layers = -1: .*greater than 0") as error:
        shapes.read(text)
    assert 'unknown setting; did you mean "vocabulary"?' in str(error.value)


def test_bart_has_no_single_layer() -> None:
    with pytest.raises(ValueError, match="differ"):
        Trained(shape="bart-large", method="top-layers", layers=2).count()
