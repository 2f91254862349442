"""The kinds over language models, trained through the trainer on tiny decoders and encoder-decoders."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from rankwise import variants
from rankwise.experiments import config, kinds, knockout, models, records, tasks
from rankwise.experiments.data.encoded import IGNORED
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.kinds.decoding import Sampling, generated
from rankwise.experiments.kinds.language import padded
from rankwise.experiments.kinds.predictions import texts_from_bytes
from rankwise.experiments.study import Runner
from rankwise.experiments.tasks import Task, text_metrics
from rankwise.experiments.training.evaluation import Evaluator
from rankwise.reports import results
from rankwise.reports.tables import samples
from safetensors.numpy import load_file

from tests import language_models, small_world
from tests.test_trainer import Stop, assert_near, assert_same, lines, logs, stopping_after, trained_tensors
from tests.tiers import quick

ROWS = {"train": 36, "validation": 9, "test": 10}
SCORED = {
    "generation": ("rougeL", text_metrics.of_texts(["rougeL", "exact_match"]), text_metrics.resampled("rougeL")),
    "choice": ("accuracy", text_metrics.choice_accuracy, None),
    "language-modelling": ("compression", text_metrics.modelled, text_metrics.resampled_compression),
}
SEEDS, RATES = (5, 2, 9), (5e-2, 4e-3, 2e-2)


def examples(kind: str, split: str) -> Examples:
    """The prompt's last letter and one or two x; of a choice three such answers or two, one of which is right."""
    random = np.random.default_rng(list(ROWS).index(split))
    prompts = [" ".join(random.choice(list("abc"), random.integers(2, 9))) for _ in range(ROWS[split])]
    answers = [f"{prompt[-1]} x" + " x" * (len(prompt) % 2) for prompt in prompts]
    if kind == "generation":
        return Examples(prompts, None, answers)
    if kind == "choice":
        options = [("a x", "b x x", "c")[: 2 + (len(prompt) > 7)] for prompt in prompts]
        right = [min("abc".index(prompt[-1]), len(some) - 1) for prompt, some in zip(prompts, options, strict=True)]
        return Examples(prompts, None, np.array(right), options)
    texts = [f"{prompt} {answer}" for prompt, answer in zip(prompts, answers, strict=True)] * 3
    return Examples(texts, None, [""] * len(texts))


def task(kind: str) -> Task:
    metric, measure, resampled = SCORED[kind]
    return Task(
        name=f"small/{kind}",
        kind=kind,
        num_labels=0,
        metric=metric,
        licence="made up",
        read=lambda split: examples(kind, split),
        measure=measure,
        resampled=resampled,
        identity=lambda: f"{kind} 1",
    )


def pack(folder, kind, name, method="lora", seeds=SEEDS, rates=RATES, **changes):
    model = str(folder / name) if (folder / name).is_dir() else language_models.saved(name, folder / name)
    one = small_world.pack(model, method, seeds=seeds, learning_rates=rates, accumulation=2, **changes)
    return replace(one, task=task(kind), targets="all-linear")


def data_of(one, is_seq2seq=False):
    processor = language_models.tokenizer()
    processor.is_encoder_decoder = is_seq2seq
    return {split: kinds.get(one.task.kind).encode(examples(one.task.kind, split), processor, 24) for split in ROWS}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))


CASES = [
    ("generation", "llama", "lora"),
    ("language-modelling", "gpt_neox", "adalora"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("generation", "t5", "adalora"),
            ("choice", "qwen2", "dora"),
            ("generation", "gpt2", "adalora"),
            ("generation", "gemma2", "dora"),
            ("generation", "bart", "lora"),
            ("choice", "bloom", "adalora"),
            ("language-modelling", "mistral", "lora"),
        )
    ),
]


