"""The adapters at one module, and what each of them does to its own rows.

At a linear module one product with the frozen weight serves every row.  Then each adapter's rows get its update, a product of
two thin matrices, so that a batch of mixed rows costs what a batch of one adapter costs, whatever the counts: no row is padded.
Rows of several tokens that lie apart are multiplied row by row, each with a copy of its adapter's factors, which are smaller
than the rows; others adapter by adapter.

    y = base(x);   y_n += (x_n A^T) (c B)^T;   y_n = g (y_n - b) + b where the adapter has magnitudes (variants/dora.py)

At any other module (a task head, an embedding, a convolution) an adapter's own forward pass computes its rows.
"""

from typing import Protocol

import torch
from rankwise.variants import native
from rankwise.variants.adapter.linears import base_output, is_linear
from rankwise.variants.adapter.site import Site
from rankwise.variants.bank.owners import Index, Owners
from torch import Tensor, nn


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
        A, B, c = (t[0].detach() for t in site.low_rank.operands())
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
        self._places = {adapter: place for place, adapter in enumerate(parts)}

    def part(self, adapter: str | None) -> Thin | Own | None:
        place = self._places.get(adapter)
        return None if place is None else self.parts[place]

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        is_single, owner = self.owners.single()
        if is_single:
            part = self.part(owner)
            return base(x) if part is None else part.alone(base, x)
        groups = self.owners.groups(self.name, x)
        y = base_output(base, x)
        by_row = self._by_row(groups, x)
        if by_row is not None:
            y = _changed_by_row(by_row, y, x, base.bias)
        for adapter, rows in groups.items():
            part = self.part(adapter)
            if isinstance(part, Thin):
                if by_row is None:
                    self._thin(part, y, x, rows, base.bias)
            elif part is not None:
                y = _with_rows(y, rows, part.alone(base, x[rows]))
        return y

    def _by_row(self, groups: dict[str, Index], x: Tensor) -> list[Thin | None] | None:
        """Of each row its update, where row by row is the faster way: gathering factors moves less than gathering rows."""
        if all(isinstance(rows, slice) for rows in groups.values()):
            return None
        parts = [part if isinstance(part, Thin) else None for part in map(self.part, self.owners.of_rows(len(x)))]
        ranks = [len(part.A) for part in parts if part is not None]
        if not ranks or not 0 < max(ranks) <= min(x[0].numel() // x.shape[-1], 2 * sum(ranks) / len(parts)):
            return None
        return parts

    @staticmethod
    def _thin(part: Thin, y: Tensor, x: Tensor, rows: Index, bias: Tensor | None) -> None:
        own = y[rows]  # a view of a slice, a copy of rows that lie apart
        new = part.changed(own, x[rows], bias)
        if isinstance(rows, Tensor) or new.data_ptr() != own.data_ptr():  # else it was changed in place
            y[rows] = new.view(own.shape).to(y.dtype)


def _changed_by_row(parts: list[Thin | None], y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """The output y (rows, ..., O) of x (rows, ..., I) with each row's update in it; y may be overwritten."""
    device, one = x.device.type, next(part for part in parts if part is not None)
    rank = max(len(part.A) for part in parts if part is not None)
    A, B = (torch.stack(factors) for factors in zip(*(_padded(part, one, rank) for part in parts), strict=True))
    rows, into = x.reshape(len(x), -1, x.shape[-1]), y.reshape(len(y), -1, y.shape[-1])
    gains = [None if part is None else part.gain for part in parts]
    kept = next((gain for gain in gains if gain is not None), None)
    if kept is not None and not torch.is_autocast_enabled(device):  # rounded once, after the gain
        rows, into = rows.to(kept.dtype), into.to(kept.dtype)
    recorded = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    if not recorded and into.is_contiguous() and native.usable(rows, into, wide=(A, B)):
        native.update_(into, native.dots(rows, A, None), B)
    else:
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else A.dtype
        with torch.autocast(device, enabled=False):
            into = torch.baddbmm(into.to(dtype), torch.bmm(rows.to(dtype), A.to(dtype).mT), B.to(dtype))
    if kept is not None:
        gain = torch.stack([torch.ones_like(kept) if gain is None else gain for gain in gains])[:, None]  # (rows, 1, O)
        into = into.to(gain.dtype)
        into = into * gain if bias is None else torch.addcmul((1 - gain) * bias.to(gain.dtype), into, gain)
    return into.reshape(y.shape).to(y.dtype)


def _padded(part: Thin | None, like: Thin, rank: int) -> tuple[Tensor, Tensor]:
    """A and B with so many slots, those that are missing zero."""
    factors = (like.A[:0], like.B[:0]) if part is None else (part.A, part.B)
    return tuple(t if len(t) == rank else nn.functional.pad(t, (0, 0, 0, rank - len(t))) for t in factors)


def _with_rows(y: Tensor, rows: Index, new: Tensor) -> Tensor:
    """y with other values in these rows, in the wider of the two types: a head computes in full precision."""
    dtype = torch.promote_types(y.dtype, new.dtype)
    y = y if y.dtype == dtype else y.to(dtype)
    y[rows] = new.to(dtype)
    return y
