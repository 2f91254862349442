"""BayesLoRA: factors with a variance, and ranks that are cut where their posterior is more noise than signal.

    y = W x + s B A x + b               s = alpha / initial_rank, also when ranks are cut
    q(A_ji) = N(A_ji, v_j)              q(B_oj) = N(B_oj, v_j)              v = exp(log_variance), one for each rank

A (K, R, I) and B (K, O, R) are means, log_variance (K, R) is trained with them.  Training minimises the loss of a draw plus
kl_weight sum KL(a), over all elements w of A and B, with a = v / w^2 their noise-to-signal ratio:

    -KL(a) = k1 sigmoid(k2 + k3 log a) - log(1 + 1/a) / 2 - k1       k = 0.63576, 1.87320, 1.48695   (Molchanov et al. 2017)

The draw is of each row's output (sampling = "local", the local reparameterisation), with m = A x:

    B A x + sqrt(var) noise      var_o = sum_j v_j (|x|^2 B_oj^2 + m_j^2 + |x|^2 v_j)

or of A and B themselves, once a forward pass ("weights"; always at embeddings and convolutions).  Evaluation takes the means.
Every `interval` steps, and when the final steps begin, a rank j goes for good whose ratio is not below `threshold`:

    ratio_j = (median_i log(v_j / A_ji^2) + median_o log(v_j / B_oj^2)) / 2

No paper; read in the release, mercury0100/bayeslora, bayeslora/hf.py, whose 1e-8 beside each w^2 and whose bounds of log v, -20
and 2, are kept.  The noise is keyed like a dropout (adapter/draws.py), so that a pack draws what its members draw alone.

Departures: B starts at zero (the release: uniform within 1e-3), so the model is unchanged at the start; the release's var lacks
its last term, the product of both variances; averages of the ranks that stay go on (there the caller makes a new optimizer);
a target, if there is one, cuts to it once.  Its fix_gauge, which balances |A_j| and |B_j|, is left out: it moves both medians
by as much in opposite directions.
"""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.draws import drop, normal
from rankwise.variants.adapter.linears import kind_of
from rankwise.variants.adapter.step import Group, Step
from rankwise.variants.allocation.allocated import check_phases
from rankwise.variants.allocation.choice import Bound, choose
from rankwise.variants.lowrank.adapter import LowRankAdapter
from rankwise.variants.lowrank.site import LowRank
from rankwise.variants.lowrank.slots import NONE
from rankwise.variants.settings import per_member
from torch import Tensor, nn

K1, K2, K3 = 0.63576, 1.87320, 1.48695  # Molchanov et al. 2017, eq. (14)
EPSILON, LEAST, MOST = 1e-8, -20.0, 2.0  # beside a square, and the bounds of a log variance: the release
TINY = 1e-30  # of a variance, so that its root has a gradient


