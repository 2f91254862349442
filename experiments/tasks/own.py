"""A user's own files as rows of input and target: read by `datasets`, their fields recognised and said, their faults named.

    parts = read(OwnData(name="support", train="train.jsonl"))
    parts.reading.said          "reading instruction + input as the prompt, output as the target"
    parts.rows["train"][0]      Row(input="...", target="...")

A file is JSON lines, JSON, CSV, TSV or Parquet, a glob of such files, a folder of images (a subfolder a label), or a hub id
("owner/name" or "owner/name:configuration").  Where no test or validation part is given, a fixed, seeded part of the training
rows becomes it, and this is said.  Nothing is guessed silently: fields that fit no known form, or more than one, are refused
with the names that there are.

Rows stay on disk, in the Arrow file that `datasets` makes of a file once, and are made one by one as they are asked for, so
that a file may be larger than memory.  What is kept of every row is its place in its part, and a hash of its input.
"""

import csv
import datetime
import glob
import hashlib
import json
import math
import os
import string
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rankwise.experiments.data.draws import carve
from rankwise.experiments.data_entries import PLACES, Kind, OwnData, is_hub_id
from rankwise.experiments.tasks import own_images
from rankwise.variants.settings import nearest, quoted

BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
HELD_OUT = 0.1  # share of the training rows that becomes a part that is not given
SPLIT_SEED = 0
BATCH = 256  # rows that are read from the disk at once
MOST_NAMED = 10  # fields that a note names
LONGEST_FIELD = 2**31 - 1  # characters of a field of a CSV; Python's csv stops at 131,072 unless told
PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip")
MOST_CLASSES = 20  # whole numbers, or texts, of which there are more may as well be no classes: the kind is asked for


@dataclass(frozen=True)
class Reading:
    """Which fields are read as what, and the sentence that says so.

    input, target: templates over the fields; `messages` names a field of chat messages instead, of which the last turn of the
    assistant is the target.  pair: a second input of a classifier, kept apart so that the tokenizer joins the two.
    """

    kind: Kind
    said: str
    input: str = ""
    target: str = ""
    pair: str = ""
    messages: str = ""
    choices: str = ""


@dataclass(frozen=True)
class Row:
    """One example.  target: a text, a number (regression) or what the file has (tags, labels, an answer's index)."""

    input: Any
    target: Any
    pair: str | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pictures:
    """A field of images beside a table. of: for each row of the table its image, or what is wrong with it."""

    field: str
    of: Sequence[own_images.OwnPicture | str]


class Rows(Sequence[Row]):
    """Rows of a table on disk, each made when it is asked for.

    places: (n,) which rows of the table, in this order; all where None is given. has_numbers: targets are made numbers.
    pictures: a field that is not in the table.
    """

    def __init__(
        self,
        table: Any,
        reading: Reading,
        places: np.ndarray | None = None,
        has_numbers: bool = False,
        pictures: Pictures | None = None,
    ):
        self.table, self.reading, self.has_numbers, self.pictures = table, reading, has_numbers, pictures
        self.places = np.arange(len(table)) if places is None else places
        self._names, self._of_lists = {}, {}  # column -> names of its classes
        for column, feature in table.features.items():
            inner = getattr(feature, "feature", None)
            self._names |= {column: feature.names} if hasattr(feature, "int2str") else {}
            self._of_lists |= {column: inner.names} if hasattr(inner, "int2str") else {}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, slice):
            return list(self.select(self.places[which]))
        return next(iter(self.select(self.places[[which]])))

    def __iter__(self) -> Iterator[Row]:
        return map(self._row, self.records())

    def records(self) -> Iterator[dict[str, Any]]:
        """What the table has for each row, in batches from the disk, and its picture."""
        for at in range(0, len(self), BATCH):
            places = self.places[at : at + BATCH]
            columns = dict(self.table[places])
            if self.pictures is not None:
                columns[self.pictures.field] = [self.pictures.of[place] for place in places]
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))

    def select(self, places: np.ndarray) -> "Rows":
        """Those at these places of the table."""
        return Rows(self.table, self.reading, places, self.has_numbers, self.pictures)

    def with_numbers(self, reading: Reading) -> "Rows":
        return Rows(self.table, reading, self.places, has_numbers=True)

    def checked(self) -> Iterator[Row | ValueError]:
        """Each row, or what is wrong with it."""
        for record in self.records():
            try:
                yield self._row(record)
            except ValueError as error:
                yield error

    def said(self, number: int, where: str, fault: ValueError) -> str:
        """What is wrong with the row of this number, from 1, and where it is: its file and place there, of images the file."""
        picture = None if self.pictures is None else self.pictures.of[self.places[number - 1]]
        if isinstance(picture, str):
            return picture
        if picture is not None:
            return f"{picture.name}: {fault}"
        file, row = _in_its_file(where, int(self.places[number - 1]) + 1)
        return f"{file}, row {row}: {fault}"

    def _row(self, record: dict[str, Any]) -> Row:
        if self.pictures is not None and isinstance(fault := record[self.pictures.field], str):
            raise ValueError(fault)
        for column, classes in self._names.items():  # a class's number becomes its name; -1 is the hub's word for no label
            record[column] = classes[record[column]] if record[column] is not None and record[column] >= 0 else None
        for column, classes in self._of_lists.items():
            record[column] = [classes[one] for one in record[column] or []]
        row = _row(record, self.reading)
        return replace(row, target=_number(row.target)) if self.has_numbers else row


