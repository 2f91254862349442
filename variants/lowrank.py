"""The low-rank site that every method shares.

    update(x) = s * ((x A^T) * e) B^T          x (K, N, I) -> (K, N, O)

Legend: K member, N rows or tokens, I in, O out, R rank slots.  A (K, R, I), B (K, O, R), e (K, R) the coefficients of
the slots (ones here, AdaLoRA's E there), slots (K, R) which slots exist for a member, scale (K,) = alpha/r.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from variants.base import Adapter, Group, trained_dtype, weight_of
from variants.dropout import Draw, drop
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

    def onto(self, y: Tensor | None, x: Tensor) -> Float[Tensor, "K N O"]:
        """y + update(x), or the update alone; y (..., O) and x (..., I) hold the members' rows one after the other."""
        x = self._draw.apart(self.name, x)  # (K, N, I)
        if self.training:
            x = drop(x, self.dropout, self._draw, self.name)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.A.dtype
        y = None if y is None else self._draw.apart(self.name, y).to(dtype)
        return LowRankProduct.apply(y, *(t.to(dtype) for t in (x, self.A, self.B, self.coefficients())))

    def update(self, x: Tensor) -> Float[Tensor, "K N O"]:
        """The change of the output, without the base's own part."""
        return self.onto(None, x)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        y = base(x)
        return self.onto(y, x).reshape(y.shape).to(y.dtype)

    def delta(self, base: nn.Module) -> Float[Tensor, "K O I"]:
        """The dense change of the weight."""
        return torch.bmm(self.B * self.coefficients()[:, None], self.A)

    def merged(self, base: nn.Module, member: int) -> dict[str, Tensor]:
        return {"weight": as_stored(base, weight_of(base) + self.delta(base)[member])}

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


class LowRankProduct(torch.autograd.Function):
    """y + ((x A^T) * c) B^T, with the products of the backward pass in the order in which thin matrices are fast.

    Shapes: y (K, N, O) or None, x (K, N, I), A (K, R, I), B (K, O, R), c (K, R), all of one type.  Autograd's own order
    for dB is g^T (x A^T c), a product with R columns; (x A^T c)^T g, with R rows, is the same and several times faster.
    """

    @staticmethod
    def forward(ctx, y: Tensor | None, x: Tensor, A: Tensor, B: Tensor, c: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            z = torch.bmm(x, A.mT)  # (K, N, R)
            ctx.save_for_backward(x, A, B, c, z)
            scaled = z * c[:, None]
            return torch.bmm(scaled, B.mT) if y is None else torch.baddbmm(y, scaled, B.mT)

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
        for setting in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self.settings, setting):
                if not any(matches(pattern, name) for name in names):
                    raise ValueError(
                        f'{setting} = {{"{pattern}": ...}} matches none of the {len(names)} targets'
                        f"{nearest(pattern, [*(n.rpartition('.')[2] for n in names), *names])}"
                    )
        return names

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
