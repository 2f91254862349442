"""What only a GPU can show.  One command on a machine with one: pytest -m gpu"""

import dataclasses
import os

import pytest
import torch
from rankwise.experiments.training.optim import MemberAdamW
from rankwise.experiments.training.pack import Pack
from rankwise.variants.adapter.draws import Draw, drop
from rankwise.variants.settings import METHODS

from tests import small_world
from tests.test_trainer import Stop, assert_same, stopping_after

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; on one: pytest -m gpu"),
]
PACKABLE = [name for name, method in METHODS.items() if method.load().packable]


@pytest.fixture
def model(tmp_path):
    return small_world.model(tmp_path / "model")


@pytest.fixture
def deterministic(monkeypatch):
    """As a study runs on a GPU."""
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pack(model: str, method: str, device: str = "cuda", precision: str = "fp32") -> Pack:
    seeds, rates = ((3, 8, 1), (1e-2, 3e-3, 1e-3)) if method in PACKABLE else ((3,), (3e-3,))
    one = small_world.pack(model, method, seeds=seeds, learning_rates=rates, precision=precision)
    return dataclasses.replace(one, device=torch.device(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_elements_are_dropped_as_on_a_cpu(dtype):
    x = torch.randn(6, 5, 37).to(dtype)
    found = []
    for device in ("cpu", "cuda"):
        draw = Draw([4, 9, 2])
        draw.begin(7, 1)
        found.append(drop(x.to(device), 0.3, draw, "here").cpu())
    assert torch.equal(*found)


@pytest.mark.parametrize("method", METHODS)
def test_a_pack_trains_as_on_a_cpu(model, tmp_path, method):
    found = []
    for device in ("cpu", "cuda"):
        trainer, outcomes = small_world.trained(pack(model, method, device), tmp_path / device)
        assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
        found.append(trainer.last_loss.cpu())
    torch.testing.assert_close(*found, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_cut_off_ends_bit_for_bit_the_same(model, tmp_path, deterministic, method, precision):
    one = pack(model, method, precision=precision)
    whole, _ = small_world.trained(one, tmp_path / "whole")
    cut = small_world.trainer(one, tmp_path / "cut", checkpoint_seconds=0.0, progress=stopping_after(6))
    with pytest.raises(Stop):
        cut.run()
    resumed, _ = small_world.trained(one, tmp_path / "cut")
    assert_same(whole, resumed)


def test_a_pack_takes_the_step_of_all_members_at_once(model, tmp_path, monkeypatch):
    trainer = small_world.trainer(pack(model, "lora"), tmp_path)
    monkeypatch.setattr(MemberAdamW, "_step_fused", None)
    trainer.run()
