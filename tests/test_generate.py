"""`rankwise generate`: what a model with an adapter says, of a run's folder, an adapter's, and PEFT's own."""

import json
import shutil

import pytest
import torch
from rankwise import variants
from rankwise.experiments import models

from tests import language_models, small_world
from tests.test_export import rankwise, refused

PROMPTS = ["a b", "c d e f g", "b a a"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return language_models.saved("gpt2", tmp_path_factory.mktemp("base") / "model")


def ours(base, folder, method="lora", **settings):
    """A saved adapter, and the live model."""
    model = models.load(base, language_models.TASK)[0]
    adapter = variants.create(method, **({"rank": 3, "alpha": 40} | settings)).attach(model, "all-linear", head=[])
    language_models.fill(adapter, 0.2)
    variants.save_pretrained(adapter, folder)
    return model


def after(model, prompt, limit=7):
    """The tokens that transformers generates after one prompt alone, and its text."""
    ask = language_models.tokenizer()
    ids = ask(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False)[0, ids.shape[1] :]
    return ask.decode(made, skip_special_tokens=True).strip(), made.tolist()


def test_every_prompt_is_gone_on_with_as_transformers_does(base, tmp_path, monkeypatch, capsys):
    model = ours(base, tmp_path / "adapter")
    words = ["generate", tmp_path / "adapter", "--max-new-tokens", 7, "--batch-size", 2, "--json"]
    assert rankwise(monkeypatch, *words, *(word for prompt in PROMPTS for word in ("--prompt", prompt))) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS and [row["row"] for row in rows] == [1, 2, 3]
    for row in rows:
        text, tokens = after(model, row["prompt"])
        assert row["text"] == text
        assert (row["tokens"], row["is_finished"]) == ((tokens.index(3), True) if 3 in tokens else (7, False))
    assert len({row["text"] for row in rows}) > 1
    with_base = after(models.load(base, language_models.TASK)[0], PROMPTS[0])[0]
    assert with_base != rows[0]["text"]


def test_pefts_own_adapter_generates_what_peft_generates(base, tmp_path, monkeypatch, capsys):
    import peft

    model = models.load(base, language_models.TASK)[0]
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=40, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=True)
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    wrapped.save_pretrained(tmp_path / "peft")
    expected, _ = after(wrapped.eval(), PROMPTS[0])
    assert rankwise(monkeypatch, "generate", tmp_path / "peft", "--prompt", PROMPTS[0], "--max-new-tokens", 7) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_several_adapters_each_go_on_from_every_prompt(base, tmp_path, monkeypatch, capsys):
    ours(base, tmp_path / "one")
    ours(base, tmp_path / "two", "dora", alpha=20)
    words = ["--max-new-tokens", 5, "--json", *(word for prompt in PROMPTS[:2] for word in ("--prompt", prompt))]

    def texts(*adapters):
        assert rankwise(monkeypatch, "generate", *adapters, *words) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    one, two = texts(tmp_path / "one"), texts(tmp_path / "two")
    assert "adapter" not in one[0]
    rows = texts("--adapter", f"one={tmp_path / 'one'}", "--adapter", f"two={tmp_path / 'two'}", "--batch-size", 3)
    assert [(row["row"], row["adapter"]) for row in rows] == [(1, "one"), (2, "two"), (3, "one"), (4, "two")]
    for row, alone in zip(rows, [one[0], two[0], one[1], two[1]], strict=True):
        assert {**row, "row": 0, "adapter": 0} == {**alone, "row": 0, "adapter": 0}
    assert one[0]["text"] != two[0]["text"]
    for fault, *given in (
        ("give NAME=FOLDER", "--adapter", "one"),
        ("is given twice", "--adapter", f"a={tmp_path / 'one'}", "--adapter", f"a={tmp_path / 'two'}"),
        ("and not both", tmp_path / "one", "--adapter", f"a={tmp_path / 'two'}"),
        ("and not both",),
    ):
        assert fault in refused(monkeypatch, capsys, "generate", *given, *words)


def test_a_file_of_prompts_is_answered_in_its_order(base, tmp_path, monkeypatch, capsys):
    model = ours(base, tmp_path / "adapter", "dora")
    rows = [{"instruction": "a b", "input": "c"}, {"instruction": "g f e d c b a", "input": "d"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["generate", tmp_path / "adapter", "--data", tmp_path / "prompts.jsonl", "--max-new-tokens", 7]
    words += ["--out", tmp_path / "out.jsonl"]
    assert rankwise(monkeypatch, *words) == 0
    said = capsys.readouterr()
    assert "2 prompts, read from instruction + input" in said.err and said.out == f"2 texts: {tmp_path / 'out.jsonl'}\n"
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    both = [f"{row['instruction']}\n{row['input']}" for row in rows]  # as a study's own data are read
    assert [row["text"] for row in written] == [after(model, prompt)[0] for prompt in both]
    assert rankwise(monkeypatch, *words, "--input", "instruction") == 0
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in written] == [after(model, row["instruction"])[0] for row in rows]
    assert rankwise(monkeypatch, *words, "--input", "{instruction} {input}") == 0
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert written[1]["prompt"] == "g f e d c b a d" and written[1]["text"] == after(model, "g f e d c b a d")[0]


def test_chats_of_a_file_are_answered_as_the_template_writes_them(base, tmp_path, monkeypatch, capsys):
    model = ours(base, tmp_path / "adapter")
    other = shutil.copytree(base, tmp_path / "chats")
    (other / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role[0] + ' ' + m.content + ' ' }}{% endfor %}")
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]
    chats = [turns, [*turns, {"role": "assistant", "content": "never read"}], turns[:1]]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    words = ["generate", tmp_path / "adapter", "--data", tmp_path / "chats.jsonl", "--max-new-tokens", 7]
    assert rankwise(monkeypatch, *words) == 2 and "has no chat template" in capsys.readouterr().err
    assert rankwise(monkeypatch, *words, "--model", other, "--json") == 0
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    asked = ["u a b a c u d", "u a b a c u d", "u a b"]
    assert [row["text"] for row in written] == [after(model, prompt)[0] for prompt in asked]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": None}]}) + "\n")
    assert "chats.jsonl, row 1: turn 1 (user) is more or other than one text" in refused(monkeypatch, capsys, *words)


