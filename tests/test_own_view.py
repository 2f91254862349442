"""rankwise data --model: a user's rows as a model sees them, what is scored, how long they are, what is cut."""

import json

import numpy as np
import pytest
from rankwise.experiments import kinds, own_study, own_view
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.data_entries import OwnData
from rankwise.experiments.kinds.interface import Seen
from rankwise.experiments.tasks import own_tasks

from tests import language_models, small_world
from tests.command import rankwise
from tests.test_own_study import jsonl


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {name: language_models.saved(name, folder / name) for name in ("llama", "t5")}
    return made | {"bert": small_world.model(folder / "bert")}


PROMPTS = [" ".join("abcdefgh"[: 2 + i % 7]) for i in range(40)]
ROWS = {
    "generation": [{"prompt": p, "completion": "x y"} for p in PROMPTS],
    "choice": [{"question": p, "choices": ["x", "y z z"], "answer": i % 2} for i, p in enumerate(PROMPTS)],
    "language-modelling": [{"text": p} for p in PROMPTS],
    "classification": [{"text": p, "label": "even" if i % 2 else "odd"} for i, p in enumerate(PROMPTS)],
    "multi-label": [{"text": p, "labels": [["one"], [], ["one", "two"]][i % 3]} for i, p in enumerate(PROMPTS)],
    "token-classification": [{"tokens": p.split(), "tags": ["B-X", "O"] * 4} for p in PROMPTS],
    "span": [{"question": "z", "context": p, "answers": {"text": ["b"], "answer_start": [2]}} for p in PROMPTS],
}
for row in ROWS["token-classification"]:
    row["tags"] = row["tags"][: len(row["tokens"])]


def viewed(tmp_path, kind, model, max_length=None):
    task = own_tasks.task(OwnData(name="mine", train=str(jsonl(tmp_path / f"{kind}.jsonl", ROWS[kind]))))
    assert task.kind == kind
    first = task.examples("train").first[0]
    return own_view.view(task, model, max_length), first if isinstance(first, str) else " ".join(first)


@pytest.mark.parametrize(
    ("kind", "model", "expected"),
    [
        ("generation", "llama", ["{p}|>>x|y|[SEP]<<"]),
        ("generation", "t5", ["[CLS]|{p}|[SEP]", ">>[CLS]|x|y|[SEP]<<"]),
        ("choice", "llama", ["{p}|>>x<<", "{p}|>>y|z|z<<"]),
        ("classification", "bert", ["[CLS]|{p}|[SEP]"]),
        ("multi-label", "bert", ["[CLS]|{p}|[SEP]"]),
        ("token-classification", "bert", None),
        ("span", "bert", None),
    ],
)
def test_the_first_rows_are_shown_as_tokens_with_what_is_scored(tmp_path, folders, kind, model, expected):
    found, first = viewed(tmp_path, kind, folders[model])
    letters = first.split()
    if kind == "token-classification":
        tagged = "|".join(f"{letter}={('B-X', 'O')[i % 2]}" for i, letter in enumerate(letters))
        expected = [f"[CLS]|>>{tagged}<<|[SEP]"]
    elif kind == "span":
        others = f"<<|{'|'.join(letters[2:])}" if letters[2:] else "<<"
        expected = [f"[CLS]|z|[SEP]|a|>>b{others}|[SEP]"]
    assert [own_view.as_line(one) for one in found.rows[0]] == [line.format(p="|".join(letters)) for line in expected]
    if kind == "classification":
        assert {row[0].label for row in found.rows} <= {"even", "odd"} and len(found.rows) == 3
    if kind == "multi-label":
        assert {row[0].label for row in found.rows} <= {"one", "(no label)", "one, two"}


