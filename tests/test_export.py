"""Taking an adapter elsewhere: PEFT and transformers load what was written, with equal outputs; faults are one line."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from rankwise import variants
from rankwise.experiments import cli, models, tasks
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.probe import fill
from safetensors.torch import load_file
from torch import Tensor, nn

from tests import small_world
from tests.loop import outputs
from tests.tiny import batch, packed_batch, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was trained but after_step"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern"),  # PEFT, of its own AdaLoRA files
]
SVD = {"initial_rank": 5, "target_rank": 3, "alpha": 7}
SETTINGS = {
    "lora": {"rank": 4, "alpha": 7, "scaling": "alpha/sqrt(r)"},
    "dora": {"rank": 3, "alpha": 7},
    "adalora": SVD,
    "allocated": SVD | {"form": "doublet", "score": "magnitude", "magnitude": True},
    "truncated": SVD,
    "head": {},
    "bitfit": {},
    "full": {},
}


def changed(adapter: Adapter) -> Adapter:
    """Nothing trivial; some slots cut, all of the first site's."""
    fill(adapter, 0.2)
    for index, (_, site) in enumerate(adapter.named_sites()):
        inner = getattr(site, "inner", site)
        if hasattr(inner, "kept"):
            inner.kept[:, : 2 if index else None] = False
            inner.project()
    return adapter


def logits(model: nn.Module, length: int = 12) -> Tensor:
    """Of three rows, the last one padded."""
    ids = torch.arange(3 * length).view(3, length) % 50 + 5
    mask = torch.ones_like(ids)
    ids[2, 7:] = mask[2, 7:] = 0
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask).logits


