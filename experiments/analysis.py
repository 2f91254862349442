"""What training did to the weights: LoRA's subspaces, and DoRA's magnitudes and directions, measured in our own runs.

rankwise analysis subspace --out DIR       (writes subspace.json and subspace.npz)
rankwise analysis magnitude --out DIR      (writes magnitude.json)

subspace   LoRA at several ranks and at two seeds: phi(A1, A2, i, j), the overlap of the top i and top j right singular
           vectors of two learned A's, and how much dW amplifies what W holds in dW's directions.  Hu et al. 2021,
           sec. 7.2 and 7.3, appendices G and H.
magnitude  Full fine-tuning, LoRA and DoRA with four snapshots each: how far the size (dM) and the direction (dD) of the
           weight's rows moved.  Liu et al. 2024, sec. 3.2.  And the intruder dimensions of the last snapshot, Shuttleworth
           et al. 2024.

Departures: the paper of DoRA takes norms over the columns of W, DoRA as PEFT trains it over the output rows, which is what
"rows" means here; both are measured.  LoRA's appendix G prints phi as (1/p)(1 - d^2) with d^2 = p - sum sigma^2; the
algebra gives 1 - d^2/p, which is what the definition says and what is computed here.  A of rank 8 and of rank 64 that
start from one seed share eight rows at the start (each A is drawn row by row), so that their overlap says nothing of
training: pairs from two seeds are measured beside them, and the overlap of the untrained A's too.

`rankwise analysis report` draws what is written here (reports/analysis/).  subspace_study and magnitude_study check the
settings without torch.
"""

import hashlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rankwise.experiments import checks, config
from rankwise.experiments.config import Study

if TYPE_CHECKING:
    import torch
    from rankwise.experiments.study import Runner
    from rankwise.experiments.training.trainer import Trainer

SCHEMA = 1
TARGETS = ["query", "value"]  # what LoRA adapts in most of its experiments, and DoRA's sec. 3.2 looks at
ALPHA = 16  # one alpha for every rank, as LoRA has it (sec. 4.1), so that the scale of rank 64 is an eighth of rank 8's
SNAPSHOTS = 4  # Liu et al. 2024, sec. 3.2: three along the way and the last
EVALUATED = 256  # rows of the selection split that say whether a run has learned anything
INTRUDERS = 10  # left singular vectors of the tuned weight, from the top, that are looked up among the pre-trained ones


# -- subspaces ----------------------------------------------------------------------------------------------------------


def directions(matrix: np.ndarray) -> np.ndarray:
    """(I, R): the right singular vectors of a matrix (R, I), that of the greatest singular value first."""
    return np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)[2].T


