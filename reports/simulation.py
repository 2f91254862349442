"""Error rate and power of each design of a comparison, on simulated methods.

A simulated method has K rates one step apart around its centre.  Its score in sd of a run is

    y[k, s] = shift - c (k - K // 2 - o)^2 + seed[s] + noise[k, s]         selection: y + noise of sd 0.5

where half of the variance is the seed's, which paired methods share, c is the steepness (what one step away from the best rate
costs), and o puts the optimum between two rates.  Noise is normal, or Student's t with 3 degrees of freedom at the same sd.  A
collapse takes 10 sd from a run; the others of that method are raised so that its mean stays.

Designs: "chosen-rate" is the older one: each method's rate is chosen by some of the final seeds, and the sign-flip test then
takes these rates as given.  "shared-rate" and "whole-curve" are those of `designs`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rankwise.experiments.files import write_file
from rankwise.reports.designs import Curve, shared_rate, whole_curve
from rankwise.reports.statistics import ALPHA, holm, sign_flip_test

RATES = tuple(1e-3 * 2.0**k for k in range(-1, 2))
SELECTION_NOISE = 0.5  # sd of the selection score's own noise
COLLAPSE = 10.0  # sd that a collapsed run loses


@dataclass(frozen=True)
class World:
    """The parameters that all methods of a family share; the reference has no offset, shift or collapses."""

    name: str
    steepness: float = 0.3  # c
    offset: float = 0.0  # o of the others than the reference
    heavy_tails: bool = False
    collapses: float = 0.0  # share of the runs of the others that collapse
    shift: float = 0.0  # a true difference, in sd of a run

    @property
    def is_null(self) -> bool:
        """Whether no method is better than another at its best rate of the grid."""
        return self.shift == 0 and self.offset == 0


WORLDS = (
    *(World(f"steepness {c:g}", c) for c in (0.1, 0.3, 1.0, 3.0)),
    World("heavy tails", heavy_tails=True),
    World("heavy tails, steep", 3.0, heavy_tails=True),
    World("5 % of runs collapse, means equal", collapses=0.05),
    World("optima half a step apart, flat", 0.1, offset=0.5),
    World("optima half a step apart, steep", 3.0, offset=0.5),
    *(World(f"true difference of 1 sd, steepness {c:g}", c, shift=1.0) for c in (0.1, 1.0)),
)


def _chosen_rate(sweep_seeds: int) -> Callable[[Curve, Curve], float]:
    def p(ours: Curve, reference: Curve) -> float:
        at = [curve.selection[:, :sweep_seeds].mean(1).argmax() for curve in (ours, reference)]
        return sign_flip_test(ours.reported[at[0]] - reference.reported[at[1]])

    return p


DESIGNS: dict[str, Callable[[Curve, Curve], float]] = {
    "chosen-rate, 1 sweep seed": _chosen_rate(1),
    "chosen-rate, 3 sweep seeds": _chosen_rate(3),
    "shared-rate": lambda ours, reference: shared_rate(ours, reference).p,
    "whole-curve": lambda ours, reference: whole_curve(ours, reference).p,
}


def family(random: np.random.Generator, world: World, seeds: int, comparisons: int) -> tuple[Curve, list[Curve]]:
    """The reference and the other methods of one simulated task."""
    seed_effect = np.sqrt(0.5) * random.standard_normal(seeds)
    plain = World("reference", world.steepness, heavy_tails=world.heavy_tails)
    reference, *others = (_curve(random, one, seed_effect) for one in (plain, *[world] * comparisons))
    return reference, others


def _curve(random: np.random.Generator, world: World, seed_effect: np.ndarray) -> Curve:
    shape = len(RATES), len(seed_effect)
    step = np.arange(shape[0])[:, None] - shape[0] // 2 - world.offset
    noise = random.standard_t(3, shape) / np.sqrt(3) if world.heavy_tails else random.standard_normal(shape)
    y = world.shift - world.steepness * step**2 + seed_effect + np.sqrt(0.5) * noise
    if world.collapses:
        y += COLLAPSE * (world.collapses - (random.random(shape) < world.collapses))
    return Curve(RATES, y + SELECTION_NOISE * random.standard_normal(shape), y)


def simulate(
    worlds: Sequence[World] = WORLDS, families: int = 2_000, comparisons: int = 5, seeds: int = 8, seed: int = 0
) -> dict:
    """For each world and design the share of families with a rejection after Holm's correction, and of single comparisons.

    In a world without a difference both are error rates; where there is one, the share of comparisons is the power.
    """
    rows = []
    for world in worlds:
        random = np.random.default_rng(seed)
        rejected = {name: np.zeros(2) for name in DESIGNS}  # families, comparisons
        for _ in range(families):
            reference, others = family(random, world, seeds, comparisons)
            for name, p in DESIGNS.items():
                values = np.array([p(other, reference) for other in others])
                rejected[name] += (holm(values) <= ALPHA).any(), (values <= ALPHA).mean()
        for name, (in_family, single) in rejected.items():
            row = {"world": asdict(world), "null": world.is_null, "design": name}
            rows.append({**row, "families": in_family / families, "comparisons": single / families})
    return {"schema": 1, "families": families, "comparisons": comparisons, "seeds": seeds, "seed": seed, "rows": rows}


def holds(row: dict, families: int) -> bool:
    """Whether an error rate is at most 5 % plus two Monte-Carlo standard errors."""
    return max(row["families"], row["comparisons"]) <= ALPHA + 2 * np.sqrt(ALPHA * (1 - ALPHA) / families)


def text(result: dict) -> str:
    """The result as Markdown: error rates first, then power."""
    names = list(dict.fromkeys(row["design"] for row in result["rows"]))
    lines = [
        "# Error and power of the designs, simulated",
        "",
        f"{result['families']:,} families of {result['comparisons']} comparisons with one reference, {result['seeds']} seeds, "
        f"{len(RATES)} rates a factor of 2 apart; `reports/simulation.py` says what is drawn. An error rate is at most "
        f"{ALPHA:.0%} where the design holds what it says; its Monte-Carlo standard error at 5 % is "
        f"{np.sqrt(ALPHA * (1 - ALPHA) / result['families']):.1%}.",
    ]
    kinds = {
        "No method is better: share of families in which one is called better or worse (Holm), and of single comparisons": True,
        "Methods differ: the same shares, which are power": False,
    }
    for title, null in kinds.items():
        lines += ["", f"## {title}", "", "| | " + " | ".join(names) + " |", "| :-- |" + " --: |" * len(names)]
        for world in dict.fromkeys(row["world"]["name"] for row in result["rows"] if row["null"] == null):
            cells = {row["design"]: row for row in result["rows"] if row["world"]["name"] == world}
            shares = (f"{cells[name]['families']:.1%}, {cells[name]['comparisons']:.1%}" for name in names)
            lines.append(f"| {world} | {' | '.join(shares)} |")
    failing = sorted({row["design"] for row in result["rows"] if row["null"] and not holds(row, result["families"])})
    kept = [name for name in names if name not in failing]
    lines += [
        "",
        f"Error at most 5 % within Monte-Carlo error in every world without a difference: {', '.join(kept) or 'none'}. "
        f"Above it in at least one: {', '.join(failing) or 'none'}.",
        "With optima half a step apart the methods do differ at the rates of the grid: more so the steeper the curve. A claim "
        "should hold at the neighbouring rates too.",
    ]
    return "\n".join(lines) + "\n"


def write(result: dict, out: Path) -> None:
    """designs.json and designs.md."""
    write_file(out / "designs.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_file(out / "designs.md", text(result))