def test_texts_to_model_are_shown_as_blocks_and_counted_as_such(tmp_path, folders):
    found, _ = viewed(tmp_path, "language-modelling", folders["llama"], 16)
    task = own_tasks.task(OwnData(name="mine", train=str(tmp_path / "language-modelling.jsonl")))
    total = sum(len(text.split()) + 1 for text in task.examples("train").first)
    assert found.trained_rows == -(-total // 16) and not found.cut
    assert all(sum(row[0].is_scored) == 15 and not row[0].is_scored[0] for row in found.rows)
    assert found.longer["train"] == 0


def test_marks_stand_where_scored_runs_begin_and_end():
    seen = Seen(("a\n", "b", "c", "d"), (True, False, True, True))
    assert own_view.as_line(seen) == ">>a\\n<<|b|>>c|d<<"
    assert own_view.as_line(Seen((), ())) == ""


@pytest.mark.parametrize(("kind", "model"), [("generation", "llama"), ("generation", "t5"), ("choice", "llama")])
def test_lengths_and_what_is_cut_are_those_of_every_row(tmp_path, folders, kind, model):
    found, _ = viewed(tmp_path, kind, folders[model], 8)
    task = own_tasks.task(OwnData(name="mine", train=str(tmp_path / f"{kind}.jsonl")))
    own = task.examples("train")
    more = {"llama": 3, "t5": 2}[model]  # target and end of text, or the longest option; two special tokens of a source
    lengths = np.array([max(len(text.split()) + more, 4) for text in own.first])
    assert found.lengths["train"]["longest"] == lengths.max() and found.lengths["train"]["shortest"] == lengths.min()
    assert found.lengths["train"]["median"] == np.quantile(lengths, 0.5, method="higher")
    longer = int((lengths > 8).sum())
    assert found.longer["train"] == longer > 0
    assert (
        f"train: {longer} of 32 rows are longer than max_length = 8 tokens (the longest {lengths.max()})" in found.cut["train"]
    )
    lost = {"generation/llama": "beginning of a prompt", "generation/t5": "end of a source", "choice/llama": "beginning of a q"}
    assert lost[f"{kind}/{model}"] in found.cut["train"]


def test_one_line_gives_a_language_model_room_for_prompt_and_target(tmp_path, folders):
    """The prompt alone is what a length of plain texts would be."""
    ask = language_models.tokenizer()
    task = own_tasks.task(OwnData(name="mine", train=str(jsonl(tmp_path / "a.jsonl", ROWS["generation"]))))
    ask.is_encoder_decoder = False
    of_prompts = max(len(text.split()) for text in task.examples("train").first)
    assert kinds.get("generation").whole_lengths(task.examples("train"), ask).max() == of_prompts + 3
    chat = Examples([({"role": "user", "content": "a b"},)], None, ["x"])
    ask.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert kinds.get("generation").whole_lengths(chat, ask).tolist() == [4]
    assert own_study.Lengths({"train": np.array([100])}, None).max_length == 104


def test_the_command_shows_it_and_refuses_what_has_no_effect(tmp_path, folders, capsys):
    data = jsonl(tmp_path / "a.jsonl", ROWS["generation"])
    assert rankwise("data", data, "--model", folders["llama"], "--max-length", 8) == 0
    said = capsys.readouterr().out
    assert "|>>x|y|[SEP]<<" in said and "max_length = 8: 32 rows to train on" in said
    assert "the beginning of a prompt, or the end of a target, is not read" in said and "median" in said
    assert rankwise("data", data, "--model", folders["llama"], "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    (first,) = facts["first_as_seen"][0]
    assert first["scored"] == [False] * (len(first["tokens"]) - 3) + [True] * 3
    assert facts["max_length"] == 16 and facts["cut"] == {} and facts["longer"]["train"] == 0
    assert rankwise("data", data, "--max-length", 8) == 2
    assert "--max-length 8 has no effect without --model" in capsys.readouterr().err
    assert rankwise("data", data, "--model", folders["llama"], "--max-length", 99) == 2
    assert "--max-length 99" in capsys.readouterr().err
    assert rankwise("data", data, "--model", folders["bert"]) == 2
    assert "it is an encoder" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("data",), ("compare", "--out", "out")], ids=["data", "compare"])
def test_a_token_that_the_embedding_has_no_row_for_is_refused_before_anything_trains(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = language_models.saved("gpt2", tmp_path / "model")
    one = language_models.tokenizer()
    one.add_tokens(["zzz"])
    one.save_pretrained(model)
    rows = [{"prompt": f"a {'zzz' if i == 3 else 'z'} {i}", "completion": "b"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["rows.jsonl"] if words == ("data",) else ["--data", "rows.jsonl"]
    assert rankwise(*words, *given, "--model", "model") == 2
    shown = capsys.readouterr().err
    assert 'its tokenizer has the token "zzz" (number 67), and its embedding 67 rows: save the model after resize' in shown
    assert "Traceback" not in shown and not list(tmp_path.glob("out/*/result.json"))
