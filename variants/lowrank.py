"""The low-rank site that every method shares.

    update(x) = s * ((x A^T) * e) B^T          x (K, N, I) -> (K, N, O)

Legend: K member, N rows or tokens, I in, O out, R rank slots.  A (K, R, I), B (K, O, R), e (K, R) the coefficients of
the slots (ones here, AdaLoRA's E there), slots (K, R) which slots exist for a member, scale (K,) = alpha/r.

R may change while training: `resize` says for each new slot which old one it is, and what an optimizer keeps for each
element follows (`Adapter.take_changes`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from rankwise.variants import native
from rankwise.variants.base import Adapter, Group, Step, trained_dtype, weight_of
from rankwise.variants.dropout import Draw, Dropping, drop
from rankwise.variants.settings import nearest, per_member
from rankwise.variants.targets import is_conv1d, matches
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NEW, NONE = -1, -2


@dataclass(frozen=True)
class Rearranged:
    """What became of a tensor's slots: along `axis`, slot j of member k is now its old slot places[k, j].

    places: NEW for a slot that is new, zero, and starts its averages; NONE for one that only other members have, zero too.
    """

    places: Int[Tensor, "K R"]
    axis: int
    size: int  # of the axis before

    def __call__(self, tensor: Tensor) -> Tensor:
        """The same for any tensor whose slots lie along that axis, such as an optimizer's average of the parameter."""
        if tensor.shape[self.axis] != self.size:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has not the {self.size} slots along axis {self.axis}")
        places = self._along(self.places, tensor.dim())
        whole = [-1 if axis in (0, self.axis) else n for axis, n in enumerate(tensor.shape)]
        if not self.size:  # nothing to gather from
            shape = [places.shape[axis] if n == -1 else n for axis, n in enumerate(whole)]
            return tensor.new_zeros(shape)
        taken = tensor.gather(self.axis, places.clamp_min(0).expand(whole).to(tensor.device))
        return taken.masked_fill_((places < 0).to(tensor.device), 0)

    def new(self, dim: int) -> Bool[Tensor, "..."]:
        """Which slots are new, as a mask on a tensor of so many axes."""
        return self._along(self.places == NEW, dim)

    def _along(self, values: Tensor, dim: int) -> Tensor:
        return values.view(len(values), *(-1 if axis == self.axis else 1 for axis in range(1, dim)))


class LowRank(nn.Module):
    """A, B and their slots at one linear: y = base(x) + s B A x."""

    # Every tensor that has slots, and their axis; a subclass with more of them adds its own.
    slot_axes: ClassVar[dict[str, int]] = {"A": 1, "B": 2, "slots": 1}

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
        self.register_buffer("given", torch.tensor(ranks), persistent=False)  # (K,) slots at the start
        self.name, self.dropout = name, dropout
        self.changes: list[tuple[nn.Parameter, Rearranged]] = []  # what an optimizer has yet to follow
        self._draw = draw

    def coefficients(self) -> Float[Tensor, "K R"]:
        """What multiplies each slot: s e, zero where a slot does not exist."""
        return self.slots * self.scale[:, None]

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and the coefficients as the forward pass takes them."""
        return self.A, self.B, self.coefficients()

    def version(self) -> tuple[Any, ...]:
        """Changes whenever the update may have changed; the step in it is None where nobody drives the adapter."""
        return self._draw.step, *(p._version for p in self.parameters())

    def onto(self, y: Tensor, x: Tensor) -> Float[Tensor, "rows O"]:
        """y + update(x), for y (rows, O) that nothing else needs and x (rows, I): the members' rows one after the other."""
        if not self.slots.shape[1]:
            return y
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.A.dtype
        return self.product(y.to(dtype).contiguous(), x.to(dtype), self.dropout if self.training else 0.0)

    def product(self, y: Tensor, x: Tensor, rate: float) -> Float[Tensor, "rows O"]:
        """The same for y and x of one type, elements of x dropped at that rate."""
        draw, dtype = self._draw, x.dtype
        if native.usable(x, y) and self.A.dtype == torch.float32:
            dropping = draw.dropping(self.name, x, rate) if rate and draw.step is not None else None
            x = nn.functional.dropout(x, rate) if rate and dropping is None else x
            return NativeProduct.apply(y, x, *self.operands(), dropping)
        x = drop(x, rate, draw, self.name)
        apart = (t.view(len(draw.seeds), -1, t.shape[-1]) for t in (y, x))  # (K, N, O) and (K, N, I)
        return LowRankProduct.apply(*apart, *(t.to(dtype) for t in self.operands())).view(y.shape)

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

    def physical(self) -> Tensor:
        """(K,) slots that exist, which parameters, gradients and averages are held for."""
        return self.slots.sum(1).long()

    def nominal(self) -> Tensor:
        """(K,) slots given at the start, or those of now where there are more."""
        return torch.maximum(self.given, self.physical())

    rank = physical

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


