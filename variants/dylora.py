"""DyLoRA: low-rank factors that are trained to be used at any rank; the first b slots are the adapter of rank b.

    y = W x + alpha/b  B[:, :b] A[:b] x + b         b drawn anew at each step, the same at every site

A (K, R, I) starts by Kaiming and B (K, O, R) at zero.  Valipour et al. 2023 (arXiv 2210.07558): eq. (5) and (7) the forward
pass, (9) the loss, which is that of the truncated model alone, (10) the update.  b is drawn by (member's seed, step) from
least_rank .. rank, all micro-batches of a step share it; outside of a training step the rank in force is that of `at_rank`, the
full one at first.  sampling = "geometric": P(b) ~ (1 - p)^(b - least_rank) with the paper's p = 0.15, truncated and normalised.
A site with fewer than b slots (rank_pattern) uses all of its own.

Which slots a step moves is `update`, for eq. (10) is a plain gradient step and an optimizer with momentum or decay moves
slots that have no gradient too: "nested", 1 .. b; "frozen", slot b alone, the others take part in the forward pass as
constants.  Slots that a step is not to move are put back after it; their running averages go on as after a gradient of zero.
"frozen-release": the gradient reaches slot b alone, and AdamW moves the others by momentum and decay, as in the release
(huawei-noah/Efficient-NLP, DyLoRA/loralib), which knows no other mode.

Departures: paper and release draw from 1 and uniformly, from one generator; the release scales both factors by sqrt(r/b), which
is alpha/b in all.  Read in a digest of paper and release: the normalisation of the geometric distribution is ours.
"""

import contextlib
from collections.abc import Sequence

import torch
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.step import Step
from rankwise.variants.lora import LoRA
from rankwise.variants.lowrank.site import LowRank
from rankwise.variants.settings import per_member
from torch import Tensor, nn

P = 0.15  # of the geometric distribution: the paper's


class Nested(LowRank):
    """A low-rank site whose first slots are an adapter of their own.

    The rank in force stands in `slots` and `scale`, so that all that reads those sees the smaller adapter; the rank drawn for
    a step acts in the forward pass of that step alone.
    """

    def __init__(self, *args, scales: Tensor, update: str, **kwargs):
        """
        Args:
            scales: (K, R) the scale at each rank, 1 first.
            update: the slots that get a gradient: "nested", all that act; else only the last of them.
        """
        super().__init__(*args, **kwargs)
        self.register_buffer("scales", scales.to(self.scale), persistent=False)
        self.update = update
        self.drawn: Tensor | None = None  # (K,) the rank of the step that is being taken

    def full(self) -> Tensor:
        """(K,) slots that a member has values for, whatever the rank in force."""
        return self.given.clamp_max(self.slots.shape[1])

    physical = full

    def rank(self) -> Tensor:
        """(K,) slots in force."""
        return self.slots.sum(1).long()

    def first(self, rank: Tensor) -> Tensor:
        """(K, R) ones at the first slots of each member, as many as there are up to `rank` (K,)."""
        return self._order() < torch.minimum(rank, self.full())[:, None]

    def last(self, rank: Tensor) -> Tensor:
        """(K, R) true at the last of them."""
        return self._order() == torch.minimum(rank, self.full())[:, None] - 1

    def _order(self) -> Tensor:
        return torch.arange(self.slots.shape[1], device=self.slots.device)

    def scale_at(self, rank: Tensor) -> Tensor:
        """(K,) alpha/b."""
        return self.scales.gather(1, torch.minimum(rank, self.full())[:, None] - 1)[:, 0]

    @torch.no_grad()
    def use(self, rank: Tensor) -> None:
        """The first slots of each member are in force from now on, (K,)."""
        self.slots.copy_(self.first(rank))
        self.scale.copy_(self.scale_at(rank))

    @property
    def acting(self) -> Tensor | None:
        """(K,) the rank drawn for this forward pass; None where it is the one in force."""
        return self.drawn if self.training else None

    def coefficients(self) -> Tensor:
        drawn = self.acting
        return super().coefficients() if drawn is None else self.first(drawn) * self.scale_at(drawn)[:, None]

    def version(self) -> tuple:
        return *super().version(), self.slots._version, self.acting is None  # the step, which is in it, tells what was drawn

    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        A, B, coefficients = super().operands()
        if self.acting is None or self.update == "nested":
            return A, B, coefficients
        last = self.last(self.acting)
        return torch.where(last[:, :, None], A, A.detach()), torch.where(last[:, None], B, B.detach()), coefficients

    @torch.no_grad()
    def clear_missing_slots(self) -> None:
        exists = self.first(self.full())
        self.A *= exists[:, :, None]
        self.B *= exists[:, None]


