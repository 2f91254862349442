"""`rankwise export --to gguf`: what llama.cpp would multiply, read back by gguf's reader, is PEFT's own update.

The way back to transformers' order of rows is transformers' (modeling_gguf_pytorch_utils), which reads llama.cpp's models.
"""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rankwise.variants.doctor import llama_cpp
from safetensors.torch import load_file, save_file

from tests import language_models
from tests.command import rankwise

gguf, peft = pytest.importorskip("gguf"), pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")

# Two ranks and three scales, one of them without a short binary fraction.
LORA = {"r": 4, "lora_alpha": 6, "rank_pattern": {"1.self_attn.k_proj": 3}, "alpha_pattern": {"0.mlp.down_proj": 0.7}}
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "gemma": "gemma", "gemma2": "gemma2", "gpt2": "gpt2"}
SLOW = ("mistral", "gemma", "gemma2")  # as llama and qwen2


def adapted(family, folder, settings, targets="all-linear"):
    """The folder of PEFT's adapter on the small model in `folder`/base; and its model in float64."""
    base = language_models.made(family)
    base.config.save_pretrained(folder / "base")
    torch.manual_seed(2)
    kind = peft.AdaLoraConfig if "init_r" in settings else peft.LoraConfig
    model = peft.get_peft_model(base, kind(target_modules=targets, **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(folder / "base")}))
    return folder / "adapter", model.double()


def read(folder):
    """Architecture, and matrix of llama.cpp -> (scale, A, B), of a file as llama.cpp reads it."""
    reader = gguf.GGUFReader(folder / "adapter.gguf")
    facts = {name: field.contents() for name, field in reader.fields.items()}
    assert (facts["general.type"], facts["adapter.type"]) == ("adapter", "lora")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    found = {}
    for name in sorted({name.removesuffix(".lora_a").removesuffix(".lora_b") for name in tensors}):
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        rank = int(B.shape[0])  # b->ne[0]
        found[name] = (facts["adapter.lora.alpha"] / rank, np.array(A.data), np.array(B.data))
    return facts["general.architecture"], found


def in_our_order(name, delta, config):
    """transformers' reversal of llama.cpp's order of rows."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    weights = LlamaTensorProcessor(config=vars(config)).process(
        weights=delta, name=name, tensor_key_mapping={}, parsed_parameters={}
    )
    return weights.weights


def peft_names(model):
    """Site -> the layer of PEFT."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and (module.lora_A or module.lora_embedding_A)
    }


@pytest.mark.parametrize("family", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FAMILIES])
def test_what_llama_cpp_multiplies_is_peft_s_update(family, tmp_path, capsys):
    folder, model = adapted(family, tmp_path, LORA | {"fan_in_fan_out": family == "gpt2"})
    assert rankwise("export", folder, "--to", "gguf", "--out", tmp_path / "out") == 0
    assert "as gguf" in capsys.readouterr().out
    architecture, found = read(tmp_path / "out")
    assert architecture == FAMILIES[family]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 2)
    sites = peft_names(model)
    assert {f"{names.get_name(site)}.weight": site for site in sites}.keys() == found.keys()
    stored = load_file(folder / "adapter_model.safetensors")
    for site, layer in sites.items():
        scale, A, B = found[f"{names.get_name(site)}.weight"]
        delta = scale * (B.astype(np.float64) @ A.astype(np.float64))
        if architecture == "llama":
            delta = in_our_order(f"{names.get_name(site)}.weight", delta, model.config)
        expected = layer.get_delta_weight("default").detach().numpy()
        expected = expected.T if family == "gpt2" else expected
        tolerance = 2e-7 if "0.mlp.down" in site or "1.self_attn.k" in site else 1e-14
        np.testing.assert_allclose(delta, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=site)
        assert np.array_equal(A, stored[f"base_model.model.{site}.lora_A.weight"].numpy())
    assert json.loads((tmp_path / "out" / "export.json").read_text())["architecture"] == architecture


