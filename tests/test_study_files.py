"""Every fault in a study's file, or in a paper's recipe, ends in lines that say where, what and how to mend it.

Each shipped file is changed in one place at a time, at every depth: every value by one of another type or size, every key
taken out, a key put in, a value nested once more or once less.  What comes of it is a study, or a ValueError.
"""

import copy
import datetime
import itertools
import math
import random
import re
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rankwise.experiments import checks, config, recipes, sources
from rankwise.variants.settings import METHODS

from tests.tiers import quick

STUDIES = {name: tomllib.loads(path.read_text(encoding="utf-8")) for name, path in config.shipped().items()}
RECIPES = {path.stem: path for path in sorted(config.PAPERS.glob("*.toml"))}
NEEDED = {"bottleneck": 4, "rank": 2, "initial_rank": 4, "target_rank": 2}
VALUES = {
    "empty text": "",
    "text": "no such thing",
    "long text": "x" * 300,
    "two lines": "one\ntwo",
    "share": "10%",
    "huge share": "9" * 400 + "%",
    "true": True,
    "false": False,
    "zero": 0,
    "one": 1,
    "negative": -1,
    "half": 0.5,
    "huge": 10**400,
    "64 bits": 2**63 - 1,
    "huge float": 1e308,
    "small float": 5e-324,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "date": datetime.date(2026, 1, 1),
    "empty list": [],
    "list of texts": ["no such thing"],
    "list of numbers": [1, 1],
    "list of floats": [math.nan, 1e-3],
    "list of lists": [[]],
    "list of tables": [{}],
    "empty table": {},
    "table": {"no such key": 1},
    "table of tables": {"no such key": {"nor this": []}},
}


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value in a file's content, tables and lists among them."""
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def variations(raw: dict[str, Any]) -> Iterator[tuple[str, tuple[str | int, ...], dict[str, Any]]]:
    """(what was changed, where, the changed content); the original is left as it is."""
    for path in [(), *places(raw)]:
        inner = raw
        for key in path:
            inner = inner[key]
        for what, value in VALUES.items() if path else ():
            yield what, path, changed(raw, path, value)
        if path:
            yield "taken out", path, changed(raw, path, None)
            yield "in a list", path, changed(raw, path, [inner])
            yield "in a table", path, changed(raw, path, {str(path[-1]): inner})  # whose keys are texts
        if isinstance(inner, dict):
            yield "a key put in", path, changed(raw, (*path, "no such key"), 1)
        if isinstance(inner, list) and inner:
            yield "twice", path, changed(raw, path, [*inner, inner[0]])
            yield "out of its list", path, changed(raw, path, inner[0])


