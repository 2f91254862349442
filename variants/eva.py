"""EVA: LoRA that starts from the directions in which a site's inputs vary, and gives rank to the sites where few explain much.

    X = U diag(sigma) V^T       A = the first r rows of V^T, B = 0       xi_j = sigma_j^2 / sum sigma^2

X (M, I) are a site's centred inputs over the member's own calibration batches, xi the share of their variance that direction j
explains.  The budget's many greatest xi of all sites get a rank, a site at most rho r of them.  Paischer et al. 2025
(arXiv 2410.07170): incremental SVD, stopped when every direction in use has a cosine of at least tau to the batch before.

PEFT's release (peft/tuners/lora/eva.py, 0.21.2; tests/test_eva.py) divides by the whole variance; the paper's xi is
sigma_j^2 / ((M - 1) sum sigma) over the directions that are computed (ratio = "paper").  One scale for all sites is PEFT's
adjust_scaling_factors; with scaling = "alpha/sqrt(r)" PEFT's would grow with sqrt(r), this one does not.

Departures: the batches are gone through once, where PEFT repeats them until all has settled; rows wait for the next batch
where there are fewer than directions, where PEFT skips them; sites with equal inputs (query, key, value) tie, and the first
one gets the greater rank.  Padding is left out, as in PEFT; tokens without a label only with tokens = "labelled".
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.rows import Rows
from rankwise.variants.adapter.step import Calibration
from rankwise.variants.allocation.measuring import measuring, run
from rankwise.variants.allocation.placed import PlacedLoRA, Ranks
from torch import Generator, Tensor, nn

ROUNDS = 4  # of subspace iteration: peft/utils/incremental_pca.py, lowrank_niter


class EVA(PlacedLoRA):
    """K members of EVA."""

    method = "eva"
    needs = "activations"

    def measure(self, names: Sequence[str], calibration: Calibration) -> Ranks:
        settings = self.settings
        kind = Incremental if settings.decomposition == "incremental" else Exact
        rooms = self.rooms(names)
        draws = [partial(initialization.generator, seed, "eva") for seed in self.seeds]  # of no site: equal inputs tie
        directions = {n: [kind(room, settings.tau, d) for room, d in zip(rooms[n], draws, strict=True)] for n in names}
        active = {(name, k) for name in names for k in range(self.members)}
        mask: Tensor | None = None
        ranks: Ranks = {}

        def hook(name: str) -> Callable:
            def after(module: nn.Module, args: tuple, y: Tensor) -> None:
                x = args[0].detach()
                self.draw.rows.check(name, x)
                chosen = _chosen(x, mask, self.draw.rows)
                for k, rows in enumerate(self.draw.rows.by_member(x)):
                    if (name, k) in active:
                        directions[name][k].update(rows[chosen[k]].double())

            return after

        with measuring(self, False, {name: hook(name) for name in names}), torch.no_grad():
            for number, batch in enumerate(calibration.batches):
                mask = _mask(batch, settings.tokens)
                run(self, calibration, number)
                if all(one.is_ready for ones in directions.values() for one in ones):
                    ranks = self._distribute(directions)
                    active = {(n, k) for n in names for k in range(self.members) if not directions[n][k].settled(ranks[n][k])}
                    if not active:
                        break
        for name in names:
            for one in directions[name]:
                one.finish(name)
        self.measured = {name: [one.directions for one in directions[name]] for name in names}
        return self._distribute(directions)

    def _distribute(self, directions: Mapping[str, Sequence["Incremental | Exact"]]) -> Ranks:
        return self.by_worth({name: [one.worth(self.settings.ratio) for one in ones] for name, ones in directions.items()})

    def site_bounds(self, name: str) -> list[tuple[int, int]]:
        pairs = zip(super().site_bounds(name), self.uniform_ranks(name), strict=True)
        return [(least, min(most, round(self.settings.rho * rank))) for (least, most), rank in pairs]

    def start(self, name: str, module: nn.Module, ranks: list[int], measured: Any) -> tuple[list[Tensor], list[Tensor]]:
        A, B = super().start(name, module, ranks, measured)
        return (A if measured is None else [V[:rank].cpu() for V, rank in zip(measured, ranks, strict=True)]), B


class Incremental:
    """The SVD of rows that come batch after batch: of the directions so far, weighted, the new rows and the mean's move.

    Ross et al. 2008, as in scikit-learn's and PEFT's IncrementalPCA.
    """

    def __init__(self, count: int, tau: float, random: Callable[[], Generator]):
        """
        Args:
            count: directions to find; random: a generator for the subspace iteration, the same at every call.
        """
        self.count, self.tau, self.random = count, tau, random
        self.seen, self.variance = 0, 0.0  # rows, and the sum of squares about their mean
        self.mean: Tensor | None = None
        self.directions: Tensor | None = None  # (count, I)
        self.values: Tensor | None = None  # (count,) sigma
        self.stood_still: Tensor | None = None  # (count,) bool: stood still in the last step
        self.pending: list[Tensor] = []

    @property
    def is_ready(self) -> bool:
        return self.directions is not None

    def update(self, rows: Tensor) -> None:
        """rows: (N, I)."""
        self.pending.append(rows)
        rows = torch.cat(self.pending)
        if len(rows) >= self.count:
            self.pending = []
            self._update(rows)

    def _update(self, rows: Tensor) -> None:
        mean, total = rows.mean(0), self.seen + len(rows)
        centred = rows - mean
        self.variance = self.variance + centred.square().sum()
        before = self.directions
        if before is None:
            self.mean = mean
        else:
            move = (self.seen / total * len(rows)) ** 0.5 * (self.mean - mean)
            self.variance = self.variance + move.square().sum()
            self.mean = self.mean + (mean - self.mean) * (len(rows) / total)
            centred = torch.cat([self.values[:, None] * before, centred, move[None]])
        self.seen = total
        self.directions, self.values = top_directions(centred, self.count, self.random())
        still = torch.zeros(self.count, dtype=torch.bool, device=rows.device)
        self.stood_still = still if before is None else nn.functional.cosine_similarity(self.directions, before) >= self.tau

    def settled(self, rank: int) -> bool:
        """Whether the directions that a site of this rank uses have been found."""
        return bool(self.stood_still[:rank].all())

    def finish(self, name: str) -> None:
        """
        Raises:
            ValueError: too few rows came for as many directions.
        """
        if self.directions is None:
            rows = sum(len(rows) for rows in self.pending)
            raise ValueError(
                f"eva: the calibration has {rows} rows at {name} for a member, fewer than the {self.count} directions it "
                f"looks for: give more batches, or a smaller rank or rho"
            )

    def worth(self, ratio: str) -> Tensor:
        """(count,): xi of each direction."""
        whole = self.variance if ratio == "release" else (self.seen - 1) * self.values.sum()
        return (self.values.square() / whole).nan_to_num(0.0)  # inputs that never vary explain nothing


class Exact(Incremental):
    """The same of all rows at once, from their second moments (I, I)."""

    moments: Tensor | float = 0.0

    @property
    def is_ready(self) -> bool:
        return False  # until all batches are there

    def _update(self, rows: Tensor) -> None:
        self.mean = rows.sum(0) + (0.0 if self.mean is None else self.mean)  # the sum, until all are there
        self.moments = self.moments + rows.mT @ rows
        self.seen += len(rows)

    def finish(self, name: str) -> None:
        if self.seen:
            rest = torch.cat(self.pending) if self.pending else self.mean.new_zeros(0, len(self.mean))
            self._update(rest)
            mean = self.mean / self.seen
            squares, vectors = torch.linalg.eigh(self.moments - self.seen * mean[:, None] * mean)
            self.variance = squares.clamp_min(0).sum()
            self.values = squares.flip(0)[: self.count].clamp_min(0).sqrt()
            self.directions = signed(vectors.mT.flip(0)[: self.count])
            del self.moments
        super().finish(name)


def top_directions(X: Tensor, count: int, random: Generator) -> tuple[Tensor, Tensor]:
    """The first `count` right singular vectors (count, I) and values of X (N, I).

    By subspace iteration with twice as many directions (Halko et al. 2011, alg. 4.4 and 5.1), which is exact where X has no
    more rows or columns than that.
    """
    width = 2 * count
    if width < min(X.shape):
        Q = torch.randn(X.shape[1], width, generator=random, dtype=torch.float64).to(X)
        Q = torch.linalg.qr(X @ Q).Q
        for _ in range(ROUNDS):
            Q = torch.linalg.qr(X @ torch.linalg.qr(X.mT @ Q).Q).Q
        X = Q.mT @ X
    _, values, vectors = torch.linalg.svd(X, full_matrices=False)
    return signed(vectors[:count]), values[:count]


def signed(vectors: Tensor) -> Tensor:
    """Rows with the sign that makes their greatest element positive, as PEFT's: a singular vector has none of its own."""
    greatest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return torch.where(greatest < 0, -vectors, vectors)


def _mask(batch: Any, tokens: str) -> Tensor | None:
    """(rows, L) bool: the tokens whose inputs count; None where all do."""
    values = batch if isinstance(batch, Mapping) else {}
    mask = values.get("attention_mask")
    mask = None if mask is None else mask.bool()
    if tokens == "unpadded":
        return mask
    labels = values.get("labels")
    if labels is None or labels.dim() != 2 or (mask is not None and labels.shape != mask.shape):
        shape = None if labels is None else tuple(labels.shape)
        raise ValueError(
            f'eva: tokens = "labelled" needs labels of each token in the batch, and these are {shape}: take it out'
        )
    return labels != -100 if mask is None else mask & (labels != -100)


def _chosen(x: Tensor, mask: Tensor | None, rows: Rows) -> Tensor:
    """(K, N) bool: which rows of an input (K*N, ..., I) count; all where the input has not one row for each token."""
    if mask is None or x.dim() != 3 or mask.shape != x.shape[:2]:
        mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    return rows.mask_by_member(mask.to(x.device))
