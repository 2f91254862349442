"""PEFT's files as they are met: incomplete, with tensors of the base, from a PeftModel's own state, of a newer PEFT."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from rankwise import variants
from rankwise.reports import ranks
from rankwise.variants.adapter.probe import fill
from rankwise.variants.files import folders
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from tests.loop import outputs
from tests.tiny import SIZES, batch, tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*", "ignore:.*tie_word_embeddings")
PREFIX = "base_model.model."


def forward(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return outputs(model, batch(0))


def classifier(name: str) -> nn.Module:
    return tiny(name, torch.float32).eval()


def saved_by_peft(model: nn.Module, folder: Path, **settings) -> nn.Module:
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, **settings)).eval()
    theirs.save_pretrained(folder)
    return theirs


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


# -- what the configuration promises -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "settings", "lost", "words"),
    [
        (
            "bert",
            {"target_modules": ["query", "value"]},
            ".layer.1.",
            "4 modules of BertFor.* lacks 2 of them, .*layer.1.*query",
        ),
        ("bert", {"target_modules": r".*layer\.\d\.attention\.self\.(key|value)"}, "layer.0.attention.self.key", "lacks 1 of"),
        (
            "gpt2",
            {"target_modules": ["c_attn", "c_proj"]},
            "h.1.mlp",
            "6 modules of GPT2For.* lacks 1 of them, .*h.1.mlp.c_proj",
        ),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}, "lora_", "1 modules .* lacks 1 of them"),
        ("bert", {"target_modules": ["query"]}, "classifier", "says that classifier was trained"),
        ("llama", {"target_modules": ["q_proj"]}, "score", "says that score was trained"),
        ("bert", {"target_modules": ["key"], "modules_to_save": ["pooler"]}, "pooler", "says that bert.pooler was trained"),
        ("bert", {"target_modules": ["key"]}, "layer.0.attention.self.key.lora_A", "key lacks lora_A"),
    ],
)
def test_a_file_that_lost_tensors_is_refused_by_their_name(model, settings, lost, words, tmp_path):
    saved_by_peft(classifier(model), tmp_path, task_type="SEQ_CLS", **settings)
    variants.load_pretrained(classifier(model), tmp_path)
    edit(tmp_path, lambda tensors: {name: value for name, value in tensors.items() if lost not in name})
    fresh = classifier(model)
    with pytest.raises(ValueError, match=words):
        variants.load_pretrained(fresh, tmp_path)
    assert torch.equal(forward(fresh), forward(classifier(model)))


def test_our_own_file_that_lost_a_layer_is_refused(tmp_path):
    adapter = variants.create("lora", rank=3, alpha=7).attach(classifier("bert"), targets=["query", "output.dense"])
    variants.save_pretrained(adapter, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({name: value for name, value in load_file(path).items() if ".layer.0." not in name}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"6 modules .* lacks 3 of them, bert.encoder.layer.0.attention.self.query among them"):
        variants.load_pretrained(classifier("bert"), tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query", "dense"], "exclude_modules": ["pooler.dense"], "layers_to_transform": 1},
        {"target_modules": ["query"], "layers_to_transform": [0], "layers_pattern": "layer"},
        {"target_modules": "all-linear"},
        {"target_modules": ["query", "classifier"], "modules_to_save": []},
    ],
)
def test_what_peft_leaves_out_is_not_missed(settings, tmp_path):
    theirs = saved_by_peft(classifier("bert"), tmp_path, **settings)
    ours = classifier("bert")
    adapter = variants.load_pretrained(ours, tmp_path)
    assert sorted(name for name, _ in adapter.named_sites()) == sorted(theirs.base_model.targeted_module_names)
    torch.testing.assert_close(forward(ours), forward(theirs), rtol=0, atol=1e-5)


# -- tensors of the base -------------------------------------------------------------------------------------------------


def llama(tied: bool, vocabulary: int = 67) -> nn.Module:
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": vocabulary, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def t5(tied: bool, vocabulary: int = 67) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=vocabulary, tie_word_embeddings=tied, **sizes)).eval()


def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(3, 17).view(2, 7)
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("make", "target"), [(llama, "q_proj"), (t5, "v")])
def test_the_base_of_an_adapted_output_layer_is_no_head(make, target, tied, tmp_path):
    """PEFT writes lm_head.base_layer.weight beside the factors of lm_head."""
    theirs = saved_by_peft(make(tied), tmp_path, target_modules=[target, "lm_head"])
    assert any(".base_layer." in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    ours = make(tied)
    adapter = variants.load_pretrained(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    assert adapter.head_names == [] and not adapter.base_tensors  # they are the model's own


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_comes_back_leaves_with_the_adapter_and_is_saved_with_it(tied, tmp_path):
    """The rows that were added are random: those of the file count, as in PEFT."""
    llama(tied).save_pretrained(tmp_path / "base")

    def resized(seed: int) -> nn.Module:
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(71, mean_resizing=False)
        torch.manual_seed(seed)
        with torch.no_grad():
            model.get_input_embeddings().weight[67:].normal_()
            model.get_output_embeddings().weight[67:].normal_()
        return model.eval()

    theirs = saved_by_peft(resized(1), tmp_path / "a", target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert PREFIX + "model.embed_tokens.weight" in load_file(tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=r"(embed_tokens|lm_head).*vocabulary was resized: call model.resize_token_embeddings\(71\) first"
    ):
        variants.load_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "a")
    ours = resized(2)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    adapter = variants.load_pretrained(ours, tmp_path / "a")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    variants.save_pretrained(adapter, tmp_path / "b")
    variants.export_merged(adapter, tmp_path / "whole")
    adapter.detach()
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    again = resized(3)
    variants.load_pretrained(again, tmp_path / "b")
    torch.testing.assert_close(logits(again), logits(theirs), rtol=0, atol=1e-5)
    oracle = peft.PeftModel.from_pretrained(resized(4), tmp_path / "b").eval()
    torch.testing.assert_close(logits(oracle), logits(theirs), rtol=0, atol=1e-5)
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(logits(whole), logits(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_the_state_of_a_peft_model_is_read_like_its_file(method, tmp_path):
    """Every name holds the adapter's, and the base and the old head stand beside it."""
    common = {"target_modules": ["query", "output.dense"], "task_type": "SEQ_CLS", "lora_alpha": 7}
    if method == "lora":
        config = peft.LoraConfig(r=3, init_lora_weights=False, use_dora=True, **common)
    else:
        config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, init_lora_weights=False, **common)
    theirs = peft.get_peft_model(classifier("bert"), config, adapter_name="cats").eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3)
    theirs.save_pretrained(tmp_path)
    state = {name: value.contiguous() for name, value in theirs.state_dict().items()}
    save_file(state, tmp_path / "cats" / "adapter_model.safetensors", metadata={"format": "pt"})
    ours = classifier("bert")
    assert variants.load_pretrained(ours, tmp_path / "cats").method == {"lora": "dora"}.get(method, method)
    torch.testing.assert_close(forward(ours), forward(theirs), rtol=0, atol=1e-5)
    two = state | {name.replace(".cats", ".dogs"): value.clone() for name, value in state.items() if ".cats" in name}
    save_file(two, tmp_path / "cats" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds 2 adapters, cats, dogs: save one of them"):
        variants.load_pretrained(classifier("bert"), tmp_path / "cats")


# -- what a newer PEFT says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, 3, {"a": 1}])
def test_a_key_of_a_newer_peft_is_warned_of_where_it_is_set(value, tmp_path, recwarn):
    adapter = variants.create("lora", rank=3).attach(classifier("bert"))
    fill(adapter)
    variants.save_pretrained(adapter, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"use_qlora2": False, "of_the_future": None}))
    variants.load_pretrained(classifier("bert"), tmp_path)
    assert not [warning for warning in recwarn if "newer PEFT" in str(warning.message)]
    path.write_text(json.dumps(config | {"use_qlora2": value}))
    with pytest.warns(UserWarning, match="use_qlora2 = .* is of a newer PEFT than this version of rankwise knows"):
        variants.load_pretrained(classifier("bert"), tmp_path)


