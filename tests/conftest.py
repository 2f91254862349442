"""What every test shares: one thread, and a seed, so that neither timing nor draws depend on the machine or the order."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