@pytest.mark.parametrize(("kind", "name", "method"), CASES)
def test_packed_members_train_and_predict_as_alone(kind, name, method, tmp_path, in_float64):
    packed = pack(tmp_path, kind, name, method)
    data = data_of(packed, name in ("t5", "bart"))
    together, outcomes = small_world.trained(packed, tmp_path / "together", data=data)
    assert together.info.heads == () and not list(together.adapter.heads.parameters())
    for k, (seed, rate) in enumerate(zip(SEEDS, RATES, strict=True)):
        one = pack(tmp_path, kind, name, method, (seed,), (rate,))
        alone, (expected,) = small_world.trained(one, tmp_path / f"alone-{k}", data=data)
        for tensor_name, tensor in trained_tensors(alone).items():
            torch.testing.assert_close(trained_tensors(together)[tensor_name][k], tensor[0], rtol=1e-9, atol=1e-12)
        assert outcomes[k].error is expected.error is None
        for split in ("validation", "test"):
            predicted, right = outcomes[k].predictions[split], expected.predictions[split]
            assert np.array_equal(predicted, right) if predicted.dtype != float else np.allclose(predicted, right, 1e-9)
        assert_near(lines(together, k), lines(alone), 1e-9)
    assert lines(together, 0)[-1]["loss"] < lines(together, 0)[0]["loss"] != lines(together, 1)[0]["loss"]


STOPPED = [("generation", "llama"), ("choice", "gpt2"), ("language-modelling", "llama")]


@pytest.mark.parametrize(("kind", "name"), quick(STOPPED, [("language-modelling", "llama")]))
def test_a_run_that_is_stopped_ends_bit_for_bit_the_same(kind, name, tmp_path):
    packed = pack(tmp_path, kind, name, "adalora", SEEDS[:2], RATES[:2])
    data = data_of(packed)
    whole, expected = small_world.trained(packed, tmp_path / "whole", data=data)
    cut = small_world.trainer(packed, tmp_path / "cut", data=data, checkpoint_seconds=0.0, progress=stopping_after(6))
    with pytest.raises(Stop):
        cut.run()
    again, outcomes = small_world.trained(packed, tmp_path / "cut", data=data)
    assert_same(again, whole)
    assert logs(again) == logs(whole)
    for one, other in zip(outcomes, expected, strict=True):
        assert one.metrics == other.metrics
        assert all(np.array_equal(one.predictions[split], other.predictions[split]) for split in ("validation", "test"))


@pytest.mark.parametrize(
    "name", ["gpt2", "t5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "bloom", "gemma2", "bart"))]
)
def test_members_generate_together_what_transformers_generates_of_each_exported_adapter(name, tmp_path):
    """Token by token, prompts of several lengths in one batch against one prompt at a time without padding."""
    model, ask = language_models.made(name), language_models.tokenizer()
    ask.is_encoder_decoder = model.config.is_encoder_decoder
    adapter = variants.create("adalora", members=3, seeds=[1, 2, 3], initial_rank=3, target_rank=2, alpha=5, **PHASES)
    adapter.attach(model, "all-linear", head=[])
    language_models.fill(adapter, 0.3)
    kind, data = kinds.get("generation"), data_of(small_pack("generation"), ask.is_encoder_decoder)["test"]
    (rows, size), *others = kind.evaluation_plan(data, 16)
    arrays = kind.collate_evaluation(data, rows, size, ask)
    assert not others and len({len(data.parts(row)[0]) for row in rows}) > 3
    batch = {k: torch.from_numpy(v).repeat(3, *[1] * (v.ndim - 1)) for k, v in arrays.items() if k != "labels"}
    adapter.begin(variants.Step(1, 2), training=False)
    batch["max_new_tokens"][:] = 6
    together = kind.outputs(model, batch).view(3, len(rows), 6)
    for member in range(3):
        variants.export_merged(adapter, tmp_path / f"merged-{member}", member=member)
        exported = type(model).from_pretrained(tmp_path / f"merged-{member}")
        for at, row in enumerate(rows):
            prompt = torch.from_numpy(data.parts(row)[0].astype(np.int64))[None]
            alone = exported.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
            alone = alone[0, 1 if ask.is_encoder_decoder else prompt.shape[1] :].tolist()
            assert together[member, at].tolist() == alone + [0] * (6 - len(alone))
    assert len({tuple(row) for row in together.flatten(0, 1).tolist()}) >= 3


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", "lora"), ("llama", "dora")]
    + [pytest.param(name, "lora", marks=pytest.mark.slow) for name in ("gpt2", "t5", "bloom", "gpt_neox", "mistral", "gemma")],
)
def test_peft_generates_what_its_member_generated_in_the_pack(name, method, tmp_path):
    import peft

    model, ask = language_models.made(name), language_models.tokenizer()
    adapter = variants.create(method, members=3, seeds=[1, 2, 3], rank=2, alpha=5).attach(model, "all-linear", head=[])
    language_models.fill(adapter, 0.3)
    for member in range(3):
        variants.save_pretrained(adapter, tmp_path / str(member), member=member)
    prompts = [[7, 8, 9, 10], [11, 12]]
    ids, mask = (torch.from_numpy(array) for array in padded([np.array(p) for p in prompts], 4, 0, on_left=True))
    adapter.begin(variants.Step(1, 2), training=False)
    together = generated(model, ids.repeat(3, 1), mask.repeat(3, 1), 6, [ask.eos_token_id]).view(3, 2, 6)
    for member in range(3):
        theirs = peft.PeftModel.from_pretrained(language_models.made(name), tmp_path / str(member))
        first = 1 if model.config.is_encoder_decoder else None  # the token that a decoder of its own begins with
        for row, prompt in enumerate(prompts):
            alone = theirs.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
            alone = alone[0, first or len(prompt) :].tolist()
            assert together[member, row].tolist() == alone + [0] * (6 - len(alone))
    assert len({tuple(row) for row in together.flatten(0, 1).tolist()}) > 2


