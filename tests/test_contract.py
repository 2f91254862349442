"""The contract of tests/contract.py, run for every registered method."""

import inspect

import pytest
from rankwise import variants

from tests.contract import CHECKS
from tests.tiny import tiny


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("method", variants.METHODS)
def test_contract(method, check, tmp_path):
    if "folder" not in inspect.signature(check).parameters:
        check(method)
    else:
        check(method, tmp_path)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_full_fine_tuning_decays_no_norm_and_no_bias(name):
    model = tiny(name)
    adapter = variants.create("full").attach(model)
    decayed, plain = adapter.parameter_groups()
    assert (decayed.weight_decay, plain.weight_decay) == (1.0, 0.0)
    assert len(decayed.params) + len(plain.params) == len(list(adapter.parameters()))
    assert {p.dim() for p in decayed.params} == {3}  # matrices (and embeddings) alone, with their leading axis
    assert {p.dim() for p in plain.params} == {2}