# -- what PEFT is told of the model ----------------------------------------------------------------------------------------


def whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8, "max_source_positions": 20}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 2}
    config = transformers.WhisperConfig(vocab_size=67, max_target_positions=20, **sizes, **heads, **tokens)
    ids = torch.arange(3, 17).view(2, 7)
    return transformers.WhisperForConditionalGeneration(config), {
        "input_features": torch.ones(2, 8, 40),
        "decoder_input_ids": ids,
    }


def wav2vec2() -> tuple[nn.Module, dict[str, Tensor]]:
    convolutions = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8), "num_feat_extract_layers": 2}
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 3}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
    config = transformers.Wav2Vec2Config(vocab_size=67, **convolutions, **sizes, **positions)
    return transformers.Wav2Vec2ForSequenceClassification(config), {"input_values": torch.ones(2, 400)}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=3, **sizes)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.ones(2, 3, 16, 16)}


@pytest.mark.parametrize("make", [whisper, wav2vec2, vit])
def test_peft_calls_a_speech_or_vision_model_with_what_it_takes(make, tmp_path):
    torch.manual_seed(0)
    model, inputs = make()
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = sorted(there & {"q_proj", "v_proj", "query", "value"})  # a ViT's are called so by transformers 5.0
    adapter = variants.create("lora", rank=4, alpha=7).attach(model.eval(), targets=targets)
    fill(adapter)
    with torch.no_grad():
        want = model(**inputs).logits
        variants.save_pretrained(adapter, tmp_path)
        adapter.detach()
        oracle = peft.PeftModel.from_pretrained(model, tmp_path).eval()
        torch.testing.assert_close(oracle(**inputs).logits, want, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] is None
    assert config["auto_mapping"] == {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


class LlavaForConditionalGeneration(nn.Module):
    """Named like a sequence-to-sequence model, but it has no decoder of its own."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 5)

    def forward(self, input_ids=None, pixel_values=None, labels=None, **kwargs):
        return self.q_proj(input_ids)


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (lambda: t5(True), "SEQ_2_SEQ_LM"),
        (lambda: llama(False), "CAUSAL_LM"),
        (lambda: classifier("bert"), "SEQ_CLS"),
        (LlavaForConditionalGeneration, None),
    ],
)
def test_a_task_type_is_one_whose_arguments_the_model_takes(make, task, tmp_path):
    adapter = variants.create("lora", rank=2).attach(make(), targets=[".*(v|q_proj|query)"])
    variants.save_pretrained(adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["task_type"], config["auto_mapping"]) == (task, None)


# -- their ranks, read without torch ---------------------------------------------------------------------------------------


class Kinds(nn.Module):
    """A weight of each kind that PEFT adapts."""

    def __init__(self):
        super().__init__()
        self.words, self.image, self.out = nn.Embedding(9, 6), nn.Conv2d(3, 5, (2, 3)), nn.Linear(6, 4)
        self.sound = nn.Conv1d(3, 5, 4)


def test_ranks_are_read_of_every_kind_of_weight_and_by_an_adapters_own_name(tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["words", "image", "out", "sound"], init_lora_weights=False)
    theirs = peft.get_peft_model(Kinds(), config, adapter_name="cats")
    theirs.save_pretrained(tmp_path)
    state = {name: value.contiguous() for name, value in theirs.state_dict().items()}
    for _ in range(2):
        read = ranks.read(tmp_path / "cats")
        assert {(site.site, site.active) for site in read.sites} == {("words", 3), ("image", 3), ("out", 3), ("sound", 3)}
        parameters = {site.site: site.parameters for site in read.sites}
        assert (parameters["image"], parameters["sound"]) == (3 * 3 * 2 * 3 + 5 * 3, 3 * 3 * 4 + 5 * 3)
        assert not read.faults and read.note is None
        save_file(state, tmp_path / "cats" / "adapter_model.safetensors", metadata={"format": "pt"})


def test_ranks_say_that_training_ended_early(tmp_path):
    settings = {"initial_rank": 5, "target_rank": 3}
    adapter = variants.create("truncated", **settings).attach(classifier("bert"), targets=["query"])
    fill(adapter)
    with pytest.warns(UserWarning, match="ended before its budget"):
        variants.save_pretrained(adapter, tmp_path)
    note = ranks.read(tmp_path).note
    assert note == "training ended before its budget was reached: 10 ranks, its schedule ends with 6"


def test_equal_adapters_are_equal_files(tmp_path):
    tensors = {"b.weight": torch.ones(2, 3), "a.weight": torch.zeros(1)}
    metadata = {name: "\u00e9\n" + name for name in ("rankwise", "format", "other", "more")}
    written = []
    for number in range(8):  # safetensors orders four names in 24 ways
        folders.save_tensors(tensors, tmp_path / f"{number}.safetensors", metadata)
        written.append((tmp_path / f"{number}.safetensors").read_bytes())
    assert set(written) == {written[0]}
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == metadata and torch.equal(file.get_tensor("b.weight"), tensors["b.weight"])