TOGETHER = [("generation", "llama"), ("generation", "t5"), ("choice", "gpt2")]


@pytest.mark.parametrize(("kind", "name"), quick(TOGETHER, [("generation", "llama"), ("choice", "gpt2")]))
def test_members_that_are_evaluated_together_predict_what_they_predict_merged(kind, name, tmp_path, in_float64, monkeypatch):
    packed = pack(tmp_path, kind, name)
    trainer, _ = small_world.trained(packed, tmp_path / "run", data=data_of(packed, name == "t5"))
    merged = trainer.predictions("test")
    monkeypatch.setattr(Evaluator, "can_merge", False)  # as on a GPU
    for one, other in zip(merged, trainer.predictions("test"), strict=True):
        assert np.array_equal(one, other)


PHASES = {"warmup_steps": 1, "final_steps": 1, "interval": 1}


def small_pack(kind):
    return type("Pack", (), {"task": task(kind)})


def test_sampled_texts_depend_on_member_and_row_alone():
    model = language_models.made("llama").double()
    adapter = variants.create("lora", members=3, seeds=[1, 2, 3], rank=2, alpha=5).attach(model, "all-linear", head=[])
    language_models.fill(adapter)
    ids = torch.randint(5, 60, (4, 6), generator=torch.Generator().manual_seed(0))

    def drawn(rows, members, seeds):
        keys = [(seed, int(row)) for seed in seeds for row in rows]
        some = ids[rows].repeat(members, 1)
        return generated(model, some, torch.ones_like(some), 5, [3], Sampling(keys, temperature=0.7, top_p=0.9))

    together = drawn(np.arange(4), 3, (7, 8, 9)).view(3, 4, 5)
    for member, seed in enumerate((7, 8, 9)):
        adapter.merge(member)
        for row in range(4):
            assert torch.equal(drawn(np.array([row]), 1, (seed,))[0], together[member, row])
        adapter.unmerge()
    assert len({tuple(row) for row in drawn(np.zeros(4, int), 3, (7, 8, 9)).tolist()}) == 3  # by seed; the row is the same
    assert drawn(np.zeros(4, int), 3, (7, 8, 9)).tolist() != drawn(np.zeros(4, int), 3, (10, 8, 9)).tolist()


