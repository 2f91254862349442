"""Ranks for each site out of a short probe, as PEFT takes them: what `rankwise suggest` says.

Each probe is the measure of a method that places rank before training, at a total of ranks that is met exactly:

    gradient     mean |W * dL/dW| over a few batches, by sqrt(m + n): GoRA's (variants/gora.py)
    activation   the share of its inputs' variance that each direction explains: EVA's (variants/eva.py)
    spectral     the stable rank of the pre-trained weight: no data (variants/stable_rank.py)

A seed draws which rows are measured and the head that the loss goes through.  The ranks of all seeds stand side by side; what
is suggested is their mean, rounded by the largest remainder.  Nothing is trained.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
from rankwise import variants
from rankwise.experiments import models
from rankwise.experiments.config import Training
from rankwise.experiments.tasks import Task
from rankwise.experiments.training.pack import Pack
from rankwise.experiments.training.trainer import Trainer
from rankwise.variants.adapter.linears import size_of
from rankwise.variants.files.state import pattern_of
from rankwise.variants.settings import check

PROBES = {"gradient": "gora", "activation": "eva", "spectral": "stable-rank"}
OWN = {"gora": {"rounding": "exact", "least_rank": 0}, "eva": {}, "stable-rank": {}}  # settings that a probe's method needs


@dataclass(frozen=True)
class Suggestion:
    """Ranks of each site.

    of_seeds: seed -> site -> rank; one seed where the probe reads no data.  ranks: their mean, of the same total.
    shapes: site -> (O, I).
    """

    probe: str
    budget: int
    scale: float
    of_seeds: dict[int, dict[str, int]]
    ranks: dict[str, int]
    shapes: dict[str, tuple[int, int]]

    @property
    def parameters(self) -> int:
        return sum(rank * sum(self.shapes[site]) for site, rank in self.ranks.items())

    def as_peft(self) -> dict:
        """What LoraConfig is given: a site without a rank is no target, and every site has the scale alpha/r."""
        kept = {site: rank for site, rank in self.ranks.items() if rank}
        common = max(set(kept.values()), key=list(kept.values()).count)
        others = {pattern_of(site, list(kept)): rank for site, rank in kept.items() if rank != common}
        return {
            "r": common,
            "lora_alpha": self.scale * common,
            "target_modules": list(kept),
            "rank_pattern": others,
            "alpha_pattern": {pattern: self.scale * rank for pattern, rank in others.items()},
        }


def suggest(
    model: str,
    task: Task,
    budget: int,
    probe: str = "gradient",
    seeds: Sequence[int] = (0, 1, 2),
    targets: str | list[str] = "all-linear",
    scale: float = 2.0,
    batches: int = 8,
    batch_size: int = 16,
    max_length: int = 128,
    device: str = "cpu",
) -> Suggestion:
    """
    Args:
        budget: ranks of all sites together.
        scale: alpha/r of every site.
        batches: of `batch_size` rows, that each seed measures.

    Raises:
        ValueError: a budget below one rank or beyond what the sites hold, or too few rows for the probe.
    """
    method = PROBES[probe]
    names, shapes, limit = _sites(model, task, targets)
    most = sum(map(min, shapes.values()))
    if not 1 <= budget <= most:
        raise ValueError(f"--budget {budget}: the {len(names)} sites hold 1 to {most:,} ranks together")
    kind = variants.method(method).load()
    seeds = seeds if kind.needs is not None else seeds[:1]
    rank = max(1, ceil(budget / len(names)))
    settings = {"rank": rank, "alpha": scale * rank, "total_rank": budget, **OWN[method]}
    if kind.needs is not None:
        settings["calibration_batches"] = batches
    training = Training(max_steps=batches, batch_size=batch_size, max_length=min(max_length, limit), precision="fp32")
    packs = [list(seeds)] if kind.packable else [[seed] for seed in seeds]
    of_seeds: dict[int, dict[str, int]] = {}
    for together in packs:
        adapter = _measured(model, task, method, settings, targets, training, together, device)
        found = adapter.ranks()
        of_seeds |= {seed: {name: int(found[name][k]) for name in names} for k, seed in enumerate(together)}
    return Suggestion(probe, budget, scale, of_seeds, mean_ranks(of_seeds, budget), shapes)


def _sites(model: str, task: Task, targets: str | list[str]) -> tuple[list[str], dict[str, tuple[int, int]], int]:
    """Names of the sites, their shapes, and the tokens that the model takes."""
    loaded, _, info = models.load(model, task)
    adapter = variants.create("lora", rank=1).attach(loaded, targets, head=info.heads)
    names = [name for name, site in adapter.named_sites() if site.has_rank]
    limit = getattr(loaded.config, "max_position_embeddings", None) or 10**6
    return names, {name: size_of(adapter.base(name)) for name in names}, limit


def _measured(
    model: str,
    task: Task,
    method: str,
    settings: dict,
    targets: str | list[str],
    training: Training,
    seeds: list[int],
    device: str,
) -> variants.Adapter:
    """The adapter as it is before its first step, with the ranks that it has placed."""
    pack = Pack(
        method=method, settings=check(method, settings), targets=targets, task=task, model=model, training=training,
        seeds=tuple(seeds), learning_rates=(1e-3,) * len(seeds), splits=(), device=torch.device(device), precision="fp32",
        quantization=None, best_epoch=False,
    )  # fmt: skip
    loaded, processor, _ = models.load(model, task)
    data = {"train": task.encode(processor, task.train_split, training.max_length)}
    if faults := models.beyond(loaded, processor, data):
        raise ValueError("\n".join(faults))
    with tempfile.TemporaryDirectory() as scratch:
        return Trainer(pack, data, Path(scratch) / "none", [Path(scratch)] * len(seeds)).adapter


def mean_ranks(of_seeds: dict[int, dict[str, int]], total: int) -> dict[str, int]:
    """The mean rank of each site over the seeds, rounded by the largest remainder to the same total."""
    names, seeds = list(next(iter(of_seeds.values()))), len(of_seeds)
    sums = {name: sum(ranks[name] for ranks in of_seeds.values()) for name in names}
    whole = {name: of_site // seeds for name, of_site in sums.items()}
    rest = sorted(names, key=lambda name: -(sums[name] % seeds))[: total - sum(whole.values())]  # stable: ties in order
    return {name: rank + (name in rest) for name, rank in whole.items()}
