"""The low-rank site that every method shares.

    update(x) = s * ((x A^T) * e) B^T          x (K, N, I) -> (K, N, O)

Legend: K member, N rows or tokens, I in, O out, R rank slots.  A (K, R, I), B (K, O, R), e (K, R) the coefficients of
the slots (ones here, AdaLoRA's E there), slots (K, R) which slots exist for a member, scale (K,) = alpha/r.

R may change while training: `resize` says for each new slot which old one it is, and what an optimizer keeps for each
element follows (`Adapter.take_changes`).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from rankwise.variants import native
from rankwise.variants.adapter.draws import Draw, drop
from rankwise.variants.adapter.kinds.interface import trained_dtype
from rankwise.variants.adapter.linears import as_stored, dtype_of, kind_of, size_of, weight_of
from rankwise.variants.adapter.site import Site
from rankwise.variants.lowrank.products import LowRankProduct, NativeProduct
from rankwise.variants.lowrank.slots import NEW, Rearranged
from torch import Tensor, nn


class LowRank(Site):
    """A, B and their slots at one frozen weight: y = base(x) + s B A x."""

    has_rank = has_delta = True
    is_allocated: ClassVar[bool] = False  # an allocator chooses what is `kept`
    has_coefficients: ClassVar[bool] = False  # each slot has a trained coefficient E
    own_factors: ClassVar[bool] = True  # A and B are tensors of its own, and with the coefficients all of the change
    # Every tensor that has slots, and their axis; a subclass with more of them adds its own.
    slot_axes: ClassVar[dict[str, int | tuple[int, int]]] = {"A": 1, "B": 2, "slots": 1}
    slot_facts: ClassVar[tuple[str, ...]] = ()  # tensors (K, R) that a file keeps beside the factors

    def __init__(
        self,
        name: str,
        base: nn.Module,
        starts: tuple[list[Tensor], list[Tensor]],
        scale: list[float],
        dropout: float,
        draw: Draw,
    ):
        """
        Args:
            starts: for each member, where A (r, I) and B (O, r) start.
            scale: for each member, the factor on the update.
        """
        super().__init__()
        out_features, in_features = size_of(base)
        ranks = [len(a) for a in starts[0]]
        self.place(name, base, ranks, scale, dropout, draw)
        A = self.slots.new_zeros(len(ranks), max(ranks), in_features)
        B = self.slots.new_zeros(len(ranks), out_features, max(ranks))
        for k, r in enumerate(ranks):
            A[k, :r], B[k, :, :r] = starts[0][k], starts[1][k]
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def place(self, name: str, base: nn.Module, ranks: list[int], scale: list[float], dropout: float, draw: Draw) -> None:
        """All that a site has but its factors."""
        like = {"dtype": trained_dtype(dtype_of(base))}
        self.register_buffer("slots", (torch.arange(max(ranks)) < torch.tensor(ranks)[:, None]).to(**like))
        self.register_buffer("scale", torch.tensor(scale, **like))
        self.register_buffer("given", torch.tensor(ranks), persistent=False)  # (K,) slots at the start
        self.name, self.dropout, self.kind = name, dropout, kind_of(base)
        self.changes: list[tuple[nn.Parameter, Rearranged]] = []  # what an optimizer has yet to follow
        self.first_row = 0  # rows of each member that other processes have before those of the input
        self.draw = draw

    @property
    def low_rank(self) -> "LowRank":
        return self

    def coefficients(self) -> Float[Tensor, "K R"]:
        """What multiplies each slot: s e, zero where a slot does not exist."""
        return self.slots * self.scale[:, None]

    def matrices(self) -> tuple[Float[Tensor, "K R I"], Float[Tensor, "K O R"], Float[Tensor, "K R"]]:
        """A, B and c of the update B diag(c) A, in which form every site can be written."""
        return self.A, self.B, self.coefficients()

    def thin(self) -> tuple[Float[Tensor, "K R I"], Float[Tensor, "K O R"]]:
        """A and B diag(c): the update is the second times the first."""
        A, B, c = self.matrices()
        return A, B * c[:, None]

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same as the forward pass takes them, which is not that of the update where a step draws or listens."""
        return self.matrices()

    def version(self) -> tuple[Any, ...]:
        """Changes whenever the update may have changed; the step in it is None where nobody drives the adapter."""
        return self.draw.step, *(p._version for p in self.parameters())

    def add_update(self, y: Tensor, x: Tensor) -> Float[Tensor, "rows O"]:
        """Adds the update of x (rows, I) to y (rows, O), which may be overwritten.  Rows grouped by member."""
        if not self.slots.shape[1]:
            return y
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.A.dtype
        return self.product(y.to(dtype).contiguous(), x.to(dtype), self.dropout if self.training else 0.0)

    def product(self, y: Tensor, x: Tensor, rate: float) -> Float[Tensor, "rows O"]:
        """The same for y and x of one type, elements of x dropped at that rate."""
        return self.product_of(y, x, rate, self.operands())

    def product_of(self, y: Tensor, x: Tensor, rate: float, operands: tuple[Tensor, Tensor, Tensor]) -> Float[Tensor, "rows O"]:
        """The same with other factors and coefficients than the site's."""
        draw, dtype = self.draw, x.dtype
        if native.usable(x, y, wide=operands):
            dropping = draw.dropping(self.name, x, rate, self.first_row) if rate and draw.step is not None else None
            x = nn.functional.dropout(x, rate) if rate and dropping is None else x
            return NativeProduct.apply(y, x, *operands, dropping, draw.rows)
        x = drop(x, rate, draw, self.name, self.first_row)
        by_member = (draw.rows.fold(t) for t in (y, x))  # (K, N, O) and (K, N, I)
        return draw.rows.unfold(LowRankProduct.apply(*by_member, *(t.to(dtype) for t in operands)), y)

    def rows(self, x: Tensor) -> Float[Tensor, "rows I"]:
        """The input as rows, grouped by member; refused where it is not the rows of the model's input."""
        self.draw.rows.check(self.name, x)
        self.first_row = self.draw.rows.first(x)
        return self.draw.rows.grouped(x)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        return self.kind.adapted(self, base, x)

    def delta(self, base: nn.Module) -> Float[Tensor, "K O I"]:
        """The dense change of the weight."""
        A, B = self.thin()
        return torch.bmm(B, A)

    def direction(self, base: nn.Module, member: int) -> Float[Tensor, "O I"]:
        """W + dW of one member, in one product."""
        A, B = self.thin()
        return torch.addmm(weight_of(base).to(A.dtype), B[member], A[member])

    def merged(self, base: nn.Module, member: int) -> dict[str, Tensor]:
        return {"weight": as_stored(base, self.direction(base, member))}

    def physical(self) -> Tensor:
        """(K,) slots that exist, which parameters, gradients and averages are held for."""
        return self.slots.sum(1).long()

    def nominal(self) -> Tensor:
        return torch.maximum(self.given, self.physical())

    def rank(self) -> Tensor:
        return self.physical()

    @torch.no_grad()
    def resize(self, places: Int[Tensor, "K R"]) -> None:
        """Rearranges the slots, in place: the parameters stay the same objects.

        Args:
            places: for each slot the old one that it is, or NEW, or NONE; both are zero everywhere, and of no member until
                `slots` says so.
        """
        size = self.slots.shape[1]
        for name, axis in self.slot_axes.items():
            tensor, change = getattr(self, name), Rearranged(places, axis, size)
            new = change(tensor)
            if isinstance(tensor, nn.Parameter):
                gradient = None if tensor.grad is None else change(tensor.grad)
                tensor.grad = None
                # Of another type in between: autograd then forgets the old shape, which else lives as long as an old loss does.
                other = torch.float64 if new.dtype == torch.float32 else torch.float32
                tensor.data = torch.empty(0, dtype=other, device=new.device)
                tensor.data = new
                tensor.grad = gradient
                torch.autograd.graph.increment_version(tensor)  # what was computed from the old values is out of date
                self.changes.append((tensor, change))
            else:
                tensor.data = new

    def forget(self, mask: Bool[Tensor, "K R"], tensors: Sequence[str] | None = None) -> None:
        """Optimizers start anew for these slots, of all the site's parameters or of those named; the values stay."""
        places = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape).masked_fill(mask, NEW)
        for name, axis in self.slot_axes.items():
            if isinstance(getattr(self, name), nn.Parameter) and (tensors is None or name in tensors):
                self.changes.append((getattr(self, name), Rearranged(places, axis, mask.shape[1])))

    def as_triplets(self, member: int) -> tuple[Float[Tensor, "r I"], Float[Tensor, "O r"], Float[Tensor, " r"]]:
        """A, B and E of one member's slots, its update being s B diag(E) A, where a site has coefficients."""
        slots = self.slots[member].bool()
        return self.A[member][slots], self.B[member][:, slots], self.E[member][slots]

    @torch.no_grad()
    def put(self, member: int, places: Tensor, U: Tensor, value: Tensor, Vt: Tensor) -> None:
        """One member's update becomes s U diag(value) V^T, in the slots `places`.

        Without a coefficient the square root of the value goes into each factor; with one the factors are U and V.
        """
        if self.has_coefficients:
            self.put_coefficients(member, places, value)
        else:
            U, Vt = U * value.sqrt(), Vt * value.sqrt()[:, None]
        self.A[member], self.B[member] = 0, 0
        self.A[member, places], self.B[member, :, places] = Vt.to(self.A), U.to(self.B)

    @torch.no_grad()
    def put_coefficients(self, member: int, places: Tensor, values: Tensor) -> None:
        """E of one member becomes `values` in the slots `places` and zero in all others."""
        self.E[member] = 0
        self.E[member, places] = values.to(self.E)

    def count(self, ranks: Tensor) -> Tensor:
        """(K,) parameters of so many slots."""
        return ranks * (self.A.shape[2] + self.B.shape[1])

    @torch.no_grad()
    def clear_missing_slots(self) -> None:
        """Zeros where no slot exists, which is what a start and a step leave there."""
        self.A *= self.slots[:, :, None]
        self.B *= self.slots[:, None]


def first_slots(site: LowRank, size: int) -> Int[Tensor, "K R"] | None:
    """Places that leave the first `size` slots, with new ones behind them where there are fewer; None if it has so many."""
    old = site.slots.shape[1]
    places = torch.arange(size, device=site.slots.device)
    return None if size == old else places.masked_fill(places >= old, NEW).expand(len(site.slots), -1)