def first_slots(site: LowRank, size: int) -> Int[Tensor, "K R"] | None:
    """Places that leave the first `size` slots, with new ones behind them where there are fewer; None if it has so many."""
    old = site.slots.shape[1]
    places = torch.arange(size, device=site.slots.device)
    return None if size == old else places.masked_fill(places >= old, NEW).expand(len(site.slots), -1)


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
    if not A.shape[1]:
        return weight_squared.expand(len(A), -1)
    # One product for all members; a 16-bit weight is widened a block of rows at a time, never as a whole.
    blocks = (weight,) if weight.dtype == A.dtype else weight.split(1024)
    products = torch.cat([A.flatten(0, 1) @ block.to(A.dtype).mT for block in blocks], 1)  # (K*R, O)
    cross = (products.view(*A.shape[:2], len(weight)).mT * B).sum(2)  # (K, O)
    square = (torch.bmm(B, torch.bmm(A, A.mT)) * B).sum(2)
    return (weight_squared + 2 * cross + square).clamp_min(0)


def as_stored(base: nn.Module, weight: Tensor) -> Tensor:
    """A weight (O, I) the way the module stores it."""
    return weight.mT if is_conv1d(base) else weight


def follow(optimizer: torch.optim.Optimizer, adapter: Adapter) -> None:
    """Has an optimizer of torch's follow what the adapter did to its parameters; call it after `adapter.after_step`.

    Averages of slots that are new are zero; torch counts steps for whole tensors, so bias correction goes on as it was.

    Raises:
        ValueError: an optimizer that keeps something of another shape than the parameter.
    """
    for parameter, change in adapter.take_changes():
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            shape = list(parameter.shape)
            shape[change.axis] = change.size
            if list(value.shape) != shape:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {name} of shape {tuple(value.shape)} for a parameter of another shape, "
                    f"which cannot follow a change of rank: use one that keeps an average for each element, such as AdamW"
                )
            state[name] = change(value)


class LowRankAdapter(Adapter):
    """What the low-rank methods share: ranks and scales of each site by pattern, LoRA+'s faster B, and sizes that change."""

    peft_type: ClassVar[str] = "LORA"  # the form of PEFT's that it is saved in

    def low_rank_sites(self) -> list[LowRank]:
        """The low-rank sites in order, those inside a magnitude too."""
        return [getattr(site, "inner", site) for _, site in self.named_sites()]

    def resize(self, places: Sequence[Int[Tensor, "K _"] | None]) -> dict[int, Rearranged]:
        """Rearranges the slots of each site (see `LowRank.resize`); None leaves one as it is.

        Returns:
            What was done, by a parameter's id.
        """
        done = {}
        for site, places_here in zip(self.low_rank_sites(), places, strict=True):
            if places_here is not None:
                before = len(site.changes)
                site.resize(places_here)
                done |= {id(parameter): change for parameter, change in site.changes[before:]}
        return done

    def take_changes(self) -> list[tuple[nn.Parameter, Rearranged]]:
        taken = [change for site in self.low_rank_sites() for change in site.changes]
        for site in self.low_rank_sites():
            site.changes.clear()
        return taken

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Sites first take the size that theirs have in the state; an optimizer's averages are loaded in that size too."""
        names = {id(module): name for name, module in self.named_modules()}
        places = []
        for site in self.low_rank_sites():
            slots = state_dict.get(f"{names[id(site)]}.slots", site.slots)
            places.append(first_slots(site, slots.shape[1]))
        self.resize(places)
        self.take_changes()
        return super().load_state_dict(state_dict, *args, **kwargs)

    def copy_member(self, source: Adapter, member: int) -> None:
        self.check_alone()
        sizes = [max(site.slots[member].nonzero()[:, 0].tolist(), default=-1) + 1 for site in source.low_rank_sites()]
        self.resize([first_slots(site, size) for site, size in zip(self.low_rank_sites(), sizes, strict=True)])
        self.take_changes()
        super().copy_member(source, member)

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
        from rankwise.variants.dora import Decomposed  # it wraps what stands here

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
        """alpha/r or alpha/sqrt(r) of the site for each member; alpha itself where it has no rank."""
        settings = self.settings
        patterned = next((a for p, a in settings.alpha_pattern.items() if matches(p, name)), settings.alpha)
        power = 1.0 if settings.scaling == "alpha/r" else 0.5
        return [a / max(r, 1) ** power for a, r in zip(per_member(patterned, self.members, "alpha"), ranks, strict=True)]

    def parameter_groups(self) -> list[Group]:
        """A, E and the head's weights; B with its own rate; biases, norms and magnitudes, which do not decay."""
        norms = self.norm_parameters()
        named = [(n.rpartition(".")[2], p) for n, p in self.named_parameters() if p.requires_grad]
        plain = [p for n, p in named if n in ("bias", "magnitude") or id(p) in norms]
        fast = [p for n, p in named if n == "B"]
        rest = [p for n, p in named if n not in ("bias", "magnitude", "B") and id(p) not in norms]
        groups = [Group(rest), Group(fast, lr_scale=self.settings.lr_ratio), Group(plain, weight_decay=0.0)]
        return [group for group in groups if group.params]