def changed(raw: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """A copy with another value at that path; None takes it out."""
    new = dict(raw)
    at: Any = new
    for key in path[:-1]:
        at[key] = copy.copy(at[key])
        at = at[key]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return new


def optional(raw: dict[str, Any]) -> Iterator[tuple[str, tuple[str | int, ...], dict[str, Any]]]:
    """Every setting that a study may have, with every value."""
    raw = {"training": {}, "sweep": {}, "budget": {}, **raw}
    name = raw["methods"][0]["method"]
    fields = {
        (): config.Study.model_fields,
        ("training",): config.Training.model_fields,
        ("sweep",): config.Sweep.model_fields,
        ("budget",): config.Budget.model_fields,
        ("methods", 0): {**METHODS[name].settings.model_fields, **config.Entry.model_fields},
    }
    for section, keys in fields.items():
        for key in keys:
            for what, value in VALUES.items():
                yield what, (*section, key), changed(raw, (*section, key), value)


REMEDIES = (
    *(
        "should ",
        "give ",
        "take ",
        "missing",
        "there are",
        "name ",
        "shorten",
        "raise ",
        "write ",
        "exchange ",
        "lower it",
        "lengthen ",
    ),
    *("add ", "these ask", "at least one row", "set "),
)
PYTHON = ("[type=", "Input", "instance of", "validation", "errors.pydantic", "NoneType", "object", "Traceback")


def refusal(raw: dict[str, Any]) -> str:
    """What is said of a study's content: nothing where it makes a study; each line with its place and a remedy."""
    try:
        checks.check(config.parse(raw, default_name="file", where="file.toml"))
    except ValueError as error:
        return clear(error)
    return ""


def recipe_refusal(raw: dict[str, Any], name: str, draw: random.Random) -> str:
    """The same of a recipe and of the studies of three of its cells."""
    try:
        recipe = recipes.parse(raw, RECIPES[name])
        cells = [(row, cell, variant) for variant in recipe.variants for row in recipe.rows for cell in recipe.tasks]
        runnable = [cell for cell in draw.sample(cells, min(3, len(cells))) if not recipes.waits(recipe, *cell)]
        for cell in runnable:
            checks.check(recipes.plan(recipe, *cell, scale=draw.choice([1.0, 0.01])).study)
            recipes.memory_bytes(recipes.settings_of(recipe, *cell))
    except ValueError as error:
        return clear(error)
    return ""


def clear(error: ValueError) -> str:
    """What it says, each line with its place and a remedy, and in no other words than ours."""
    assert type(error) is ValueError, repr(error)  # pydantic's and json's own are kinds of it
    for line in str(error).split("\n"):
        assert re.match(r"[^:=]+[.:\[=]", line) and (": " in line), line
        assert any(word in line for word in REMEDIES) and not any(word in line for word in PYTHON), line
        assert line.isprintable(), line
    return str(error)


def check_all(changes: Iterator[tuple[str, tuple[str | int, ...], dict[str, Any]]], refusal: Callable = refusal) -> None:
    refused = 0
    for what, path, raw in changes:
        try:
            refused += bool(refusal(raw))
        except Exception as error:
            raise AssertionError(f"{what} at {path}: {error!r}") from error
    assert refused


CHECKED_STUDIES = {"default", "smoke", "thousand", "placing"}  # with ranks_of and shared_with
OWN_STUDIES = [name for name in STUDIES if not name.startswith("pilots/")]


@pytest.mark.parametrize("name", quick(OWN_STUDIES, CHECKED_STUDIES))
def test_a_fault_in_a_shipped_study_is_said_in_clear_lines(name):
    assert refusal(STUDIES[name]) == "" or name == "fair"  # which asks to accept the terms of its data
    check_all(variations(STUDIES[name]))


@pytest.mark.parametrize("name", quick(METHODS))
def test_a_fault_in_any_setting_that_a_study_may_have_is_said_in_clear_lines(name):
    fields = METHODS[name].settings.model_fields
    needed = {key: value for key, value in NEEDED.items() if key in fields and fields[key].is_required()}
    entry = {"method": name, "learning_rates": [1e-3, 2e-3], **needed}
    raw = {"name": "x", "model": "m", "tasks": ["glue/stsb"], "quick": True, "sweep": {}, "methods": [entry]}
    assert refusal(raw) == ""
    check_all(optional(raw))


@pytest.mark.parametrize("name", quick(["allocation", "placing"], ["placing"]))  # with ranks_of, with shared_with
def test_two_faults_are_said_in_clear_lines(name):
    draw = random.Random(0)
    first = draw.sample(list(variations(STUDIES[name])), 60)
    pairs = (
        (f"{a} at {where}, {b}", path, twice)
        for a, where, once in first
        for b, path, twice in itertools.islice(variations(once), draw.randrange(100), None, 401)
    )
    check_all(pairs)


def test_a_fault_beside_an_entry_that_takes_ranks_is_said_once():
    raw = changed(STUDIES["allocation"], ("methods", 3, "learning_rates"), [-1.0])
    said = refusal(raw).split("\n")
    assert said == ["file.toml.methods[3].learning_rates.0 = -1.0: should be greater than 0"]


def test_a_fault_after_a_refused_entry_names_the_entry_of_the_file():
    raw = changed(changed(STUDIES["smoke"], ("methods", 0, "rnak"), 1), ("methods", 3, "label"), "two\nlines")
    assert "file.toml.methods[3].label:" in refusal(raw)


def test_a_list_that_is_none_is_refused():
    said = refusal(changed(STUDIES["smoke"], ("tasks",), True))
    assert said == "file.toml.tasks = True: should be a valid list"


def test_a_sweep_of_endless_rungs_is_refused():
    raw = changed(STUDIES["smoke"], ("sweep", "halving"), 2)
    assert "rungs" in refusal(changed(raw, ("sweep", "rungs"), 10**15))


def test_a_label_is_as_long_as_the_names_of_its_folders_allow():
    assert refusal(changed(STUDIES["smoke"], ("methods", 3, "label"), "x" * config.LONGEST_NAME)) == ""
    said = refusal(changed(STUDIES["smoke"], ("methods", 3, "label"), "\u00e9" * 51))
    assert "methods[3].label" in said and "102 bytes, and at most 100 fit, because files and folders" in said


def test_a_name_says_what_it_may_be_and_where_it_comes_from():
    said = refusal(changed(STUDIES["smoke"], ("name",), "my study"))
    assert said.startswith('file.toml.name: "my study" cannot name the folder') and 'name = "my-study"' in said
    with pytest.raises(ValueError, match=r'sets no name, so that the file.s own is taken.*name = "my-study"'):
        config.parse(changed(STUDIES["smoke"], ("name",), None), default_name="my study")


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "marked.toml"
    path.write_text(config.DEFAULT_STUDY.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert config.read(path).model == config.read(config.DEFAULT_STUDY).model


@pytest.mark.parametrize(
    "text", ["a = " + "9" * 5000, "a = " + "[" * 5000, "\x00", "a = 'x"], ids=["long", "deep", "zero", "cut"]
)
def test_what_is_no_toml_is_refused(text, tmp_path):
    (tmp_path / "no.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="not a TOML file") as refused:
        config.read(tmp_path / "no.toml")
    assert type(refused.value) is ValueError


LARGE = {"adalora-4", "adalora-4-miniature", "adalora-5", "adalora-5-miniature"}


@pytest.mark.parametrize("name", quick(RECIPES, set(RECIPES) - LARGE))
def test_a_fault_in_a_recipe_is_said_in_clear_lines(name, monkeypatch):
    def none(model: str) -> None:
        raise ValueError(f"{model}: not to be had: give another")

    monkeypatch.setattr(sources, "fetch", none)
    raw, draw = tomllib.loads(RECIPES[name].read_text(encoding="utf-8")), random.Random(0)
    changes = list(variations(raw))
    check_all(draw.sample(changes, min(len(changes), 500)), lambda changed: recipe_refusal(changed, name, draw))


def test_recipes_that_name_one_another_are_refused(tmp_path):
    for name, other in (("one", "two"), ("two", "one")):
        (tmp_path / f"{name}.toml").write_text(f'like = "{other}"', encoding="utf-8")
    with pytest.raises(ValueError, match=r'like = "one": one and two name one another: take one out'):
        recipes.read(tmp_path / "one.toml")
