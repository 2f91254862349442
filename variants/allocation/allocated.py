"""What every method shares that allocates rank while it trains.

The order of one step (`AllocatedAdapter.after_step`, with new parameters and gradients still there): the score is updated;
every `interval` steps after the warm-up, and once at the start of the final phase, the slots to keep are chosen.  Then the
pattern is final, and with shrink = true the slots that were cut leave the tensors.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import ClassVar, TypeVar

import torch
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.linears import module_in, module_out
from rankwise.variants.adapter.step import Step
from rankwise.variants.adapter.targets import matches
from rankwise.variants.allocation.choice import Bound, choose, protected
from rankwise.variants.allocation.plateau import Plateau
from rankwise.variants.allocation.schedules import scheduled_budget
from rankwise.variants.allocation.scores import SCORES, Score
from rankwise.variants.allocation.sites import Doublets, Triplets
from rankwise.variants.lowrank.adapter import LowRankAdapter
from rankwise.variants.lowrank.site import LowRank
from rankwise.variants.lowrank.slots import NONE, Rearranged
from rankwise.variants.settings import per_member
from rankwise.variants.settings.allocated import Rule
from torch import Tensor, nn

Site = TypeVar("Site", Triplets, Doublets)


class AllocatedAdapter(LowRankAdapter):
    """K members whose ranks an allocator places: score x schedule x direction x cost, by name in the settings."""

    form = "triplet"
    budget_moves: ClassVar[int] = -1  # the total falls, stays (0) or rises (1)
    scores: ClassVar[dict[str, type[Score]]] = SCORES

    @functools.cached_property
    def rule(self) -> Rule:
        """What the allocator goes by; of SoRA, which leaves no choice, none of it is a setting."""
        return self.settings.rule

    def make_low_rank(self, name: str, module: nn.Module) -> LowRank:
        return self.make_allocated(name, module, Doublets if self.form == "doublet" else Triplets)

    def make_allocated(self, name: str, module: nn.Module, kind: type[Site]) -> Site:
        starts = self.starts(name, module, self.site_slots(name))
        scale = self.site_scales(name, self.site_ranks(name, self.settings.initial_rank))
        return kind(name, module, starts, scale, self.settings.dropout, self.draw)

    def starts(self, name: str, module: nn.Module, ranks: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        """For each member where A (r, I) and B (O, r) start; E starts at zero."""
        A, B = [], []
        for rank, seed in zip(ranks, self.seeds, strict=True):
            draws = [initialization.generator(seed, name, part) for part in "AB"]
            if self.form == "doublet":
                A.append(initialization.kaiming(rank, module_in(module), draws[0]))
                B.append(torch.zeros(module_out(module), rank))
            else:
                A.append(initialization.triplet(rank, module_in(module), draws[0]))
                B.append(initialization.triplet(rank, module_out(module), draws[1]).mT)
        return A, B

    def site_slots(self, name: str) -> list[int]:
        """Slots of a site for each member: its initial rank, or what it may grow to."""
        initial = self.site_ranks(name, self.settings.initial_rank)
        if self.rule.direction == "prune" or self.settings.grows:
            return initial
        return [max(rank, self.site_bounds(name)[1] or rank) for rank in initial]

    def site_bounds(self, name: str) -> tuple[int, int | None]:
        """Least and most rank of a site: of the first of `rank_bounds` that matches, else the method's."""
        rule = self.rule
        default = (rule.least_rank, rule.most_rank)
        return next((tuple(b) for p, b in rule.rank_bounds.items() if matches(p, name)), default)

    def choose(self, model: nn.Module, targets: str | Sequence[str], head: Sequence[str]) -> list[str]:
        names = super().choose(model, targets, head)
        rule = self.rule
        self.check_patterns({"rank_bounds": rule.rank_bounds, "group_bounds": rule.group_bounds}, names)
        return names

    def inserted(self) -> None:
        self.loaded(total_steps=None)
        self._check_budget(len(self.sites))
        for site in self.triplets():
            initial = torch.tensor(self.site_ranks(site.name, self.settings.initial_rank), device=site.slots.device)
            site.kept &= torch.arange(site.slots.shape[1], device=site.slots.device) < initial[:, None]
        rule = self.rule
        self.score = self.scores[rule.score](self.triplets(), self.seeds, rule.beta1, rule.beta2).to(self.device)
        self.plateau = self._make_plateau() if rule.schedule == "on-plateau" else None
        self._steps_driven, self._has_warned = 0, False
        self.when_detached(self.model.register_forward_pre_hook(self._before_forward).remove)

    def _make_plateau(self) -> Plateau:
        settings = self.settings
        smoothing, stages = settings.plateau_smoothing, settings.plateau_stages
        return Plateau(self.members, settings.plateau_patience, settings.plateau_threshold, smoothing, stages).to(self.device)

    def _check_budget(self, sites: int) -> None:
        """
        Raises:
            ValueError: a target that pruning cannot reach, or bounds that leave no room for it.
        """
        settings = self.settings
        initial, target = self.totals()
        by_parameters = settings.cost == "parameters"
        named = [n for n in ("target_parameters", "target_total") if settings.get(n) is not None]
        asked = f"{named[0]} =" if named else f"target_rank times {sites} sites is"
        unit = "parameters" if by_parameters else "triplets"
        for start, end in zip(initial, target, strict=True):
            if end > start and self.rule.direction == "prune":
                setting = named[0] if named else "target_rank"
                raise ValueError(
                    f"{asked} {end}, above the {start} {unit} that rank_pattern leaves: lower {setting} or raise the ranks"
                )
            if end < start and self.rule.direction == "grow":
                raise ValueError(
                    f"{asked} {end}, below the {start} {unit} at the start: a method that grows needs a higher target"
                )
        for site in self.triplets():
            for rank in self.site_ranks(site.name, settings.initial_rank):
                most = self.site_bounds(site.name)[1]
                if most is not None and rank > most:
                    raise ValueError(
                        f"{site.name} starts at rank {rank}, above its most rank {most}: lower initial_rank or raise it"
                    )
        slots = torch.cat([site.slots for site in self.triplets()], 1).bool()
        bounds = self.bounds()
        kept = choose(torch.zeros(slots.shape), slots.cpu(), torch.tensor(target), self.costs(), bounds)
        for member, end in enumerate(target):
            for bound in bounds:
                has = int(kept[member, list(bound.inside)].sum())
                if has < min(bound.least, int(slots[member, list(bound.inside)].sum())):
                    raise ValueError(
                        f"least rank {bound.least} of {bound.name} does not fit into the budget of {end} {unit}: lower it "
                        f"or raise the target"
                    )
            if not by_parameters and int(kept[member].sum()) < end:
                raise ValueError(
                    f"the bounds leave room for {int(kept[member].sum())} ranks of a budget of {end}: raise most_rank "
                    f"or lower the target"
                )

    def loaded(self, total_steps: int | None) -> None:
        """Takes note that the tensors were set from outside, by a start or a file, which is no training."""
        self.total_steps = total_steps
        self._untrained = self._norms()
        self._totals: tuple[list[int], list[int]] | None = None  # slots are what a file may change too

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """(sites,): changes with a step of any optimizer; version counters do not, where it is a fused one."""
        norms = [site.factors()[-1].norm() for site in self.triplets()]
        return torch.stack(norms) if norms else torch.zeros(0)

    def load_state_dict(self, *args, **kwargs):
        result = super().load_state_dict(*args, **kwargs)
        self.loaded(self.total_steps)
        return result

    def triplets(self) -> Sequence[Triplets | Doublets]:
        """The sites whose slots are allocated, in order; inside DoRA's magnitudes where there are some."""
        return self.low_rank_sites()

    def resize(self, places: Sequence[Tensor | None]) -> dict[int, Rearranged]:
        done = super().resize(places)
        if done:
            self.score.follow(self.triplets(), done)
        return done

    # -- the budget ------------------------------------------------------------------------------------------------

    def costs(self) -> list[int] | None:
        """What each slot takes out of the budget, in site order; None where every one takes one rank."""
        if self.settings.cost == "rank":
            return None
        return [self._price(site) for site in self.triplets() for _ in range(site.slots.shape[1])]

    @staticmethod
    def _price(site: LowRank) -> int:
        """Parameters of one slot of a site."""
        return int((site.count(torch.ones(1, dtype=torch.long)) - site.count(torch.zeros(1, dtype=torch.long)))[0])

    def bounds(self) -> list[Bound]:
        """Least and most ranks, of sites and of groups of them."""
        bounds, at, places = [], 0, {}
        for site in self.triplets():
            places[site.name] = range(at, at + site.slots.shape[1])
            at += site.slots.shape[1]
            least, most = self.site_bounds(site.name)
            if least or most is not None:
                bounds.append(Bound(site.name, tuple(places[site.name]), least, most))
        for pattern, (least, most) in self.rule.group_bounds.items():
            inside = tuple(place for name, slots in places.items() if matches(pattern, name) for place in slots)
            bounds.append(Bound(f"the sites {pattern}", inside, least, most))
        return bounds

    def totals(self) -> tuple[list[int], list[int]]:
        """For each member, what the kept slots cost at the start and at the end, over all sites."""
        if self._totals is None:
            sites, settings = self.triplets(), self.settings
            prices = [1 if settings.cost == "rank" else self._price(site) for site in sites]
            starts = [self.site_ranks(site.name, settings.initial_rank) for site in sites]
            initial = [sum(p * ranks[k] for p, ranks in zip(prices, starts, strict=True)) for k in range(self.members)]
            means = per_member(settings.target_rank, self.members, "target_rank")
            fixed = settings.target_total if settings.cost == "rank" else settings.target_parameters
            self._totals = initial, [sum(prices) * mean if fixed is None else fixed for mean in means]
        return self._totals

    @property
    def has_target(self) -> bool:
        """Whether there is a budget that the ranks end with."""
        return True

    def final_budget(self) -> Tensor | None:
        if self.total_steps is None or self.settings.get("overshoot") or not self.has_target:
            return None  # never driven, or may end above its target, or has none
        return self.cost_budget(Step(self.total_steps, self.total_steps))

    def cost_budget(self, step: Step) -> Tensor:
        """(K,): what the schedule lets the kept slots cost after this step, in ranks or in parameters."""
        start, end = self.rule.warmup_steps, step.total - self.settings.final_steps
        if self.plateau is not None:
            return torch.tensor(self.totals()[1] if step.index >= end else self.plateau.budgets(*self.totals()))
        pairs = zip(*self.totals(), strict=True)
        return torch.tensor([scheduled_budget(self.rule.schedule, step.index, start, end, b0, bT) for b0, bT in pairs])

    def budget(self, step: Step) -> Tensor | None:
        """(K,) total rank after this step; None where the budget is one of parameters."""
        return self.cost_budget(step) if self.settings.cost == "rank" else None

    # -- the step ----------------------------------------------------------------------------------------------------

    def begin(self, step: Step, micro_batch: int = 0, training: bool = True) -> None:
        super().begin(step, micro_batch, training)
        if training:
            self.total_steps = step.total
            check_phases(self.rule.warmup_steps, self.settings.final_steps, step.total)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Scores the slots; allocates every `interval` steps and at the start of the final phase; projects.

        Raises:
            ValueError: no tensor has a gradient: called after zero_grad; or nobody said the loss that the schedule goes by.
        """
        self.total_steps = step.total
        self._steps_driven += 1
        final = step.total - self.settings.final_steps
        if step.index < final:
            if all(tensor.grad is None for site in self.triplets() for tensor in site.factors()):
                raise ValueError("after_step found no gradient: call it after optimizer.step() and before zero_grad()")
            counted = torch.ones(self.members, dtype=torch.bool) if step.taken is None else step.taken
            self.score.update(self.triplets(), counted.to(self.device))
            self._watch(step, counted)
            if self.is_due(step):
                self._allocate(step)
            elif self.rule.direction != "prune":
                self.project()
        elif step.index == final:
            self._allocate(step)
            if self.settings.get("shrink"):
                self.shrink()
        else:
            self.project()
        super().after_step(step)

    def _watch(self, step: Step, counted: Tensor) -> None:
        if self.plateau is None:
            return
        if step.losses is None:
            raise ValueError(
                'schedule = "on-plateau" goes by the loss of each step: give Step(index, total, losses=(K,) tensor), or take '
                "another schedule"
            )
        self.plateau.update(step.losses, counted, step.index > self.rule.warmup_steps)

    def is_due(self, step: Step) -> bool:
        """Whether ranks are allocated after this step."""
        return step.index > self.rule.warmup_steps and step.index % self.settings.interval == 0

    def project(self) -> None:
        for site in self.triplets():
            site.project()

    @torch.no_grad()
    def shrink(self) -> None:
        """Slots that are cut leave parameters, gradients and averages for good; the output stays what it is.

        A pack keeps, at each site, as many as its largest member needs; for the others those are spare, and no slots.
        """
        places = []
        for site in self.triplets():
            order = (~site.kept).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(site.kept.sum(1).max())]
            places.append(order.masked_fill(~site.kept.gather(1, order), NONE))
        self.resize(places)

    def _allocate(self, step: Step) -> None:
        sites, rule = self.triplets(), self.rule
        slots, kept = (torch.cat([getattr(site, mask) for site in sites], 1).bool() for mask in ("slots", "kept"))  # (K, S)
        scores = torch.cat(self.triplet_scores(), 1)
        must = protected(rule.direction, scores, kept, rule.exchange)
        chosen = choose(scores, slots, self.cost_budget(step), self.costs(), self.bounds(), must)
        for site, keep in zip(sites, chosen.split([site.slots.shape[1] for site in sites], 1), strict=True):
            site.kept.copy_(keep)
            site.project()

    def triplet_scores(self) -> list[Tensor]:
        """(K, R) of each site: what the score says of its slots."""
        return self.score.of_slots(self.triplets())

    # -- driving -------------------------------------------------------------------------------------------------------

    def ranks(self) -> dict[str, Tensor]:
        self.warn_if_undriven()
        return super().ranks()

    def warn_if_undriven(self) -> None:
        """Says so, once, where the tensors moved but `after_step` was never called, so that nothing was allocated."""
        if self._steps_driven or self._has_warned:
            return
        now = self._norms()
        if now.is_meta or type(now) is not Tensor:  # shapes alone: nothing can have moved
            return
        if torch.allclose(now, self._untrained.to(now), rtol=1e-6, atol=0.0):  # another device rounds otherwise
            return
        self._has_warned = True
        warnings.warn(
            f"{type(self).__name__} was trained but after_step was never called, so no rank was pruned: call "
            f"adapter.after_step(step) after optimizer.step() and before zero_grad(), or give Trainer "
            f"callbacks=[variants.AdapterCallback(adapter)]",
            stacklevel=3,
        )

    def _before_forward(self, model: nn.Module, args: tuple) -> None:
        if model.training and torch.is_grad_enabled():
            self.warn_if_undriven()


def check_phases(warmup_steps: int, final_steps: int, total: int) -> None:
    """
    Raises:
        ValueError: no step is left between warm-up and final phase.
    """
    if warmup_steps + final_steps >= total:
        raise ValueError(
            f"warmup_steps = {warmup_steps} and final_steps = {final_steps} leave no step to prune in a run of {total}: "
            f"their sum must be below {total}"
        )