# -- merged, from Python -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SETTINGS)
def test_transformers_loads_a_merged_model_with_equal_outputs(method, tmp_path):
    from transformers import AutoModelForSequenceClassification

    base = tiny("bert", torch.float32).eval()
    members = 3 if method in ("lora", "allocated") else 1
    adapter = changed(variants.create(method, members=members, **SETTINGS[method]).attach(base))
    before, told = {n: v.clone() for n, v in base.state_dict().items()}, copy.deepcopy(vars(base.config))
    with torch.no_grad():
        live = outputs(base, packed_batch([0] * members)).view(members, 4, -1)[-1]
    variants.export_merged(adapter, tmp_path / "m", member=members - 1)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["config.json", "m", "model.safetensors"]
    loaded, found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    with torch.no_grad():
        torch.testing.assert_close(outputs(loaded.eval(), batch(0)), live, rtol=1e-5, atol=1e-5)
        assert (outputs(loaded, batch(0)) - outputs(tiny("bert", torch.float32).eval(), batch(0))).abs().max() > 0.05
    assert not adapter.is_merged and vars(base.config) == told
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"rank": 4, "alpha": 6.0, "rank_pattern": {"query": 2}, "alpha_pattern": {"value": 9.0}}),
        ("lora", {"rank": 4, "alpha": 6.0, "scaling": "alpha/sqrt(r)", "rank_pattern": {"query": 2}}),
        ("adalora", {"initial_rank": 5, "target_rank": 2, "alpha": 6.0}),
        ("trained-alpha", {"rank": 3, "alpha": 4.0}),
    ],
)
def test_an_exported_lora_is_right_by_the_rules_of_vllm(method, settings, tmp_path):
    """As vLLM's PEFTHelper and parse_fine_tuned_lora_name read a folder: one scale, no patterns, no bias, no heads, no DoRA."""
    adapter = changed(variants.create(method, **settings).attach(tiny("bert", torch.float32), head=[]))
    variants.export_lora(adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["bias"] == "none" and not config["modules_to_save"] and not config["use_dora"]
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        module, factor = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", name).groups()
        found.setdefault(module, {})[factor] = tensor
    for name, _ in adapter.named_sites():
        delta = adapter.delta(name)[0]
        served = scale * found[name]["lora_B"] @ found[name]["lora_A"] if name in found else torch.zeros_like(delta)
        torch.testing.assert_close(served, delta, rtol=1e-5, atol=1e-6)
    assert found.keys() <= {name for name, _ in adapter.named_sites()} and len(found) > 8


@pytest.mark.parametrize("name", ["gpt2", "albert", "llama"])
def test_every_architecture_is_merged(name, tmp_path):
    from transformers import AutoModelForSequenceClassification

    base = tiny(name, torch.float32).eval()
    adapter = changed(variants.create("dora", rank=2, alpha=3).attach(base))
    variants.export_merged(adapter, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(outputs(loaded, batch(0)), outputs(base, batch(0)), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_merged_leaves_nothing(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"Sequential is no model of transformers: call adapter.merge\(0\)"):
        variants.export_merged(variants.create("lora", rank=1).attach(plain, ["0"]), tmp_path / "a")
    tied = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    adapter = variants.create("lora", rank=1).attach(tied, ["lm_head"], head=[])
    with pytest.raises(ValueError, match="is tied to"):
        variants.export_merged(adapter, tmp_path / "a")
    adapter = variants.create("lora", rank=1).attach(tiny("bert", torch.float32))
    with pytest.raises(ValueError, match="member = 1: there are 1"):
        variants.export_merged(adapter, tmp_path / "a", member=1)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: give a folder"):
        variants.export_merged(adapter, tmp_path / "file")
    assert not adapter.is_merged and [p.name for p in tmp_path.iterdir()] == ["file"]


# -- the command ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return small_world.model(tmp_path_factory.mktemp("base") / "model")


def with_head(base: str, task: str = "glue/stsb") -> nn.Module:
    return models.load(base, tasks.get(task))[0]


def run_of(method: str, base: str, folder: Path, task: str = "glue/stsb", **settings) -> tuple[Path, nn.Module]:
    """A run's folder as a study leaves it, as far as an export reads it; and the live model."""
    model = with_head(base, task)
    adapter = variants.create(method, **SETTINGS[method] | settings).attach(model)
    changed(adapter)
    variants.save_pretrained(adapter, folder / "adapter")
    config = {"fingerprint": "f" * 24, "task": task, "model": base, "method": method}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model


def rankwise(monkeypatch, *words: object) -> int:
    """The exit code of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["rankwise", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def refused(monkeypatch, capsys, *words: object) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert rankwise(monkeypatch, *words) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("rankwise: ") and said.err.count("\n") == 1, said.err
    return said.err


def in_peft(base: str, folder: Path, task: str = "glue/stsb") -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(with_head(base, task), folder)


@pytest.mark.parametrize("method", ["lora", "adalora", "truncated"])
def test_a_run_leaves_as_a_plain_lora(method, base, tmp_path, monkeypatch, capsys):
    run, live = run_of(method, base, tmp_path / "run", task="glue/mnli" if method == "truncated" else "glue/stsb")
    assert rankwise(monkeypatch, "export", run, "--to", "lora", "--out", tmp_path / "out") == 0
    task = json.loads((run / "config.json").read_text())["task"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and not config["use_dora"] and config["base_model_name_or_path"] == base
    oracle = in_peft(base, tmp_path / "out", task)
    torch.testing.assert_close(logits(oracle), logits(live), rtol=1e-5, atol=1e-5)
    again = variants.load_pretrained(with_head(base, task), tmp_path / "out")
    assert again.method == "lora"
    torch.testing.assert_close(logits(again.model), logits(live), rtol=1e-5, atol=1e-5)
    said = capsys.readouterr().out
    assert said.startswith(f"{method}, ") and str(tmp_path / "out") in said


@pytest.mark.parametrize("method", ["dora", "adalora", "allocated", "full", "head"])
def test_a_run_leaves_as_a_whole_model(method, base, tmp_path, monkeypatch):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run, live = run_of(method, base, tmp_path / "run")
    assert rankwise(monkeypatch, "export", run / "adapter", "--to", "merged", "--out", tmp_path / "out") == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(live), rtol=1e-5, atol=1e-5)
    assert model.config.problem_type == "regression" and model.num_labels == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc")["input_ids"] == models.tiny_tokenizer()("abc")["input_ids"]


@pytest.mark.parametrize("budget", [("--total-rank", 9), ("--total-parameters", 900)])
def test_an_export_is_truncated_to_a_budget(budget, base, tmp_path, monkeypatch, capsys):
    run, live = run_of("adalora", base, tmp_path / "run")
    words = ("export", run, "--to", "lora", "--out", tmp_path / "out", "--json", *budget)
    assert rankwise(monkeypatch, *words) == 0
    told = json.loads(capsys.readouterr().out)
    adapter = variants.load_pretrained(with_head(base), run / "adapter")
    variants.truncate(adapter, **{budget[0].removeprefix("--").replace("-", "_"): budget[1]})
    torch.testing.assert_close(logits(in_peft(base, tmp_path / "out")), logits(adapter.model), rtol=1e-5, atol=1e-5)
    assert (logits(adapter.model) - logits(live)).abs().max() > 1e-3
    assert told["truncated"] and told["total_rank"] == sum(r.item() for r in adapter.ranks().values())
    assert told["total_rank"] == 9 or budget[0] == "--total-parameters"


def test_pefts_own_adalora_leaves_as_a_plain_lora_and_as_a_model(base, tmp_path, monkeypatch):
    from peft import AdaLoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForSequenceClassification

    start = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    config = AdaLoraConfig(
        task_type="SEQ_CLS", init_r=5, target_r=2, total_step=10, lora_alpha=7, target_modules=["query", "value", "dense"]
    )
    theirs = get_peft_model(start, config)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.2)
    theirs.save_pretrained(tmp_path / "peft")
    expected = logits(theirs)
    assert rankwise(monkeypatch, "export", tmp_path / "peft", "--to", "lora", "--out", tmp_path / "lora") == 0
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert rankwise(monkeypatch, "export", tmp_path / "peft", "--to", "merged", "--out", tmp_path / "merged") == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


def test_a_base_without_all_its_weights_is_not_merged(base, tmp_path, monkeypatch, capsys):
    """What is drawn at random at every loading is no base of anything; a plain LoRA does not need it."""
    from transformers import BertModel

    run_of("lora", base, tmp_path / "run")
    BertModel.from_pretrained(base, add_pooling_layer=False).save_pretrained(tmp_path / "part")
    words = ("export", tmp_path / "run" / "adapter", "--model", tmp_path / "part", "--out", tmp_path / "out", "--to")
    (tmp_path / "run" / "config.json").unlink()
    assert "lacks 2 weights of a BertForSequenceClassification, bert.pooler" in refused(monkeypatch, capsys, *words, "merged")
    assert rankwise(monkeypatch, *words, "lora") == 0


def test_another_base_may_be_named(base, tmp_path, monkeypatch, capsys):
    run, live = run_of("lora", base, tmp_path / "run")
    copied = small_world.model(tmp_path / "copied")
    config = json.loads((run / "config.json").read_text()) | {"model": str(tmp_path / "gone")}
    (run / "config.json").write_text(json.dumps(config))
    line = refused(monkeypatch, capsys, "export", run, "--to", "merged", "--out", tmp_path / "out")
    assert "gone" in line and not (tmp_path / "out").exists()
    assert rankwise(monkeypatch, "export", run, "--to", "merged", "--out", tmp_path / "out", "--model", copied) == 0
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(live), rtol=1e-5, atol=1e-5)


def test_an_earlier_export_is_replaced_whole_or_not_at_all(base, tmp_path, monkeypatch, capsys):
    run, _ = run_of("lora", base, tmp_path / "run")
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is as good as none
    assert rankwise(monkeypatch, "export", run, "--to", "merged", "--out", out) == 0
    assert rankwise(monkeypatch, "export", run, "--to", "lora", "--out", out) == 0
    names = ["adapter_config.json", "adapter_model.safetensors", "export.json"]
    assert sorted(p.name for p in out.iterdir()) == names, "nothing of the model is left"
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    line = refused(monkeypatch, capsys, "export", run, "--to", "lora", "--out", out, "--total-rank", 10**6)
    assert "total_rank = 1000000: there are" in line
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (out / "export.json").unlink()
    assert "no earlier export" in refused(monkeypatch, capsys, "export", run, "--to", "lora", "--out", out)
    assert "the adapter itself is in there" in refused(monkeypatch, capsys, "export", run, "--to", "lora", "--out", run)
    (tmp_path / "file").touch()
    assert "this is a file" in refused(monkeypatch, capsys, "export", run, "--to", "lora", "--out", tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out", "run"]


def test_what_cannot_be_exported_is_one_line_with_a_remedy(base, tmp_path, monkeypatch, capsys):
    def line(*words: object) -> str:
        said = refused(monkeypatch, capsys, "export", *words, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return said

    run, _ = run_of("dora", base, tmp_path / "dora")
    assert "use_dora" in (said := line(run, "--to", "lora")) and "--to merged" in said
    assert "give lora, merged, kohya or gguf" in line(run, "--to", "lorra")
    assert "two budgets" in line(run, "--to", "merged", "--total-rank", 3, "--total-parameters", 9)
    assert "--total-rank 0: give at least 1" in line(run, "--to", "merged", "--total-rank", 0)
    for method in ("full", "bitfit"):
        run, _ = run_of(method, base, tmp_path / method)
        assert f"{method} changes the model's own tensors" in (said := line(run, "--to", "lora")) and "--to merged" in said
        assert "no low-rank update to truncate" in line(run, "--to", "merged", "--total-rank", 3)
        (run / "config.json").unlink()
        assert "says neither model nor task: give its run's folder" in line(run / "adapter", "--to", "merged")
    run, _ = run_of("lora", base, tmp_path / "lora")
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    assert "cut off or no safetensors file" in line(run, "--to", "lora")
    (run / "adapter" / "adapter_model.safetensors").unlink()
    assert "holds no adapter: give a run's folder" in line(run, "--to", "lora")
    (run / "adapter" / "adapter_model.bin").touch()
    assert "is a pickle" in line(run, "--to", "lora")
    for path in (run / "adapter").iterdir():
        path.unlink()
    (run / "adapter").rmdir()
    (run / "result.json").touch()
    assert "a run without its adapter/" in (said := line(run, "--to", "lora")) and "run the study again" in said
    assert "holds no adapter" in line(tmp_path / "nowhere", "--to", "lora")


# -- the model's class -----------------------------------------------------------------------------------------------------


def vision(kind: str, folder: Path):
    """A base without a head, and the class of a classifier over it, with the end of its linears' names."""
    import transformers

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "hidden_size": 32}
    if kind == "wav2vec2":
        convolutions = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8), "num_feat_extract_layers": 2}
        positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
        config = transformers.Wav2Vec2Config(vocab_size=67, **sizes, **convolutions, **positions)
        transformers.Wav2Vec2Model(config).save_pretrained(folder)
        return transformers.Wav2Vec2ForSequenceClassification, {"input_values": torch.ones(2, 400)}, ["projector", "classifier"]
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    transformers.ViTModel(config).save_pretrained(folder)
    return transformers.ViTForImageClassification, {"pixel_values": torch.ones(2, 3, 16, 16)}, ["classifier"]