class Variational(LowRank):
    """LoRA's factors as means, with a log variance for each rank."""

    slot_axes = LowRank.slot_axes | {"log_variance": 1}
    slot_facts = ("log_variance",)

    def __init__(self, *args, initial: float, variance: str, sampling: str, **kwargs):
        """
        Args:
            initial: where the log variances start; variance, sampling: the settings of these names.
        """
        super().__init__(*args, **kwargs)
        self.log_variance = nn.Parameter(self.slots * initial)
        self.of_both, self.is_local = variance == "both", sampling == "local"
        self._at_means = False  # the noise of this product is drawn apart

    def variances(self) -> Float[Tensor, "K R"]:
        return self.log_variance.clamp(LEAST, MOST).exp() * self.slots

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """A and B as drawn for this forward pass, in training."""
        A, B, c = self.matrices()
        if not self.training or self._at_means:
            return A, B, c
        with torch.autocast(A.device.type, enabled=False):
            spread = (self.log_variance.clamp(LEAST, MOST) / 2).exp() * self.slots
            A = A + spread[:, :, None] * normal(A, self.draw, f"{self.name}/A")
            if self.of_both:
                B = B + (spread[:, :, None] * normal(B.mT, self.draw, f"{self.name}/B")).mT
        return A, B, c

    def product(self, y: Tensor, x: Tensor, rate: float) -> Float[Tensor, "rows O"]:
        if not (self.training and self.is_local):
            return super().product(y, x, rate)
        x, rows = drop(x, rate, self.draw, self.name), self.draw.rows
        noise = self._noise(rows.fold(x).to(self.A.dtype))
        self._at_means = True
        try:
            mean = super().product(y, x, 0.0)
        finally:
            self._at_means = False
        return mean + rows.unfold(noise.to(mean.dtype), mean)

    def _noise(self, x: Float[Tensor, "K N I"]) -> Float[Tensor, "K N O"]:
        with torch.autocast(x.device.type, enabled=False):
            A, B, _ = self.matrices()
            variances, size = self.variances(), x.square().sum(2, keepdim=True)  # (K, R), (K, N, 1)
            var = size * torch.bmm(B.square(), variances[:, :, None]).mT  # (K, N, O)
            if self.of_both:
                squares = torch.bmm(x, A.mT).square() + size * variances[:, None]  # (K, N, R)
                var = var + torch.bmm(squares, variances[:, :, None])
            draws = normal(var, self.draw, f"{self.name}/noise", of_tokens=True, first=self.first_row)
            return self.scale[:, None, None] * var.clamp_min(TINY).sqrt() * draws

    def divergence(self) -> Float[Tensor, " K"]:
        """Sum of KL(a) over the elements of A and, where they have a variance, of B."""
        means = [self.A, self.B.mT] if self.of_both else [self.A]
        log_variance = self.log_variance.clamp(LEAST, MOST)[:, :, None]
        return sum((divergence(mean, log_variance).sum(2) * self.slots).sum(1) for mean in means)

    @torch.no_grad()
    def ratios(self) -> Float[Tensor, "K R"]:
        """log noise-to-signal of each rank."""
        means = [self.A, self.B.mT] if self.of_both else [self.A]
        logs = [self.log_variance[:, :, None] - (mean.square() + EPSILON).log() for mean in means]
        return sum(log.median(2).values for log in logs) / len(logs)

    def count(self, ranks: Tensor) -> Tensor:
        """(K,) parameters of so many slots, their variances too."""
        return super().count(ranks) + ranks

    @torch.no_grad()
    def clear_missing_slots(self) -> None:
        super().clear_missing_slots()
        self.log_variance *= self.slots


