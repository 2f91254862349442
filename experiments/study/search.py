"""A search over rank, scale, learning rate and targets: optuna asks, packs answer, the selection split alone decides.

Choices are asked for as many at a time as fit into a pack, trained with the first seed of the search, and told; with more seeds
the best few train with the others too, and the best mean over all of them is what the search found.  Tree-structured Parzen
estimator (Bergstra et al. 2011), which takes the lowest score so far for choices that are not told yet ("constant liar").

The search keeps no state: every choice follows from its seed and from the scores before it, so that a search that was cut off
asks again, finds the runs that are finished, and goes on.  `search.json` says what was tried; its scores chose, so that no
report has them: what was found is tested in a study of its own, on seeds and a split that the search has not seen.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.experiments import search_space
from rankwise.experiments.config import Entry, Study
from rankwise.experiments.files import write_json
from rankwise.experiments.records import SCHEMA
from rankwise.experiments.search_space import TUNED, Searched, Tune
from rankwise.experiments.study import overview
from rankwise.experiments.study.plan import PackPlan, is_packable, work
from rankwise.experiments.study.runner import Runner
from rankwise.experiments.study.runs import PlannedRun, planned

FOLDER, RECORD = "search", "search.json"  # of the runs of a search, beside those of the study; and what it tried


@dataclass(frozen=True)
class Choice:
    """One point of the space.  targets: which of the entries of the search."""

    rank: int
    scale: float
    learning_rate: float
    targets: int


def of_search(study: Study) -> Study:
    """The study whose runs are those of the search: one entry for each choice of targets."""
    tune = study.tune
    assert tune is not None
    entry = next(one for one in study.methods if one.label == tune.entry)
    lengths = {key: value for key in ("epochs", "max_steps") if (value := getattr(tune, key)) is not None}
    return study.model_copy(
        update={
            "name": f"{study.name}-search",
            "methods": search_space.entries(tune, entry),
            "seeds": tune.seeds,
            "sweep": None,
            "reference": None,
            "hypothesis": [],
            "looks": [],
            "training": study.training.model_copy(update=lengths),
        }
    )


def tested(study: Study, found: Choice, runs: int) -> Study:
    """The study that tests what was found: it and the reference, with the study's own seeds."""
    tune = study.tune
    assert tune is not None
    entry = next(one for one in study.methods if one.label == tune.entry)
    reference = next(one for one in study.methods if one.label == study.reference)
    tuned = entry.model_copy(
        update={
            "label": TUNED,
            "settings": search_space.settings_at(entry, found.rank, found.scale),
            "learning_rates": [found.learning_rate],
            "targets": (tune.targets or [entry.targets])[found.targets],
            "shared_with": None,
            "place": None,
            "searched": Searched(entry=entry.label, runs=runs, at_edge=tune.at_edge(found.learning_rate)),
        }
    )
    reference = reference.model_copy(update={"shared_with": None, "place": None})
    sweep = study.sweep.model_copy(update={"design": "chosen-rate"}) if reference.swept else None
    return study.model_copy(update={"methods": [reference, tuned], "sweep": sweep, "tune": None, "hypothesis": [], "looks": []})