@pytest.mark.parametrize("writer", ["peft", "ours"])
@pytest.mark.parametrize(("kind", "labels"), [("vit", 3), ("vit", 5), ("wav2vec2", 4)])
def test_the_class_that_the_adapter_names_is_exported(kind, labels, writer, tmp_path, monkeypatch):
    import peft

    classifier, inputs, heads = vision(kind, tmp_path / "base")
    model = classifier.from_pretrained(tmp_path / "base", num_labels=labels).eval()
    if writer == "peft":
        settings = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": heads, "init_lora_weights": False}
        model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, **settings)).eval()
        model.save_pretrained(tmp_path / "a")
    else:
        fill(adapter := variants.create("lora", rank=3, alpha=7).attach(model, ["q_proj", "v_proj"], head=heads))
        variants.save_pretrained(adapter, tmp_path / "a")
    with torch.no_grad():
        want = model(**inputs).logits
    assert rankwise(monkeypatch, "export", tmp_path / "a", "--to", "merged", "--out", tmp_path / "out") == 0
    whole, notes = classifier.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not notes["missing_keys"]
    with torch.no_grad():
        torch.testing.assert_close(whole.eval()(**inputs).logits, want, rtol=0, atol=1e-5)


def test_another_class_may_be_named_and_a_foreign_one_must_be(base, tmp_path, monkeypatch, capsys):
    classifier, inputs, heads = vision("vit", tmp_path / "base")
    model = classifier.from_pretrained(tmp_path / "base", num_labels=3).eval()
    fill(adapter := variants.create("lora", rank=3, alpha=7).attach(model, ["q_proj", "v_proj"], head=heads))
    variants.save_pretrained(adapter, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    foreign = {"base_model_class": "MyViT", "parent_library": "transformers_modules.me.modeling"}
    path.write_text(json.dumps(config | {"auto_mapping": foreign}))
    words = ("export", tmp_path / "a", "--to", "merged", "--out", tmp_path / "out")
    line = refused(monkeypatch, capsys, *words)
    assert "MyViT of transformers_modules.me.modeling, which is not of transformers" in line and "--model-class" in line
    line = refused(monkeypatch, capsys, *words, "--model-class", "ViTForImageClassifcation")
    assert 'no model class ViTForImageClassifcation; did you mean "ViTForImageClassification"?' in line
    assert rankwise(monkeypatch, *words, "--model-class", "AutoModelForImageClassification") == 0
    with torch.no_grad():
        want, whole = model(**inputs).logits, classifier.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(whole(**inputs).logits, want, rtol=0, atol=1e-5)
    run, _ = run_of("lora", base, tmp_path / "run")
    line = refused(monkeypatch, capsys, "export", run, *words[2:], "--model-class", "BertModel")
    assert "is a run, whose task says the class" in line


@pytest.mark.parametrize("folder", ["/home/ada/models/base", "~/elsewhere/base", "./base", r"C:\models\base"])
def test_a_base_of_another_machine_is_refused_with_the_remedy(folder, base, tmp_path, monkeypatch, capsys):
    run, _ = run_of("lora", base, tmp_path / "run")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": folder}))
    (run / "config.json").write_text(json.dumps(json.loads((run / "config.json").read_text()) | {"model": folder}))
    for path in (run, run / "adapter"):
        line = refused(monkeypatch, capsys, "export", path, "--to", "merged", "--out", tmp_path / "out")
        assert folder in line and "name a copy with --model" in line
        (run / "config.json").unlink(missing_ok=True)