@dataclass(frozen=True)
class Parts:
    """The rows of each part, how they were read, and what a reader should know of them."""

    reading: Reading
    rows: Mapping[str, Rows]
    notes: tuple[str, ...]
    labels: tuple[str, ...] = ()  # of a classification, or that rows may have, sorted
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Form:
    """Fields that files of one kind commonly have, and how they are read."""

    fields: tuple[str, ...]
    reading: Reading


def _form(kind: Kind, input: str, target: str, said: str, pair: str = "", **more: str) -> _Form:
    """A form by the names of its fields."""
    fields = tuple(name for name in (input, pair, *more.values(), target) if name)
    templates = ("{" + name + "}" if name else "" for name in (input, target, pair))
    return _Form(tuple(dict.fromkeys(fields)), Reading(kind, f"reading {said}", *templates, **more))


_FORMS = (
    _Form(
        ("messages",),
        Reading("generation", "reading messages as a chat, its last assistant turn as the target", messages="messages"),
    ),
    _form(
        "choice",
        "question",
        "answer",
        "question as the input, choices as the options, answer as the right one",
        choices="choices",
    ),
    _form("span", "question", "answers", "question and context as the input, answers as spans of the context", pair="context"),
    _form("token-classification", "tokens", "tags", "tokens as the words, tags as their labels"),
    _form("token-classification", "tokens", "ner_tags", "tokens as the words, ner_tags as their labels"),
    _form("generation", "instruction", "output", "instruction as the prompt, output as the target"),
    _form("generation", "prompt", "completion", "prompt as the prompt, completion as the target"),
    _form("generation", "question", "answer", "question as the prompt, answer as the target"),
    _form("image-classification", "image", "label", "image as the input, label as its class"),
    _form("classification", "sentence1", "label", "sentence1 and sentence2 as the input, label as its class", pair="sentence2"),
    _form("classification", "premise", "label", "premise and hypothesis as the input, label as its class", pair="hypothesis"),
    _form("classification", "text", "label", "text as the input, label as its class"),
    _form("multi-label", "text", "labels", "text as the input, labels as any number of labels"),
    _form("language-modelling", "text", "text", "text as the text to model"),
)


def read(data: OwnData, sample: int | None = None) -> Parts:
    """The rows of each part.

    sample: read no more than so many rows of each file (to show them); labels and counts are then of these alone.

    Raises:
        ValueError: one line for each fault: file, row, what is wrong, the remedy.
    """
    given, said = _places(data)
    tables = {part: load(where, sample, part) for part, where in given.items()}
    reading = recognise(tables["train"], data)
    reading = replace(reading, said=f"{reading.said}{said}")
    faults = [fault for part, table in tables.items() if (fault := _missing(reading, table, given[part], given["train"]))]
    _refuse(faults)
    rows = {part: _rows(table, reading, given[part], faults) for part, table in tables.items()}
    _refuse(faults)
    notes, pictured = [reading.said], {part: found.pictures for part, found in rows.items()}
    if reading.kind == "classification" and data.kind is None:
        values = {str(row.target) for row in rows["train"]}
        if _are_numbers(values):
            reading = replace(reading, kind="regression")
            rows = {part: found.with_numbers(reading) for part, found in rows.items()}
            for part, found in rows.items():
                _check_numbers(found, given[part], faults)
            _refuse(faults)
            notes.append("its targets are numbers, some of which are no whole ones: kind = regression")
        else:
            _check_classes(values, len(rows["train"]), given["train"])
    rows = _split(rows, given["train"], reading.kind, notes)
    labels = _labels(reading, rows, given, faults)
    _refuse(faults)
    unread = [name for name in tables["train"].column_names if name not in _used(reading)]
    if unread:
        shown = ", ".join(unread[:MOST_NAMED])
        notes.append(f"fields that are not read: {shown}{', ...' if len(unread) > MOST_NAMED else ''}")
    for part, pictures in pictured.items():
        notes += [] if pictures is None else own_images.remarks(given[part], pictures.of)
    notes += _overlap(rows)
    return Parts(reading, rows, tuple(notes), labels, tuple(tables["train"].column_names))


