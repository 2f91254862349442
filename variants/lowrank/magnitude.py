"""A magnitude for each output row around any low-rank site, as DoRA has it (variants/dora.py)."""

import torch
from rankwise.variants import native
from rankwise.variants.adapter.kinds.interface import base_output
from rankwise.variants.adapter.linears import as_stored, kind_of, weight_of
from rankwise.variants.adapter.site import Site
from rankwise.variants.lowrank.products import squared_row_norms
from rankwise.variants.lowrank.site import LowRank
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Decomposed(Site):
    """A magnitude for each output row around any low-rank site."""

    has_rank = has_delta = has_magnitude = True

    def __init__(self, inner: LowRank, base: nn.Module):
        super().__init__()
        self.inner = inner
        self.register_buffer("weight_squared", kind_of(base).squared_row_norms(base), persistent=False)  # (O,): W is frozen
        norm = self.weight_squared.sqrt()
        self.magnitude = nn.Parameter(norm.expand(inner.A.shape[0], -1).clone())  # (K, O)
        self._norm: tuple[object, Tensor] | None = None

    @torch.no_grad()
    def norm(self, base: nn.Module) -> Tensor:
        """(K, O): |W + dW| of each row, computed once a step where a trainer says which step it is."""
        inner = self.inner
        state = inner.version()
        if state[0] is None or self._norm is None or self._norm[0] != state:
            with torch.autocast(base.weight.device.type, enabled=False):
                square = squared_row_norms(kind_of(base).row_blocks(base), self.weight_squared, *inner.thin())
            self._norm = state, square.sqrt()
        return self._norm[1]

    def gain(self, base: nn.Module) -> Tensor:
        """(K, O): m / |W + dW|, and 1 where a row is zero and has no direction."""
        norm = self.norm(base)
        return torch.where(norm > 0, self.magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny), 1.0)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        if not self.inner.kind.is_linear:
            return self._rescaled(base, self.inner(base, x))
        rows = self.inner.rows(x)
        y = base_output(base, rows)
        dtype = y.dtype
        gain, owners = self.gain(base), self.inner.draw.rows
        y = self.inner.add_update(y, rows)
        scaled = Recomposed.apply(owners.fold(y), gain, base.bias, True)  # (K, N, O)
        return owners.as_input(owners.unfold(scaled, y).to(dtype), x)

    def _rescaled(self, base: nn.Module, y: Tensor) -> Tensor:
        """The output (K*N, ...) of a weight of another kind, whose O may lie along another axis, with the gain on it."""
        axis, owners = self.inner.kind.out_axis(base), self.inner.draw.rows
        values = y.movedim(axis, -1)  # (K*N, ..., O)
        scaled = Recomposed.apply(owners.by_member(values), self.gain(base), getattr(base, "bias", None), True)
        return owners.as_input(scaled, values).movedim(-1, axis).to(y.dtype)

    def delta(self, base: nn.Module) -> Tensor:
        return self.gain(base)[:, :, None] * (weight_of(base) + self.inner.delta(base)) - weight_of(base)

    def merged(self, base: nn.Module, member: int) -> dict[str, Tensor]:
        weight = self.inner.direction(base, member).mul_(self.gain(base)[member, :, None])
        return {"weight": as_stored(base, weight)}

    def parameters_changed(self) -> None:
        """Version counters do not always tell: fused optimizers do not raise them."""
        self._norm = None

    @property
    def low_rank(self) -> LowRank:
        return self.inner

    @property
    def scale(self) -> Tensor:
        return self.inner.scale

    def rank(self) -> Tensor:
        return self.inner.rank()

    def live(self) -> Tensor:
        return self.inner.live()

    def nominal(self) -> Tensor:
        return self.inner.nominal()

    def physical(self) -> Tensor:
        return self.inner.physical()

    def count(self, ranks: Tensor) -> Tensor:
        """(K,) parameters of so many slots, magnitudes counted."""
        return self.inner.count(ranks) + self.magnitude.shape[1]

    def clear_missing_slots(self) -> None:
        self.inner.clear_missing_slots()


class Recomposed(torch.autograd.Function):
    """gain * (t - b) + b for t (K, N, O), gain (K, O) and the frozen bias b (O,) or None, in one pass over t.

    t holds the bias already, which the gain must not scale.  The result has the gain's precision, or, if `narrow`, may be
    rounded to that of t.
    """

    @staticmethod
    def forward(ctx, t: Tensor, gain: Tensor, bias: Tensor | None, narrow: bool = False) -> Tensor:
        # The gain stays in its own precision: it lies near 1, where bf16 knows steps of 1/128.
        bias = None if bias is None else bias.to(gain.dtype)
        ctx.save_for_backward(t, gain, bias)
        if native.usable(t, wide=(gain, bias)) and (narrow or t.dtype == gain.dtype):
            return native.scale_rows(t, gain, bias)
        factor = gain[:, None]  # (K, 1, O)
        wide = t.to(gain.dtype)
        return wide * factor if bias is None else torch.addcmul((1 - factor) * bias, wide, factor)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        t, gain, bias = ctx.saved_tensors
        if native.usable(t, g, wide=(gain, bias)):
            dt, dgain = native.scale_rows_backward(g, t, gain, bias)
            return dt, dgain if ctx.needs_input_grad[1] else None, None, None
        dgain = None
        if ctx.needs_input_grad[1]:
            dgain = (t.to(g.dtype) * g).sum(1)
            if bias is not None:
                dgain -= g.sum(1) * bias
        return (g * gain[:, None]).to(t.dtype), dgain, None, None
