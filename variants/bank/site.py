"""The adapters at one module, and what each of them does to its own rows.

At a linear module one product with the frozen weight serves every row.  Then each adapter's rows get its update, a product of
two thin matrices, so that a batch of mixed rows costs what a batch of one adapter costs, whatever the counts: no row is padded.
Rows that stand together are multiplied adapter by adapter; rows that lie apart, and those of a single token, row by row, each
with the factors of its adapter's place among the batch's adapters: to gather these moves less than to gather the rows.

    y = base(x);   y_n += (x_n A^T) (c B)^T;   y_n = g (y_n - b) + b where the adapter has magnitudes (variants/dora.py)

At any other module (a task head, an embedding, a convolution) an adapter's own forward pass computes its rows.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from rankwise.variants import native
from rankwise.variants.adapter.kinds.interface import base_output
from rankwise.variants.adapter.linears import is_linear
from rankwise.variants.adapter.site import Site
from rankwise.variants.bank.owners import Index, Owners
from torch import Tensor, nn

STACKED_BYTES = 256 * 2**20  # of factors that are kept during a generation; beyond it rows go adapter by adapter


class Part(Protocol):
    """What one adapter does at one module."""

    def alone(self, base: nn.Module, x: Tensor) -> Tensor:
        """(rows, ..., O): the module's output for x (rows, ..., I), all of this adapter."""
        ...


class Own(nn.Module):
    """The forward pass of the adapter's own site."""

    def __init__(self, site: Site):
        super().__init__()
        self.site = site

    def alone(self, base: nn.Module, x: Tensor) -> Tensor:
        return self.site(base, x)


