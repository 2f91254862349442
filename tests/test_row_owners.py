"""Another rule of who owns a row is a subclass of `Rows` and nothing else: adapters a and b and none, mixed in one batch."""

import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.probe import fill
from rankwise.variants.adapter.rows import Rows
from torch import Tensor, nn

IN, OUT, TOKENS = 5, 7, 3
OWNERS = [1, -1, 0, 1, 1, -1, 0, -1, 1]  # the adapter of each row of the batch; -1: none
SETTINGS = {
    "lora": {"rank": [2, 3], "alpha": 5.0},
    "dora": {"rank": [2, 3], "alpha": 5.0},
    "adalora": {"initial_rank": [2, 3], "target_rank": 2, "alpha": 5.0},
}


class MixedRows(Rows):
    """Each row of a batch has its own owner, in any order; a row of -1 has none, and gets the frozen model's output."""

    def __init__(self, members: int, owners: Tensor):
        super().__init__(members)
        self.unowned = (owners < 0).nonzero()[:, 0]
        of_members = [(owners == k).nonzero()[:, 0] for k in range(members)]
        longest = max(map(len, of_members))
        self.exists = torch.stack([torch.arange(longest) < len(rows) for rows in of_members])  # (K, N)
        self.places = torch.stack([nn.functional.pad(rows, (0, longest - len(rows))) for rows in of_members])  # (K, N)

    def grouped(self, x: Tensor) -> Tensor:
        order = torch.cat([self.places.flatten(), self.unowned])  # a member with fewer rows is padded with row 0
        return x[order].reshape(-1, x.shape[-1])

    def fold(self, rows: Tensor) -> Tensor:
        return rows[: self._owned(rows)].view(self.members, -1, rows.shape[-1])

    def unfold(self, y: Tensor, rows: Tensor) -> Tensor:
        return torch.cat([y.flatten(0, 1), rows[self._owned(rows) :]])

    def by_member(self, x: Tensor) -> Tensor:
        return self.fold(self.grouped(x))

    def as_input(self, y: Tensor, x: Tensor) -> Tensor:
        size = self.places.numel()
        y = y.view(size + len(self.unowned), *x.shape[1:-1], y.shape[-1])
        whole = y.new_empty(*x.shape[:-1], y.shape[-1])
        whole[self.places[self.exists]] = y[:size][self.exists.flatten()]
        whole[self.unowned] = y[size:]
        return whole

    def _owned(self, rows: Tensor) -> int:
        size = self.places.numel()
        return len(rows) // (size + len(self.unowned)) * size


@pytest.mark.parametrize("method", SETTINGS)
def test_each_row_of_a_mixed_batch_is_as_with_its_adapter_alone(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, 4)).double().eval()
    x, owners = torch.randn(len(OWNERS), TOKENS, IN, dtype=torch.float64), torch.tensor(OWNERS)
    plain = model(x)
    calibration = (torch.randn(6, IN, dtype=torch.float64),)
    adapter = variants.create(method, members=2, **SETTINGS[method]).attach(model, ["0", "2"], head=[], calibration=calibration)
    fill(adapter)
    adapter.draw.rows = MixedRows(2, owners)
    mixed = model(x)
    adapter.detach()
    torch.testing.assert_close(mixed[owners < 0], plain[owners < 0], rtol=1e-12, atol=1e-14)
    for member in range(2):
        alone = adapter.alone(member).attach(model, ["0", "2"], head=[])
        alone.copy_member(adapter, member)
        own = owners == member
        torch.testing.assert_close(mixed[own], model(x)[own], rtol=1e-12, atol=1e-14)
        assert (mixed[own] - plain[own]).abs().min() > 1e-6
        alone.detach()
