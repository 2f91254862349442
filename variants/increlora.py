"""IncreLoRA: start at rank one and add ranks where the update matters most.

    y = W x + s B diag(E) A x + b        s = alpha / (active rank of the site now)

A (K, R, I), B (K, O, R) ~ N(0, 0.02^2), E (K, R) = 0.  Each site holds `added_rank` triplets in reserve, which are in the
update but not in its rank: with advance learning their E is 1e-5 and fixed, so that A and B learn before they count.
The score of a site, with G = dL/ddW of the last micro-batch, the task's loss alone, before clipping:

    S = sum |dW * G| / sqrt(O I)      Ibar = b1 Ibar + (1 - b1) S      U = b2 U + (1 - b2) |S - Ibar|      score = Ibar U

At an allocation the sites of the highest scores grow: their reserves become active (E trained from where it is) and new
reserves are made; when the target is reached the E of what is left in reserve is zero.  A triplet has a clock of its own:
its learning rate rises over `rise_steps` and falls to zero at the end, and its averages start anew.  Penalty: AdaLoRA's,
reserves included.  Zhang et al. 2023 (arXiv 2308.12043); read in the release, FeiyuZhang98/IncreLoRA
loralib/loralib/increlora.py, NLU/src/transformers/{trainer,optimization}.py.

Departures: the target is met exactly, the last round clipped, ties in site order (the release can go beyond and then never
stops its reserves; overshoot = true); it grows after step t where t > warmup_steps and t is a multiple of the interval,
counted from one; s lacks the release's + 1e-5; the round that reaches the target makes no further reserves; without
top_sites the totals follow a schedule; with cost = "parameters" sites are taken by score per parameter.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from rankwise.variants.adalora import AdaLoRA
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.draws import drop
from rankwise.variants.adapter.step import Group, Step
from rankwise.variants.allocation.scores import Score
from rankwise.variants.allocation.sites import Triplets
from rankwise.variants.lowrank.slots import NEW, NONE
from torch import Tensor, nn

TINY = 1e-5  # E of a triplet in reserve, with advance learning


class Reserving(Triplets):
    """Triplets of which those that are not kept are held in reserve; scores the site while it is listening."""

    slot_axes = Triplets.slot_axes | {"born": 1, "active_since": 1, "pace_A": 1, "pace_B": 2, "pace_E": 1}
    learns_ahead = True
    listening = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        K, R = self.slots.shape
        self.register_buffer("born", torch.zeros_like(self.slots))  # (K, R) the step after which A and B began to learn
        self.register_buffer("active_since", torch.zeros_like(self.slots))  # (K, R) the same of E
        for name, shape in (("pace_A", (K, R, 1)), ("pace_B", (K, 1, R)), ("pace_E", (K, R))):  # of the learning rate
            self.register_buffer(name, self.slots.new_ones(shape), persistent=False)
        self.sensitivity: Tensor | None = None  # (K,) S of the last micro-batch

    def coefficients(self) -> Tensor:
        return torch.where(self.kept, self.E, self.E.detach()) * (self.slots * self.scale[:, None])

    def project(self) -> None:
        """What is not kept is in reserve, and stays."""

    def live(self) -> Tensor:
        """(K,) triplets that act on the output, those in reserve too."""
        return ((self.E != 0) & self.slots.bool()).sum(1)

    def listen(self, on: bool) -> None:
        """A micro-batch begins; whether its backward pass is to score this site."""
        self.listening, self.sensitivity = on, None
        self._calls = self._heard = 0
        self._gradient: Tensor | None = None

    def product(self, y: Tensor, x: Tensor, rate: float) -> Tensor:
        if not self.listening or not self.training:
            return super().product(y, x, rate)
        x = drop(x, rate, self.draw, self.name, self.first_row)
        y = super().product(y, x, 0.0)
        # Reentrant checkpointing runs the first pass without gradients: there the second is the one to be heard.
        if y.requires_grad and not (self.draw.is_recomputing and self._calls):
            self._calls += 1
            y.register_hook(partial(self._hear, x.detach()))
        return y

    def _hear(self, x: Tensor, g: Tensor) -> None:
        """Adds g^T x to dL/ddW; S once every call of this micro-batch has been heard."""
        g, x = (self.draw.rows.fold(t.detach().to(self.A.dtype)) for t in (g, x))
        gradient = torch.bmm(g.mT, x)  # (K, O, I)
        self._gradient = gradient if self._gradient is None else self._gradient + gradient
        self._heard += 1
        if self._heard == self._calls:
            change = torch.bmm(self.B * self.coefficients()[:, None], self.A)
            self.sensitivity = change.mul_(self.draw.rows.summed(self._gradient)).abs_().sum((1, 2)).detach()
            self._gradient = None


class WeightSensitivity(Score):
    """Ibar U of each site, from S = sum |dW * dL/ddW|; see above."""

    needs_gradient = True

    def __init__(self, sites: Sequence[nn.Module], seeds: Sequence[int], beta1: float, beta2: float):
        super().__init__(sites, seeds, beta1, beta2)
        self.register_buffer("smoothed", sites[0].slots.new_zeros(len(seeds), len(sites)))  # (K, S)
        self.register_buffer("uncertainty", torch.zeros_like(self.smoothed))
        self.divisors = [1.0] * len(sites)

    @torch.no_grad()
    def update(self, sites: Sequence[nn.Module], counted: Bool[Tensor, " K"]) -> None:
        for s, (site, divisor) in enumerate(zip(sites, self.divisors, strict=True)):
            if site.sensitivity is None:
                continue
            now = site.sensitivity / divisor
            weight = (counted & now.isfinite()).to(now.dtype)
            now = now.nan_to_num(0.0, 0.0, 0.0)
            self.smoothed[:, s].lerp_(now, (1 - self.beta1) * weight)
            self.uncertainty[:, s].lerp_((now - self.smoothed[:, s]).abs(), (1 - self.beta2) * weight)

    def of_sites(self) -> Float[Tensor, "K S"]:
        return self.smoothed * self.uncertainty

    def of_slots(self, sites: Sequence[nn.Module]) -> list[Tensor]:
        return [score[:, None].expand_as(site.slots) for site, score in zip(sites, self.of_sites().unbind(1), strict=True)]


class IncreLoRA(AdaLoRA):
    """K members of IncreLoRA."""

    method = "increlora"
    peft_type = "LORA"
    budget_moves = 1
    scores = {"weight-sensitivity": WeightSensitivity}

    def make_low_rank(self, name: str, module: nn.Module) -> Reserving:
        return self.make_allocated(name, module, Reserving)

    def inserted(self) -> None:
        super().inserted()
        power = 0.5 if self.settings.score_form == "release" else 1.0
        self.score.divisors = [(site.A.shape[2] * site.B.shape[1]) ** power for site in self.triplets()]
        for site in self.triplets():
            site.learns_ahead = self.settings.advance_learning

    def _check_budget(self, sites: int) -> None:
        """
        Raises:
            ValueError: a target below the start, or bounds that leave no room for it.
        """
        unit = "parameters" if self.settings.cost == "parameters" else "triplets"
        for k, (start, end) in enumerate(zip(*self.totals(), strict=True)):
            if end < start:
                raise ValueError(
                    f"the target of {end} {unit} is below the {start} at the start: IncreLoRA grows, so raise target_rank or "
                    f"lower initial_rank"
                )
            room = 0
            for site in self.triplets():
                rank, most = self.site_ranks(site.name, self.settings.initial_rank)[k], self.site_bounds(site.name)[1]
                if most is not None and rank > most:
                    raise ValueError(f"{site.name} starts at rank {rank}, above its most rank {most}: lower initial_rank")
                room += end if most is None else most
            if self.settings.cost == "rank" and room < end:
                raise ValueError(f"the bounds leave room for {room} ranks of a budget of {end}: raise most_rank")

    def loaded(self, total_steps: int | None) -> None:
        super().loaded(total_steps)
        self._is_growing: bool | None = None

    def penalized(self, site: Reserving) -> tuple[Tensor, Tensor]:
        """A and B^T; reserves that do not learn ahead get no gradient."""
        if site.learns_ahead:
            return site.A, site.B.mT
        kept = site.kept[:, :, None]
        return torch.where(kept, site.A, site.A.detach()), torch.where(kept, site.B.mT, site.B.mT.detach())

    def parameter_groups(self) -> list[Group]:
        """A, B and E with the paces of their slots; the head and magnitudes as they are."""
        paced = {id(p): pace for site in self.triplets() for p, pace in zip(site.factors(), self._paces(site), strict=True)}
        rest = [replace(g, params=[p for p in g.params if id(p) not in paced]) for g in super().parameter_groups()]
        triplets = [p for site in self.triplets() for p in site.factors()]
        return [*(group for group in rest if group.params), Group(triplets, lr_scale=[paced[id(p)] for p in triplets])]

    @staticmethod
    def _paces(site: Reserving) -> list[Tensor]:
        return [site.pace_A, site.pace_B, site.pace_E]

    # -- the budget ------------------------------------------------------------------------------------------------

    def cost_budget(self, step: Step) -> Tensor:
        """(K,): what the active ranks may cost after this step: by rounds of so many sites, or by the schedule."""
        settings = self.settings
        if settings.top_sites is None or settings.cost == "parameters":
            return super().cost_budget(step) if settings.top_sites is None else torch.tensor(self.totals()[1])
        last = min(step.index, step.total - settings.final_steps)
        rounds = max(last // settings.interval - settings.warmup_steps // settings.interval, 0)
        grown = rounds * settings.top_sites * settings.added_rank
        return torch.tensor([min(start + grown, end) for start, end in zip(*self.totals(), strict=True)])

    def budget(self, step: Step) -> Tensor | None:
        return None if self.settings.overshoot else super().budget(step)

    def _prices(self) -> list[int]:
        return [1 if self.settings.cost == "rank" else self._price(site) for site in self.triplets()]

    def _mosts(self) -> list[float]:
        mosts = [self.site_bounds(site.name)[1] for site in self.triplets()]
        return [math.inf if most is None else most for most in mosts]

    def _active(self) -> list[list[int]]:
        """For each member the active rank of each site."""
        return torch.stack([site.rank() for site in self.triplets()], 1).tolist()

    def _is_done(self, ranks: Sequence[int], target: int) -> bool:
        """Whether a member of these ranks has no room left for a rank."""
        prices, mosts = self._prices(), self._mosts()
        total = sum(p * r for p, r in zip(prices, ranks, strict=True))
        return not any(r < most and total + p <= target for p, r, most in zip(prices, ranks, mosts, strict=True))

    # -- the step ----------------------------------------------------------------------------------------------------

    def begin(self, step: Step, micro_batch: int = 0, training: bool = True) -> None:
        super().begin(step, micro_batch, training)
        final = step.total - self.settings.final_steps
        if training:
            self._check_rounds(final)
            if self._is_growing is None:
                pairs = zip(self._active(), self.totals()[1], strict=True)
                self._is_growing = not all(self._is_done(ranks, target) for ranks, target in pairs)
        for site in self.triplets():
            site.listen(training and self._is_growing and step.index < final)

    def _check_rounds(self, final: int) -> None:
        """
        Raises:
            ValueError: rounds of top_sites that do not reach the target before the final phase.
        """
        settings = self.settings
        if settings.top_sites is None or settings.cost == "parameters":
            return
        needed = max(end - start for start, end in zip(*self.totals(), strict=True))
        needed = -(-needed // (settings.top_sites * settings.added_rank))
        there = final // settings.interval - settings.warmup_steps // settings.interval
        if needed > there:
            raise ValueError(
                f"top_sites = {settings.top_sites} takes {needed} rounds to the target and there are {there}: raise it, or "
                f"shorten warmup_steps, final_steps or interval"
            )

    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        """Every triplet at the rate of its own clock."""
        for site in self.triplets():
            learns = site.kept | site.learns_ahead
            A, E = self._pace(site.born, step) * learns, self._pace(site.active_since, step) * site.kept
            site.pace_A.copy_(A[:, :, None])
            site.pace_B.copy_(A[:, None] * self.settings.lr_ratio)
            site.pace_E.copy_(E)

    def _pace(self, since: Tensor, step: Step) -> Tensor:
        """(K, R): the own learning rate of slots that began after step `since`, over that of all others; 1 since the start.

        u = steps since then: u / rise up to `rise`, then a straight line that would reach zero one step after the last.
        """
        rise = self.settings.interval if self.settings.rise_steps is None else self.settings.rise_steps
        if not rise or not step.factor:
            return torch.ones_like(since)
        u, left = step.index - since, step.total - since
        own = torch.where(u <= rise, u / rise, (left - u + 1) / (left - rise).clamp_min(1))
        return torch.where(since > 0, own / step.factor, 1.0)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        if step.index == 1:  # the first reserves; so the model is unchanged at the start
            self._add([[0] * len(self.triplets()) for _ in range(self.members)], step)
        super().after_step(step)

    def _allocate(self, step: Step) -> None:
        if not self._is_growing or (self.settings.top_sites is not None and not self.is_due(step)):
            return
        limits, scores, ranks = self.cost_budget(step).tolist(), self.score.of_sites().tolist(), self._active()
        added = [self._round(*member) for member in zip(scores, ranks, limits, self.totals()[1], strict=True)]
        if any(any(member) for member in added):
            self._add(added, step)

    def _round(self, scores: Sequence[float], ranks: Sequence[int], limit: int, target: int) -> list[int]:
        """Ranks that each site of one member grows by: `added_rank` at a time in the order of scores, within the limit."""
        settings, prices, mosts = self.settings, self._prices(), self._mosts()
        total, added = sum(p * r for p, r in zip(prices, ranks, strict=True)), [0] * len(ranks)
        if settings.overshoot:
            top = min(settings.top_sites, target - total, len(ranks))
            return [settings.added_rank if top > 0 and score >= sorted(scores)[-top] else 0 for score in scores]
        left = math.inf if settings.top_sites is None else settings.top_sites * settings.added_rank
        order = sorted(range(len(ranks)), key=lambda s: -scores[s] / prices[s])
        grew = True
        while grew:  # once round is enough unless there are fewer sites than the limit asks for
            grew = False
            for s in order:
                more = min(settings.added_rank, mosts[s] - ranks[s] - added[s], (limit - total) // prices[s], left)
                if more > 0:
                    added[s], total, left, grew = added[s] + more, total + more * prices[s], left - more, True
        return added

    def _add(self, added: Sequence[Sequence[int]], step: Step) -> None:
        """So many of each member's reserves become active at each site, new ones are made, and the scale follows."""
        settings, sites, before = self.settings, self.triplets(), self._active()
        after = [[r + a for r, a in zip(*pair, strict=True)] for pair in zip(before, added, strict=True)]
        done = [self._is_done(ranks, target) for ranks, target in zip(after, self.totals()[1], strict=True)]
        if settings.overshoot:  # nothing ends where the total jumped over the target
            done = [sum(ranks) == target for ranks, target in zip(after, self.totals()[1], strict=True)]
        old = [site.physical().tolist() for site in sites]
        sizes, places = [], []
        for s, site in enumerate(sites):
            size = []
            for k in range(self.members):
                wanted = after[k][s] + (0 if done[k] else settings.added_rank)
                size.append(max(old[s][k], wanted) if added[k][s] or not any(added[k]) else old[s][k])
            order = [[*range(n), *[NEW] * (m - n), *[NONE] * (max(size) - m)] for n, m in zip(old[s], size, strict=True)]
            sizes.append(size)
            places.append(torch.tensor(order, device=site.slots.device))
        self.resize(places)
        for s, site in enumerate(sites):
            fresh = torch.zeros_like(site.kept)
            for k, seed in enumerate(self.seeds):
                fresh[k, before[k][s] : after[k][s]] = True
                site.kept[k, : after[k][s]] = True
                site.slots[k, : sizes[s][k]] = 1
                for j in range(old[s][k], sizes[s][k]):
                    draws = [initialization.generator(seed, site.name, part, f"slot {j}") for part in "AB"]
                    site.A[k, j] = initialization.triplet(1, site.A.shape[2], draws[0])[0].to(site.A)
                    site.B[k, :, j] = initialization.triplet(1, site.B.shape[1], draws[1])[0].to(site.B)
                    site.E[k, j] = TINY if site.learns_ahead else 0.0
                    site.born[k, j] = step.index
                if done[k]:
                    site.E[k, after[k][s] :] = 0
            site.active_since[fresh] = step.index
            if not site.learns_ahead:
                site.born[fresh] = step.index
            site.forget(fresh, None if not site.learns_ahead else ["E"])
            for k in range(self.members):
                site.scale[k] = self.site_scales(site.name, [row[s] for row in after])[k]
        self._is_growing = None