def test_a_models_own_settings_for_beams_and_sampling_are_not_taken(capfd):
    """BART's and Qwen's releases ask for them; what they forbid or force stays, as with transformers' own greedy search."""
    model = language_models.made("llama")
    ids = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None)
    own = {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True, "max_length": 9, "length_penalty": 2.0}
    own |= {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "eos_token_id": None}
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    capfd.readouterr()
    assert torch.equal(generated(model, ids, torch.ones_like(ids), 6, []), expected[:, 6:])
    assert capfd.readouterr() == ("", "")
    model.generation_config.suppress_tokens = [int(expected[0, 6])]
    assert generated(model, ids, torch.ones_like(ids), 6, [])[0, 0] != expected[0, 6]


def test_tokens_are_sampled_as_often_as_they_are_likely():
    model = language_models.made("llama")
    ids = torch.randint(5, 60, (1, 6), generator=torch.Generator().manual_seed(0))
    count = 4_000
    made = generated(model, ids.repeat(count, 1), torch.ones(count, 6), 1, [], Sampling([(1, row) for row in range(count)]))
    share = torch.bincount(made.flatten(), minlength=67) / count
    with torch.no_grad():
        likely = model(ids).logits[0, -1].softmax(-1)
    assert (share - likely).abs().max() < 0.03 < likely.max() - likely.min()