def test_a_text_ends_at_any_token_that_the_model_s_own_settings_name(base, tmp_path, monkeypatch, capsys):
    ours(base, tmp_path / "adapter")
    other = shutil.copytree(base, tmp_path / "ends")
    settings = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": list(range(3, 67))}))
    words = ["generate", tmp_path / "adapter", "--prompt", "a b", "--max-new-tokens", 1, "--model", other, "--json"]
    assert rankwise(monkeypatch, *words) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["tokens"], row["is_finished"]) == (0, True)


def test_draws_are_the_same_for_a_seed_and_differ_between_seeds(base, tmp_path, monkeypatch, capsys):
    ours(base, tmp_path / "adapter")

    def drawn(*words):
        always = ["--prompt", "a b", "--temperature", 2, "--max-new-tokens", 9]
        assert rankwise(monkeypatch, "generate", tmp_path / "adapter", *always, *words) == 0
        return capsys.readouterr().out

    assert drawn("--seed", 1) == drawn("--seed", 1) != drawn("--seed", 2)
    assert drawn("--seed", 1, "--prompt", "c d e", "--batch-size", 2).startswith("[1] " + drawn("--seed", 1).rstrip("\n"))


def test_what_cannot_be_generated_is_one_line_with_a_remedy(base, tmp_path, monkeypatch, capsys):
    ours(base, tmp_path / "adapter")
    (tmp_path / "rows.jsonl").write_text('{"questoin": "a"}\n')

    def line(*words):
        return refused(monkeypatch, capsys, "generate", *words)

    adapter = tmp_path / "adapter"
    assert "holds no adapter" in line(base, "--prompt", "a")
    assert "give --prompt, or a file" in line(adapter)
    assert "give --prompt, or a file" in line(adapter, "--prompt", "a", "--data", "x.jsonl")
    assert "--max-new-tokens 0: give at least 1" in line(adapter, "--prompt", "a", "--max-new-tokens", 0)
    assert "--top-p 1.5: give a number above 0" in line(adapter, "--prompt", "a", "--temperature", 1, "--top-p", 1.5)
    assert "--temperature -1: give a number above 0" in line(adapter, "--prompt", "a", "--temperature", -1)
    assert "give --temperature too" in line(adapter, "--prompt", "a", "--top-p", 0.5)
    assert "no such file" in line(adapter, "--data", tmp_path / "nothing.jsonl")
    assert "name one with --input" in line(adapter, "--data", tmp_path / "rows.jsonl")
    assert 'did you mean "questoin"' in line(adapter, "--data", tmp_path / "rows.jsonl", "--input", "question")
    assert "'other' is no field" in line(adapter, "--data", tmp_path / "rows.jsonl", "--input", "{other}")
    assert "60 tokens, with 128 to generate this is above the 64" in line(adapter, "--prompt", "a " * 60)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"task_type": "TOKEN_CLS"}))
    assert "which gives neither texts nor the class of a text" in line(adapter, "--prompt", "a")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    assert "--max-new-tokens is about texts to generate" in line(adapter, "--prompt", "a", "--max-new-tokens", 3)


def test_a_classifier_of_peft_gives_the_labels_that_its_model_names(tmp_path, monkeypatch, capsys):
    import peft
    from transformers import AutoModelForSequenceClassification

    base = small_world.model(tmp_path / "base", "gpt2")  # which has no padding token
    names = {0: "high", 1: "low", 2: "mid"}
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, pad_token_id=0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="SEQ_CLS"))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.normal_(0, 0.5)
    wrapped.save_pretrained(tmp_path / "peft")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    named = {"id2label": names, "label2id": {v: k for k, v in names.items()}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | named))
    assert rankwise(monkeypatch, "generate", tmp_path / "peft", "--prompt", "a b", "--prompt", "c", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ask = models.tiny_tokenizer()
    for row in rows:
        logits = wrapped.eval()(**ask(row["prompt"], return_tensors="pt")).logits[0]
        assert row["label"] == names[int(logits.argmax())]
        assert list(row["scores"].values()) == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)
        assert list(row["scores"]) == list(names.values())
    assert rankwise(monkeypatch, "generate", tmp_path / "peft", "--prompt", "a b", "--prompt", "c") == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    expected = [f"[{row['row']}] {row['label']} ({max(row['scores'].values()):.3f})" for row in rows]
    assert shown == expected
    several = json.loads((tmp_path / "base" / "config.json").read_text()) | {"problem_type": "multi_label_classification"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(several))
    assert rankwise(monkeypatch, "generate", tmp_path / "peft", "--prompt", "a b", "--prompt", "c", "--json") == 0
    for line in capsys.readouterr().out.splitlines():
        row = json.loads(line)
        shares = wrapped(**ask(row["prompt"], return_tensors="pt")).logits[0].sigmoid().tolist()
        assert list(row["scores"].values()) == pytest.approx(shares, abs=1e-5)
        assert row["label"] == ", ".join(names[i] for i, share in enumerate(shares) if share > 0.5)
