"""What `rankwise list` says of each method's abilities is what they were tried to be."""

import json

import pytest
from rankwise.experiments.cli.listing import list_
from rankwise.variants.settings import METHODS

from tests import contract, method_matrix

WRITTEN = json.loads(method_matrix.FILE.read_text("utf-8"))


def test_every_method_has_every_ability_written_down():
    assert {name: list(row) for name, row in WRITTEN.items()} == {name: list(method_matrix.ABILITIES) for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_what_is_written_agrees_with_the_class(name):
    kind, row = METHODS[name].load(), WRITTEN[name]
    assert (row["packs"], row["merges"]) == (contract.members_of(name) > 1, kind.mergeable)
    assert row["resumes to the bit"] and (row["checkpointing"] or not kind.checkpointable)


def test_an_ability_is_what_the_contract_shows_of_it():
    assert method_matrix.abilities("head") == WRITTEN["head"]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_ability_is_what_the_contract_shows_of_it(name):
    assert method_matrix.abilities(name) == WRITTEN[name]


def test_list_shows_them(capsys):
    list_(as_json=True)
    assert json.loads(capsys.readouterr().out)["abilities"] == WRITTEN
    list_()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert next(line for line in lines if line.startswith("lora packs")).count(",") == sum(WRITTEN["lora"].values()) - 1
    assert "gradual merges, resumes to the bit, checkpointing" in "\n".join(lines)
