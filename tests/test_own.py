"""A user's own files: what they are read as, what is said, and one line with file, row and remedy for what is wrong."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rankwise.experiments.data_entries import OwnData
from rankwise.experiments.tasks.own import read

from tests.command import rankwise


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def lines(folder: Path, rows, name: str = "train.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parts(train: str, **more):
    return read(OwnData(name="mine", train=train, **more))


INSTRUCTION = "reading instruction as the prompt, output as the target"
WITH_INPUT = "reading instruction + input as the prompt, output as the target"
PAIR, CHOICE = "reading premise and hypothesis as the input", "reading question as the input, choices as the options"
FORMS = [
    ({"instruction": "a{i}", "output": "b"}, "generation", INSTRUCTION),
    ({"instruction": "a{i}", "input": "c", "output": "b"}, "generation", WITH_INPUT),
    ({"prompt": "a{i}", "completion": "b"}, "generation", "reading prompt as the prompt, completion as the target"),
    ({"text": "a{i}"}, "language-modelling", "reading text as the text to model"),
    ({"text": "a{i}", "label": "{even}"}, "classification", "reading text as the input, label as its class"),
    ({"premise": "a{i}", "hypothesis": "h", "label": "{even}"}, "classification", PAIR),
    ({"question": "a{i}", "choices": ["x", "y"], "answer": "B"}, "choice", CHOICE),
    ({"question": "a{i}", "answer": "b"}, "generation", "reading question as the prompt, answer as the target"),
    ({"tokens": ["a{i}"], "tags": ["{even}"]}, "token-classification", "reading tokens as the words, tags as their labels"),
    ({"text": "a{i}", "labels": ["{even}", "all"]}, "multi-label", "reading text as the input, labels as any number of labels"),
]  # fmt: skip


def filled(value, i: int):
    if isinstance(value, list):
        return [filled(one, i) for one in value]
    return value.replace("{i}", str(i)).replace("{even}", "yes" if i % 2 else "no")


@pytest.mark.parametrize(("form", "kind", "said"), FORMS, ids=["+".join(form) for form, _, _ in FORMS])
def test_known_forms_are_recognised_and_said(tmp_path, form, kind, said):
    one = parts(lines(tmp_path, [{k: filled(v, i) for k, v in form.items()} for i in range(40)]))
    assert one.reading.kind == kind
    assert said in one.notes[0]
    assert {part: len(rows) for part, rows in one.rows.items()} == {"train": 32, "validation": 4, "test": 4}
    assert "test: 4 of the 40 training rows, drawn by a fixed seed, because none is given" in one.notes


def test_a_chat_ends_at_its_last_assistant_turn(tmp_path):
    turns = [("system", "s"), ("user", "u"), ("assistant", "one"), ("user", "v"), ("assistant", "two"), ("user", "thanks")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    row = parts(lines(tmp_path, [chat] * 20)).rows["train"][0]
    assert row.target == "two" and [m["content"] for m in row.input] == ["s", "u", "one", "v"]


@pytest.mark.parametrize("answer", [1, "1", "B", "b", "yes"])
def test_an_answer_may_be_an_index_a_letter_or_the_option(tmp_path, answer):
    rows = [{"question": f"q{i}", "choices": ["no", "yes"], "answer": str(answer)} for i in range(20)]
    assert {row.target for row in parts(lines(tmp_path, rows)).rows["train"]} == {1}


def test_fields_and_templates_that_are_named_are_used(tmp_path):
    rows = [{"q": f"q{i}", "context": "c", "a": f"a{i}"} for i in range(20)]
    one = parts(lines(tmp_path, rows), input="{q}\n{context}", target="a", kind="generation")
    assert {row.input.partition("\n")[2] for row in one.rows["train"]} == {"c"}
    assert "reading '{q}\\n{context}' as the input, 'a' as the target" in one.notes[0]


def test_the_kind_that_named_fields_have_is_said_with_its_reason(tmp_path):
    rows = [{"x": f"x{i}", "y": "yes" if i % 2 else "no"} for i in range(40)]
    one = parts(lines(tmp_path, rows), input="x", target="y")
    assert one.reading.kind == "classification" and "its 2 values in 40 rows are classes" in one.notes[0]
    assert one.labels == ("no", "yes")


def test_numbers_with_fractions_are_a_regression_and_said(tmp_path):
    rows = [{"text": f"x{i}", "label": i / 3} for i in range(40)]
    one = parts(lines(tmp_path, rows))
    assert one.reading.kind == "regression" and any("kind = regression" in note for note in one.notes)
    assert all(isinstance(row.target, float) for row in one.rows["test"])


def test_a_csv_is_text_as_it_stands_with_or_without_a_byte_order_mark(tmp_path):
    text = "text,label\n" + "".join(f'"a, {i}",{"01" if i % 2 else "NA"}\n' for i in range(20))
    for name, encoding in (("plain.csv", "utf-8"), ("bom.csv", "utf-8-sig")):
        (tmp_path / name).write_text(text, encoding=encoding)
        one = parts(str(tmp_path / name))
        assert set(one.labels) == {"01", "NA"} and one.rows["train"][0].input.startswith("a, ")


def test_tabs_globs_and_parquet_are_read_alike(tmp_path):
    rows = [{"text": f"t{i}", "label": str(i % 2)} for i in range(30)]
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in rows))
    lines(tmp_path, rows[:15], "p1.jsonl")
    lines(tmp_path, rows[15:], "p2.jsonl")
    import pandas

    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    names = ("a.tsv", "p*.jsonl", "a.parquet")
    read_as = [{part: list(rows) for part, rows in parts(str(tmp_path / name)).rows.items()} for name in names]
    assert read_as[0] == read_as[1] == read_as[2]


def test_a_folder_of_images_has_its_subfolders_as_labels(tmp_path):
    from PIL import Image

    for i in range(20):
        folder = tmp_path / "images" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(folder / f"{i}.png")
    one = parts(str(tmp_path / "images"))
    assert one.reading.kind == "image-classification" and one.labels == ("cat", "dog")


def test_the_parts_are_the_same_every_time_and_share_no_row(tmp_path):
    where = lines(tmp_path, [{"text": f"t{i}", "label": str(i % 2)} for i in range(50)])
    first, again = ({part: list(rows) for part, rows in parts(where).rows.items()} for _ in range(2))
    assert first == again
    inputs = [{row.input for row in first[part]} for part in ("train", "validation", "test")]
    assert sum(map(len, inputs)) == len(set.union(*inputs)) == 50


def test_rows_in_train_and_test_are_counted_and_said(tmp_path):
    train = lines(tmp_path, [{"text": f"t{i}", "label": str(i % 2)} for i in range(30)])
    test = lines(tmp_path, [{"text": f"t{i}", "label": str(i % 2)} for i in range(25, 35)], "test.jsonl")
    one = parts(train, test=test, validation=test)
    assert "5 of the 10 rows of the test part have the input of a training row" in one.notes


GOOD = [{"text": f"t{i}", "label": "a" if i % 2 else "b"} for i in range(20)]
SEVEN = [{"text": "x", "label": "7"}] * 5 + [{"text": "x", "label": "seven"}] * 15
TWO_FORMS = [{"prompt": "a", "completion": "b", "text": "c", "label": "d"}] * 20
NO_OPTION = [{"question": "q", "choices": ["x", "y"], "answer": "Z"}] * 20
UNKNOWN = ['names the field "txt"', 'did you mean "text"', "there are: text, label"]
EMPTY = ["train.jsonl, row 8: the target is empty", "take the row out"]
NUMBERS = [{"question": "q", "choices": ["1", "2"], "answer": "1"}] * 20
TWICE = [{"question": "q", "choices": ["x", "x"], "answer": "A"}] * 20
NO_TEXT = [{"question": "q", "choices": ["x", " "], "answer": "A"}] * 20
NESTED = [{"text": {"en": "t"}, "label": "a"}] * 20
CALL = [{"role": "user", "content": "u"}, {"role": "assistant", "content": None}, {"role": "assistant", "content": "a"}]
CALLED = [*CALL[:1], {"role": "assistant", "content": "x", "tool_calls": [{"name": "f"}]}, CALL[2]]
SHOWN = [{"role": "user", "content": [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]}, CALL[2]]
DATES = [{"text": f"2024-01-{i:02}", "label": "a" if i % 2 else "b"} for i in range(1, 21)]
FAULTS = {
    "two readings": (NUMBERS, {}, ['row 1: answer = "1" may be the place of one option and the text of another', "or letters"]),
    "option twice": (TWICE, {}, ['row 1: two options are "x": take one out']),
    "empty option": (NO_TEXT, {}, ["row 1: an option is empty"]),
    "nested": (NESTED, {}, ['row 1: the field "text" has fields of its own (en): write them beside the others']),
    "nested in a template": (NESTED, {"input": "{label} {text}", "target": "label"}, ["row 1: the field", "(en)"]),
    "list": ([{"text": ["t"], "label": "a"}] * 20, {}, ['row 1: the field "text" is a list']),
    "list as target": ([{"text": "t", "x": ["a"]}] * 20, {"input": "text", "target": "x", "kind": "generation"}, ["is a list"]),
    "dates": (DATES, {}, ['row 1: the field "text" is a point in time', "give a CSV"]),
    "turn without text": ([{"messages": CALL}] * 20, {}, ["row 1: turn 2 (assistant) is more or other than one text"]),
    "call of a tool": ([{"messages": CALLED}] * 20, {}, ["row 1: turn 2 (assistant) is more or other than one text"]),
    "several contents": ([{"messages": SHOWN}] * 20, {}, ["row 1: turn 1 (user) is more or other than one text"]),
    "format": (GOOD, {"input": "{text:>9}", "target": "label"}, ["has a format: write a field as {name} alone"]),
    "blanks in labels": ([*GOOD, {"text": "x", "label": "a "}], {}, ['the labels "a" and "a " differ by blanks alone']),
    "missing field": ([{"txt": "a", "lable": "b"}] * 20, {}, ["fields txt, lable fit no known form", "--input"]),
    "named field": (GOOD, {"input": "txt", "target": "label"}, UNKNOWN),
    "half named": (GOOD, {"input": "text"}, ["target is not given", "name both"]),
    "open brace": (GOOD, {"input": "{text", "target": "label"}, ["is no template"]),
    "two forms": (TWO_FORMS, {}, ["can be read as", "prompt+completion"]),
    "empty target": ([*GOOD[:7], {"text": "x", "label": " "}, *GOOD], {}, EMPTY),
    "empty input": ([*GOOD, {"text": None, "label": "a"}], {}, ["row 21: the input is empty"]),
    "NaN": ([{"text": "x", "label": float("nan")}] * 20, {"kind": "regression"}, ["row 1: the target is empty"]),
    "no number": (SEVEN, {"kind": "regression"}, ['row 6: target = "seven" is no number', "10 more rows"]),
    "infinite": ([{"text": "x", "label": "inf"}] * 20, {"kind": "regression"}, ["should be a finite number"]),
    "one label": ([{"text": f"x{i}", "label": "a"} for i in range(20)], {}, ["1 distinct label"]),
    "no such option": (NO_OPTION, {}, ['answer = "Z" is none of the 2 options']),
    "no assistant": ([{"messages": [{"role": "user", "content": "u"}]}] * 20, {}, ["before its last assistant turn"]),
    "few rows": (GOOD[:4], {}, ["4 rows are too few to set test and validation aside"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_bad_data_is_refused_with_its_place_and_the_remedy(tmp_path, case):
    rows, options, words = FAULTS[case]
    with pytest.raises(ValueError, match=r"train\.jsonl") as caught:
        parts(lines(tmp_path, rows), **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert all(line.startswith(str(tmp_path)) for line in str(caught.value).splitlines())


def test_a_label_of_the_test_part_alone_is_a_fault(tmp_path):
    test = lines(tmp_path, [{"text": "x", "label": "c"}], "test.jsonl")
    with pytest.raises(ValueError, match=r'test\.jsonl: label "c" is in the test part and in no training row'):
        parts(lines(tmp_path, GOOD), test=test)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.csv", b"text,label\na,x\nb,y,z\n", "line 3: 3 fields where the header has 2"),
        ("a.csv", b"text,label\na,x\nb\n", "line 3: 1 fields where the header has 2"),
        ("a.csv", b"text,text\na,x\n", 'two fields are called "text"'),
        ("a.csv", b"", "empty: the first line names the fields"),
        ("a.csv", "text,label\ncaf\xe9,x\n".encode("latin-1"), "line 2: byte 0xe9 is no UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: no JSON"),
        ("a.csv", b"text;label\na;x\n", "commas in .csv and by tabs in .tsv: write it so"),
        ("a.jsonl", '{"text": "a"}\n{"text": "caf\xe9"}\n'.encode("latin-1"), "line 2: byte 0xe9 is no UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2: a list, no object"),
        ("a.xlsx", b"PK", "files of .xlsx: give files of one of .jsonl"),
        ("a.csv.gz", b"", "packed (.gz): unpack it first"),
        ("a.jsonl", b"", "empty: give rows"),
        ("a.json", b" \n", "empty: give rows"),
        ("a.json", b"[]", "no rows: give at least one"),
        ("a.csv", b"text,label\n", "no rows: give at least one"),
        ("a.csv", b",text,label\n0,a,x\n", "line 1: field 1 has no name: name it, or take it out"),
        ("a.csv", b"text,label,\na,x,\n", "line 1: field 3 has no name"),
        ("a.csv", b"text, label\na,x\n", 'line 1: the field " label" has blanks around its name'),
        ("a.csv", b'text,label\n"a,x\nb,y\n', "line 2: quotation marks that do not pair"),
        # Without care the marks swallow the rows between them: one row whose text is all four lines, and no fault.
        ("a.tsv", b'text\tlabel\n"a\tx\nb\ty\n"c\tx\n', "line 2: quotation marks that do not pair"),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_why(tmp_path, name, content, fault):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        parts(str(tmp_path / name))
    assert fault in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_a_field_may_be_longer_than_python_s_csv_takes_by_itself(tmp_path):
    rows = [f"{'word ' * 30_000 if i == 3 else f't{i}'},{'ab'[i % 2]}\n" for i in range(20)]
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(rows))
    found = [len(row.input) for of_part in parts(str(tmp_path / "a.csv")).rows.values() for row in of_part]
    assert max(found) == 150_000 and len(found) == 20


def test_a_part_without_a_field_that_is_read_is_a_fault(tmp_path):
    test = lines(tmp_path, [{"text": "x", "lable": "a"}], "test.jsonl")
    with pytest.raises(ValueError) as caught:
        parts(lines(tmp_path, GOOD), test=test)
    assert str(caught.value).startswith(f'{test}: the field "label", which is read of ')
    assert 'did you mean "lable"' in str(caught.value) and "there are: text, lable" in str(caught.value)


def test_of_several_files_the_one_with_the_fault_is_named(tmp_path):
    def fault(second) -> str:
        lines(tmp_path, GOOD, "a1.jsonl")
        lines(tmp_path, second, "a2.jsonl")
        with pytest.raises(ValueError) as caught:
            parts(str(tmp_path / "a*.jsonl"))
        return str(caught.value).replace(f"{tmp_path}/", "")

    assert fault([*GOOD[:2], {"text": " ", "label": "a"}]) == (
        "a2.jsonl, row 3: the input is empty: fill it, or take the row out"
    )
    assert fault([{"text": "t", "other": "a"}]) == "a2.jsonl: its fields text, other are not those of a1.jsonl: text, label"
    assert fault([{"text": "t", "label": [1]}]).startswith('a2.jsonl: its field "label" is ')
    assert fault([]) == "a2.jsonl: empty: give rows, or leave the file out"


def test_a_row_of_a_part_that_was_drawn_is_named_by_its_place_in_the_file(tmp_path, capsys):
    rows = [{"question": f"q{i}", "context": "the cat", "answers": {"text": ["cat"], "answer_start": [4]}} for i in range(40)]
    for number in (7, 33):
        rows[number - 1]["answers"] = {"text": ["dog"], "answer_start": [4]}
    where = lines(tmp_path, rows)
    assert rankwise("data", where) == 2
    shown = capsys.readouterr().err.splitlines()
    assert sorted(line.partition(": the answer")[0] for line in shown) == [f"rankwise: {where}, row {n}" for n in (33, 7)]


def test_fields_that_are_not_read_are_said(tmp_path):
    rows = [{"id": i, **row, "source": "web"} for i, row in enumerate(GOOD)]
    assert "fields that are not read: id, source" in parts(lines(tmp_path, rows)).notes
    assert not [note for note in parts(lines(tmp_path, GOOD)).notes if "not read" in note]


def test_a_name_of_an_option_comes_before_its_place(tmp_path):
    options = {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}
    rows = [{"question": f"q{i}", "choices": options, "answer": "2"} for i in range(20)]
    assert {row.target for row in parts(lines(tmp_path, rows)).rows["train"]} == {1}
    rows = [{"question": f"q{i}", "choices": ["7", "0", "1"], "answer": 1} for i in range(20)]
    assert {row.target for row in parts(lines(tmp_path, rows)).rows["train"]} == {1}  # a number beside texts is a place


def test_the_text_of_a_turn_may_stand_in_a_list_of_one(tmp_path):
    turns = [{"role": role, "content": [{"type": "text", "text": role[0]}]} for role in ("user", "assistant")]
    row = parts(lines(tmp_path, [{"messages": turns}] * 20)).rows["train"][0]
    assert row.input == ({"role": "user", "content": "u"},) and row.target == "a"


def test_missing_numbers_in_a_template_are_left_out(tmp_path):
    rows = [{"a": f"t{i}", "b": float("nan") if i % 2 else 1.5, "y": "z"} for i in range(20)]
    found = parts(lines(tmp_path, rows), input="{a} {b}|", target="y", kind="generation").rows["train"]
    assert {row.input.partition(" ")[2] for row in found} == {"|", "1.5|"}


def test_breaks_in_a_template_are_read_as_a_shell_hands_them_over(tmp_path, capsys):
    rows = [{"a": f"t{i}", "b": "u", "y": f"z{i}"} for i in range(20)]
    assert rankwise("data", lines(tmp_path, rows), "--input", r"{a}\n{b}", "--target", "y", "--json") == 0
    assert json.loads(capsys.readouterr().out)["first"][0]["input"].endswith("\nu")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([str(i % 30) for i in range(60)], "30 distinct whole numbers, which may be classes or amounts: give the kind"),
        ([f"a text {i}" for i in range(60)], "60 distinct texts in 60 rows, which may be no classes: give the kind"),
    ],
    ids=["numbers", "texts"],
)
def test_targets_that_may_be_no_classes_are_asked_for_and_not_guessed(tmp_path, labels, said):
    where = lines(tmp_path, [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)])
    with pytest.raises(ValueError, match=said):
        parts(where)


def test_the_kind_of_named_fields_follows_from_numbers_and_lists(tmp_path):
    rows = [{"x": f"x{i}", "y": i / 3, "w": ["a", "b"], "t": ["X", "Y"]} for i in range(40)]
    where = lines(tmp_path, rows)
    assert parts(where, input="x", target="y").reading.kind == "regression"
    assert parts(where, input="w", target="t").reading.kind == "token-classification"
    assert parts(where, input="x", target="t").reading.kind == "multi-label"


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("a;b", r'row 3: labels = "a;b": should be a list, \[\] for none'),
        (["a", "b", "a"], 'row 3: the label "a" is there twice: take one out'),
        (["a", " "], "row 3: a label is empty"),
        (None, "row 3: the target is empty"),
    ],
)
def test_labels_that_are_no_list_of_distinct_ones_are_refused(tmp_path, labels, said):
    rows = [{"text": f"t{i}", "labels": labels if i == 2 else "a" if isinstance(labels, str) else ["a"]} for i in range(20)]
    with pytest.raises(ValueError, match=said):
        parts(lines(tmp_path, rows))


def test_of_rows_with_several_labels_each_label_s_share_is_set_aside_and_training_keeps_a_rare_one(tmp_path):
    names = [["common"] + ["odd"] * (i % 2) + ["tenth"] * (i % 10 == 0) + ["rare"] * (i == 30) for i in range(200)]
    found = parts(lines(tmp_path, [{"text": f"t{i}", "labels": labels} for i, labels in enumerate(names)]))
    assert found.labels == ("common", "odd", "rare", "tenth")
    counts = {part: Counter(label for row in rows for label in row.target) for part, rows in found.rows.items()}
    assert counts["train"]["rare"] == 1
    assert counts["test"] == counts["validation"] == {"common": 20, "odd": 10, "tenth": 2}


def test_a_hub_id_gives_the_split_of_each_part_and_names_of_its_classes(monkeypatch):
    import datasets

    asked = []

    def load(name, configuration, split):
        asked.append((name, configuration, split))
        names = datasets.ClassLabel(names=["O", "B-X"])
        features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(names)})
        rows = {"tokens": [["a", "b"]] * 20, "ner_tags": [[0, 1]] * 20}
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    one = parts("owner/name:part", test="owner/name:part")
    assert asked == [("owner/name", "part", "train"), ("owner/name", "part", "test")]
    assert one.labels == ("B-X", "O") and one.rows["test"][0].target == ["O", "B-X"]


@pytest.mark.parametrize("where", ["nowhere.jsonl", "*.none", "/no/such/folder"])
def test_what_is_not_there_is_refused(where):
    with pytest.raises(ValueError, match="no such file: give a file, a glob, a folder of images, or a hub id"):
        parts(where)


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a folder without images"):
        parts(str(tmp_path))


def test_the_command_shows_what_is_read_and_refuses_with_exit_code_2(tmp_path, capsys):
    where = lines(tmp_path, [{"instruction": f"say {i}", "output": f"word {i}"} for i in range(20)])
    assert rankwise("data", where) == 0
    shown = capsys.readouterr().out
    assert "kind:   generation" in shown and "rows:   train 16, validation 2, test 2" in shown and INSTRUCTION in shown
    assert rankwise("data", where, "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == {"train": 16, "validation": 2, "test": 2}
    assert rankwise("data", where, "--kind", "poetry") == 2
    assert "poetry" in capsys.readouterr().err
    assert rankwise("data", where, "--input", "instrution", "--target", "output") == 2
    assert 'did you mean "instruction"' in capsys.readouterr().err
