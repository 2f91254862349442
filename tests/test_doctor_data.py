"""`rankwise doctor --data`: the loss of every truncation, beside PEFT's own model asked for row after row."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from rankwise.experiments import truncations
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests import language_models, small_world
from tests.command import rankwise

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")

LETTERS = "abcdefgh"
LABELS = ("z", "x", "y")  # in the order of the model's outputs, which is no alphabet's


def trained(model, folder, **settings):
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **settings))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    wrapped.save_pretrained(folder)


def texts(count):
    return [" ".join(LETTERS[(i * j) % 8] for j in range(1, 4 + i % 3)) for i in range(count)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two small models, an adapter of each, and their data."""
    folder = tmp_path_factory.mktemp("world")
    base = small_world.model(folder / "encoder")
    config = json.loads((folder / "encoder" / "config.json").read_text())
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: at for at, name in enumerate(LABELS)}}
    (folder / "encoder" / "config.json").write_text(json.dumps(config | names))
    model = AutoModelForSequenceClassification.from_pretrained(base)
    trained(model, folder / "classifier", target_modules=["query", "value"], task_type="SEQ_CLS")
    with (folder / "labelled.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((text, "xyz"[i % 3]) for i, text in enumerate(texts(11)))])
    base = language_models.saved("llama", folder / "decoder")
    trained(AutoModelForCausalLM.from_pretrained(base), folder / "speaker", target_modules="all-linear", task_type="CAUSAL_LM")
    rows = [
        {"prompt": " ".join(LETTERS[: 1 + i % 4]), "completion": " ".join(LETTERS[i % 5 : i % 5 + 1 + i % 3])} for i in range(7)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def of_classifier(world, folder, is_base=False):
    """(losses, counts, accuracy) of PEFT's model, row by row."""
    model = AutoModelForSequenceClassification.from_pretrained(world / "encoder")
    model = peft.PeftModel.from_pretrained(model, folder).eval()
    ask, losses, right = AutoTokenizer.from_pretrained(world / "encoder"), [], []
    if is_base:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
    for i, text in enumerate(texts(11)):
        logits = model(**ask(text, return_tensors="pt")).logits[0].detach().double()
        label = LABELS.index("xyz"[i % 3])
        losses.append(float(-logits.log_softmax(0)[label]))
        right.append(int(logits.argmax()) == label)
    return np.array(losses), np.ones(11), 100 * np.mean(right)


def of_speaker(world, folder, is_base=False):
    """The same of the language model; its counts are the tokens of the target and the end of text."""
    model = AutoModelForCausalLM.from_pretrained(world / "decoder")
    model = model if is_base else peft.PeftModel.from_pretrained(model, folder)
    ask, losses, counts = AutoTokenizer.from_pretrained(world / "decoder"), [], []
    for row in map(json.loads, (world / "prompts.jsonl").read_text().splitlines()):
        prompt = ask(row["prompt"], add_special_tokens=False)["input_ids"]
        target = [*ask(row["completion"], add_special_tokens=False)["input_ids"], ask.eos_token_id]
        logits = model.eval()(torch.tensor([prompt + target])).logits[0].detach().double()
        found = F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(target), reduction="none")
        losses.append(float(found.mean()))
        counts.append(len(target))
    return np.array(losses), np.array(counts), None


def by_hand(losses, counts):
    value = (losses * counts).sum() / counts.sum()
    n, residuals = len(losses), counts * (losses - value)
    return value, (n / (n - 1) * (residuals**2).sum()) ** 0.5 / counts.sum()


@pytest.mark.parametrize(
    ("name", "data", "oracle"), [("classifier", "labelled.csv", of_classifier), ("speaker", "prompts.jsonl", of_speaker)]
)
def test_losses_are_those_of_peft_s_model_row_by_row(name, data, oracle, world, tmp_path, capsys):
    words = ["doctor", world / name, "--data", world / data, "--batch-size", 3, "--total", 7]
    assert rankwise(*words, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    measured = said["measured"]
    assert (measured["rows"], measured["of_rows"]) == ((11, 11) if name == "classifier" else (7, 7))
    assert measured["labels"] == (list(LABELS) if name == "classifier" else [])
    assert list(measured["criteria"]) == list(said["criteria"])
    whole, _, _ = oracle(world, world / name)
    losses = {"whole": oracle(world, world / name), "base": oracle(world, world / name, is_base=True)}
    for criterion in ("total", "sv_fro"):
        assert rankwise(*words[:2], "--total", 7, "--fix", tmp_path / criterion, "--by", criterion) == 0
        losses[criterion] = oracle(world, tmp_path / criterion)
    for who, (found, counts, score) in losses.items():
        of = measured["criteria"].get(who) or measured[who]
        value, error = by_hand(found, counts)
        difference, of_difference = by_hand(found - whole, counts)
        assert of["loss"] == pytest.approx(value, abs=2e-5) and of["standard_error"] == pytest.approx(error, rel=1e-3)
        assert of["difference"] == pytest.approx(difference, abs=2e-5)
        assert of["difference_standard_error"] == pytest.approx(of_difference, rel=2e-3, abs=2e-6)
        if score is not None:
            assert of["score"] == pytest.approx(score)
    assert abs(measured["criteria"]["total"]["difference"]) > 1e-3
    assert measured["criteria"]["exact"]["difference"] == pytest.approx(0, abs=1e-5)
    capsys.readouterr()
    assert rankwise(*words, "--rows", 5) == 0
    out = capsys.readouterr().out
    assert (name == "speaker") != ("Outputs are taken for the labels z, x, y in this order." in " ".join(out.split()))
    assert "Measured on" in out and f"5 rows of {11 if name == 'classifier' else 7}, drawn by a fixed seed" in out


def test_standard_errors_by_hand():
    losses, counts = np.array([1.0, 2.0, 6.0, 9.0]), np.array([1, 1, 2, 0])  # nothing of the last row is scored
    assert truncations.mean(losses, counts) == (3.75, pytest.approx((1.5 * (2.75**2 + 1.75**2 + 4.5**2)) ** 0.5 / 4))
    assert truncations.mean(np.array([1.0]), np.array([3])) == (1.0, None)
    assert truncations.mean(np.array([1.0, np.nan]), np.ones(2)) == (None, None)


def without_head(folder):
    path = folder / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "classifier" not in name}, path)
    settings = folder / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"modules_to_save": None}))


