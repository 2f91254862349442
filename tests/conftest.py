"""What every test shares: one thread, and a seed, so that neither timing nor draws depend on the machine or the order."""

import gc

import matplotlib.figure
import pytest
import torch

torch.set_num_threads(1)
CHECKED = ["rankwise.variants.lowrank", "rankwise.variants.allocation"]  # whose shapes are written at their tensors


def pytest_configure(config: pytest.Config) -> None:
    """The slow tier, which runs every method on every model, has the shapes of CHECKED tested at each call."""
    if config.getoption("markexpr") == "slow":
        from jaxtyping import install_import_hook

        install_import_hook(CHECKED, "beartype.beartype")


def pytest_collection_finish() -> None:
    """What was imported until now stays, so no collection of garbage need look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model that a Trainer loads is in float64; in a process that is forked from here, too."""
    from tests import small_world

    small_world.in_float64(monkeypatch.setattr)


@pytest.fixture
def figures_undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a report's time is matplotlib's; what a figure's file holds is the claim of test_figures.py and the slow tier."""
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, out, **_: out.write(b"a figure"))
