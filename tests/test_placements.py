"""What the registry says of how each method places rank is so of its class, is shown, and stands on the page."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from rankwise import variants
from rankwise.experiments import config
from rankwise.experiments.cli.listing import list_
from rankwise.variants.allocation.allocated import AllocatedAdapter
from rankwise.variants.allocation.placed import PlacedLoRA
from rankwise.variants.settings import METHODS, Placement

PAGE = Path(variants.__file__).parent / "allocation" / "placing.md"
PLACED = {name: one.placement for name, one in METHODS.items() if one.placement is not None}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_places_rank_says_how(name):
    kind, placement = METHODS[name].load(), METHODS[name].placement
    if issubclass(kind, AllocatedAdapter | PlacedLoRA):
        assert placement is not None
    if placement is None:
        return
    for word, hint in get_type_hints(Placement).items():
        assert getattr(placement, word) in get_args(hint)
    # What is measured before training is measured on calibration batches, and nothing else is.
    assert (placement.data == "calibration") == (kind.needs is not None)
    if issubclass(kind, PlacedLoRA) and kind.needs is None:
        assert placement.data == "none"


def test_adalora_and_its_kin_are_the_default_row():
    assert METHODS["adalora"].placement == METHODS["allocated"].placement == METHODS["elalora"].placement == Placement()
    assert METHODS["lora"].placement is None


def test_list_shows_the_words(capsys):
    list_(as_json=True)
    assert json.loads(capsys.readouterr().out)["placements"] == {name: asdict(one) for name, one in PLACED.items()}
    list_()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "gora unit matrix, total fixed, basis keep, data calibration" in lines


def test_the_page_has_every_placement():
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in PAGE.read_text("utf-8").splitlines()]
    found = {row[0]: row[1:5] for row in rows if len(row) > 4}
    assert {name: found.get(name) for name in PLACED} == {name: list(asdict(one).values()) for name, one in PLACED.items()}


def test_the_study_of_allocators_has_every_one():
    study = config.read(config.STUDIES / "allocators.toml")
    assert {entry.method for entry in study.methods} >= set(PLACED), "a method that places rank joins allocators.toml"
    assert study.budget.equal == "parameters" and study.sweep.design == "whole-curve"
