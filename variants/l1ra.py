"""L1RA: LoRA with a gate for each rank under an L1 norm; ranks whose gates reach zero are handed to other sites.

    y = W x + s B (c * A x) + b        s = alpha / initial_rank
    c <- min(max(c - eta_t lambda, 0), 1)        after each step of the optimizer

Here c (K, R) is E, the coefficients of the slots, and starts at 1; A (K, R, I) ~ N(0, 1/initial_rank^2), B (K, O, R) = 0.  The
step is the proximal one of lambda |c| on [0, 1], decoupled from the gradient's; eta_t is the rate of the gates in force, so a
trainer has to say it (`Step.learning_rates`).  Every `interval` steps after the warm-up:

    1. of each site the ranks with c < 1e-10 go, but for one
    2. those that were freed are handed on one by one, in turn, to the sites that lost none, in falling order of their least c
    3. a new rank has c = 1, a row of A ~ N(0, 1/initial_rank^2), and a column of B at zero

L1RA, arXiv 2509.04884; read in the release, raul-singh/L1RA src/l1ra/tuner/{layer,model,config}.py and trainer/trainer.py.

Departures: the release clamps c where it is used, in each forward pass; the fork of bitsandbytes with its optimizer AdamE was
not found, so lambda's step is by the rate that the trainer gives the gates; they keep 2e-2 there and follow the schedule of
all others here; it makes a new optimizer after each exchange, here the averages of ranks that stay go on; where every site
lost ranks it drops those that were freed, here all sites then take them in turn, so that the total stays; the last phase with
fixed ranks is ours.
"""

from collections.abc import Sequence

import torch
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.step import Group, Step
from rankwise.variants.allocation.exchanging import ExchangingAdapter, Plan
from rankwise.variants.allocation.sites import Triplets, with_gates_apart
from rankwise.variants.lowrank.site import LowRank
from torch import Tensor, nn

ZERO = 1e-10  # the release's prune_threshold


class L1RA(ExchangingAdapter):
    """K members of L1RA."""

    method = "l1ra"

    def make_low_rank(self, name: str, module: nn.Module) -> LowRank:
        site = self.make_allocated(name, module, Triplets)
        with torch.no_grad():
            site.E.copy_(site.slots)
        return site

    def starts(self, name: str, module: nn.Module, ranks: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        A, B = super().starts(name, module, ranks)
        draws = [initialization.generator(seed, name, "A") for seed in self.seeds]
        A = [initialization.gaussian(len(a), a.shape[1], random) for a, random in zip(A, draws, strict=True)]
        return A, [torch.zeros_like(b) for b in B]

    def parameter_groups(self) -> list[Group]:
        return with_gates_apart(super().parameter_groups(), self.triplets(), self.settings.gate_lr_ratio)

    # -- the step ----------------------------------------------------------------------------------------------------

    def after_step(self, step: Step) -> None:
        """Shrinks the gates into [0, 1]; hands ranks on where that is due."""
        self._shrink_gates(step)
        super().after_step(step)

    @torch.no_grad()
    def _shrink_gates(self, step: Step) -> None:
        """
        Raises:
            ValueError: nobody said the rate that the L1 norm acts by.
        """
        if step.learning_rates is None:
            raise ValueError(
                "the L1 norm of the gates acts by the rate of each step: give Step(index, total, learning_rates=(K,) tensor)"
            )
        shrinkage = step.learning_rates.to(self.device) * self.settings.gate_lr_ratio * self.settings.sparsity  # (K,)
        if step.taken is not None:  # a member whose step did not count
            shrinkage = shrinkage * step.taken.to(shrinkage)
        for site in self.triplets():
            site.E.copy_((site.E - shrinkage.to(site.E)[:, None]).clamp(0, 1))

    def plans(self, step: Step) -> list[Plan] | None:
        gates = [site.E.tolist() for site in self.triplets()]
        plans = []
        for k, ranks in enumerate(self.kept_ranks()):
            plans.append(self._plan([gates[s][k][:rank] for s, rank in enumerate(ranks)], self.totals()[0][k]))
        return plans if any(cut or any(added) for cut, added in plans) else None

    def _plan(self, gates: Sequence[Sequence[float]], limit: int) -> Plan:
        """What one member hands on, from the gates of its ranks."""
        cut: set[tuple[int, int]] = set()
        for s, (own, site) in enumerate(zip(gates, self.triplets(), strict=True)):
            spare = len(own) - max(self.site_bounds(site.name)[0], 1)
            zero = [j for j, gate in enumerate(own) if gate < ZERO]
            cut |= {(s, j) for j in zero[: max(spare, 0)]}
        losers = {s for s, _ in cut}
        left = [len(own) - sum(at == s for at, _ in cut) for s, own in enumerate(gates)]
        open_sites = sorted((s for s, own in enumerate(gates) if own), key=lambda s: -min(gates[s]))
        takers = [s for s in open_sites if s not in losers]
        prices = [self._price(site) for site in self.triplets()]
        paid = (limit - sum(p * rank for p, rank in zip(prices, left, strict=True))) // min(prices)
        turns = len(cut) if self.settings.cost == "rank" else paid  # no site takes more
        return cut, self.added(takers * turns + open_sites * turns, left, len(cut), limit)

    def start_slot(self, site: Triplets, k: int, j: int, step: Step) -> None:
        """A at random, B at zero, its gate open."""
        random = initialization.generator(self.seeds[k], site.name, "A", f"step {step.index}, slot {j}")
        rank = self.site_ranks(site.name, self.settings.initial_rank)[k]
        site.A[k, j] = torch.empty(site.A.shape[2]).normal_(generator=random).to(site.A) / rank
        site.B[k, :, j] = 0
        site.E[k, j] = 1