class Search:
    """Runs the search of a study into OUT/search.

    Args:
        runner: of `of_search(study)`, prepared.
        tune: what is searched.
    """

    def __init__(self, runner: Runner, tune: Tune, say: Callable[[str], None] = lambda line: None):
        self.runner, self.tune, self.say = runner, tune, say
        study = runner.study
        [self.task] = study.tasks
        self.size = runner.pack if is_packable(study.methods[0].method) else 1
        self.total = study.training.total_steps(runner.context.num_rows(self.task))
        self.packs = 0

    def work(self) -> float:
        """Rows of all runs, for the progress bar."""
        data = self.runner.context.tasks[self.task].data
        rows = {split: len(part) for split, part in data.items()}
        split = self.runner.context.tasks[self.task].task.selection_split
        one = PackPlan("sweep", self.runner.study.methods[0], self.task, 0, ((0, 0.0),))
        return self.tune.runs * work(one, self.runner.study.training, rows, (split,))

    def run(self) -> Choice:
        """What the search found.

        Raises:
            ValueError: every run failed.
        """
        out = self.runner.out
        out.mkdir(parents=True, exist_ok=True)
        with overview.locked(out):
            overview.clear_leftovers(out)
            scores = self._asked()
            first, *others = self.tune.seeds
            ranked = sorted((c for c in scores if scores[c][first] is not None), key=lambda c: -scores[c][first])
            if not ranked:
                raise ValueError(
                    f"all {len(scores)} runs of the search failed: {self.runner.out} says why; lower learning_rates in [tune]"
                )
            finalists = ranked[: self.tune.finalists] if others else ranked[:1]
            for seed in others:
                for choice, score in self._scores(finalists, seed, rung=1).items():
                    scores[choice][seed] = score
            found = max(finalists, key=lambda c: _mean(scores[c], self.tune.seeds))
            self._write(out / RECORD, scores, found)
        return found

    def _asked(self) -> dict[Choice, dict[int, float | None]]:
        """Choice -> first seed -> selection score, in the order of asking."""
        import optuna
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        tune, first = self.tune, self.tune.seeds[0]
        space: dict[str, Any] = {"learning_rate": FloatDistribution(*tune.learning_rates, log=True)}
        if len(tune.ranks) > 1:
            space["rank"] = IntDistribution(0, len(tune.ranks) - 1)  # of the ranks, ascending
        if isinstance(tune.scales, list):
            space["scale"] = FloatDistribution(*tune.scales, log=True)
        if len(tune.targets) > 1:
            space["targets"] = CategoricalDistribution(range(len(tune.targets)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=first % 2**32, constant_liar=True)
        asked = optuna.create_study(direction="maximize", sampler=sampler)
        scores: dict[Choice, dict[int, float | None]] = {}
        while len(asked.trials) < tune.choices:
            trials = [asked.ask(space) for _ in range(min(self.size, tune.choices - len(asked.trials)))]
            choices = [self._choice(trial.params) for trial in trials]
            new = self._scores([choice for choice in dict.fromkeys(choices) if choice not in scores], first)
            scores |= {choice: {first: score} for choice, score in new.items()}
            for trial, choice in zip(trials, choices, strict=True):
                score = scores[choice][first]
                asked.tell(trial, score, state=None if score is not None else optuna.trial.TrialState.FAIL)
        return scores

    def _choice(self, params: dict[str, Any]) -> Choice:
        ranks, scales = sorted(self.tune.ranks), self.tune.scales
        scale = _rounded(params["scale"]) if isinstance(scales, list) else scales
        rate = _rounded(params["learning_rate"])
        return Choice(ranks[params.get("rank", 0)], scale, rate, params.get("targets", 0))

    def _scores(self, choices: Sequence[Choice], seed: int, rung: int = 0) -> dict[Choice, float | None]:
        """The selection score of each choice with this seed, in its order; None where the run failed."""
        found: dict[Choice, float | None] = {}
        for targets, entry in enumerate(self.runner.study.methods):
            same = [choice for choice in choices if choice.targets == targets]
            for at in range(0, len(same), self.size):
                part = same[at : at + self.size]
                found |= dict(zip(part, self._pack(entry, part, seed, rung), strict=True))
        return {choice: found[choice] for choice in choices}

    def _pack(self, entry: Entry, choices: Sequence[Choice], seed: int, rung: int) -> list[float | None]:
        """The selection scores of choices that train together."""
        plan = PackPlan("sweep", entry, self.task, self.packs, tuple((seed, c.learning_rate) for c in choices), rung)
        self.packs += 1
        runs = [self._planned(plan, entry, choice, seed) for choice in choices]
        runner, what = self.runner, f"search {self.task}"
        missing = runner.store.missing(runs)
        if done := len(runs) - len(missing):
            runner.progress(what, self.work() / self.tune.runs * done)
        runner.packs.run(plan, runs, missing, what)
        results = [runner.store.result(run) for run in runs]
        return [result["selection_score"] if result is not None else None for result in results]

    def _planned(self, plan: PackPlan, entry: Entry, choice: Choice, seed: int) -> PlannedRun:
        at = entry.model_copy(update={"settings": search_space.settings_at(entry, choice.rank, choice.scale)})
        training = self.runner.study.training
        return planned(self.runner.context, plan, at.resolved(self.total), training, seed, choice.learning_rate)

    def _write(self, path: Path, scores: dict[Choice, dict[int, float | None]], found: Choice) -> None:
        import optuna

        def said(choice: Choice) -> dict[str, Any]:
            targets = self.runner.study.methods[choice.targets].targets
            return {"rank": choice.rank, "scale": choice.scale, "learning_rate": choice.learning_rate, "targets": targets}

        tried = [
            {**said(choice), "selection_scores": {str(seed): score for seed, score in by_seed.items()}}
            for choice, by_seed in scores.items()
        ]
        record = {
            "schema": SCHEMA,
            "optuna": optuna.__version__,
            "space": self.tune.model_dump(mode="json"),
            "found": said(found),
            "tried": tried,
        }
        write_json(path, record)


def _mean(scores: dict[int, float | None], seeds: Sequence[int]) -> float:
    """Over the seeds; a choice of which one failed comes last."""
    known = [scores.get(seed) for seed in seeds]
    return -math.inf if None in known else math.fsum(known) / len(known)


def _rounded(value: float) -> float:
    """Three significant digits, so that a run can be written down by hand."""
    return float(f"{value:.2e}")
