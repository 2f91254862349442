"""Which adapter owns each row of a batch, in any order; a row of None is the frozen model's own."""

from collections.abc import Sequence
from typing import Any

import torch
from rankwise.variants.adapter.rows import Rows
from torch import Tensor

Index = slice | Tensor


class Owners(Rows):
    """The owners of the rows of one forward pass.

    active: the adapter of every row, where `names` is None.
    names: of each row of the batch its adapter's name, or None; while a batch of mixed rows is computed.  A generation that
        makes several sequences of a row has them one after the other, as transformers does.
    """

    def __init__(self) -> None:
        super().__init__(1)
        self.active: str | None = None
        self.names: list[str | None] | None = None
        self.stacked: dict[tuple[str, int], Any] = {}  # (site, rows) -> what the site keeps for these owners (site.py)
        self.stacked_bytes = 0
        self._groups: dict[tuple[int, torch.device], dict[str, Index]] = {}
        self._orders: dict[tuple[int, torch.device], tuple[list[str | None], list[int], Tensor]] = {}

    def mix(self, names: Sequence[str | None] | None) -> None:
        """From now on rows have these owners; None: all have the active one."""
        self.names = None if names is None else list(names)
        self._groups.clear()
        self._orders.clear()
        self.stacked.clear()
        self.stacked_bytes = 0

    def single(self) -> tuple[bool, str | None]:
        """Whether all rows have one owner, and which."""
        if self.names is None:
            return True, self.active
        first = next(iter(self.names), None)
        return all(name == first for name in self.names), first

    def groups(self, site: str, x: Tensor) -> dict[str, Index]:
        """The places of each adapter's rows in the first axis of x (rows, ...): a slice where they stand together.

        Raises:
            ValueError: the first axis of x is not the rows of the model's input.
        """
        count, batch = x.shape[0] if x.dim() else 0, len(self.names)
        if count != (batch if self.total is None else self.total) or count % batch:
            raise ValueError(
                f"{site} got an input of shape {tuple(x.shape)}, whose first axis is not the "
                f"{batch if self.total is None else self.total} rows of the model's input, so that rows of several adapters "
                f"cannot be told apart there: give each adapter's rows a call of their own (bank.use), or train without {site}"
            )
        key = count, x.device
        if key not in self._groups:
            self._groups[key] = {
                name: self._places(name, count // batch, x.device) for name in dict.fromkeys(self.names) if name
            }
        return self._groups[key]

    def order(self, count: int, device: torch.device) -> tuple[list[str | None], list[int], Tensor]:
        """The owners of so many rows, each once; how many rows each has; and of each row the place of its owner (count,)."""
        key = count, device
        if key not in self._orders:
            owners = [name for name in self.names for _ in range(count // len(self.names))]
            once = dict.fromkeys(owners)
            places = {name: place for place, name in enumerate(once)}
            self._orders[key] = (
                list(once),
                [owners.count(name) for name in once],
                torch.tensor([places[name] for name in owners], dtype=torch.int64, device=device),
            )
        return self._orders[key]

    def _places(self, name: str, times: int, device: torch.device) -> Index:
        rows = [row for row, owner in enumerate(self.names) if owner == name]
        if rows[-1] - rows[0] == len(rows) - 1:
            return slice(rows[0] * times, (rows[-1] + 1) * times)
        return torch.tensor([row * times + i for row in rows for i in range(times)], device=device)
