"""The contract of tests/contract.py, run for every registered method."""

import inspect

import pytest
from rankwise import variants
from rankwise.variants.adapter import interface

from tests.contract import CHECKS
from tests.tiny import tiny

OF_ATTACHING = {  # whose claim is what attaching does to a model: always with the probe
    "body_is_unchanged_at_the_start",
    "attaching_keeps_the_evaluation_mode",
    "base_is_untouched_bit_for_bit",
    "detach_restores_everything",
    "packed_equals_alone",
}
PROBED = set()  # what was probed already: method, model, targets, settings


@pytest.fixture
def probed_once(monkeypatch):
    """The probe of packing is three quarters of an attach: where attaching is not the claim, it is made once for each case."""
    real = interface.probe

    def probe(adapter, model, targets, head, calibration):
        case = (adapter.method, type(model), str(targets), repr(adapter.settings), adapter.members)
        if case not in PROBED:
            real(adapter, model, targets, head, calibration)
            PROBED.add(case)

    monkeypatch.setattr(interface, "probe", probe)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("method", variants.METHODS)
def test_contract(method, check, tmp_path, request):
    if check.__name__ not in OF_ATTACHING:
        request.getfixturevalue("probed_once")
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