def test_a_decoder_is_trained_on_the_target_and_its_end_and_asked_with_the_prompt_on_the_right():
    kind, ask = kinds.get("generation"), language_models.tokenizer()
    data = kind.encode(Examples(["a b", "a b c d "], None, ["x y", "z"], [("x y",), ("z", "q")]), ask, 24)
    ids = {letter: ask.convert_tokens_to_ids(letter) for letter in "abcdxyz"}
    batch = kind.collate(data, np.array([0, 1]), 8, ask)
    a, b, c, d, x, y, z = ids.values()
    assert batch["input_ids"].tolist() == [[a, b, x, y, 3, 0, 0, 0], [a, b, c, d, z, 3, 0, 0]]
    i = IGNORED
    assert batch["labels"].tolist() == [[i, i, x, y, 3, i, i, i], [i, i, i, i, z, 3, i, i]]
    asked = kind.collate_evaluation(data, np.array([0, 1]), 8, ask)
    assert asked["prompt_ids"].tolist() == [[0, 0, a, b], [a, b, c, d]] and asked["max_new_tokens"].tolist() == [3, 3]
    assert asked["prompt_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert kind.counts(torch.from_numpy(batch["labels"]), 2).tolist() == [3, 2]
    assert data.truth == ((("x y",), ("z", "q")), None)
    assert data.select([1]).truth[0] == (("z", "q"),) and data.select([1]).max_new_tokens == 3
    assert kind.decoded(np.array([[x, y, 3, 0], [z, 3, 0, 0]]), ask).tolist() == ["x y", "z"]


def test_a_chat_goes_through_the_tokenizers_template():
    kind, ask = kinds.get("generation"), language_models.tokenizer()
    chats = Examples([({"role": "user", "content": "a b"},)], None, ["x"])
    with pytest.raises(ValueError, match="has no chat template"):
        kind.encode(chats, ask, 24)
    for broken in ("{{ raise_exception('no such role') }}", "{{ foo.bar }}", "{% for"):
        ask.chat_template = broken
        with pytest.raises(ValueError, match="chat template of the model's tokenizer does not take turns of user"):
            kind.encode(chats, ask, 24)
    ask.chat_template = "{% for m in messages %}{{ m.role[0] + ' ' + m.content + ' ' }}{% endfor %}"
    ask.chat_template += "{% if add_generation_prompt %}{{ 's\n' }}{% endif %}"
    data = kind.encode(chats, ask, 24)
    prompt, scored = data.parts(0)
    assert ask.decode(prompt) == "u a b s" and ask.decode(scored) == "x [SEP]"


def test_an_encoder_decoder_reads_the_prompt_and_is_trained_on_the_target():
    kind, ask = kinds.get("generation"), language_models.tokenizer()
    ask.is_encoder_decoder = True
    data = kind.encode(Examples(["a b", "a b c d"], None, ["x y", "z"]), ask, 24)
    a, b, c, d, x, y, z = ask.convert_tokens_to_ids(list("abcdxyz"))
    (rows, size), *others = kind.evaluation_plan(data, 4)
    assert rows.tolist() == [0, 1] and size == 8 and not others  # 6 of the longer source, rounded up; targets do not count
    batch = kind.collate(data, rows, size, ask)
    assert batch["input_ids"].tolist() == [[2, a, b, 3, 0, 0, 0, 0], [2, a, b, c, d, 3, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [4, 6]
    assert batch["labels"].tolist() == [[2, x, y, 3], [2, z, 3, IGNORED]]
    asked = kind.collate_evaluation(data, rows, size, ask)
    assert np.array_equal(asked["prompt_ids"], batch["input_ids"]) and asked["max_new_tokens"].tolist() == [4, 4]
    alone = kind.collate(data.select([1]), np.array([0]), size, ask)  # as wide, whichever rows a member has
    assert alone["labels"].shape == (1, 4) and np.array_equal(alone["input_ids"][0], batch["input_ids"][1])


def test_the_loss_is_each_members_mean_over_its_own_scored_tokens():
    kind = kinds.get("generation")
    labels = torch.tensor([[IGNORED, 5, 6], [IGNORED, IGNORED, 7], [IGNORED, 8, IGNORED], [IGNORED] * 3])
    losses = torch.tensor([[1.0, 2, 0], [0, 6, 0], [4, 0, 0], [0, 0, 0]])
    assert kind.losses(losses, labels, 2).tolist() == [3.0, 4.0] and kind.counts(labels, 2).tolist() == [3, 1]


def test_a_long_prompt_loses_its_beginning_and_a_long_target_its_end():
    kind, ask = kinds.get("generation"), language_models.tokenizer()
    letters = list("abcdefghijklmnop")
    data = kind.encode(Examples([" ".join(letters), "a"], None, ["x", " ".join(letters)]), ask, 10)
    prompt, scored = data.parts(0)
    assert ask.decode(prompt).split() == letters[-8:] and scored.tolist()[-1] == 3 and len(scored) == 2
    prompt, scored = data.parts(1)
    assert ask.decode(prompt) == "a" and ask.decode(scored[:-1]).split() == letters[:8] and scored[-1] == 3
    assert data.max_new_tokens == 5  # half of max_length, so that the prompt has the rest
    asked = kind.collate_evaluation(data, np.array([0]), 10, ask)
    assert ask.decode(asked["prompt_ids"][0]).split()[-5:] == letters[-5:] and asked["prompt_mask"].sum() == 5


def test_texts_are_stored_without_pickle(tmp_path):
    texts = np.array(["a b", "", "\u00e4 \U0001f600"], dtype=object)
    records.write_predictions(tmp_path, "test", kinds.get("generation").stored(texts))
    kept = load_file(tmp_path / records.PREDICTIONS)
    assert texts_from_bytes(kept) == texts.tolist() and {str(a.dtype) for a in kept.values()} == {"uint8", "int64"}


def test_options_are_scored_by_their_likelihood_after_the_question():
    kind, ask = kinds.get("choice"), language_models.tokenizer()
    model = language_models.made("llama").double().requires_grad_(False)
    given = Examples(["a b", "c"], None, np.array([2, 0]), [("a", "bb", "c d e"), ("x y", "z")])
    data = kind.encode(given, ask, 24)
    (rows, size), *_ = kind.evaluation_plan(data, 4)
    arrays = {k: torch.from_numpy(v) for k, v in kind.collate_evaluation(data, rows, size, ask).items()}
    labels = arrays.pop("labels")
    outputs = kind.outputs(model, arrays)
    for at, row in enumerate(rows):
        for option, text in enumerate(given.answers[row]):
            prompt = ask(given.first[row], add_special_tokens=False)["input_ids"]
            rest = ask(text, add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([[*prompt, *rest]])).logits[0].log_softmax(-1)
            total = sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(rest))
            expected = torch.tensor([total / len(text), total / len(rest), total], dtype=torch.float64)
            torch.testing.assert_close(outputs[at, option], expected)
    assert outputs[list(rows).index(1), 2].max() < -1e30  # an option that the question does not have
    chosen = kind.predictions(outputs).numpy()
    assert chosen.shape == (2, 3) and len(set(chosen[list(rows).index(0)])) > 1
    right = [outputs[at, given.labels[row], 2].item() for at, row in enumerate(rows)]
    counts = kind.counts(labels, 1)
    loss = kind.evaluation_losses(model, arrays, outputs, labels, 1) * counts
    assert loss.item() == pytest.approx(-sum(right), rel=1e-9)
    trained = kind.collate(data, rows, size, ask)
    assert np.array_equal(trained["labels"], labels.numpy())
    torch.testing.assert_close(
        kind.training_losses(model, {k: torch.from_numpy(v) for k, v in trained.items() if k != "labels"}, labels, 1) * counts,
        loss.double(),
    )
    assert data.select_examples([1]).labels.tolist() == [0] and len(data.select_examples([1]).rows) == 2


@pytest.mark.parametrize(
    ("label", "options", "message"), [(2, ("a", "b"), "the right option is 2 of 2"), (0, ("a", " "), "is empty")]
)
def test_a_choice_that_cannot_be_right_is_refused(label, options, message):
    with pytest.raises(ValueError, match=message):
        kinds.get("choice").encode(Examples(["q"], None, np.array([label]), [options]), language_models.tokenizer(), 24)


def test_text_is_cut_into_blocks_and_its_bytes_are_counted_once():
    kind, ask = kinds.get("language-modelling"), language_models.tokenizer()
    data = kind.encode(Examples(["a bc d", "\u00e9 e f g"], None, ["", ""]), ask, 4)
    flat = ask.convert_tokens_to_ids(["a", "b", "##c", "d", "[SEP]", "e", "e", "f", "g", "[SEP]"])
    assert data.ids.tolist() == flat and data.lengths.tolist() == [4, 4, 2]
    # "a" is first in its block; " b", "c", " d": 5 bytes.  "e-acute" has two, " e" and " f" two each; "[SEP]" none.
    assert data.truth[0].tolist() == [[3, 5], [3, 6], [1, 0]]
    assert data.labels[[0, 4, 8]].tolist() == [IGNORED] * 3
    losses = np.array([3.0, 4.0, 1.0])
    found = text_metrics.modelled(*kind.scored(losses, *data.truth)[0])
    assert found["bits_per_byte"] == pytest.approx(8 / math.log(2) / 11)
    assert found["perplexity"] == pytest.approx(math.exp(8 / 7))
    assert found["compression"] == pytest.approx(100 - 12.5 * found["bits_per_byte"])
    ones = np.ones((2, 3), int)
    assert text_metrics.resampled_compression(losses, data.truth[0], ones)[0] == pytest.approx(found["compression"])


@pytest.mark.slow
def test_the_knock_out_measures_the_loss_of_a_language_model(tmp_path):
    packed = pack(tmp_path, "generation", "llama", seeds=SEEDS[:2], rates=RATES[:2])
    trainer, outcomes = small_world.trained(packed, tmp_path / "run", data=data_of(packed))
    first, _ = knockout.knock_out(trainer.adapter, trainer.processor, packed.task, "test", trainer.data["test"], 4)
    assert first["score"] == pytest.approx(outcomes[0].metrics["test"]["rougeL"]) and len(first["sites"]) == 14
    total = count = 0
    trainer.model.eval()
    trainer.adapter.merge(0)
    for row in range(ROWS["test"]):  # one at a time, from the logits of every token
        prompt, scored = trainer.data["test"].parts(row)
        ids = torch.from_numpy(np.concatenate([prompt, scored]).astype(np.int64))[None]
        logits = trainer.model(ids).logits[0].log_softmax(-1)
        total -= sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(scored.tolist()))
        count += len(scored)
    assert first["loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("generation", transformers.BertConfig, "it is an encoder"),
        ("choice", transformers.T5Config, "it is an encoder-decoder"),
    ],
)
def test_a_model_of_no_use_is_refused(kind, config, message):
    with pytest.raises(ValueError, match=message):
        kinds.get(kind).model_class(config())


