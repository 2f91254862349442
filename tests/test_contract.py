"""The contract of tests/contract.py, run for every registered method."""

import importlib.util
import inspect

import pytest

import variants
from tests.contract import CHECKS


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("method", variants.METHODS)
def test_contract(method, check, tmp_path):
    if "folder" not in inspect.signature(check).parameters:
        check(method)
    elif importlib.util.find_spec("variants.checkpoint") is None:
        pytest.skip("variants/checkpoint.py is not there")
    else:
        check(method, tmp_path)