def _places(data: OwnData) -> tuple[dict[str, str], str]:
    """Where each part is, those of a folder with subfolders of these names among them; and what is to be said of it.

    Raises:
        ValueError: a part that is given twice.
    """
    given = dict(data.places())
    inside = own_images.parts_of(data.train) if os.path.isdir(data.train) else {}
    if not inside:
        return given, ""
    for part in set(inside) & set(given) - {"train"}:
        raise ValueError(
            f"{part} = {given[part]}: {data.train} has a part {part} of its own, {inside[part]}: leave {part} out, or give "
            f"{inside['train']} as train"
        )
    names = " and ".join(f"{Path(where).name} as the {part} part" for part, where in inside.items())
    return {**given, **inside}, f"; {names}, by the folders' names"


def load(where: str, sample: int | None = None, part: str = "train") -> Any:
    """The table of a file, glob, folder of images or hub id, as a `datasets.Dataset`; of a hub id the split called `part`.

    Text columns of a CSV stay text ("NA" and "01" are no numbers), whatever its rows look like.

    Raises:
        ValueError: nothing there, mixed or unknown kinds of file, or one that cannot be read; the reason and its place.
    """
    files = files_of(where)
    if not files and not os.path.isdir(where) and not is_hub_id(where):
        raise ValueError(
            f'{where}: no such file: give a file, a glob, a folder of images, or a hub id ("owner/name:configuration")'
        )

    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said below, once
    split = "train" if sample is None else f"train[:{sample}]"
    if os.path.isdir(where):
        return own_images.load_folder(where, split)
    return _from_files(where, files, split) if files else _from_hub(where, split.replace("train", part, 1))


def files_of(where: str) -> list[str]:
    """The files that a path, a glob or a folder (of images) stands for, sorted; none where it is a hub id."""
    if os.path.isfile(where):
        return [where]
    pattern = os.path.join(glob.escape(where), "**") if os.path.isdir(where) else where
    return sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))


def _from_files(where: str, files: list[str], split: str) -> Any:
    import datasets
    import datasets.exceptions

    suffixes = {Path(file).suffix.lower() for file in files}
    if len(suffixes) > 1 or not suffixes <= BUILDERS.keys():
        names = ", ".join(sorted(suffixes))
        if packed := suffixes & {*PACKED}:
            raise ValueError(f"{where}: packed ({', '.join(sorted(packed))}): unpack it first")
        raise ValueError(f"{where}: files of {names or 'no known kind'}: give files of one of {', '.join(BUILDERS)}")
    suffix = suffixes.pop()
    options: dict[str, Any] = {}
    if BUILDERS[suffix] == "csv":
        separator = "\t" if suffix == ".tsv" else ","
        headers = [_check_csv(file, separator) for file in files]
        for file, header in zip(files, headers, strict=True):
            if header != headers[0]:
                raise ValueError(f"{file}: its fields {', '.join(header)} are not those of {files[0]}: {', '.join(headers[0])}")
        text = datasets.Features({name: datasets.Value("string") for name in headers[0]})
        options = {"sep": separator, "features": text, "keep_default_na": False}
    elif suffix != ".parquet":  # bytes that are no UTF-8 would be found only when their row is used
        for file in files:
            if not _check_text(file):
                raise ValueError(f"{file}: empty: give rows, or leave the file out")
    try:
        return datasets.load_dataset(BUILDERS[suffix], data_files=files, split=split, **options)
    except (datasets.exceptions.DatasetGenerationError, datasets.exceptions.DatasetNotFoundError, ValueError, OSError) as error:
        for file in files if suffix != ".parquet" else []:  # now that it matters, look for the line
            _check_text(file, as_json=suffix in (".jsonl", ".ndjson"))
        if "corresponds to no data" in str(error):
            raise ValueError(f"{where}: no rows: give at least one") from None
        if len(files) > 1:
            _check_alike(files)
        reason = str(error.__cause__ or error).strip().splitlines()
        why = reason[0] if reason else type(error).__name__
        raise ValueError(f"{where}: cannot be read as {suffix} ({why}): write it anew") from None