class BayesLoRA(LowRankAdapter):
    """K members of BayesLoRA."""

    method = "bayeslora"

    def make_low_rank(self, name: str, module: nn.Module) -> Variational:
        ranks, settings = self.site_ranks(name, self.settings.initial_rank), self.settings
        start, kind = initialization.STARTS["kaiming"], kind_of(module)
        draws = [initialization.generator(seed, name, "A") for seed in self.seeds]
        A, B = zip(*(kind.start(start, module, r, random) for r, random in zip(ranks, draws, strict=True)), strict=True)
        own = {"initial": settings.initial_log_variance, "variance": settings.variance, "sampling": settings.sampling}
        scales = self.site_scales(name, ranks)
        return Variational(name, module, (list(A), list(B)), scales, settings.dropout, self.draw, **own)

    def inserted(self) -> None:
        """
        Raises:
            ValueError: a target above what there is, or that the least ranks exceed.
        """
        if not self.settings.has_target:
            return
        sites, least = self.low_rank_sites(), self.settings.least_rank
        unit = "ranks" if self.settings.cost == "rank" else "parameters"
        for k, target in enumerate(self.target().tolist()):
            ranks = [int(site.physical()[k]) for site in sites]
            floor, ceiling = (
                sum(self._price(site) * r for site, r in zip(sites, some, strict=True))
                for some in ([min(least, r) for r in ranks], ranks)
            )
            if target > ceiling:
                raise ValueError(
                    f"the target of {target} {unit} is above the {ceiling} at the start: lower it or raise the ranks"
                )
            if target < floor:
                raise ValueError(
                    f"least_rank = {least} takes {floor} {unit} of a target of {target}: lower it or raise the target"
                )

    def parameter_groups(self) -> list[Group]:
        """The log variances have a rate of their own and do not decay."""
        variances = [site.log_variance for site in self.low_rank_sites()]
        places = {id(one) for one in variances}
        groups = []
        for group in super().parameter_groups():
            others = [p for p in group.params if id(p) not in places]
            groups += [dataclasses.replace(group, params=others)] if others else []
        return [*groups, Group(variances, lr_scale=self.settings.variance_lr_ratio, weight_decay=0.0)]

    def penalty(self, step: Step) -> Tensor:
        """(K,): kl_weight times the divergence of all sites."""
        return self.settings.kl_weight * sum(site.divergence() for site in self.low_rank_sites())

    # -- the ranks -----------------------------------------------------------------------------------------------------

    def _price(self, site: Variational) -> int:
        """What a rank of a site takes out of a budget."""
        return 1 if self.settings.cost == "rank" else int(site.count(torch.tensor(1)))

    def target(self) -> Tensor:
        """(K,): what is left of all sites in the end at most, in ranks or parameters as `cost` says."""
        settings = self.settings
        whole = sum(self._price(site) for site in self.low_rank_sites())
        fixed = settings.target_total if settings.cost == "rank" else settings.target_parameters
        means = per_member(settings.target_rank, self.members, "target_rank")
        return torch.tensor([whole * mean if fixed is None else fixed for mean in means])

    def final_budget(self) -> Tensor | None:
        return self.target() if self.settings.has_target and self.total_steps is not None else None

    def loaded(self, total_steps: int | None) -> None:
        self.total_steps = total_steps

    def begin(self, step: Step, micro_batch: int = 0, training: bool = True) -> None:
        super().begin(step, micro_batch, training)
        if training:
            self.total_steps = step.total
            check_phases(self.settings.warmup_steps, self.settings.final_steps, step.total)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Cuts ranks, where it is time to."""
        self.total_steps = step.total
        settings, final = self.settings, step.total - self.settings.final_steps
        if step.index == final or (settings.warmup_steps < step.index < final and step.index % settings.interval == 0):
            kept = self._within_threshold()
            if step.index == final and settings.has_target:
                kept = self._within_budget(kept)
            self._keep(kept)
        super().after_step(step)

    def _within_threshold(self) -> list[Bool[Tensor, "K R"]]:
        """The ranks of each site that are more signal than noise, and the least rank; all of a member that is not finite."""
        kept = []
        for site in self.low_rank_sites():
            exists, ratios = site.slots.bool(), site.ratios()
            order = ratios.masked_fill(~exists, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
            stays = (ratios < self.settings.threshold) | (order < self.settings.least_rank)
            diverged = (exists & ~ratios.isfinite()).any(1, keepdim=True)
            kept.append(exists & (stays | diverged))
        return kept

    def _within_budget(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """Of these the ranks of the lowest ratios that the target pays for; of parameters the largest exp(-ratio) for each."""
        sites, least = self.low_rank_sites(), self.settings.least_rank
        sizes, at, bounds = [site.slots.shape[1] for site in sites], 0, []
        for site, size in zip(sites, sizes, strict=True):
            bounds += [Bound(site.name, tuple(range(at, at + size)), least)] if least else []
            at += size
        by_rank = self.settings.cost == "rank"
        costs = None if by_rank else [self._price(site) for site, size in zip(sites, sizes, strict=True) for _ in range(size)]
        signal = torch.cat([-site.ratios() for site in sites], 1)
        signal = (signal if by_rank else signal.exp()).nan_to_num(0.0)
        return list(choose(signal, torch.cat(list(kept), 1), self.target(), costs, bounds).split(sizes, 1))

    def _keep(self, kept: Sequence[Tensor]) -> None:
        """All other ranks leave parameters, gradients and averages for good."""
        places = []
        for keep in kept:
            order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(keep.sum(1).max())]
            places.append(order.masked_fill(~keep.gather(1, order), NONE))
        unchanged = [bool(keep.all()) for keep in kept]
        self.resize([None if same else place for same, place in zip(unchanged, places, strict=True)])


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(a) of each element, up to a constant, as Molchanov et al. 2017 approximate it."""
    a = log_variance.exp() / (mean.square() + EPSILON) + EPSILON
    return K1 - K1 * torch.sigmoid(K2 + K3 * a.log()) + 0.5 * torch.log1p(1 / a)
