"""The products of a low-rank update, forward and backward."""

from collections.abc import Iterable

import torch
from einops import rearrange
from jaxtyping import Float
from rankwise.variants import native
from rankwise.variants.adapter.draws import Dropping
from rankwise.variants.adapter.rows import Rows
from torch import Tensor
from torch.autograd.function import once_differentiable


class LowRankProduct(torch.autograd.Function):
    """y + ((x A^T) * c) B^T, with the products of the backward pass in the order in which thin matrices are fast.

    Shapes: y (K, N, O), x (K, N, I), A (K, R, I), B (K, O, R), c (K, R), all of one type.  Autograd's own order
    for dB is g^T (x A^T c), a product with R columns; (x A^T c)^T g, with R rows, is the same and several times faster.
    """

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            z = torch.bmm(x, A.mT)  # (K, N, R)
            ctx.save_for_backward(x, A, B, c, z)
            return torch.baddbmm(y, z * c[:, None], B.mT)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, c, z = ctx.saved_tensors
        needs_y, needs_x, needs_A, needs_B, needs_c = ctx.needs_input_grad
        dx = dA = dB = dc = None
        if needs_B:
            dB = torch.bmm((z * c[:, None]).mT, g).mT  # (K, O, R)
        dz = torch.bmm(g, B.mT.contiguous().mT)  # (K, N, R), before c
        if needs_c:
            dc = (dz * z).sum(1)
        dz = dz * c[:, None]
        if needs_A:
            dA = torch.bmm(dz.mT, x)  # (K, R, I)
        if needs_x:
            dx = torch.bmm(dz, A)  # (K, N, I)
        return g if needs_y else None, dx, dA, dB, dc


class NativeProduct(torch.autograd.Function):
    """y + ((drop(x) A^T) * c) B^T by the compiled passes: dropout is drawn inside them, and y is changed in place.

    Shapes: y (K*N, O) and x (K*N, I) of one type; A (K, R, I), B (K, O, R), c (K, R) in fp32, in which all sums are made.
    """

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, A: Tensor, B: Tensor, c: Tensor, dropping: Dropping | None, rows: Rows) -> Tensor:
        Bt = B.mT.contiguous()  # (K, R, O)
        z = native.dots(rows.fold(x), A, dropping)  # (K, N, R)
        scaled = z * c[:, None]
        native.update_(rows.fold(y), scaled, Bt)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, A, Bt, c, z, scaled)
        ctx.dropping, ctx.rows = dropping, rows
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, A, Bt, c, z, scaled = ctx.saved_tensors
        needs_y, needs_x, needs_A, needs_B, needs_c, *_ = ctx.needs_input_grad
        g_rows = ctx.rows.fold(g.contiguous())  # (K, N, O)
        dB = native.outer(g_rows, scaled, None, None)[0].mT if needs_B else None  # (K, O, R)
        dz = native.dots(g_rows, Bt, None)  # (K, N, R), before c
        dc = (dz * z).sum(1) if needs_c else None
        dx = dA = None
        if needs_A or needs_x:
            dA, dx = native.outer(ctx.rows.fold(x), dz * c[:, None], A if needs_x else None, ctx.dropping)
        return g if needs_y else None, None if dx is None else dx.view(x.shape), dA, dB, dc, None, None


def squared_row_norms(
    weight: Float[Tensor, "O I"] | Iterable[Tensor],
    weight_squared: Float[Tensor, " O"],
    A: Float[Tensor, "K R I"],
    B: Float[Tensor, "K O R"],
) -> Float[Tensor, "K O"]:
    """|W + B A|^2 of each row, from thin products: no (O, I) temporary is made.

        |W|^2 + 2 rowsum((W A^T) * B) + rowsum((B (A A^T)) * B)

    `weight_squared` is the squared row norm of `weight`, which never changes.  Zelenin & Zhuravlyova 2026, sec. 3.

    weight: or its blocks of rows, each of which is widened to the type of A in its turn, so that no whole W is.
    """
    if not A.shape[1]:
        return weight_squared.expand(len(A), -1)
    thin = rearrange(A, "k r i -> (k r) i")
    blocks = (weight,) if isinstance(weight, Tensor) else weight  # one product of each for all members
    products = torch.cat([thin @ block.to(A.dtype).mT for block in blocks], 1)  # (K*R, O)
    cross = (rearrange(products, "(k r) o -> k o r", k=len(A)) * B).sum(2)  # (K, O)
    square = (torch.bmm(B, torch.bmm(A, A.mT)) * B).sum(2)
    return (weight_squared + 2 * cross + square).clamp_min(0)
