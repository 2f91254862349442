"""The low-rank site that every method shares.

    update(x) = s * ((x A^T) * e) B^T          x (K, N, I) -> (K, N, O)

Legend: K member, N rows or tokens, I in, O out, R rank slots.  A (K, R, I), B (K, O, R), e (K, R) the coefficients of
the slots (ones here, AdaLoRA's E there), slots (K, R) which slots exist for a member, scale (K,) = alpha/r.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from variants import native
from variants.base import Adapter, Group, Step, trained_dtype, weight_of
from variants.dropout import Draw, Dropping, drop
from variants.settings import nearest, per_member
from variants.targets import is_conv1d, matches


class LowRank(nn.Module):
    """A, B and their slots at one linear: y = base(x) + s B A x."""

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
        weight = weight_of(base)
        out_features, in_features = weight.shape
        ranks = [len(a) for a in starts[0]]
        like = {"dtype": trained_dtype(weight)}
        A = torch.zeros(len(ranks), max(ranks), in_features, **like)
        B = torch.zeros(len(ranks), out_features, max(ranks), **like)
        for k, r in enumerate(ranks):
            A[k, :r], B[k, :, :r] = starts[0][k], starts[1][k]
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.register_buffer("slots", (torch.arange(max(ranks)) < torch.tensor(ranks)[:, None]).to(**like))
        self.register_buffer("scale", torch.tensor(scale, **like))
        self.name, self.dropout = name, dropout
        self._draw = draw

    def coefficients(self) -> Float[Tensor, "K R"]:
        """What multiplies each slot: s e, zero where a slot does not exist."""
        return self.slots * self.scale[:, None]

    def onto(self, y: Tensor, x: Tensor) -> Float[Tensor, "rows O"]:
        """y + update(x), for y (rows, O) that nothing else needs and x (rows, I): the members' rows one after the other."""
        if not self.A.shape[1]:  # no member has a slot here
            return y
        draw, rate = self._draw, self.dropout if self.training else 0.0
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.A.dtype
        x, y = x.to(dtype), y.to(dtype).contiguous()
        if native.usable(x, y) and self.A.dtype == torch.float32:
            dropping = draw.dropping(self.name, x, rate) if rate and draw.step is not None else None
            x = nn.functional.dropout(x, rate) if rate and dropping is None else x
            return NativeProduct.apply(y, x, self.A, self.B, self.coefficients(), dropping)
        x = drop(x, rate, draw, self.name)
        apart = (t.view(len(draw.seeds), -1, t.shape[-1]) for t in (y, x))  # (K, N, O) and (K, N, I)
        return LowRankProduct.apply(*apart, *(t.to(dtype) for t in (self.A, self.B, self.coefficients()))).view(y.shape)

    def rows(self, x: Tensor) -> Float[Tensor, "rows I"]:
        """The input as rows, the members' one after the other; refused where it is not that."""
        return self._draw.apart(self.name, x).flatten(0, 1)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        rows = self.rows(x)
        y = base_output(base, rows)
        return self.onto(y, rows).to(y.dtype).view(*x.shape[:-1], -1)

    def delta(self, base: nn.Module) -> Float[Tensor, "K O I"]:
        """The dense change of the weight."""
        return torch.bmm(self.B * self.coefficients()[:, None], self.A)

    def direction(self, base: nn.Module, member: int) -> Float[Tensor, "O I"]:
        """W + dW of one member, in one product."""
        A, B = self.A[member], self.B[member] * self.coefficients()[member]
        return torch.addmm(weight_of(base).to(A.dtype), B, A)

    def merged(self, base: nn.Module, member: int) -> dict[str, Tensor]:
        return {"weight": as_stored(base, self.direction(base, member))}

    def nominal(self) -> Tensor:
        return self.slots.sum(1).long()

    rank = nominal

    def count(self, ranks: Tensor) -> Tensor:
        """(K,) parameters of so many slots."""
        return ranks * (self.A.shape[2] + self.B.shape[1])

    @torch.no_grad()
    def clear_missing_slots(self) -> None:
        """Zeros where no slot exists, which is what a start and a step leave there."""
        self.A *= self.slots[:, :, None]
        self.B *= self.slots[:, None]


def base_output(base: nn.Module, rows: Tensor) -> Tensor:
    """The frozen module's output, to be changed in place: a copy where a hook of somebody's may have kept it."""
    y = base(rows)
    return y.clone() if base._forward_hooks else y


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
    def forward(ctx, y: Tensor, x: Tensor, A: Tensor, B: Tensor, c: Tensor, dropping: Dropping | None) -> Tensor:
        K = len(A)
        Bt = B.mT.contiguous()  # (K, R, O)
        z = native.dots(x.view(K, -1, x.shape[1]), A, dropping)  # (K, N, R)
        scaled = z * c[:, None]
        native.update_(y.view(K, -1, y.shape[1]), scaled, Bt)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, A, Bt, c, z, scaled)
        ctx.dropping = dropping
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, A, Bt, c, z, scaled = ctx.saved_tensors
        needs_y, needs_x, needs_A, needs_B, needs_c, _ = ctx.needs_input_grad
        rows = g.contiguous().view(len(A), -1, g.shape[1])  # (K, N, O)
        dB = native.outer(rows, scaled, None, None)[0].mT if needs_B else None  # (K, O, R)
        dz = native.dots(rows, Bt, None)  # (K, N, R), before c
        dc = (dz * z).sum(1) if needs_c else None
        dx = dA = None
        if needs_A or needs_x:
            dA, dx = native.outer(x.view(len(A), -1, x.shape[1]), dz * c[:, None], A if needs_x else None, ctx.dropping)
        return g if needs_y else None, None if dx is None else dx.view(x.shape), dA, dB, dc, None