class DyLoRA(LoRA):
    """K members of DyLoRA."""

    method = "dylora"
    nested = True
    _before: list[tuple[Tensor, Tensor]] | None = None  # A and B of each site as the step that is being taken finds them

    @property
    def exact_gradient(self) -> bool:
        """A frozen slot takes part in the forward pass and gets no gradient."""
        return self.settings.update == "nested"

    def make_low_rank(self, name: str, module: nn.Module) -> Nested:
        (A, B), *others = self.start(name, module)
        ranks = range(1, max(map(len, A)) + 1)
        scales = torch.tensor([self.site_scales(name, [rank] * self.members) for rank in ranks], dtype=torch.float64).mT
        return Nested(name, module, (A, B), *others, scales=scales, update=self.settings.update)

    # -- the rank of a step ----------------------------------------------------------------------------------------------

    def full_ranks(self) -> list[int]:
        """The most rank that each member can be used at: that of its largest site."""
        most_ranks = [1] * self.members
        for site in self.low_rank_sites():
            ranks = self.site_ranks(site.name, self.settings.rank)
            most_ranks = [max(most, min(rank, site.slots.shape[1])) for most, rank in zip(most_ranks, ranks, strict=True)]
        return most_ranks

    def drawn_ranks(self, index: int) -> list[int]:
        """The rank b that each member draws for step `index`."""
        keep = 1 - P if self.settings.sampling == "geometric" else 1.0
        drawn = []
        for seed, ranks in zip(self.seeds, self.nested_ranks(), strict=True):
            weights = torch.tensor([keep**i for i in range(len(ranks))], dtype=torch.float64)
            drawn.append(ranks[int(weights.multinomial(1, generator=initialization.generator(seed, "rank", str(index))))])
        return drawn

    def begin(self, step: Step, micro_batch: int = 0, training: bool = True) -> None:
        super().begin(step, micro_batch, training)
        drawn = torch.tensor(self.drawn_ranks(step.index), device=self.device) if training else None
        for site in self.low_rank_sites():
            site.drawn = drawn

    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        if self.settings.update != "frozen-release":
            self._before = [(site.A.clone(), site.B.clone()) for site in self.low_rank_sites()]

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Puts back the slots that this step was not to move; no rank is drawn any more.

        Raises:
            ValueError: begin or before_step was not called, so that it is not known which slots those are, or what they were.
        """
        if self.settings.update != "frozen-release":
            if self._before is None or any(site.drawn is None for site in self.low_rank_sites()):
                raise ValueError(
                    "after_step without begin and before_step: call adapter.begin(step) before the forward pass and "
                    "adapter.before_step(step) before optimizer.step()"
                )
            for site, (A, B) in zip(self.low_rank_sites(), self._before, strict=True):
                moves = site.first(site.drawn) if site.update == "nested" else site.last(site.drawn)
                site.A.copy_(torch.where(moves[:, :, None], site.A, A))
                site.B.copy_(torch.where(moves[:, None], site.B, B))
        self._before = None
        for site in self.low_rank_sites():
            site.drawn = None
        super().after_step(step)

    # -- the rank in force -------------------------------------------------------------------------------------------------

    def nested_ranks(self) -> list[range]:
        """The ranks that each member was trained to be used at."""
        return [range(min(self.settings.least_rank, most), most + 1) for most in self.full_ranks()]

    @torch.no_grad()
    def at_rank(self, rank: Sequence[int] | int | None) -> contextlib.AbstractContextManager:
        """Uses the first `rank` slots with alpha/rank from now on: in the model, merge, delta, ranks and every file.

            adapter.at_rank(2)             # until the next call; None: the full rank
            with adapter.at_rank(2): ...   # and back to what it was before

        Training goes on over all ranks.  A member or site with fewer slots uses all of its own.

        Args:
            rank: one number, or one for each member.

        Raises:
            ValueError: below 1, above every member's rank, or merged.
        """
        if self.is_merged:
            raise ValueError(f"{self.method} is merged: call unmerge() before at_rank()")
        full = self.full_ranks()
        ranks = full if rank is None else per_member(rank if isinstance(rank, int) else list(rank), self.members, "rank")
        most = [max(full)] * self.members if isinstance(rank, int) else full
        for wanted, limit in zip(ranks, most, strict=True):
            if not 1 <= wanted <= limit:
                raise ValueError(f"rank = {wanted}: this adapter can be used at ranks 1 to {limit}")
        before = [(site, site.slots.clone(), site.scale.clone()) for site in self.low_rank_sites()]
        for site in self.low_rank_sites():
            site.use(torch.tensor(ranks, device=self.device))
        back = contextlib.ExitStack()
        back.callback(_restore, before)
        return back


@torch.no_grad()
def _restore(before: list[tuple[Nested, Tensor, Tensor]]) -> None:
    for site, slots, scale in before:
        site.slots.copy_(slots)
        site.scale.copy_(scale)