def with_nan(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    next(t for name, t in tensors.items() if "lora_B" in name)[0, 0] = float("nan")
    save_file(tensors, path)


def nameless(folder):
    settings = folder / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": None}))


def start_of_pissa(folder):
    settings = folder / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"init_lora_weights": "pissa"}))


REFUSED = {
    "no base model": (nameless, [], "names no base model: name it with --model"),
    "no such base": (None, ["--model", "/no/such/folder"], "/no/such/folder"),
    "no such file": (None, ["--data", "/no/such.csv"], "/no/such.csv: no such file"),
    "another kind": (None, ["--kind", "language-modelling"], "read as language-modelling, which asks an AutoModelForCausalLM"),
    "an unknown label": (None, ["--data", "MORE"], "has 4 labels (w, x, y, z), and the model 3 outputs"),
    "no head anywhere": (without_head, [], "it would answer at random"),
    "not finite": (with_nan, [], "holds numbers that are not finite"),
    "another base": (start_of_pissa, [], "init_lora_weights = 'pissa'"),
    "no rows": (None, ["--rows", 0], "--rows 0: give at least 1"),
    "no device": (None, ["--device", "tpu"], "--device tpu: no such device"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_measured_is_refused(what, world, tmp_path, capsys):
    change, more, message = REFUSED[what]
    folder = shutil.copytree(world / "classifier", tmp_path / "adapter")
    if change is not None:
        change(folder)
    data = [] if "--data" in more else ["--data", world / "labelled.csv"]
    if "MORE" in more:
        rows = "".join(f"{text},{'wxyz'[i % 4]}\n" for i, text in enumerate(texts(12)))
        (tmp_path / "more.csv").write_text("text,label\n" + rows)
        more = ["--data", tmp_path / "more.csv"]
    assert rankwise("doctor", folder, *data, *more) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == "" and len(said.err.splitlines()) == 1, said.err


def test_options_of_the_measurement_ask_for_data(world, capsys):
    for option, value in (("--model", "x"), ("--kind", "regression"), ("--rows", 3), ("--device", "cpu")):
        assert rankwise("doctor", world / "classifier", option, value) == 2
        assert f"{option} is about measuring the loss" in capsys.readouterr().err