def test_the_model_says_whether_it_is_a_decoder_or_reads_first(tmp_path):
    for name, expected in (("llama", "LlamaForCausalLM"), ("t5", "T5ForConditionalGeneration")):
        model, processor, info = models.load(language_models.saved(name, tmp_path / name), task("generation"))
        assert type(model).__name__ == expected and processor.is_encoder_decoder == (name == "t5") and info.heads == ()


@pytest.mark.parametrize("kind", quick(SCORED, ["generation"]))
def test_a_study_over_a_language_model_ends_with_scores_and_predictions(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(tasks._TASKS, f"small/{kind}", task(kind))
    methods = [{"method": name, "learning_rate": 1e-2, **small_world.settings(name)} for name in ("lora", "adalora")]
    what = small_world.study(language_models.saved("llama", tmp_path / "llama"), methods, tasks=[f"small/{kind}"])
    what = what.model_copy(update={"targets": "all-linear"})
    runner = Runner(what, tmp_path / "out", device="cpu")
    runner.prepare()
    runner.run()
    runs = [records.load_run(path.parent) for path in (tmp_path / "out").glob("*/config.json")]
    assert {run.status for run in runs} == {"completed"} and len(runs) == 4
    for run in runs:
        kept = load_file(run.folder / records.PREDICTIONS)
        assert math.isfinite(run.result.score) and run.result.head_parameters == 0 and run.result.tokens_per_second > 0
        if kind == "generation":
            texts = texts_from_bytes(kept)
            shown = {one.row: (one.prompt, one.target, one.text) for one in run.samples}
            whole = examples(kind, "test")
            assert list(shown) == [1, 3, 5, 8, 10] and len(texts) == ROWS["test"]
            assert all(shown[row] == (whole.first[row - 1], whole.labels[row - 1], texts[row - 1]) for row in shown)
        else:
            assert not run.samples
        saved = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
        assert saved["task_type"] == "CAUSAL_LM" and not saved.get("modules_to_save")
    table = samples(results.load(tmp_path / "out"))
    assert (table is None) == (kind != "generation")
    if table is not None:
        assert [of for _, of, _ in table.rows] == ["prompt", "target", "lora", "adalora"] * 5


def own_study(folder: Path) -> config.Study:
    """One study on a file of every kind of language data, with a template, beside a model in the same folder."""
    random = np.random.default_rng(0)
    prompts = [" ".join(random.choice(list("abc"), random.integers(2, 9))) for _ in range(30)]
    rows = {
        "generation": [{"prompt": p, "completion": f"{p[-1]} x"} for p in prompts],
        "choice": [{"question": p, "choices": ["a x", "b", "c x x"], "answer": "abc".index(p[-1])} for p in prompts],
        "language-modelling": [{"text": f"{p} {p[-1]}"} for p in prompts],
    }
    text = f'model = "{language_models.saved("llama", folder / "llama")}"\nquick = true\ncheckpoint_seconds = 1e-6\n'
    text += '[training]\nepochs = 1\nmax_steps = 3\nbatch_size = 6\nmax_length = 16\nprecision = "fp32"\n'
    for kind, of_kind in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_kind))
        text += f'[[data]]\nname = "{kind}"\ntrain = "{kind}.jsonl"\n'
    (folder / "mine.toml").write_text(text + '[[methods]]\nmethod = "lora"\nrank = 2\nlearning_rate = 1e-2\n')
    return config.read(folder / "mine.toml")


@pytest.mark.slow
def test_killed_and_begun_again_a_study_of_own_texts_ends_with_the_same_bytes(tmp_path, monkeypatch):
    from tests.test_study import child, contents

    study, cache = own_study(tmp_path), str(tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for out, kills in (("whole", []), ("cut", [(4, True), (9, False), (14, True)])):
        for kill in [*kills, ()]:
            process = child(study, tmp_path / out, cache, *kill)
            process.join()
            assert (process.exitcode < 0) == bool(kill)
    whole = contents(tmp_path / "whole")
    assert whole == contents(tmp_path / "cut")
    assert (
        sum(name.endswith("result.json") for name in whole) == 3 and sum(name.endswith("samples.json") for name in whole) == 1
    )