def _check_alike(files: Sequence[str]) -> None:
    """
    Raises:
        ValueError: one of several files that are no one table: it cannot be read alone, or its fields are not the first's.
    """
    first, *others = ((file, load(file).features) for file in files)
    for file, features in others:
        if set(features) != set(first[1]):
            raise ValueError(f"{file}: its fields {', '.join(features)} are not those of {first[0]}: {', '.join(first[1])}")
        for name, feature in features.items():
            if feature != first[1][name]:
                raise ValueError(
                    f'{file}: its field "{name}" is {_type_of(feature)}, and that of {first[0]} {_type_of(first[1][name])}: '
                    f"write both alike"
                )


def _type_of(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__


def _in_its_file(where: str, number: int) -> tuple[str, int]:
    """The file that has the row of this number, and its number there; where there is one file alone as it stands."""
    files = files_of(where)
    if len(files) > 1 and not os.path.isdir(where):
        for file in files:
            rows = len(load(file))
            if number <= rows:
                return file, number
            number -= rows
    return where, number


def _from_hub(where: str, split: str) -> Any:
    import datasets

    name, _, configuration = where.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the hub's client raises many kinds
        first = str(error).strip().splitlines()
        why = first[0] if first else error
        raise ValueError(f"{where}: neither a file here nor to be read from the hub ({why}): give a file") from None


def _check_text(file: str, as_json: bool = False) -> bool:
    """Whether there is anything in it but blanks.

    Raises:
        ValueError: bytes that are not UTF-8, or (`as_json`) a line that is no JSON object, with its number.
    """
    is_filled = False
    with open(file, "rb") as opened:
        for number, line in enumerate(opened, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file}, line {number}: byte 0x{line[error.start]:02x} is no UTF-8: save the file as UTF-8"
                ) from None
            is_filled = is_filled or bool(text.strip())
            if as_json and text.strip():
                try:
                    found = json.loads(text.strip())
                except ValueError as error:
                    raise ValueError(f"{file}, line {number}: no JSON ({error}): each line is one object") from None
                if not isinstance(found, dict):
                    raise ValueError(f"{file}, line {number}: a {type(found).__name__}, no object: each line is one object")
    return is_filled


def _check_csv(file: str, separator: str) -> list[str]:
    """Its header.

    Raises:
        ValueError: no header, a field without a name of its own, a row with another number of fields than the header, or
            quotation marks that do not pair.
    """
    _check_text(file)
    csv.field_size_limit(LONGEST_FIELD)
    with open(file, encoding="utf-8-sig", newline="") as opened:
        reader = csv.reader(opened, delimiter=separator, strict=True)  # else a lone mark swallows rows up to the next one
        line = 1
        try:
            header = _check_header(file, next(reader, None), separator)
            line = reader.line_num + 1
            for row in reader:
                if row and len(row) != len(header):
                    raise ValueError(
                        f"{file}, line {reader.line_num}: {len(row)} fields where the header has {len(header)}: "
                        f'put a field that holds "{separator}" in quotation marks'.replace("\t", "\\t")
                    )
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{file}, line {line}: quotation marks that do not pair ({error}): put a field that holds one in quotation "
                f"marks, and write the one in it twice"
            ) from None
    return header


def _check_header(file: str, header: list[str] | None, separator: str) -> list[str]:
    """
    Raises:
        ValueError: none, another separator, a field without a name, one that begins or ends in blanks, two of one name.
    """
    if not header:
        raise ValueError(f"{file}: empty: the first line names the fields")
    if len(header) == 1 and any(other in header[0] for other in ";\t|" if other != separator):
        raise ValueError(
            f"{file}, line 1: one field, {quoted(header[0])}: fields are separated by commas in .csv and by tabs in .tsv: "
            f"write it so"
        )
    if not all(header):
        raise ValueError(
            f"{file}, line 1: field {header.index('') + 1} has no name: name it, or take it out (pandas writes its index so: "
            f"to_csv(index=False))"
        )
    if blank := next((name for name in header if name != name.strip()), None):
        raise ValueError(f"{file}, line 1: the field {quoted(blank)} has blanks around its name: take them out")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise ValueError(f'{file}, line 1: two fields are called "{twice}": rename one')
    return header


# -- fields ------------------------------------------------------------------------------------------------------------