def squared_row_norms(
    weight: Float[Tensor, "O I"],
    weight_squared: Float[Tensor, " O"],
    A: Float[Tensor, "K R I"],
    B: Float[Tensor, "K O R"],
) -> Float[Tensor, "K O"]:
    """|W + B A|^2 of each row, from thin products: no (O, I) temporary is made.

        |W|^2 + 2 rowsum((W A^T) * B) + rowsum((B (A A^T)) * B)

    `weight_squared` is the squared row norm of `weight`, which never changes.  Zelenin & Zhuravlyova 2026, sec. 3.
    """
    # One product for all members; a 16-bit weight is widened a block of rows at a time, never as a whole.
    blocks = (weight,) if weight.dtype == A.dtype else weight.split(1024)
    products = torch.cat([A.flatten(0, 1) @ block.to(A.dtype).mT for block in blocks], 1)  # (K*R, O)
    cross = (products.view(*A.shape[:2], -1).mT * B).sum(2)  # (K, O)
    square = (torch.bmm(B, torch.bmm(A, A.mT)) * B).sum(2)
    return (weight_squared + 2 * cross + square).clamp_min(0)


def as_stored(base: nn.Module, weight: Tensor) -> Tensor:
    """A weight (O, I) the way the module stores it."""
    return weight.mT if is_conv1d(base) else weight


class LowRankAdapter(Adapter):
    """What the low-rank methods share: ranks and scales of each site by pattern, and LoRA+'s faster B."""

    def choose(self, model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
        names = super().choose(model, targets, head)
        self.check_patterns(("rank_pattern", "alpha_pattern"), names)
        return names

    def check_patterns(self, settings: Sequence[str], names: Sequence[str]) -> None:
        """
        Raises:
            ValueError: a pattern in one of these settings that matches no target.
        """
        for setting in settings:
            for pattern in getattr(self.settings, setting):
                if not any(matches(pattern, name) for name in names):
                    raise ValueError(
                        f'{setting} = {{"{pattern}": ...}} matches none of the {len(names)} targets'
                        f"{nearest(pattern, [*(n.rpartition('.')[2] for n in names), *names])}"
                    )

    def make_low_rank(self, name: str, module: nn.Module) -> LowRank:
        """The method's own site, without magnitudes."""
        raise NotImplementedError

    @property
    def has_magnitude(self) -> bool:
        """Whether each site is decomposed into magnitude and direction."""
        return self.settings.magnitude

    def make_site(self, name: str, module: nn.Module) -> nn.Module:
        site = self.make_low_rank(name, module)
        if not self.has_magnitude:
            return site
        from variants.dora import Decomposed  # it wraps what stands here

        return Decomposed(site, module)

    def after_step(self, step: Step) -> None:
        if self.has_magnitude:  # parameters are new; version counters do not always tell, fused optimizers do not raise them
            for _, site in self.named_sites():
                site._norm = None

    def site_ranks(self, name: str, default: list[int] | int) -> list[int]:
        """Rank of the site for each member: that of the first pattern that matches, else the default."""
        patterned = next((r for p, r in self.settings.rank_pattern.items() if matches(p, name)), default)
        return per_member(patterned, self.members, "rank")

    def site_scales(self, name: str, ranks: list[int]) -> list[float]:
        """alpha/r or alpha/sqrt(r) of the site for each member."""
        settings = self.settings
        patterned = next((a for p, a in settings.alpha_pattern.items() if matches(p, name)), settings.alpha)
        power = 1.0 if settings.scaling == "alpha/r" else 0.5
        return [a / r**power for a, r in zip(per_member(patterned, self.members, "alpha"), ranks, strict=True)]

    def parameter_groups(self) -> list[Group]:
        """A, E and the head's weights; B with its own rate; biases, norms and magnitudes, which do not decay."""
        norms = self.norm_parameters()
        named = [(n.rpartition(".")[2], p) for n, p in self.named_parameters() if p.requires_grad]
        plain = [p for n, p in named if n in ("bias", "magnitude") or id(p) in norms]
        fast = [p for n, p in named if n == "B"]
        rest = [p for n, p in named if n not in ("bias", "magnitude", "B") and id(p) not in norms]
        groups = [Group(rest), Group(fast, lr_scale=self.settings.lr_ratio), Group(plain, weight_decay=0.0)]
        return [group for group in groups if group.params]
