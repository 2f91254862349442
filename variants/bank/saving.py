"""What `Bank.combine` made, and how it is written: a LoRA of PEFT's, or, with magnitudes, a DoRA, of scale 1 at every site.

alpha is the rank at every site, by patterns where ranks differ: a program that reads no patterns has the right scale too.
"""

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.linears import find_kind, weight_of
from rankwise.variants.bank.combine import Combined
from rankwise.variants.bank.updates import Update
from rankwise.variants.files.peft.reading import unscaled
from rankwise.variants.files.pretrained import save_pretrained
from rankwise.variants.files.state import detached_if_it_fails, pattern_of
from torch import Tensor, nn


class Combination:
    """Several adapters of a bank as one."""

    def __init__(self, model: nn.Module, combined: Combined, taken_out: Callable[[], contextlib.AbstractContextManager[None]]):
        self._model, self._combined, self._taken_out = model, combined, taken_out

    @property
    def how(self) -> str:
        return self._combined.how

    @property
    def errors(self) -> dict[str, float]:
        """Of each site |what is missing| / |the change that was asked for|, Frobenius norms; 0 where that is no change."""
        return {name: _share([square]) for name, square in self._combined.squares.items()}

    @property
    def error(self) -> float:
        """The same over all sites together; below 1e-6 it is rounding."""
        return _share(list(self._combined.squares.values()))

    @property
    def ranks(self) -> dict[str, int]:
        """Of each site."""
        return {name: update.rank for name, update in self._combined.updates.items()}

    def __repr__(self) -> str:
        total = sum(self.ranks.values())
        return f"Combination(how={self.how!r}, {len(self.ranks)} sites, total rank {total}, error {self.error:.2%})"

    @torch.no_grad()
    def save(self, folder: str | Path) -> None:
        """Writes it as an adapter's folder, which the bank, `load_pretrained` and PEFT read; whole or not at all.

        Warns of its error where it is more than rounding.

        Raises:
            ValueError: `folder` is a file, or nothing but the frozen model is left to write.
            OSError: the disk is full or not writable; what was in `folder` before is untouched.
        """
        with self._taken_out():
            adapter = _attached(self._model, self._combined)
            try:
                save_pretrained(adapter, folder)
            finally:
                adapter.detach()
        if self.error > 1e-6:
            warnings.warn(
                f'how = "{self.how}": what {folder} holds differs from the change that was asked for by {self.error:.1%} of it '
                f"(Frobenius norm), because it is cut to the rank: a larger rank has a smaller error",
                stacklevel=2,
            )


def _share(squares: list[tuple[float, float]]) -> float:
    missing, asked = (sum(values) for values in zip(*squares, strict=True)) if squares else (0.0, 0.0)
    return (missing / asked) ** 0.5 if asked else 0.0


def _attached(model: nn.Module, combined: Combined) -> Adapter:
    """The combination as an adapter in the model."""
    updates = combined.updates
    ranks = {name: max(update.rank, 1) for name, update in updates.items()}  # PEFT knows no rank 0
    adapter = unscaled(ranks, any(update.gain is not None for update in updates.values()))
    with detached_if_it_fails(adapter):
        known = [name for name, module in model.named_modules() if find_kind(module) is not None]
        adapter.attach(model, [pattern_of(name, known) for name in updates] or "all-linear", head=combined.head_names)
        for name, update in updates.items():
            _fill(adapter, name, update)
        for name, site in adapter.named_heads():
            for key, parameter in site.named_parameters():
                parameter[0].copy_(combined.heads[name][key])
    return adapter


def _fill(adapter: Adapter, name: str, update: Update) -> None:
    site, base = adapter.site(name), adapter.base(name)
    low_rank = site.low_rank
    low_rank.A.zero_()
    low_rank.B.zero_()
    if update.rank:
        low_rank.A[0].copy_(update.A)
        low_rank.B[0].copy_(update.B)
    if site.has_magnitude:
        site.parameters_changed()
        norm = _row_norms(base, low_rank.A[0], low_rank.B[0])
        site.magnitude[0].copy_(norm if update.gain is None else update.gain * norm)


def _row_norms(base: nn.Module, A: Tensor, B: Tensor) -> Tensor:
    """(O,): |W + B A| of each row, of the factors as they are written."""
    return (weight_of(base).double() + B.double() @ A.double()).norm(dim=1)