def recognise(table: Any, data: OwnData) -> Reading:
    """How the fields of a table are read: as the study says, else by their names.

    Raises:
        ValueError: a named field that is not there, names that fit no known form, or two that do not fit together.
    """
    columns = table.column_names
    if data.input is not None or data.target is not None:
        return _as_told(table, data)
    fitting = [form for form in _FORMS if set(form.fields) <= set(columns) and _fits(form.reading.kind, data.kind)]
    best = [f for f in fitting if not any(set(f.fields) < set(other.fields) for other in fitting)]
    remedy = "name the fields by input and target (--input, --target)"
    if not best:
        of_kind = f" for kind = {data.kind}" if data.kind else ""
        raise ValueError(f"{data.train}: the fields {', '.join(columns)} fit no known form{of_kind}: {remedy}")
    if len({form.reading.kind for form in best}) > 1 or len(best) > 1:
        forms = " or ".join("+".join(form.fields) for form in best)
        raise ValueError(f"{data.train}: the fields can be read as {forms}: {remedy}, or the kind (--kind)")
    reading = best[0].reading
    if "instruction" in best[0].fields and "input" in columns:
        said = "reading instruction + input as the prompt, output as the target"
        reading = replace(reading, said=said, input="{instruction}\n{input}")
    if data.kind is not None and data.kind != reading.kind:
        said = f"{reading.said.replace('its class', 'its number')} (kind = {data.kind})"
        reading = replace(reading, kind=data.kind, said=said)
    return reading


def _fits(kind: str, wanted: str | None) -> bool:
    return wanted in (None, kind) or (wanted, kind) == ("regression", "classification")


def _as_told(table: Any, data: OwnData) -> Reading:
    """The fields that the study names."""
    columns = table.column_names
    if data.input is None or (data.target is None and data.kind != "language-modelling"):
        missing = "input" if data.input is None else "target"
        raise ValueError(f"{data.train}: {missing} is not given: name both input and target, or none")
    templates = {key: _template(value, key, columns, data.train) for key, value in
                 (("input", data.input), ("target", data.target or data.input))}  # fmt: skip
    said = f"reading {data.input!r} as the input, {data.target or data.input!r} as the target"
    kind = data.kind
    if kind is None and any(own_images.column_of(table, field) for field in _fields(templates["input"])):
        kind = "image-classification"
    elif kind is None:
        kind, why = _kind_of(table, templates["input"], templates["target"])
        said += f"; {why}"
    if kind == "choice":
        if "choices" not in columns:
            raise ValueError(f'{data.train}: kind = choice takes a field "choices" with the options of each row')
        return Reading(kind, said, templates["input"], templates["target"], choices="choices")
    if kind == "span":
        if "context" not in columns:
            raise ValueError(f'{data.train}: kind = span takes a field "context" with the text that answers are spans of')
        return Reading(kind, said, templates["input"], templates["target"], "{context}")
    return Reading(kind, said, templates["input"], templates["target"])


def _kind_of(table: Any, given: str, target: str) -> tuple[Kind, str]:
    """Classes where few values come again and again, text where they do not; and why."""
    first = table.select(range(min(len(table), 1_000)))
    found = [_filled(target, row) for row in first]
    if any(isinstance(value, list) for value in found):
        if any(isinstance(_filled(given, row), str) for row in first):
            return "multi-label", "lists are the labels of a text (kind = multi-label)"
        return "token-classification", "lists are the labels of words (kind = token-classification)"
    values = [str(value) for value in found]
    distinct = len(set(values))
    if _are_numbers(values):
        return "regression", "its values are numbers, some of which are no whole ones (kind = regression)"
    if distinct <= MOST_CLASSES and len(values) >= 5 * distinct:
        return "classification", f"its {distinct} values in {len(values)} rows are classes (kind = classification)"
    return "generation", f"its {distinct} values in {len(values)} rows are texts to generate (kind = generation)"


def _check_classes(values: Set[str], rows: int, where: str) -> None:
    """
    Args:
        values: the distinct targets of so many rows.

    Raises:
        ValueError: targets that may as well be no classes.
    """
    if len(values) <= MOST_CLASSES:
        return
    if all(value.lstrip("-").isdecimal() for value in values):
        raise ValueError(
            f"{where}: the targets are {len(values)} distinct whole numbers, which may be classes or amounts: "
            f'give the kind (--kind): "classification" or "regression"'
        )
    if len(values) > rows / 2:
        raise ValueError(
            f"{where}: the targets are {len(values)} distinct texts in {rows} rows, which may be no classes: "
            f'give the kind (--kind): "classification" or "generation"'
        )


def _template(text: str, key: str, columns: Sequence[str], where: str) -> str:
    """A field's name or a template as a template.

    Raises:
        ValueError: a field that is not there, or braces that do not close.
    """
    if text in columns:
        return "{" + text + "}"
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(
            f"{where}: {key} = {quoted(text)} is no template ({error}): write a field as {{name}}, a brace as {{{{"
        ) from None
    if any(spec or conversion for _, _, spec, conversion in string.Formatter().parse(text)):
        raise ValueError(f"{where}: {key} = {quoted(text)} has a format: write a field as {{name}} alone")
    unknown = next((name for name in names or [text] if name not in columns), None)
    if unknown is not None:
        raise ValueError(
            f"{where}: {key} names the field {quoted(unknown)}, which is not there{nearest(unknown, columns)}; "
            f"there are: {', '.join(columns)}"
        )
    return text


