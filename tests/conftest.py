"""What every test shares: one thread, and a seed, so that neither timing nor draws depend on the machine or the order."""

import matplotlib.figure
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def figures_undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a report's time is matplotlib's; what a figure's file holds is the claim of test_figures.py and the slow tier."""
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, out, **_: out.write(b"a figure"))
