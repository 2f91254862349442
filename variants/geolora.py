"""GeoLoRA: a full core between two orthonormal bases, which the gradient widens and the singular values cut again.

    y = W x + s U S V^T x + b            s = alpha / initial_rank, also when the rank is another

B (K, O, R) is U, A (K, R, I) is V^T, S (K, R, R) is the core, which starts at zero, so the model is unchanged; U and V start as
the Q of Gaussian matrices.  With G = dL/dW of the whole step, eta the rate of the step:

    augment    K' = s G V    L' = s G^T U       U1 = [U, U~] = qr([U, K'])      V1 = [V, V~] = qr([V, L'])
               S1 = | S'               -eta L'^T V~ |      S' = S after the optimizer's step
                    | -eta U~^T K'      0           |
    core       only S is trained, and the rank stays
    truncate   S = P diag(d) Q^T    r' = least with |d[r':]| < tolerance |d|
               U <- U P[:, :r']    V <- V Q[:, :r']    S <- diag(d[:r'])

The first step of each `interval` is an augmentation, the step `truncate_after` it a truncation.  With a target the truncation
pools the d of all sites and keeps the largest, at least `least_rank` of each.  Schotthoefer et al. 2024 (arXiv 2410.18720);
read in the release, ScSteffen/Publication-GeoLoRA (experiment2_GLUE/.../LoRAParallelDLRT.py, trainer_parallel_dlrt.py).

The release gets K' from dL/dU S^-1, with an S^-1 = diag(1/d) of the last truncation, which grows without bound as d falls and
which the core has left behind.  Here the backward pass gives K' and L' themselves, as the gradients of two terms that are
zero (`Core.operands`), so that nothing is inverted, and at S = 0 the first augmentation already follows the gradient.

Departures: core_step = "release" is its step, S' = S - eta dL/dS, in which the optimizer leaves the core alone (there the
head too); scale_by = "release" is its jump of alpha/r' at each truncation.  Of the new directions those that are rounding are
left out, as many at either side; where `most_rank` leaves no room for all, the strongest stay (the release: the first).  A
truncation takes the decomposition of U S V^T, so that bases that are not orthonormal (a file's, rounding) do no harm.  The
averages of the optimizer start anew for a core that was rotated.  A clipped gradient counts K' and L' in its norm.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.linears import module_in, module_out
from rankwise.variants.adapter.step import Step, Uncalibrated
from rankwise.variants.allocation.choice import Bound, choose
from rankwise.variants.lowrank.adapter import LowRankAdapter
from rankwise.variants.lowrank.site import LowRank
from rankwise.variants.lowrank.slots import NEW, NONE
from rankwise.variants.settings import per_member
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROUNDING = 1e-5  # of the gradient's norm: a new direction below this is no direction


class Core(LowRank):
    """U, S and V^T at one frozen weight."""

    has_coefficients = True
    slot_axes = LowRank.slot_axes | {"S": (1, 2)}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        K, R = self.slots.shape
        self.S = nn.Parameter(self.A.new_zeros(K, R, R))
        self.augments = False  # this step's gradient is to say how the bases grow

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(self.B.device.type, enabled=False):
            return self.A.detach(), torch.bmm(self.B.detach(), self.S), self.coefficients()

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Before an augmentation B S and, beside it, a term 0 B whose gradients are K' at U and L'^T at V^T."""
        if not self.augments or not torch.is_grad_enabled():
            return self.matrices()
        with torch.autocast(self.B.device.type, enabled=False):
            A = torch.cat([self.A.detach(), Absent.apply(self.A)], 1)  # (K, 2R, I)
            B = torch.cat([Product.apply(self.B, self.S), self.B.detach()], 2)  # (K, O, 2R)
        c = self.coefficients()
        return A, B, torch.cat([c, c], 1)

    def as_triplets(self, member: int) -> tuple[Tensor, Tensor, Tensor]:
        """Its singular value decomposition, which rotates the bases."""
        r = int(self.slots[member].sum())
        if not self.S[member].isfinite().all():
            return self.A[member, :r], self.B[member, :, :r], self.S[member].diagonal()[:r]
        return tuple(part.to(self.A) for part in self.decomposed(member))

    @torch.no_grad()
    def decomposed(self, member: int) -> tuple[Float[Tensor, "r I"], Float[Tensor, "O r"], Float[Tensor, " r"]]:
        """V^T, U and d of one member's U S V^T, in float64, the greatest d first."""
        r = int(self.slots[member].sum())
        A, B, S = (t.detach().double() for t in (self.A[member, :r], self.B[member, :, :r], self.S[member, :r, :r]))
        (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
        P, d, Qt = torch.linalg.svd(R_B @ S @ R_A.mT)
        return Qt @ Q_A.mT, Q_B @ P, d

    @torch.no_grad()
    def put_coefficients(self, member: int, places: Tensor, values: Tensor) -> None:
        self.S[member] = 0
        self.S[member, places, places] = values.to(self.S)

    def count(self, ranks: Tensor) -> Tensor:
        """(K,) parameters of so many slots, those of the core too."""
        return super().count(ranks) + ranks * ranks

    @torch.no_grad()
    def clear_missing_slots(self) -> None:
        super().clear_missing_slots()
        self.S *= self.slots[:, :, None] * self.slots[:, None]


class Product(torch.autograd.Function):
    """U S, whose gradient reaches U as it is, in place of g S^T: at U it is then K', with nothing to divide out."""

    @staticmethod
    def forward(ctx, U: Tensor, S: Tensor) -> Tensor:
        ctx.save_for_backward(U)
        return torch.bmm(U, S)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        (U,) = ctx.saved_tensors
        return g, torch.bmm(U.mT, g)


class Absent(torch.autograd.Function):
    """Zeros in the shape of a tensor, whose gradient is that of the zeros."""

    @staticmethod
    def forward(ctx, A: Tensor) -> Tensor:
        return torch.zeros_like(A)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        return g


class GeoLoRA(LowRankAdapter):
    """K members of GeoLoRA."""

    method = "geolora"
    exact_gradient: ClassVar[bool] = False  # at U and V it is K' and L'
    _gradients: list[tuple[Tensor | None, Tensor | None, Tensor | None]] | None = None  # K', L'^T and dL/dS of each site

    def make_low_rank(self, name: str, module: nn.Module) -> Core:
        asked = self.site_ranks(name, self.settings.initial_rank)
        sizes = module_in(module), module_out(module)
        A, B = [], []
        for rank, seed in zip(asked, self.seeds, strict=True):
            rank = min(rank, *sizes)  # there are no more orthonormal directions
            V, U = (_orthonormal(size, rank, seed, name, part) for size, part in zip(sizes, "AB", strict=True))
            A.append(V.mT)
            B.append(U)
        return Core(name, module, (A, B), self.site_scales(name, asked), self.settings.dropout, self.draw)

    def inserted(self) -> None:
        """
        Raises:
            ValueError: a target that the least ranks exceed.
        """
        if not self.settings.has_target or isinstance(self._calibration, Uncalibrated):  # counted alone, or from a file
            return
        least = self.settings.least_rank
        floor = sum(least if self.settings.cost == "rank" else _parameters(site, least) for site in self.low_rank_sites())
        for target in self.target().tolist():
            if target < floor:
                unit = "ranks" if self.settings.cost == "rank" else "parameters"
                raise ValueError(
                    f"least_rank = {least} takes {floor} {unit} of a target of {target}: lower it or raise the target"
                )

    # -- the budget --------------------------------------------------------------------------------------------------

    def target(self) -> Tensor:
        """(K,): what a truncation leaves of all sites together, in ranks or parameters as `cost` says."""
        settings, sites = self.settings, self.low_rank_sites()
        means = per_member(settings.target_rank, self.members, "target_rank")
        if settings.cost == "rank":
            return torch.tensor([len(sites) * m if settings.target_total is None else settings.target_total for m in means])
        fixed = settings.target_parameters
        return torch.tensor([sum(_parameters(site, m) for site in sites) if fixed is None else fixed for m in means])

    def final_budget(self) -> Tensor | None:
        return self.target() if self.settings.has_target and self.total_steps is not None else None

    def loaded(self, total_steps: int | None) -> None:
        self.total_steps = total_steps

    # -- the step ----------------------------------------------------------------------------------------------------

    def is_augmented(self, step: Step) -> bool:
        """Whether the bases grow by the gradient of this step."""
        return (step.index - 1) % self.settings.interval == 0 and step.index < step.total - self.settings.final_steps

    def is_truncated(self, step: Step) -> bool:
        """Whether the cores are cut after this step."""
        settings, final = self.settings, step.total - self.settings.final_steps
        after = settings.interval - 1 if settings.truncate_after is None else settings.truncate_after
        return step.index == final or (step.index < final and (step.index - 1) % settings.interval == after)

    def begin(self, step: Step, micro_batch: int = 0, training: bool = True) -> None:
        """
        Raises:
            ValueError: a run that has no step before the ranks are fixed.
        """
        super().begin(step, micro_batch, training)
        if training:
            self.total_steps = step.total
            if self.settings.final_steps >= step.total:
                raise ValueError(
                    f"final_steps = {self.settings.final_steps} leaves no step for the ranks in a run of {step.total}: lower it"
                )
        for site in self.low_rank_sites():
            site.augments = training and self.is_augmented(step)

    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        """Keeps K' and L' for `after_step`: the optimizer moves the core alone."""
        self._gradients = []
        for site in self.low_rank_sites():
            at_core = site.S.grad if self.settings.core_step == "release" and self.is_augmented(step) else None
            self._gradients.append((site.B.grad, site.A.grad, at_core))
            site.A.grad = site.B.grad = None
            if at_core is not None:
                site.S.grad = None

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Augments and truncates, where it is time to.

        Raises:
            ValueError: before_step was not called, or nobody said the rate.
        """
        self.total_steps = step.total
        if self.is_augmented(step):
            self._augment(step)
        if self.is_truncated(step):
            self._truncate()
        self._gradients = None
        super().after_step(step)

    def _augment(self, step: Step) -> None:
        if self._gradients is None or all(at_U is None for at_U, _, _ in self._gradients):
            raise ValueError(
                "after_step without the gradients of an augmentation: call adapter.begin(step) before the forward pass and "
                "adapter.before_step(step) before optimizer.step()"
            )
        if step.learning_rates is None:
            raise ValueError("an augmentation is by the rate of its step: give Step(index, total, learning_rates=(K,) tensor)")
        rates = step.learning_rates.double().tolist()
        taken = [True] * self.members if step.taken is None else step.taken.tolist()
        news = []
        for site, (at_U, at_V, at_core) in zip(self.low_rank_sites(), self._gradients, strict=True):
            if at_core is not None:
                steps = torch.tensor([r * t for r, t in zip(rates, taken, strict=True)], dtype=site.S.dtype)
                site.S -= (steps.to(site.S.device)[:, None, None] * at_core).nan_to_num(0.0, 0.0, 0.0)
            sizes, new = site.physical().tolist(), []
            for k, r in enumerate(sizes):  # a module that no row went through has no gradient
                grows = taken[k] and at_U is not None
                new.append(self._directions(site, k, r, at_U[k, :, :r], at_V[k, :r].mT) if grows else None)
            grown = [r + (0 if n is None else n[0].shape[1]) for r, n in zip(sizes, new, strict=True)]
            news.append((sizes, grown, new))
        self._grow([grown for _, grown, _ in news])
        for site, (at_U, at_V, _), (sizes, grown, new) in zip(self.low_rank_sites(), self._gradients, news, strict=True):
            for k, (r, g) in enumerate(zip(sizes, grown, strict=True)):
                if g == r:
                    continue
                U, V = new[k]
                site.B[k, :, r:g], site.A[k, r:g] = U.to(site.B), V.mT.to(site.A)
                site.S[k, r:g, :r] = (-rates[k] * (U.mT @ at_U[k, :, :r].double())).to(site.S)
                site.S[k, :r, r:g] = (-rates[k] * (at_V[k, :r].double() @ V)).to(site.S)
            if self.settings.core_step == "release":  # the optimizer made no step here, so that its counts would be off
                site.forget(site.slots.bool(), ["S"])

    def _most(self, site: Core) -> int:
        return min(self.settings.most_rank, site.A.shape[2], site.B.shape[1])

    def _grow(self, grown: Sequence[Sequence[int]]) -> None:
        """Gives each site, for each member, so many slots, with zeros in the new ones."""
        places, sites = [], self.low_rank_sites()
        for site, new in zip(sites, grown, strict=True):
            old = site.physical().tolist()
            rows = [[*range(r), *[NEW] * (n - r), *[NONE] * (max(new) - n)] for r, n in zip(old, new, strict=True)]
            places.append(torch.tensor(rows, dtype=torch.long, device=site.slots.device).view(len(rows), max(new)))
        self.resize(places)
        for site, new in zip(sites, grown, strict=True):
            sizes = torch.tensor(new, device=site.slots.device)[:, None]
            site.slots.copy_(torch.arange(site.slots.shape[1], device=site.slots.device) < sizes)

    @torch.no_grad()
    def widen(self) -> None:
        """Every site as wide as an augmentation makes it."""
        sites = self.low_rank_sites()
        self._grow([[max(r, min(2 * r, self._most(site))) for r in site.physical().tolist()] for site in sites])
        self.take_changes()

    def _directions(self, site: Core, k: int, r: int, at_U: Tensor, at_V: Tensor) -> tuple[Tensor, Tensor]:
        """U~ (O, q) and V~ (I, q), of one member: q directions of the gradient that the bases lack, in float64."""
        U = beyond(site.B[k, :, :r].double(), at_U.double())
        V = beyond(site.A[k, :r].mT.double(), at_V.double())
        q = max(min(U.shape[1], V.shape[1], self._most(site) - r), 0)
        return U[:, :q], V[:, :q]

    def _truncate(self) -> None:
        sites = self.low_rank_sites()
        parts = [[self._decomposed(site, k) for k in range(self.members)] for site in sites]
        ranks = self._ranks(sites, [[None if one is None else one[2] for one in of_site] for of_site in parts])
        places = []
        for site, kept in zip(sites, ranks, strict=True):
            place = torch.arange(max(kept), device=site.slots.device).expand(len(kept), -1)
            places.append(place.masked_fill(place >= torch.tensor(kept, device=place.device)[:, None], NONE))
        self.resize(places)
        for site, of_site, kept in zip(sites, parts, ranks, strict=True):
            for k, (one, r) in enumerate(zip(of_site, kept, strict=True)):
                if one is None:
                    continue
                Vt, U, d = one
                site.put(k, torch.arange(r, device=site.slots.device), U[:, :r], d[:r], Vt[:r])
                if self.settings.scale_by == "release":
                    site.scale[k] = self.site_scales(site.name, [r] * self.members)[k]
            # Averages of a core that was rotated mean nothing.
            site.forget(
                site.slots.bool() & torch.tensor([[one is not None] for one in of_site], device=site.slots.device), ["S"]
            )

    @staticmethod
    def _decomposed(site: Core, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """None of a member that diverged, which stays as it is."""
        finite = all(bool(t[k].isfinite().all()) for t in (site.A, site.B, site.S))
        return site.decomposed(k) if finite else None

    def _ranks(self, sites: Sequence[Core], values: Sequence[Sequence[Tensor | None]]) -> list[list[int]]:
        """For each site the rank of each member, from its singular values, those of None staying."""
        sizes = [site.physical().tolist() for site in sites]
        if not self.settings.has_target:
            least, most = self.settings.least_rank, self.settings.most_rank
            return [
                [r if d is None else within(d, self.settings.tolerance, least, most) for d, r in zip(of_site, own, strict=True)]
                for of_site, own in zip(values, sizes, strict=True)
            ]
        chosen = [self._within_budget(sites, [of_site[k] for of_site in values], k) for k in range(self.members)]
        return [[sizes[s][k] if chosen[k] is None else chosen[k][s] for k in range(self.members)] for s in range(len(sites))]

    def _within_budget(self, sites: Sequence[Core], values: Sequence[Tensor | None], k: int) -> list[int] | None:
        """The rank of each site for one member: the largest singular values of all sites, or those largest for their price."""
        if any(d is None for d in values):
            return None
        least, at, bounds, costs = self.settings.least_rank, 0, [], []
        for site, d in zip(sites, values, strict=True):
            bounds.append(Bound(site.name, tuple(range(at, at + len(d))), least))
            costs += [_parameters(site, j + 1) - _parameters(site, j) for j in range(len(d))]
            at += len(d)
        squares = torch.cat([d.square() for d in values])[None].cpu()
        budget, by_rank = self.target()[k : k + 1], self.settings.cost == "rank"
        kept = choose(squares, torch.ones_like(squares, dtype=torch.bool), budget, None if by_rank else costs, bounds)[0]
        return [int(part.sum()) for part in kept.split([len(d) for d in values])]


def _orthonormal(size: int, rank: int, seed: int, name: str, part: str) -> Float[Tensor, "F r"]:
    """The Q of a Gaussian matrix, drawn by the member's seed."""
    drawn = torch.empty(rank, size).normal_(generator=initialization.generator(seed, name, part))
    return torch.linalg.qr(drawn.mT.double()).Q


def _parameters(site: Core, rank: int) -> int:
    return int(site.count(torch.tensor(rank)))


def beyond(basis: Float[Tensor, "F r"], gradient: Float[Tensor, "F r"]) -> Float[Tensor, "F q"]:
    """Orthonormal directions of the gradient outside the span of the basis, the strongest first; none that is rounding."""
    r = basis.shape[1]
    Q, R = torch.linalg.qr(torch.cat([basis, gradient], 1))
    P, sigma, _ = torch.linalg.svd(R[r:, r:], full_matrices=False)
    return (Q[:, r:] @ P)[:, sigma > ROUNDING * gradient.norm()]


def within(d: Float[Tensor, " r"], tolerance: float, least: int, most: int) -> int:
    """The least rank whose tail is below the tolerance, as a share of |d|, within bounds; all where none is."""
    tails = d.flip(0).square().cumsum(0).flip(0).sqrt()  # |d[j:]| for each j
    below = (tails < tolerance * d.norm()).nonzero()[:, 0].tolist()
    return min(max(below[0] if below else len(d), least), most, len(d))
