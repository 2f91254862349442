"""Rank that is placed once, before training: what EVA, GoRA, FIM-LoRA, stable-rank and others share.

A method says what the weights or the data tell of each site (`measure`); the ranks come from `allocation.choose`, within a
budget and bounds; A and B start, and from there on it is LoRA.  A site may get no rank: it then has no slots, and costs
nothing.

One scale for all sites is the default (scale_by = "mean rank"): with alpha over a site's own rank a site that is given more
rank learns more slowly in each direction, and what the placement is worth could not be seen from that.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.linears import module_in, module_out, size_of
from rankwise.variants.adapter.step import Calibration, Uncalibrated
from rankwise.variants.adapter.surgery import has_values
from rankwise.variants.adapter.targets import matches
from rankwise.variants.allocation.choice import Bound, choose
from rankwise.variants.lowrank.adapter import LowRankAdapter
from rankwise.variants.lowrank.site import LowRank
from rankwise.variants.settings import per_member
from torch import Tensor, nn

Ranks = dict[str, list[int]]  # site -> rank of each member


class PlacedLoRA(LowRankAdapter):
    """K members of LoRA whose ranks are placed before training."""

    reads_values: ClassVar[bool] = True  # `measure` looks at weights, activations or gradients

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.placed: Ranks = {}
        self.measured: dict[str, Any] = {}  # site -> what `start` needs of it

    def measure(self, names: Sequence[str], calibration: Calibration | None) -> Ranks:
        """The ranks, out of the bare model; leaves in `measured` what `start` needs."""
        raise NotImplementedError

    def start(self, name: str, module: nn.Module, ranks: list[int], measured: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Where A (r, I) and B (O, r) of each member start: A at LoRA's random draw, B at zero.

        Args:
            measured: what `measure` left of this site; None where the start is to come from elsewhere.
        """
        draws = [initialization.generator(seed, name, "A") for seed in self.seeds]
        A = [initialization.kaiming(r, module_in(module), random) for r, random in zip(ranks, draws, strict=True)]
        return A, [torch.zeros(module_out(module), r) for r in ranks]

    # -- given once ----------------------------------------------------------------------------------------------------

    def choose(self, model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
        names = super().choose(model, targets, head)
        settings = self.settings
        self.check_patterns({"rank_bounds": settings.rank_bounds, "group_bounds": settings.group_bounds}, names)
        return names

    def place(self, names: Sequence[str], calibration: Calibration | Uncalibrated | None) -> None:
        self.measured = {}
        if isinstance(calibration, Uncalibrated):
            known = calibration.ranks
            if known is None:
                self.placed = self.by_share({name: [1.0] * self.members for name in names})
            else:
                self.placed = {name: per_member(known[name], self.members, f"rank of {name}") for name in names}
            return
        if self.needs is not None and (calibration is None or not len(calibration.batches)):
            raise ValueError(
                f"{self.method} measures {self.needs} before it trains: give "
                f"attach(calibration=variants.Calibration(batches{', loss' if self.needs == 'gradients' else ''}))"
            )
        if self.needs == "gradients" and calibration.loss is None:
            raise ValueError(
                f"{self.method} measures gradients: give Calibration(batches, loss=a function of a batch to (K,) losses)"
            )
        if self.reads_values and not has_values(self.model):
            raise ValueError(
                f"{self.method} measures values, and this model has shapes alone (meta device): load its weights, or attach "
                f"with calibration=Uncalibrated() for the counts of a uniform start"
            )
        self.placed = self.measure(names, calibration)

    def make_low_rank(self, name: str, module: nn.Module) -> LowRank:
        ranks = self.placed[name]
        starts = self.start(name, module, ranks, self.measured.pop(name, None))
        return LowRank(name, module, starts, self.site_scales(name, ranks), self.settings.dropout, self.draw)

    def uniform_ranks(self, name: str) -> list[int]:
        """The site's rank in the uniform start that the budget is that of."""
        return super().site_ranks(name, self.settings.rank)

    def site_ranks(self, name: str, default: list[int] | int) -> list[int]:
        return self.placed.get(name) or super().site_ranks(name, default)

    def site_scales(self, name: str, ranks: list[int]) -> list[float]:
        own = self.settings.scale_by == "own rank"
        return super().site_scales(name, [max(r, 1) for r in ranks] if own else self.uniform_ranks(name))

    # -- the budget ----------------------------------------------------------------------------------------------------

    def price(self, name: str) -> int:
        """Parameters of one rank at a site."""
        module = self.model.get_submodule(name)
        return module_in(module) + module_out(module)

    def budgets(self, names: Sequence[str]) -> list[int]:
        """For each member the budget, in ranks or in parameters."""
        settings = self.settings
        total = settings.total_rank if settings.cost == "rank" else settings.total_parameters
        if total is not None:
            return [total] * self.members
        prices = [1 if settings.cost == "rank" else self.price(name) for name in names]
        return [sum(p * self.uniform_ranks(n)[k] for p, n in zip(prices, names, strict=True)) for k in range(self.members)]

    def default_bounds(self, name: str) -> list[tuple[int, int | None]]:
        """For each member least and most rank of a site that `rank_bounds` says nothing of."""
        return [(self.settings.least_rank, self.settings.most_rank)] * self.members

    def site_bounds(self, name: str) -> list[tuple[int, int]]:
        """For each member the least and the most rank of a site; never more than its weight's own."""
        bound = next((tuple(b) for p, b in self.settings.rank_bounds.items() if matches(p, name)), None)
        bounds = self.default_bounds(name) if bound is None else [bound] * self.members
        full = min(size_of(self.model.get_submodule(name)))
        return [(least, full if most is None else min(most, full)) for least, most in bounds]

    def by_share(self, weights: Mapping[str, list[float]]) -> Ranks:
        """Ranks in proportion to the weights, rounded by the largest remainder, so that the budget is met exactly.

        The t-th rank of a site (t from 0) is worth q - t, with q the site's exact share: whole ranks come first, then the
        largest remainders.  What bounds keep from a site goes to those furthest below their share.
        """
        names = list(weights)
        share = torch.tensor([weights[name] for name in names], dtype=torch.float64).T  # (K, sites)
        share = torch.where((share.isfinite() & (share >= 0)).all(1, True) & (share.sum(1, True) > 0), share, 1.0)
        prices = torch.tensor([1 if self.settings.cost == "rank" else self.price(name) for name in names], dtype=torch.float64)
        budget = torch.tensor(self.budgets(names), dtype=torch.float64)
        quota = share * (budget / (share * prices).sum(1))[:, None]  # (K, sites)
        rooms = self.rooms(names)
        worth = {
            name: [q - torch.arange(room) for q, room in zip(quota[:, i], rooms[name], strict=True)]
            for i, name in enumerate(names)
        }
        return self.by_worth(worth, per_cost=False)

    def rooms(self, names: Sequence[str]) -> Ranks:
        """The most rank that each site may get, by its bounds and by the budget."""
        prices = {name: 1 if self.settings.cost == "rank" else self.price(name) for name in names}
        pairs = {name: zip(self.site_bounds(name), self.budgets(names), strict=True) for name in names}
        return {name: [min(most, budget // prices[name]) for (_, most), budget in pairs[name]] for name in names}

    def by_worth(self, worth: Mapping[str, Sequence[Tensor]], per_cost: bool = True) -> Ranks:
        """Ranks out of what the first, second, ... rank of each site is worth.

        Args:
            worth: for each site and member (R,), falling along R; R may differ.
            per_cost: whether a rank that costs more must be worth more.

        Raises:
            ValueError: bounds that leave no room for the budget, or ask for more than it.
        """
        names, settings = list(worth), self.settings
        ranks: Ranks = {name: [] for name in names}
        limits = {name: self.site_bounds(name) for name in names}
        for k, budget in enumerate(self.budgets(names)):
            sizes = [min(len(worth[name][k]), limits[name][k][1]) for name in names]
            places = dict(zip(names, torch.arange(sum(sizes)).split(sizes), strict=True))
            scores = torch.cat([worth[name][k][:size].double().cpu() for name, size in zip(names, sizes, strict=True)])
            costs = None
            if settings.cost == "parameters":
                costs = [self.price(name) for name, size in zip(names, sizes, strict=True) for _ in range(size)]
                scores = scores if per_cost else scores * torch.tensor(costs)  # `choose` divides by them
            bounds = [Bound(name, tuple(places[name].tolist()), limits[name][k][0]) for name in names]
            for pattern, (least, most) in settings.group_bounds.items():
                inside = [i for name in names if matches(pattern, name) for i in places[name].tolist()]
                bounds.append(Bound(f"the sites {pattern}", tuple(inside), least, most))
            slots = torch.ones(1, len(scores), dtype=torch.bool)
            kept = choose(scores[None], slots, torch.tensor([budget]), costs, bounds)[0]
            self._check_met(kept, budget, bounds)
            for name in names:
                ranks[name].append(int(kept[places[name]].sum()))
        return ranks

    def _check_met(self, kept: Tensor, budget: int, bounds: Sequence[Bound]) -> None:
        unit = "ranks" if self.settings.cost == "rank" else "parameters"
        for bound in bounds:
            if kept[list(bound.inside)].sum() < bound.least:
                raise ValueError(
                    f"least rank {bound.least} of {bound.name} does not fit into the budget of {budget} {unit}: lower it or "
                    f"raise the budget"
                )
        if unit == "ranks" and int(kept.sum()) < budget:
            raise ValueError(
                f"the bounds leave room for {int(kept.sum())} ranks of a budget of {budget}: raise the most ranks or lower rank"
            )