def phi(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(R1, R2) of numbers from 0 to 1: at [i - 1, j - 1] the overlap of the top i with the top j directions.

        phi(i, j) = |U1^i^T U2^j|_F^2 / min(i, j)

    It is the mean squared cosine of the principal angles; of two random subspaces of R^I it is max(i, j) / I on average.

    first, second: (I, R1) and (I, R2), as `directions` gives them.
    """
    squares = (first.T @ second) ** 2
    smaller = np.minimum.outer(np.arange(1, first.shape[1] + 1), np.arange(1, second.shape[1] + 1))
    return squares.cumsum(0).cumsum(1) / smaller


def amplification(weight: np.ndarray, update: np.ndarray, rank: int, random: np.ndarray) -> dict[str, float]:
    """What Table 7 of LoRA says of one weight (O, I) and its update (O, I).

    |U^T W V|_F with U (O, rank) and V (I, rank) the top left and right singular vectors of the update, of the weight and
    of `random` (O, I); the norms; and the factor |dW|_F / |U^T W V|_F with the update's own U and V.

    Raises:
        ValueError: the update is zero, so that it has no directions, or the weight has nothing in them.
    """

    def inside(matrix: np.ndarray) -> float:
        U, _, Vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
        return float(np.linalg.norm(U[:, :rank].T @ weight @ Vt[:rank].T))

    of_update, update_norm = inside(update), float(np.linalg.norm(update))
    if not update_norm or not of_update:
        raise ValueError("dW, or W in dW's directions, is zero, so that nothing is amplified: train for more steps")
    return {
        "of_update": of_update,
        "of_weight": inside(weight),
        "of_random": inside(random),
        "weight_norm": float(np.linalg.norm(weight)),
        "update_norm": update_norm,
        "factor": update_norm / of_update,
    }


# -- magnitudes and directions ------------------------------------------------------------------------------------------


def moved(start: np.ndarray, now: np.ndarray, axis: int = 1) -> tuple[float, float]:
    """(dM, dD) of a weight (O, I): mean |m_t - m_0| and mean 1 - cos(V_t, V_0) over its rows.

    axis: 1 for the output rows (PEFT's convention), 0 for the columns (the paper's).  A row that is zero has no direction,
    so that it has not turned.
    """
    m0, m1 = (np.linalg.norm(weight, axis=axis, keepdims=True) for weight in (start, now))
    whole = (m0 > 0) & (m1 > 0)
    apart = now / np.where(whole, m1, 1.0) - start / np.where(whole, m0, 1.0)
    # 1 - cos = |u - v|^2 / 2 for unit vectors: small angles do not cancel.
    turned = np.where(whole.squeeze(axis), (apart**2).sum(axis) / 2, 0.0)
    return float(np.abs(m1 - m0).mean()), float(turned.mean())


def familiarity(start: np.ndarray, now: np.ndarray, count: int) -> np.ndarray:
    """(count,): for each of the top left singular vectors of `now` (O, I) its greatest |cosine| with any of `start`'s.

    Those below a threshold are the intruder dimensions of Shuttleworth et al. 2024.
    """
    before, after = (np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)[0] for w in (start, now))
    return np.abs(before.T @ after[:, :count]).max(0)


# -- what is trained ----------------------------------------------------------------------------------------------------


def subspace_study(ranks: Sequence[int], rate: float, **common: Any) -> Study:
    """What `subspace` trains: LoRA at the greatest rank, of which the others are members. common: see `_study`."""
    entry = {"method": "lora", "rank": max(ranks), "alpha": ALPHA, "learning_rate": rate, "targets": TARGETS}
    return _study("subspace", [entry], **common)


def magnitude_study(rank: int, rate: float, full_rate: float, **common: Any) -> Study:
    """What `magnitude` trains: full fine-tuning at `full_rate`, LoRA and DoRA at `rate`. common: see `_study`."""
    low_rank = {"rank": rank, "alpha": ALPHA, "learning_rate": rate, "targets": TARGETS}
    methods = [{"method": "full", "learning_rate": full_rate}, *({"method": name, **low_rank} for name in ("lora", "dora"))]
    return _study("magnitude", methods, **common)


def _study(
    kind: str,
    methods: Sequence[Mapping[str, Any]],
    *,
    model: str,
    task: str,
    examples: int,
    steps: int,
    batch_size: int,
    max_length: int,
    seed: int,
) -> Study:
    """The options as a Study, so they pass the same checks; no torch, no download.

    Raises:
        ValueError: what the user can correct, one line for each fault.
    """
    training = {"epochs": steps, "max_steps": steps, "batch_size": batch_size, "precision": "fp32"}
    training |= {"max_length": max_length, "evaluations_per_epoch": 0}
    training |= {"train_examples": examples, "evaluation_examples": EVALUATED}
    raw = {"name": kind, "quick": True, "model": model, "tasks": [task], "seeds": [seed]}
    study = config.parse({**raw, "training": training, "methods": list(methods)}, default_name=kind, where=kind)
    checks.check(study)
    return study


def prepare(
    study: Study, out: Path, device: str, say: Callable[[str], None], sites_of: str
) -> tuple["Runner", dict[str, np.ndarray]]:
    """A runner with data and targets ready, and the pre-trained weight (O, I) of each site of the method `sites_of`."""
    from rankwise.experiments import models
    from rankwise.experiments.study import Runner
    from rankwise.variants.adapter.linears import weight_of

    runner = Runner(study, out, device, say=say)
    runner.prepare()
    prepared = runner.prepared[study.tasks[0]]
    model, _, _ = models.load(study.model, prepared.task, "fp32", "cpu")
    return runner, {name: float64(weight_of(model.get_submodule(name))) for name in prepared.targets[sites_of]}


def trainers(
    runner: "Runner", label: str, seeds: Sequence[int], **lists: Sequence[Any]
) -> Iterator[tuple["Trainer", list[int]]]:
    """Trainers that have not begun, and which members each has: one pack, or one for each member where packing is no use.

    lists: settings of the method with one value for each member.
    """
    from rankwise.experiments.training.pack import Pack
    from rankwise.experiments.training.trainer import Trainer
    from rankwise.variants.adapter.step import NotPackable
    from rankwise.variants.settings import check

    ((name, prepared),) = runner.prepared.items()
    entry = next(entry for entry in runner.study.methods if entry.label == label)

    def made(members: list[int]) -> Trainer:
        own = {key: [values[k] for k in members] for key, values in lists.items()}
        pack = Pack(
            method=entry.method,
            settings=check(entry.method, {**entry.settings, **own}),
            targets=["^" + re.escape(site) for site in prepared.targets[label]] or entry.targets,
            task=prepared.task,
            model=runner.study.model,
            training=runner.study.training,
            seeds=tuple(seeds[k] for k in members),
            learning_rates=(entry.learning_rates[0],) * len(members),
            splits=(prepared.task.selection_split,),
            device=runner.device,
            precision=runner.precision,
        )
        # It is stepped by `train`, not by its own `run`, and so writes neither checkpoint nor logs.
        trainer = Trainer(pack, prepared.data, runner.out, [runner.out] * len(members))
        runner.say(f"{label} on {name}: {len(members)} of {len(seeds)} runs, {trainer.total} steps")
        return trainer

    everyone = list(range(len(seeds)))
    try:
        trainer = made(everyone)
    except NotPackable:
        for k in everyone:
            yield made([k]), [k]
    else:
        yield trainer, everyone


def train(trainer: "Trainer", after_step: Callable[[], None] = lambda: None) -> list[float | None]:
    """Trains to the end; each member's score on the selection split, None where it has no value.

    Raises:
        ValueError: a gradient was not finite.
    """
    while trainer.step < trainer.total:
        trainer.step += 1
        trainer.train_step()
        after_step()
    pack = trainer.pack
    if int(trainer.skipped.max()):
        raise ValueError(f"{pack.method} met a gradient that is not finite at the rate {pack.learning_rates[0]:g}: lower it")
    found = trainer.evaluate(pack.task.selection_split)
    return [metrics[pack.task.metric] if isinstance(metrics, dict) else None for metrics in found]


def float64(tensor: "torch.Tensor") -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def tuned(trainer: "Trainer", weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """(K, O, I) for each site: what stands in the weight's place, were each member merged."""
    return {name: weight + float64(trainer.adapter.delta(name)) for name, weight in weights.items()}


def write(runner: "Runner", numbers: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """The files, then <study>.json with the numbers and with what they come from, each whole or not at all."""
    import torch
    from rankwise.experiments import measure, models
    from rankwise.experiments.files import write_file, write_json

    study, out = runner.study, runner.out
    prepared = runner.prepared[study.tasks[0]]
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_file(out / name, content)
    value = {
        "schema": SCHEMA,
        "kind": study.name,
        "model": study.model,
        "task": study.tasks[0],
        "metric": prepared.task.metric,
        "split": prepared.task.selection_split,
        "captions": prepared.captions,
        "methods": [entry.model_dump(mode="json") for entry in study.methods],
        "training": study.training.model_dump(mode="json"),
        "model_hash": models.content_hash(study.model),
        "data_hash": prepared.data_hash,
        "versions": runner.versions,
        "device": runner.device.type,
        "device_name": measure.device_name(runner.device),
        "threads": torch.get_num_threads(),
        "precision": runner.precision,
        **runner.commit,
        **numbers,
        "files_sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    write_json(out / f"{study.name}.json", value)


# -- the two analyses ---------------------------------------------------------------------------------------------------


def subspace(study: Study, ranks: Sequence[int], out: Path, device: str, say: Callable[[str], None]) -> None:
    """Trains LoRA at every rank with one seed, and at the greatest with the next seed too, and compares their subspaces.

    study: a `subspace_study` of these ranks, which rise.

    subspace.npz holds float16 grids (sites, R1, R2): "A/p" of the learned A, "start/p" of A before training, "dW/p" of the
    update, for each pair p: "nested" (the two greatest ranks, one seed), "ranks" (the same, two seeds) and "seeds" (the
    greatest rank, two seeds); and "gaussian" (R, R) of two random matrices.
    """
    top, (first_seed,) = ranks[-1], study.seeds
    runner, weights = prepare(study, out, device, say, "lora")
    narrow, most = min(((name, min(weight.shape)) for name, weight in weights.items()), key=lambda pair: pair[1])
    if top > most:
        raise ValueError(f"--ranks: {top} is above {most}, the greatest that {narrow} can have: give lower ones")

    members = [*((rank, first_seed) for rank in ranks), (top, first_seed + 1)]
    same, other = len(ranks) - 1, len(ranks)  # the members of the greatest rank
    pairs = {"nested": (same - 1, same), "ranks": (same - 1, other), "seeds": (same, other)}
    subspaces: dict[str, list[dict[str, np.ndarray]]] = {of: [{} for _ in members] for of in ("start", "A", "dW")}
    amplified, ends = [], [None for _ in members]
    random = np.random.default_rng(first_seed)
    noise = {name: random.standard_normal(weight.shape) for name, weight in weights.items()}
    for trainer, which in trainers(runner, "lora", [s for _, s in members], rank=[r for r, _ in members]):
        sites = dict(trainer.adapter.named_sites())

        def keep(of: str, which: list[int] = which, sites: dict[str, Any] = sites) -> None:
            for at, k in enumerate(which):
                subspaces[of][k] = {name: directions(float64(site.A[at, : members[k][0]])) for name, site in sites.items()}

        keep("start")
        for k, score in zip(which, train(trainer), strict=True):
            ends[k] = score
        keep("A")
        for name, weight in weights.items():
            for k, update in zip(which, float64(trainer.adapter.delta(name)), strict=True):
                rank, seed = members[k]
                subspaces["dW"][k][name] = directions(update)[:, :rank]
                row = amplification(weight, update, rank, noise[name])
                amplified.append({"site": name, "rank": rank, "seed": seed, **row})

    grids = {
        f"{of}/{pair}": np.stack([phi(members_of[a][name], members_of[b][name]) for name in weights])
        for of, members_of in subspaces.items()
        for pair, (a, b) in pairs.items()
    }
    width = next(iter(weights.values())).shape[1]
    grids["gaussian"] = phi(*(directions(random.standard_normal((top, width))) for _ in range(2)))
    archive = io.BytesIO()
    np.savez_compressed(archive, **{name: grid.astype(np.float16) for name, grid in grids.items()})
    numbers = {
        "members": [{"rank": r, "seed": s, "score": end} for (r, s), end in zip(members, ends, strict=True)],
        "sites": [{"name": name, "in_features": weight.shape[1]} for name, weight in weights.items()],
        "gaussian_width": width,
        "pairs": pairs,
        "amplification": amplified,
    }
    write(runner, numbers, {"subspace.npz": archive.getvalue()})


def magnitude(study: Study, num_seeds: int, out: Path, device: str, say: Callable[[str], None]) -> None:
    """Trains full fine-tuning, LoRA and DoRA, and measures at each snapshot how far size and direction have moved.

    study: a `magnitude_study`. num_seeds: runs of each method, from the study's seed on.
    """
    runner, weights = prepare(study, out, device, say, "lora")
    (first_seed,) = study.seeds
    seeds = list(range(first_seed, first_seed + num_seeds))
    at = [round(study.training.max_steps * (i + 1) / SNAPSHOTS) for i in range(SNAPSHOTS)]
    moves, runs = [], []
    for entry in runner.study.methods:
        for trainer, which in trainers(runner, entry.label, seeds):

            def look(trainer: "Trainer" = trainer, which: list[int] = which, method: str = entry.method) -> None:
                if trainer.step not in at:
                    return
                for name, now in tuned(trainer, weights).items():
                    for one, k in zip(now, which, strict=True):
                        row = {"method": method, "seed": seeds[k], "step": trainer.step, "site": name}
                        for convention, axis in (("rows", 1), ("columns", 0)):
                            row[f"dM_{convention}"], row[f"dD_{convention}"] = moved(weights[name], one, axis)
                        if trainer.step == at[-1]:
                            row["familiarity"] = familiarity(weights[name], one, INTRUDERS).tolist()
                        moves.append(row)

            for k, score in zip(which, train(trainer, look), strict=True):
                runs.append({"method": entry.method, "seed": seeds[k], "score": score})
    write(runner, {"runs": runs, "snapshots": at, "sites": list(weights), "moves": moves}, {})
