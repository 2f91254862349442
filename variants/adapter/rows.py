"""Which member owns each row of a model's input.

The members' rows lie one after the other, as many of each: of K*N rows, row j belongs to member j // N.  This file alone knows
that; every other one calls these functions, so that another rule of who owns a row is a subclass of `Rows` and nothing else.

    by_member  (k n) ... f -> k (n ...) f        as_input  k (n ...) f -> (k n) ... f
    grouped    (k n) ... f -> (k n ...) f        fold      (k n) f -> k n f        unfold  k n f -> (k n) f

All are plain reshapes, which cost 4 microseconds of a call where einops takes 20, two to four times at each site of each
forward pass.  What folds the member axis once a step says it with einops (products.squared_row_norms, adalora.Orthogonality).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Rows:
    """The rows of an adapter's forward passes.

    members: K.
    total: rows of the model's input in this forward pass, K*N; None between forward passes.
    before: rows that each member has before those here; 0, unless several processes share the rows of a batch (`shared`).
    summed: of a tensor that was made from the rows here, the sum over all processes; the tensor itself in one process.
    """

    def __init__(self, members: int):
        self.members = members
        self.total: int | None = None
        self.before = 0
        self.summed: Callable[[Tensor], Tensor] = itself
        self._shape: tuple[int, ...] = ()  # of the model's input; a segment that is computed again needs it after the pass

    def check(self, site: str, x: Tensor) -> None:
        """
        Raises:
            ValueError: there are several members, and this input of `site` is not the rows of the model's input.
        """
        if self.members > 1 and self.total is not None and x.shape[0] != self.total:
            raise ValueError(
                f"{site} got an input of shape {tuple(x.shape)}, whose first axis is not the {self.total} rows "
                f"of {self.members} members"
            )

    def check_divisible(self, site: str, x: Tensor) -> None:
        """
        Raises:
            ValueError: the rows cannot be as many of each member.
        """
        if x.shape[0] % self.members:
            raise ValueError(f"{site} got {x.shape[0]} rows, which is no multiple of {self.members} members")

    def first(self, x: Tensor) -> int:
        """Rows that each member has before those of x (K*N, ..., F), counted as in `by_member`.

        0 where x is not made of the model's rows, as DeBERTa's table of relative positions, of which every process has all.
        (That is told by its first axis: K*N, or so many times that; of a matrix (rows, F) K*N rows, or all their tokens.)
        """
        if not self.before or not self._shape:
            return 0
        total, length = x.shape[0], self._shape[0]
        tokens = length * self._shape[1] if len(self._shape) > 1 else length
        if total not in (length, tokens) if x.dim() < 3 else total % length:
            return 0
        return self.before * (x.numel() // x.shape[-1] // length)

    def by_member(self, x: Tensor) -> Tensor:
        """(K, N, F): each member's rows of x (K*N, ..., F); of a sequence every token counts as a row."""
        return x.reshape(self.members, -1, x.shape[-1])

    def grouped(self, x: Tensor) -> Tensor:
        """(rows, F): the rows of x (K*N, ..., F), those of a member together; behind them rows that no member owns, if any."""
        return self.by_member(x).flatten(0, 1)

    def fold(self, rows: Tensor) -> Tensor:
        """(K, N, F): each member's rows of what is `grouped`."""
        return self.by_member(rows)

    def unfold(self, y: Tensor, rows: Tensor) -> Tensor:
        """(rows, O): y (K, N, O) in the place of the members' rows of `rows` (rows, O), which is `grouped`."""
        return y.view(rows.shape)

    def as_input(self, y: Tensor, x: Tensor) -> Tensor:
        """(rows, ..., O): y, (K, N, O) or (K*N, O), in the order and shape of the input x (rows, ..., F) it was made from."""
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def mask_by_member(self, mask: Tensor) -> Tensor:
        """(K, N): the tokens of a mask (rows, tokens)."""
        return mask.reshape(self.members, -1)

    @contextlib.contextmanager
    def shared(self, before: int, summed: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While some of each member's rows are here, those after the first `before`, and other processes have the rest.

        summed: of a tensor the sum over all processes.
        """
        self.before, self.summed = before, summed
        try:
            yield
        finally:
            self.before, self.summed = 0, itself

    @contextlib.contextmanager
    def apart(self, total: int) -> Iterator[None]:
        """While a module is called with other rows than the model's input: so many, as many of each member."""
        was, self.total = self.total, total
        try:
            yield
        finally:
            self.total = was

    def watch(self, model: nn.Module) -> list[RemovableHandle]:
        """Hooks on the model that say how many rows each forward pass has; bound methods, which pickle with the model."""
        return [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        self.total = count_rows(args, kwargs)
        self._shape = tuple(_main(args, kwargs).shape) if self.total else ()

    def _after(self, *_: Any) -> None:
        self.total = None


def count_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Rows of what a model is called with; None where it is called with no tensor."""
    main = _main(args, kwargs)
    return None if main is None else main.shape[0]


def _main(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    main = [kwargs[k] for k in ("input_ids", "inputs_embeds", "pixel_values") if kwargs.get(k) is not None]
    return next((t for t in [*main, *args, *kwargs.values()] if isinstance(t, Tensor) and t.dim()), None)


def itself(tensor: Tensor) -> Tensor:
    return tensor