class Thin(nn.Module):
    """The update of a linear by the slots that act: A (r, I), B (r, O) with all scales in it, gain (O,) or None."""

    A: Tensor
    B: Tensor
    gain: Tensor | None

    @torch.no_grad()
    def __init__(self, site: Site, base: nn.Module):
        super().__init__()
        A, B, c = (t[0].detach() for t in site.low_rank.matrices())
        acts = c != 0
        A = A if acts.all() else A[acts]
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", (B * c)[:, acts].mT.contiguous(), persistent=False)
        self.register_buffer("gain", site.gain(base)[0] if site.has_magnitude else None, persistent=False)

    def alone(self, base: nn.Module, x: Tensor) -> Tensor:
        y = base_output(base, x)
        return self.changed(y, x, base.bias).view(y.shape).to(y.dtype)

    def changed(self, y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """(rows, O): the output y (..., O) of x (..., I) with this update in it; y may be overwritten."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.A.dtype
        with torch.autocast(device, enabled=False):
            y, x = y.reshape(-1, y.shape[-1]).to(dtype), x.reshape(-1, x.shape[-1]).to(dtype)
            if len(self.A):
                y = y.addmm_(x @ self.A.to(dtype).mT, self.B.to(dtype))
            if self.gain is None:
                return y
            # In the gain's own precision: it lies near 1, where bf16 knows steps of 1/128.
            wide = y.to(self.gain.dtype)
            return wide.mul_(self.gain) if bias is None else torch.addcmul((1 - self.gain) * bias.to(wide), wide, self.gain)


def part_of(site: Site, base: nn.Module) -> Thin | Own:
    """What a loaded adapter's site does at its module."""
    return Thin(site, base) if site.low_rank is not None and is_linear(base) else Own(site)


class BankSite(nn.Module):
    """The adapters of a bank at one module, in the place of an adapter's site (adapter/surgery.py)."""

    def __init__(self, name: str, owners: Owners, parts: dict[str, Thin | Own]):
        super().__init__()
        self.name, self.owners = name, owners
        self.parts = nn.ModuleList(parts.values())  # so that they move with the model
        self._of = dict(parts)

    def part(self, adapter: str | None) -> Thin | Own | None:
        return self._of.get(adapter)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        is_single, owner = self.owners.single()
        if is_single:
            part = self.part(owner)
            return base(x) if part is None else part.alone(base, x)
        groups = self.owners.groups(self.name, x)
        y = base_output(base, x)
        by_row = self._by_row(groups, x)
        if by_row is not None:
            y = by_row.changed(y, x, base.bias)
        for adapter, rows in groups.items():
            part = self.part(adapter)
            if isinstance(part, Thin):
                if by_row is None:
                    self._thin(part, y, x, rows, base.bias)
            elif part is not None:
                y = _with_rows(y, rows, part.alone(base, x[rows]))
        return y

    def _by_row(self, groups: dict[str, Index], x: Tensor) -> "Stacked | None":
        """The rows' factors, where row by row is the faster way: None where ranks differ much, or long rows stand together.

        Rows of fewer tokens than ranks are smaller than their factors: those are then kept for the next tokens, within a limit.
        """
        key = self.name, len(x)
        if key in self.owners.stacked:
            return self.owners.stacked[key]
        order, counts, places = self.owners.order(len(x), x.device)
        parts = [part if isinstance(part, Thin) else None for part in map(self.part, order)]
        ranks = [0 if part is None else part.A.shape[0] for part in parts]
        most = max(ranks)
        if not 0 < most <= 2 * sum(rank * count for rank, count in zip(ranks, counts, strict=True)) / len(x):
            return None
        few = x[0].numel() // x.shape[-1] < most
        if not few and all(isinstance(rows, slice) for rows in groups.values()):
            return None
        one = next(part for part in parts if part is not None)
        size = len(parts) * most * (one.A.shape[1] + one.B.shape[1]) * one.A.element_size()
        if few and self.owners.stacked_bytes + size > STACKED_BYTES:
            return None
        stacked = Stacked.of(parts, places, one, most)
        if few:
            self.owners.stacked[key] = stacked
            self.owners.stacked_bytes += size
        return stacked

    @staticmethod
    def _thin(part: Thin, y: Tensor, x: Tensor, rows: Index, bias: Tensor | None) -> None:
        own = y[rows]  # a view of a slice, a copy of rows that lie apart
        new = part.changed(own, x[rows], bias)
        if isinstance(rows, Tensor) or new.data_ptr() != own.data_ptr():  # else it was changed in place
            y[rows] = new.view(own.shape).to(y.dtype)


@dataclass(frozen=True)
class Stacked:
    """The factors of the adapters in a batch, and of each row the place of its own.

    A (adapters, R, I), B (adapters, R, O), places (rows,), gain (rows, 1, O) or None; R is that of the adapter with most.
    """

    A: Tensor
    B: Tensor
    places: Tensor
    gain: Tensor | None

    @classmethod
    def of(cls, parts: list[Thin | None], places: Tensor, like: Thin, rank: int) -> "Stacked":
        """Of each adapter's update; None leaves its rows as they are."""
        A, B = (torch.stack(factors) for factors in zip(*(_padded(part, like, rank) for part in parts), strict=True))
        gains = [None if part is None else part.gain for part in parts]
        kept = next((gain for gain in gains if gain is not None), None)
        if kept is None:
            return cls(A, B, places, None)
        return cls(A, B, places, torch.stack([torch.ones_like(kept) if gain is None else gain for gain in gains])[places, None])

    def changed(self, y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """The output y (rows, ..., O) of x (rows, ..., I) with each row's update in it; y may be overwritten."""
        device, gain = x.device.type, self.gain
        is_autocast = torch.is_autocast_enabled(device)
        rows, into = x.reshape(len(x), -1, x.shape[-1]), y.reshape(len(y), -1, y.shape[-1])
        if gain is not None and not is_autocast:  # rounded once, after the gain
            rows, into = rows.to(gain.dtype), into.to(gain.dtype)
        is_recorded = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
        if not is_recorded and into.is_contiguous() and native.usable(rows, into, wide=(self.A, self.B)):
            native.update_(into, native.dots(rows, self.A, None, self.places), self.B, self.places)
        else:
            dtype = torch.get_autocast_dtype(device) if is_autocast else self.A.dtype
            with torch.autocast(device, enabled=False):
                z = torch.bmm(rows.to(dtype), self.A.to(dtype)[self.places].mT)
                into = torch.baddbmm(into.to(dtype), z, self.B.to(dtype)[self.places])
        if gain is not None:
            into = into.to(gain.dtype)
            into = into * gain if bias is None else torch.addcmul((1 - gain) * bias.to(gain.dtype), into, gain)
        return into.reshape(y.shape).to(y.dtype)


def _padded(part: Thin | None, like: Thin, rank: int) -> tuple[Tensor, Tensor]:
    """A and B with so many slots, those that are missing zero."""
    factors = (like.A[:0], like.B[:0]) if part is None else (part.A, part.B)
    A, B = (t if t.shape[0] == rank else nn.functional.pad(t, (0, 0, 0, rank - len(t))) for t in factors)
    return A, B


def _with_rows(y: Tensor, rows: Index, new: Tensor) -> Tensor:
    """y with other values in these rows, in the wider of the two types: a head computes in full precision."""
    dtype = torch.promote_types(y.dtype, new.dtype)
    y = y if y.dtype == dtype else y.to(dtype)
    y[rows] = new.to(dtype)
    return y