def _fields(template: str) -> list[str]:
    """The fields that a template names."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def _filled(template: str, row: Mapping[str, Any]) -> Any:
    """A template with the row's values in it; the value itself, of whatever type, where it is one field alone."""
    parts = list(string.Formatter().parse(template))
    if len(parts) == 1 and parts[0][0] == "" and parts[0][1] is not None:
        return row[parts[0][1]]
    filled = (literal + ("" if name is None or _is_missing(row[name]) else str(row[name])) for literal, name, _, _ in parts)
    return "".join(filled).rstrip("\n")


def _used(reading: Reading) -> list[str]:
    """The fields that are read."""
    named = [name for template in (reading.input, reading.pair, reading.target) for name in _fields(template)]
    return list(dict.fromkeys([*named, *filter(None, (reading.messages, reading.choices))]))


def _missing(reading: Reading, table: Any, where: str, train: str) -> str | None:
    """The fault of a part that lacks a field which is read of the training part."""
    lacking = [name for name in _used(reading) if name not in table.column_names]
    if not lacking:
        return None
    return (
        f'{where}: the field "{lacking[0]}", which is read of {train}, is not there{nearest(lacking[0], table.column_names)}; '
        f"there are: {', '.join(table.column_names)}: write both alike"
    )


# -- rows ----------------------------------------------------------------------------------------------------------------


def _rows(table: Any, reading: Reading, where: str, faults: list[str], most_faults: int = 5) -> Rows:
    """The rows of a table; a fault for each of the first rows that cannot be one."""
    pictures = None
    if reading.kind == "image-classification":
        fields = _fields(reading.input)
        try:
            table = own_images.undecoded(table, fields[0] if fields else reading.input)
        except ValueError as error:
            faults.append(f"{where}: {error}")
            return Rows(table, reading)
        pictures = Pictures(fields[0], own_images.look(table, fields[0], where))
        table = table.remove_columns(fields[0])  # whose bytes are read where they are decoded, and nowhere else
    rows, bad = Rows(table, reading, pictures=pictures), 0
    for number, found in enumerate(rows.checked(), start=1):
        if isinstance(found, ValueError):
            bad += 1
            if bad <= most_faults:
                faults.append(rows.said(number, where, found))
    if bad > most_faults:
        faults.append(f"{where}: {bad - most_faults} more rows have faults of this kind: mend them, or take them out")
    if not len(table):
        faults.append(f"{where}: no rows: give at least one")
    return rows


def _row(row: Mapping[str, Any], reading: Reading) -> Row:
    """
    Raises:
        ValueError: what is wrong with this row, and the remedy.
    """
    if reading.messages:
        return _chat(row[reading.messages])
    _check_plain(reading, row)
    given, target = _filled(reading.input, row), _filled(reading.target, row)
    if _is_empty(given):
        raise ValueError("the input is empty: fill it, or take the row out")
    if _is_empty(target):
        raise ValueError("the target is empty: fill it, or take the row out")
    if reading.kind == "regression":
        target = _number(target)
    elif reading.kind == "token-classification":
        _check_words(given, target)
    elif reading.kind == "multi-label":
        _check_several(target)
    elif reading.kind in ("generation", "language-modelling"):
        target = str(target)
    pair = _filled(reading.pair, row) if reading.pair else None
    if reading.pair and _is_empty(pair):
        raise ValueError("the second input is empty: fill it, or take the row out")
    if not reading.choices:
        return Row(given, target, pair)
    return _choice(given, target, row[reading.choices])


