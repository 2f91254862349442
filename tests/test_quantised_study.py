"""Quantised bases in studies, on the command line, in exports and in PEFT."""

import dataclasses
import json
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from rankwise import variants
from rankwise.experiments import config, export, generate, knockout, models, own_study, quantization
from rankwise.experiments.cli.compare import narrowed
from rankwise.experiments.data_entries import OwnData
from rankwise.experiments.records import read_json
from rankwise.experiments.study import Runner
from rankwise.reports import results
from rankwise.reports.tables.captions import task_caption
from rankwise.variants.adapter.kinds.quantised import bits, dequantised, scheme_of
from rankwise.variants.adapter.kinds.scheme import Scheme
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.step import Step
from rankwise.variants.settings import METHODS
from safetensors import safe_open

from tests import small_world
from tests.command import rankwise
from tests.quantised_models import folder, in_full, loaded, needed, wide_folder
from tests.tiny import packed_batch

pytestmark = pytest.mark.filterwarnings("ignore")
NF4, DOUBLE, INT8 = Scheme("nf4"), Scheme("nf4", True), Scheme("int8")
BASIC = {"model": "m", "tasks": ["glue/stsb"], "quick": True}
LORA = {"method": "lora", "rank": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tiny model without a head, of a width that bitsandbytes takes on every processor."""
    return wide_folder(tmp_path_factory.mktemp("wide"))


@pytest.fixture(autouse=True)
def world(monkeypatch, tmp_path):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    small_world.register(monkeypatch.setitem)


# -- what a study may say --------------------------------------------------------------------------------------------------


def study(*entries: dict, **top: object) -> config.Study:
    return config.parse({**BASIC, "methods": list(entries), **top}, "s")


def test_an_entry_says_otherwise_than_its_study():
    entries = [LORA, {**LORA, "label": "plain", "quantization": "none"}, {**LORA, "label": "int8", "quantization": "int8"}]
    made = study(*entries, quantization="nf4", double_quantization=True)
    assert [entry.scheme for entry in made.methods] == [DOUBLE, None, INT8]
    assert [entry.scheme for entry in config.quantized(made, "int8", False).methods] == [INT8, None, INT8]
    assert [entry.scheme for entry in study(*entries).methods] == [None, None, INT8]
    chosen = narrowed(made, "lora", None, None, None, [])
    assert [entry.scheme for entry in config.quantized(chosen, "nf4", False).methods] == [NF4]


@pytest.mark.parametrize(
    ("entries", "top", "words"),
    [
        ([LORA], {"quantization": "int4"}, "study.quantization = 'int4': should be 'nf4' or 'int8'"),
        ([LORA], {"double_quantization": True}, "double_quantization = true has no effect with no quantization: take it out"),
        ([LORA], {"quantization": "int8", "double_quantization": True}, 'no effect with quantization = "int8": .* add .*nf4'),
        ([{**LORA, "double_quantization": True}], {}, "lora: double_quantization = true has no effect with no quantization"),
        ([{"method": "full", "learning_rate": 1e-3}], {"quantization": "nf4"}, r"full: full trains the base's .*\(nf4\): take"),
        ([LORA], {"defaults": {"quantization": "nf4"}}, "defaults.quantization: no method of this study reads it"),
    ],
)
def test_what_a_study_may_not_say_is_said_in_one_line(entries, top, words):
    with pytest.raises(ValueError, match=words) as error:
        study(*entries, **top)
    assert len(str(error.value).splitlines()) == 1


def test_full_fine_tuning_may_stand_beside_quantised_bases():
    entry = {"method": "full", "learning_rate": 1e-3, "quantization": "none"}
    assert [one.scheme for one in study(LORA, entry, quantization="nf4").methods] == [NF4, None]


def test_the_registry_knows_what_trains_the_base():
    assert {name for name, one in METHODS.items() if one.trains_base} == {
        name for name, one in METHODS.items() if one.load().trains_base
    }


@pytest.mark.parametrize(("version", "words"), [(None, "which is not installed"), ("0.46.1", "and 0.46.1 is installed")])
def test_without_bitsandbytes_a_study_is_refused_before_anything_is_loaded(monkeypatch, version, words):
    own = quantization.importlib.metadata.version

    def versions(name: str) -> str:
        if name != "bitsandbytes":
            return own(name)
        if version is None:
            raise quantization.importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(quantization.importlib.metadata, "version", versions)
    from rankwise.experiments import checks

    with pytest.raises(ValueError, match=rf"needs bitsandbytes >= 0.50, {words}: pip install 'rankwise\[quantized\]'"):
        checks.check(study(LORA, quantization="nf4"))
    checks.check(study(LORA))


# -- the command line ------------------------------------------------------------------------------------------------------


@needed
def test_options_that_make_no_sense_are_refused(tmp_path, capsys):
    for options, words in (
        (["--quantization", "int4"], ["--quantization int4: no such form", "give nf4 or int8"]),
        (["--double-quantization"], ["--double-quantization has no effect without --quantization nf4"]),
        (["--quantization", "int8", "--double-quantization"], ["--double-quantization has no effect without"]),
        (["--quantization", "nf4"], ["--quantization nf4: full: full trains the base's own weights"]),
    ):
        assert rankwise("compare", "smoke", "--out", tmp_path / "out", *options) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
        assert len(said.splitlines()) == 1
    assert rankwise("export", tmp_path, "--to", "lora", "--out", tmp_path / "out", "--requantize") == 2
    assert "--requantize has no effect with --to lora: take it out" in capsys.readouterr().err


def test_a_comparison_in_one_line_writes_its_quantization_down(tmp_path):
    data = OwnData(name="mine", train=str(tmp_path / "mine.csv"), kind="classification", input="text", target="label")
    written = {}
    for form in (None, INT8, DOUBLE):
        methods = own_study.check_methods(None, False, form)
        assert ("full" in methods) == (form is None) and "lora" in methods
        text = own_study.compose(data, "m", methods, 800, 16, tmp_path, False, form)
        written[form] = {k: v for k, v in tomllib.loads(text).items() if "quantization" in k}
    assert written[None] == {} and written[INT8] == {"quantization": "int8"}
    assert written[DOUBLE] == {"quantization": "nf4", "double_quantization": True}


# -- loading, training, going on -------------------------------------------------------------------------------------------


@needed
@pytest.mark.parametrize(("scheme", "precision"), [(DOUBLE, "fp32"), (INT8, "bf16")])
def test_a_model_is_loaded_quantised_but_for_its_head(model, scheme, precision):
    loaded_model, _, info = models.load(model, small_world.task(), precision, "cpu", quantization=scheme)
    plain, _, plain_info = models.load(model, small_world.task(), precision)
    kinds = {name: bits(module) for name, module in loaded_model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert kinds["classifier"] is None and kinds["bert.pooler.dense"] is None
    assert {n for n, b in kinds.items() if b} == {n for n in kinds if ".layer." in n}
    assert info.quantization == scheme and info.num_parameters == plain_info.num_parameters
    assert info.heads == plain_info.heads and plain_info.quantization is None and not loaded_model.training
    name = "bert.encoder.layer.1.output.dense"
    W, own = dequantised(loaded_model.get_submodule(name)).float(), plain.get_submodule(name).weight.float()
    assert 0 < ((W - own).norm() / own.norm()).item() < (0.11 if scheme.name == "nf4" else 0.01)
    ids = packed_batch([0])["input_ids"]
    evaluated = loaded_model(input_ids=ids).logits
    dense = in_full(loaded_model)
    assert torch.equal(evaluated, dense(input_ids=ids).logits)  # activations are not rounded, as bitsandbytes would


@needed
@pytest.mark.slow
def test_a_run_over_a_quantised_base_goes_on_where_it_was(model, tmp_path):
    pack = dataclasses.replace(small_world.pack(model, "adalora+dora", seeds=(0, 1, 2)), quantization=DOUBLE)
    whole = small_world.trained(pack, tmp_path / "whole")
    reports = iter(range(8))  # it ends at the ninth: after its seventh step and an evaluation

    def stop(rows: float) -> None:
        if next(reports, None) is None:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        small_world.trained(pack, tmp_path / "cut", checkpoint_seconds=0.0, progress=stop)
    went_on = small_world.trained(pack, tmp_path / "cut")
    for one, other in zip(whole[1], went_on[1], strict=True):
        assert one.metrics == other.metrics and one.error is None
        assert (one.predictions["test"] == other.predictions["test"]).all()
    state, other = whole[0].adapter.state_dict(), went_on[0].adapter.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert whole[0].adapter.ranks() and scheme_of(whole[0].model) == DOUBLE
    plain = small_world.pack(model, "adalora+dora", seeds=(0, 1, 2))
    assert pack.identity() != plain.identity()
    assert not small_world.trainer(plain, tmp_path / "cut")._resume()


@needed
def test_evaluation_does_not_dequantise_what_it_evaluates(model, tmp_path, monkeypatch):
    pack = dataclasses.replace(small_world.pack(model, "lora"), quantization=NF4)
    trainer, _ = small_world.trained(pack, tmp_path)
    monkeypatch.setattr(type(trainer.adapter), "merge", lambda *_: pytest.fail("it was merged"))
    assert trainer.predictions("test")[0].shape == (20,)
    split = pack.splits[0]
    (measured,) = knockout.knock_out(trainer.adapter, trainer.processor, pack.task, split, trainer.data[split], 8)
    assert len(measured["sites"]) == 4 and any(one["loss"] != measured["loss"] for one in measured["sites"].values())


@needed
def test_a_study_compares_bases_and_its_adapters_know_theirs(model, tmp_path):
    entries = [
        {"method": "lora", "learning_rate": 1e-2, **small_world.settings("lora"), "label": label, "quantization": form}
        for label, form in (("lora", "none"), ("qlora", "nf4"))
    ]
    what = small_world.study(model, entries, seeds=1, knock_out=True, anatomy=True)
    runner = Runner(what, tmp_path, "cpu")
    runner.prepare()
    plain, quantised = runner.run()
    assert plain["status"] == quantised["status"] == "completed"
    assert plain["final_train_loss"] != quantised["final_train_loss"]
    folder = tmp_path / quantised["fingerprint"]
    written = read_json(folder / "config.json")
    assert written["quantization"].items() >= {"name": "nf4", "is_double": False}.items()
    assert "quantization" not in read_json(tmp_path / plain["fingerprint"] / "config.json")
    said = [line for line in task_caption(results.load(tmp_path).parts()[0]) if "quantised" in line]
    assert said == ["The base is quantised to nf4 for qlora."]
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        fact = json.loads(file.metadata()["rankwise"])["quantization"]
    assert fact["name"] == "nf4" and "classifier" in fact["skipped"] and fact["dtype"] == "float32"
    assert read_json(folder / "adapter" / "adapter_config.json")["base_model_name_or_path"] == model
    measured = knockout.of_run(folder)
    assert measured == read_json(folder / "knockout.json")
    # exported, merged
    source = export.find(folder, "merged", None)
    assert source.scheme == NF4
    record = export.export(source, "merged", tmp_path / "merged")
    assert record["quantization"] == "nf4" and record["dequantised"] and record["requantised"] is None
    found, _, _ = generate.classify(source, ["a b c", "d"], device="cpu")
    with models.quiet():
        merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        ask = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    want = merged(**ask(["a b c", "d"], padding=True, return_tensors="pt")).logits.flatten().tolist()
    assert [one.value for one in found] == pytest.approx(want, abs=1e-4)
    record = export.export(source, "merged", tmp_path / "again", requantize=True)
    assert not record["dequantised"] and 0.05 < record["requantised"]["error"] < 0.11
    assert "merged weights, quantised again to nf4, are off by" in export.costs(record["requantised"])
    with pytest.raises(ValueError, match="has no quantised weights: leave it out"):
        export.export(export.find(tmp_path / plain["fingerprint"], "merged", None), "merged", tmp_path / "no", requantize=True)


# -- files -----------------------------------------------------------------------------------------------------------------


def logits(model: torch.nn.Module, train: bool = False) -> torch.Tensor:
    model.train(train)
    with torch.no_grad():
        return model(input_ids=packed_batch([0])["input_ids"]).logits


@needed
@pytest.mark.parametrize("form", ["nf4+dq", "int8"])
def test_a_merged_model_is_written_in_full_and_quantised_only_when_asked(form, tmp_path):
    import transformers

    model = loaded("causal", form)
    adapter = variants.create("adalora", initial_rank=4, target_rank=2, alpha=7).attach(model, ["q_proj", "down_proj"])
    fill(adapter, 0.05)
    adapter.begin(Step(1, 10), training=False)
    want, noted = logits(model), dict(vars(model.config))
    with pytest.warns(UserWarning, match="4 weights are dequantised"):
        assert variants.export_merged(adapter, tmp_path / "full") is None
    assert dict(vars(model.config)) == noted and model.hf_quantizer is not None and torch.equal(logits(model), want)
    with models.quiet():
        full = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert scheme_of(full) is None and not hasattr(full.config, "quantization_config")
    assert all(p.is_floating_point() for p in full.parameters())  # the modules without an adapter too
    torch.testing.assert_close(logits(full), want, rtol=1e-4, atol=1e-5)
    cost = variants.export_merged(adapter, tmp_path / "again", requantize=True)
    with models.quiet():
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert scheme_of(again) == scheme_of(model) and cost.weights == 4
    error = (logits(again, train=True) - want).norm() / want.norm()
    assert 1e-4 < error < 0.5 and not torch.allclose(logits(again, train=True), want, rtol=1e-3, atol=1e-3)
    with pytest.warns(UserWarning, match="over another base than this one: .*, and here not quantised"):
        variants.save_pretrained(adapter, tmp_path / "adapter")
        variants.load_pretrained(full, tmp_path / "adapter")


@needed
@pytest.mark.parametrize("form", ["nf4+dq", "int8"])
@pytest.mark.parametrize("settings", [{}, {"scaling": "alpha/sqrt(r)"}, {"magnitude": True}], ids=["lora", "rslora", "dora"])
def test_peft_over_the_same_base_has_equal_outputs(form, settings, tmp_path):
    """Both in training mode: in evaluation bitsandbytes rounds activations, which with our adapter it does not."""
    from peft import PeftModel

    method = "dora" if settings.pop("magnitude", False) else "lora"
    adapter = variants.create(method, rank=3, alpha=7, **settings).attach(loaded("causal", form), ["q_proj", "down_proj"])
    fill(adapter, 0.05)
    want = logits(adapter.model, train=True)
    variants.save_pretrained(adapter, tmp_path)
    with models.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(loaded("causal", form), tmp_path)
    tolerance = {"rtol": 1e-4, "atol": 1e-4}  # the last bits of int8's weights depend on the order of two products
    torch.testing.assert_close(logits(theirs, train=True), want, **tolerance)
    assert not torch.allclose(logits(loaded("causal", form), train=True), want, rtol=1e-2, atol=1e-2)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder("causal"))


@needed
def test_an_adapter_made_in_python_is_exported_over_the_base_that_its_file_names(tmp_path):
    adapter = variants.create("lora", rank=3, alpha=7).attach(loaded("causal", "nf4"), ["q_proj"])
    fill(adapter, 0.05)
    want = logits(adapter.model)
    variants.save_pretrained(adapter, tmp_path / "adapter")
    source = export.find(tmp_path / "adapter", "merged", None)
    assert source.scheme == NF4 and source.quantization["skipped"] == ["lm_head"]
    record = export.export(source, "merged", tmp_path / "merged")
    with models.quiet():
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert record["dequantised"]
    torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-5)
    assert generate.find(tmp_path / "adapter").scheme == NF4


def test_the_study_of_qlora_differs_in_the_base_alone():
    path = config.shipped()["qlora-smollm2"]
    made, raw = config.read(path), tomllib.loads(Path(path).read_text())
    schemes = {entry.label: entry.scheme for entry in made.methods}
    assert set(schemes.values()) == {None, DOUBLE} and len(made.seeds) >= 2
    for label in [label for label, scheme in schemes.items() if scheme is None]:
        (one,), (other,) = ([e for e in made.methods if e.label == name] for name in (label, f"q{label}"))
        assert (one.settings, one.learning_rates, one.targets) == (other.settings, other.learning_rates, other.targets)
    assert "max_steps" in raw["training"] or "epochs" in raw["training"]