def test_attention_is_the_same_when_llama_cpp_rotates_pairs_of_neighbours():
    """The order of rows is right if and only if q . k after rotation is: halves in transformers, neighbours in llama.cpp."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.manual_seed(0)
    heads, size, tokens = 3, 8, 5
    q, k = torch.randn(2, tokens, heads * size, dtype=torch.float64)
    angles = torch.arange(tokens)[:, None] / 100 ** (torch.arange(0, size, 2, dtype=torch.float64) / size)  # (tokens, size/2)
    twice = torch.cat([angles, angles], -1)[None]
    ours = [one.view(1, tokens, heads, size).transpose(1, 2) for one in (q, k)]
    ours = apply_rotary_pos_emb(*ours, twice.cos(), twice.sin())
    theirs = []
    for one in (q, k):
        rows = torch.from_numpy(llama_cpp.reordered(one.T.numpy(), heads)).T.view(tokens, heads, size // 2, 2)
        x, y, cos, sin = rows[..., 0], rows[..., 1], angles.cos()[:, None], angles.sin()[:, None]
        rotated = torch.stack([x * cos - y * sin, x * sin + y * cos], -1)
        theirs.append(rotated.flatten(2).transpose(0, 1)[None])
    torch.testing.assert_close(ours[0] @ ours[1].mT, theirs[0] @ theirs[1].mT)


@pytest.mark.parametrize("family", ["qwen3", "smollm3"])
def test_newer_families_have_their_names(family):
    name, _ = llama_cpp.ARCHITECTURES[family]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name], 1)
    for layer in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert names.get_name(f"model.layers.0.{layer}")


def test_every_method_of_thin_factors_is_folded(tmp_path):
    for number, settings in enumerate(
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, {"init_r": 5, "target_r": 2, "lora_alpha": 8, "total_step": 10})
    ):
        (tmp_path / f"{number}").mkdir()
        folder, model = adapted("qwen2", tmp_path / f"{number}", settings, ["q_proj", "down_proj"])
        assert rankwise("export", folder, "--to", "gguf", "--out", tmp_path / f"out{number}") == 0
        _, found = read(tmp_path / f"out{number}")
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
        for site, layer in peft_names(model).items():
            scale, A, B = found[f"{names.get_name(site)}.weight"]
            expected = layer.get_delta_weight("default").detach().numpy()
            np.testing.assert_allclose(scale * (B.astype(float) @ A.astype(float)), expected, rtol=0, atol=3e-7)


def test_an_embedding_is_looked_up_by_rows(tmp_path):
    folder, model = adapted("llama", tmp_path, {"r": 4, "lora_alpha": 6}, ["embed_tokens", "lm_head"])
    assert rankwise("export", folder, "--to", "gguf", "--out", tmp_path / "out") == 0
    _, found = read(tmp_path / "out")
    scale, A, B = found["token_embd.weight"]
    assert A.shape == (67, 4) and B.shape == (32, 4)
    sites = peft_names(model)
    expected = sites["model.embed_tokens"].get_delta_weight("default").detach().numpy()
    looked_up = np.stack([scale * (B.astype(float) @ row) for row in A.astype(float)])  # llm_build_inp_embd
    np.testing.assert_allclose(looked_up, expected, atol=1e-14)
    scale, A, B = found["output.weight"]
    expected = sites["lm_head"].get_delta_weight("default").detach().numpy()
    np.testing.assert_allclose(scale * (B.astype(float) @ A.astype(float)), expected, atol=1e-14)


def test_an_alpha_of_zero_is_not_written_as_one():
    """llama.cpp takes alpha 0 for scale 1."""
    sites = [SimpleNamespace(scale=0.0, rank=4), SimpleNamespace(scale=0.0, rank=4), SimpleNamespace(scale=1.5, rank=4)]
    assert llama_cpp._common_alpha(SimpleNamespace(sites=sites)) == 6.0
    assert llama_cpp._common_alpha(SimpleNamespace(sites=sites[:2])) == 1.0


def with_nan(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)


def with_base(**changes):
    def change(folder):
        path = folder.with_name("base") / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


REFUSED = {
    "DoRA": ("llama", {"use_dora": True}, None, None, "has a magnitude (DoRA)"),
    "a head": ("llama", {"modules_to_save": ["lm_head"]}, ["q_proj"], None, "it holds a head, lm_head.weight"),
    "a bias": ("llama", {"lora_bias": True}, None, None, "has a bias"),
    "trained biases": ("gpt2", {"bias": "all", "fan_in_fan_out": True}, None, None, "a whole tensor of the model"),
    "new tokens": ("llama", {"trainable_token_indices": [1, 2]}, None, None, "a whole tensor of the model"),
    "tied output": ("qwen2", {}, ["lm_head"], None, "lm_head is tied"),
    "tied embedding": ("qwen2", {}, ["embed_tokens"], None, "model.embed_tokens is tied"),
    "positions": ("gpt2", {}, ["wpe"], None, "transformer.wpe is an embedding that is looked up without its update"),
    "NaN": ("llama", {}, None, with_nan, "holds numbers that are not finite"),
    "fewer layers": ("llama", {}, None, with_base(num_hidden_layers=1), "model.layers.1."),
    "other heads": ("llama", {}, None, with_base(num_attention_heads=32), "which are not 32 heads of even size"),
    "another kind": ("llama", {}, None, with_base(model_type="bert"), 'a base of type "bert" has no form known here'),
    "a broken base": ("llama", {}, None, with_base(num_attention_heads=5), "its configuration cannot be read"),
    "no base": (
        "llama",
        {},
        None,
        lambda folder: (folder.with_name("base") / "config.json").unlink(),
        "give a folder with config.json",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_cannot_hold_is_refused(what, tmp_path, capsys):
    family, settings, targets, change, message = REFUSED[what]
    folder, _ = adapted(family, tmp_path, {"r": 2, "lora_alpha": 6, **settings}, targets or "all-linear")
    if change is not None:
        change(folder)
    assert rankwise("export", folder, "--to", "gguf", "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_without_the_package_or_with_options_of_another_form_it_is_refused(tmp_path, monkeypatch, capsys):
    words = ("export", tmp_path, "--to", "gguf", "--out", tmp_path / "out")
    for more in (["--total-rank", 3], ["--prefix", "lora_te"], ["--model-class", "GPT2Model"], ["--requantize"]):
        assert rankwise(*words, *more) == 2
        assert "has no effect" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert rankwise(*words) == 2
    assert "pip install 'rankwise[gguf]'" in capsys.readouterr().err