def _check_plain(reading: Reading, row: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: a field that is to be read as text, and is none: Python's way to write it is not what the file says.
    """
    templates = [reading.pair]
    if reading.kind not in ("token-classification", "image-classification"):
        templates.append(reading.input)
    if reading.kind not in ("token-classification", "multi-label", "span"):
        templates.append(reading.target)
    for name in (name for template in templates for name in _fields(template)):
        value = row[name]
        if isinstance(value, Mapping):
            raise ValueError(f'the field "{name}" has fields of its own ({", ".join(value)}): write them beside the others')
        if isinstance(value, list):
            raise ValueError(f'the field "{name}" is a list, where one text or number is read: write one')
        if isinstance(value, bytes):
            raise ValueError(f'the field "{name}" is bytes, and no text: write it as text')
        if isinstance(value, datetime.datetime):
            raise ValueError(
                f'the field "{name}" is a point in time, as dates in JSON are read, and not as it was written: '
                f"give a CSV, whose fields are text as they stand"
            )


def _chat(messages: Any) -> Row:
    turns = chat_turns(messages)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if not last or _is_empty(turns[last]["content"]):
        raise ValueError("a chat needs a turn before its last assistant turn, and this turn some content")
    return Row(tuple(turns[:last]), turns[last]["content"])


def chat_turns(messages: Any) -> list[dict[str, str]]:
    """The turns of a chat, role and content of each.

    Raises:
        ValueError: no list of turns, or a turn that is no text: calls of tools, images, none.
    """
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages):
        raise ValueError('messages should be a list of {"role": ..., "content": ...}')
    turns = []
    for number, turn in enumerate(messages, start=1):
        content = turn["content"]
        if isinstance(content, list) and len(content) == 1 and isinstance(content[0], Mapping):
            content = content[0].get("text")  # [{"type": "text", "text": ...}], where others may have images beside it
        if not isinstance(content, str) or not isinstance(turn["role"], str) or turn.get("tool_calls"):
            raise ValueError(
                f"turn {number} ({turn['role']}) is more or other than one text (calls of tools, images): give turns of text "
                f"alone, or take the row out"
            )
        turns.append({"role": turn["role"], "content": content})
    return turns


def _check_words(words: Any, tags: Any) -> None:
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError("the words should be a list of texts, none of them empty: write them as a list")
    if not isinstance(tags, list) or len(tags) != len(words):
        count = f"{len(tags)} labels" if isinstance(tags, list) else "no list of labels"
        raise ValueError(f"{count} for {len(words)} words: give one for each")
    if any(_is_empty(tag) for tag in tags):
        raise ValueError("the label of a word is empty: fill it, or take the row out")


def _check_several(labels: Any) -> None:
    if not isinstance(labels, list):
        raise ValueError(f'labels = "{str(labels)[:40]}": should be a list, [] for none (a CSV has no lists: give .jsonl)')
    if any(_is_empty(label) for label in labels):
        raise ValueError("a label is empty: fill it, or take it out")
    named = [str(label) for label in labels]
    if twice := next((label for label in named if named.count(label) > 1), None):
        raise ValueError(f'the label "{twice}" is there twice: take one out')


def _choice(given: Any, answer: Any, choices: Any) -> Row:
    texts = choices.get("text") if isinstance(choices, Mapping) else choices  # ARC's form: {"text": [...], "label": [...]}
    if isinstance(texts, str):
        try:
            texts = json.loads(texts)
        except ValueError:
            raise ValueError(f'choices = "{texts[:40]}": should be a list of options') from None
    if not isinstance(texts, list) or len(texts) < 2:
        raise ValueError("choices: a question has two options or more")
    options = tuple(str(text) for text in texts)
    if any(_is_empty(text) for text in texts):
        raise ValueError("an option is empty: fill it, or take it out")
    if len(set(options)) < len(options):
        raise ValueError(f'two options are "{max(options, key=options.count)[:40]}": take one out')
    names = [str(name) for name in choices.get("label", [])] if isinstance(choices, Mapping) else []
    if str(answer) in names:
        return Row(given, names.index(str(answer)), choices=options)
    letters = string.ascii_uppercase[: len(options)]
    indices = [str(index) for index in range(len(options))]
    places = {
        known.index(str(answer)) for known in (indices, [*letters], [*letters.lower()], [*options]) if str(answer) in known
    }
    if len(places) > 1 and isinstance(answer, int) and all(isinstance(text, str) for text in texts):
        places = {answer}  # a number beside texts is no text
    if len(places) > 1:
        raise ValueError(
            f'answer = "{answer}" may be the place of one option and the text of another: give places as numbers and options '
            f"as texts (in JSON), or letters"
        )
    if not places:
        raise ValueError(
            f'answer = "{answer}" is none of the {len(options)} options: give its index from 0, its letter, or its text'
        )
    return Row(given, places.pop(), choices=options)


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f'target = "{value}" is no number: mend it, or give kind = "classification"') from None
    if not math.isfinite(number):
        raise ValueError(f"target = {value}: should be a finite number: mend it, or take the row out")
    return number


def _check_numbers(rows: Rows, where: str, faults: list[str]) -> None:
    """A fault for the first target that is no number."""
    for number, found in enumerate(rows.checked(), start=1):
        if isinstance(found, ValueError):
            faults.append(f"{where}, row {number}: {found}")
            return


def _is_empty(value: Any) -> bool:
    return _is_missing(value) or (isinstance(value, str) and not value.strip())


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _are_numbers(values: Collection[Any]) -> bool:
    """Whether these are numbers some of which are no whole ones."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        return False
    return any(not number.is_integer() for number in numbers)


# -- parts ---------------------------------------------------------------------------------------------------------------


def _split(rows: Mapping[str, Rows], where: str, kind: Kind, notes: list[str]) -> dict[str, Rows]:
    """Train, validation and test: what is not given is a fixed, seeded tenth of the training rows (each class by its share).

    Raises:
        ValueError: too few training rows for that.
    """
    missing = [part for part in ("test", "validation") if part not in rows]
    train, made = rows["train"], dict(rows)
    size = max(1, round(HELD_OUT * len(train)))
    if missing and len(train) < 10:
        raise ValueError(
            f"{where}: {len(train)} rows are too few to set {' and '.join(missing)} aside: give at least 10, or a file for each"
        )
    order = np.random.default_rng([SPLIT_SEED, *b"own data"]).permutation(len(train))
    by_class = missing and kind in ("classification", "image-classification", "multi-label")
    targets = [row.target for row in train] if by_class else None  # labels alone, which are short
    for part in missing:
        if targets is not None:
            is_taken = carve(np.array(_classes_of([targets[i] for i in order])), size)
            taken, order = order[is_taken], order[~is_taken]
        else:
            taken, order = order[:size], order[size:]
        made[part] = train.select(np.sort(taken))
        notes.append(f"{part}: {size} of the {len(train)} training rows, drawn by a fixed seed, because none is given")
    if missing:
        made["train"] = train.select(np.sort(order))
    return {part: made[part] for part in PLACES}


def _classes_of(targets: Sequence[Any]) -> list[str]:
    """Of each target the class by whose share a part is set aside: of several labels the rarest, to leave training some."""
    several = [[str(label) for label in target] if isinstance(target, list) else [str(target)] for target in targets]
    counts = Counter(label for labels in several for label in labels)
    return [min(labels, key=lambda label: (counts[label], label), default="") for labels in several]


def _labels(
    reading: Reading, rows: Mapping[str, Sequence[Row]], given: Mapping[str, str], faults: list[str]
) -> tuple[str, ...]:
    """The classes, sorted: whole numbers by value, texts by alphabet; a fault for each that training never sees."""
    several = reading.kind in ("token-classification", "multi-label")
    if not several and reading.kind not in ("classification", "image-classification"):
        return ()

    def of(part: str) -> set[str]:
        return {str(label) for row in rows[part] for label in (row.target if several else [row.target])}

    known = of("train")
    for part in ("validation", "test"):
        for label in sorted(of(part) - known):
            where = given.get(part, given["train"])
            faults.append(f'{where}: label "{label}" is in the {part} part and in no training row: add some, or take it out')
    by_words: dict[str, list[str]] = {}
    for label in sorted(known):
        by_words.setdefault(" ".join(label.split()), []).append(label)
    for alike in (some for some in by_words.values() if len(some) > 1):
        faults.append(f'{given["train"]}: the labels "{alike[0]}" and "{alike[1]}" differ by blanks alone: write them alike')
    if len(known) < 2:
        faults.append(f"{given['train']}: {len(known)} distinct label, and a classification has two or more: add another")
    return tuple(sorted(known, key=lambda label: (0, int(label), "") if label.lstrip("-").isdecimal() else (1, 0, label)))


def _overlap(rows: Mapping[str, Rows]) -> list[str]:
    """A note for each part that shares inputs with the training rows; of images the first that is there twice."""
    notes = []
    digests = {part: np.fromiter(map(_digest, found), dtype=np.uint64, count=len(found)) for part, found in rows.items()}
    seen, first_seen = np.unique(digests["train"], return_index=True)
    for part in ("validation", "test"):
        twice = np.flatnonzero(np.isin(digests[part], seen))
        if len(twice):
            first = rows[part][int(twice[0])].input
            named = ""
            if isinstance(first, own_images.OwnPicture):
                other = first_seen[np.searchsorted(seen, digests[part][twice[0]])]
                named = f" ({first.name} is {rows['train'][int(other)].input.name})"
            notes.append(
                f"{len(twice)} of the {len(rows[part])} rows of the {part} part have the input of a training row{named}"
            )
    repeated = len(rows["train"]) - len(seen)
    if repeated:
        notes.append(f"{repeated} of the {len(rows['train'])} training rows repeat the input of another")
    return notes


def _digest(row: Row) -> int:
    is_image = isinstance(row.input, own_images.OwnPicture)
    content = row.input.digest if is_image else repr((row.input, row.pair)).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise ValueError("\n".join(faults))
