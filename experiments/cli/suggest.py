"""`rankwise suggest`: ranks for each site, out of a short probe, ready for PEFT."""

import json
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rankwise.experiments.cli.options import Device, Json, Threads, check_device, check_least, width
from rankwise.experiments.cli.own_options import own_entry
from rankwise.experiments.cli.progress import Progress
from rankwise.experiments.cli.start import start_torch
from rankwise.variants.settings import nearest

if TYPE_CHECKING:
    from rankwise.experiments.suggest import Suggestion

NAMES = ("gradient", "activation", "spectral")
HONEST = (
    "Whether these ranks beat the same rank everywhere is not known of your task: compare both, at equal parameters "
    "(rankwise compare; reports/findings.md has what placing was worth where it was measured)."
)


def suggest(
    model: Annotated[str, typer.Argument(help="Hub id or folder.")],
    data: Annotated[str, typer.Option(help="Your own training data: file, glob, folder of images, or hub id.")],
    budget: Annotated[int, typer.Option(help="Ranks of all sites together.")],
    probe: Annotated[str, typer.Option(help="gradient (GoRA's), activation (EVA's) or spectral (stable rank).")] = "gradient",
    seeds: Annotated[int, typer.Option(help="Seeds whose agreement is shown.")] = 3,
    batches: Annotated[int, typer.Option(help="Batches that each seed measures.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 16,
    scale: Annotated[float, typer.Option(help="alpha/r of every site.")] = 2.0,
    targets: Annotated[str, typer.Option(help="Modules, with commas between.")] = "all-linear",
    kind: Annotated[str | None, typer.Option(help="Kind of task.  [default: by the fields]")] = None,
    input: Annotated[str | None, typer.Option(help="Field or template that the model reads.")] = None,
    target: Annotated[str | None, typer.Option(help="Field or template that it is to give.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Suggest a rank for each site by a short named probe: rank_pattern and alpha_pattern of a LoraConfig.

    Nothing is trained.  The agreement of the seeds says how much of it is the probe's noise.
    """
    from rankwise.experiments.tasks import in_study

    for option, value in {"--budget": budget, "--batches": batches, "--batch-size": batch_size, "--threads": threads}.items():
        check_least(option, value)
    check_least("--seeds", seeds)
    check_device(device)
    if probe not in NAMES:
        raise ValueError(f"--probe {probe}: no such probe{nearest(probe, NAMES)}; give {', '.join(NAMES)}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"--scale {scale}: give a number above 0")
    entry = own_entry(data, None, None, kind, input, target).beside(Path())
    task = in_study(entry.name, [entry])
    named = [name.strip() for name in targets.split(",") if name.strip()]
    with Progress() as bar:
        bar.say("suggest: loading torch, model and data ...")
        start_torch(bar, threads)
        from rankwise.experiments import measure
        from rankwise.experiments import suggest as probing

        chosen = named[0] if len(named) == 1 else named
        found = probing.suggest(
            model, task, budget, probe, range(seeds), chosen, scale, batches, batch_size, device=str(measure.device(device))
        )
    agreement = agreement_of(found)
    if as_json:
        value = {
            "probe": probe,
            "budget": budget,
            "parameters": found.parameters,
            "agreement": agreement,
            "peft": found.as_peft(),
            "ranks": found.ranks,
            "ranks_of_seeds": {str(seed): ranks for seed, ranks in found.of_seeds.items()},
        }
        print(json.dumps(value, indent=1))
        return
    print(_shown(found, agreement))


def agreement_of(found: "Suggestion") -> dict[str, float | None] | None:
    """Means over pairs of seeds: Spearman's rank correlation of the sites' ranks, and their overlap (Jaccard's index).

    None where there is one seed, as of a probe that reads no data; the correlation is None where some seed gives all sites
    one rank.
    """
    from rankwise.reports.statistics import jaccard, spearman

    pairs = list(combinations(found.of_seeds.values(), 2))
    if not pairs:
        return None
    correlations = [spearman(list(one.values()), list(other.values())) for one, other in pairs]
    known = [value for value in correlations if value is not None]
    overlaps = [jaccard(one, other) for one, other in pairs]
    return {
        "rank_correlation": sum(known) / len(known) if len(known) == len(pairs) else None,
        "overlap": sum(overlaps) / len(overlaps),
    }


def _shown(found: "Suggestion", agreement: dict[str, float | None] | None) -> str:
    from rankwise.reports.tables import Table

    columns = ("site", "rank", *(f"seed {seed}" for seed in found.of_seeds))
    rows = [(site, rank, *(ranks[site] for ranks in found.of_seeds.values())) for site, rank in found.ranks.items()]
    if agreement is None:
        said = "One seed: this probe reads no data." if found.probe == "spectral" else "One seed: its agreement is not known."
    else:
        correlation = agreement["rank_correlation"]
        shown = "not defined (a seed gives every site one rank)" if correlation is None else f"{correlation:.2f}"
        said = f"Agreement of the seeds, means over pairs: rank correlation {shown}, overlap {agreement['overlap']:.2f}."
    caption = (f"{found.budget} ranks, {found.parameters:,} parameters, alpha/r = {found.scale:g} at every site.", said, HONEST)
    table = Table("suggest", f"Ranks by the {found.probe} probe", columns, tuple(rows), caption).text(width())
    return f"{table}\nLoraConfig(**{json.dumps(found.as_peft(), indent=1)})"
