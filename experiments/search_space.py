"""What `rankwise tune` searches: the section [tune] of a study file.  No torch, and no optuna."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from rankwise.experiments.rank_curves import at_rank
from rankwise.variants.settings import Positive, PositiveInt, check, method, nearest, quoted, shown

if TYPE_CHECKING:
    from rankwise.experiments.config import Entry, Study

TUNED = "tuned"  # label of what a search found
NEAR = 0.05  # of a range's logarithm: a best rate so near an end may have better ones beyond
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Range = Annotated[list[Positive], Field(min_length=2, max_length=2)]


class Searched(BaseModel):
    """What is said of an entry that a search found."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    entry: str
    """Label of the entry that was searched over."""
    runs: int
    """Runs of the search, all of them scored on the selection split alone."""
    at_edge: bool
    """Whether its rate lies at an end of the range."""


class Tune(BaseModel):
    """What `rankwise tune` searches, and with how many runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
    entry: str
    """Label of the method that is tuned; what it sets beside the searched settings stays."""
    runs: PositiveInt
    """Runs of the search in all."""
    ranks: list[PositiveInt] = Field(min_length=1)
    """Ranks to choose from; of a method that moves ranks, those that it ends with."""
    scales: Range | Positive
    """Lowest and highest alpha/r (alpha/sqrt(r) with that scaling), or the one of every run; alpha follows."""
    learning_rates: Range
    """Lowest and highest learning rate."""
    targets: list[str | list[str]] = []
    """Choices of `targets`; the entry's own alone, if not given."""
    seeds: list[Seed] = Field(min_length=1)
    """Seeds of the search: each choice runs with the first, the finalists with the others too.  None may be a final seed."""
    finalists: PositiveInt = 3
    """With several seeds: how many of the best choices run with all of them, of which the best mean is kept."""
    epochs: PositiveInt | None = None
    """Passes of a run of the search; as [training] says, if not given."""
    max_steps: PositiveInt | None = None
    """Steps of a run of the search; as [training] says, if not given."""

    @field_validator("scales", "learning_rates")
    @classmethod
    def _ascends(cls, ends: Any) -> Any:
        if isinstance(ends, list) and not ends[0] < ends[1]:
            raise ValueError(f"is {ends}: give the lowest and the highest, in this order")
        return ends

    @field_validator("ranks", "targets", "seeds")
    @classmethod
    def _has_none_twice(cls, values: list) -> list:
        if any(value in values[:i] for i, value in enumerate(values)):
            raise ValueError(f"is {values} and has one twice: take it out")
        return values

    @property
    def choices(self) -> int:
        """Choices that are run with the first seed; the finalists' other seeds take the rest of the runs."""
        return self.runs - self.finalists * (len(self.seeds) - 1)

    def at_edge(self, rate: float) -> bool:
        low, high = (math.log(end) for end in self.learning_rates)
        return not NEAR <= (math.log(rate) - low) / (high - low) <= 1 - NEAR


def faults(study: "Study") -> list[str]:
    """What keeps the study's search from running, and its result from being tested."""
    tune = study.tune
    if tune is None:
        return [
            '[tune] is missing: add one with entry, runs, ranks, scales, learning_rates and seeds, such as entry = "lora", '
            "runs = 32, ranks = [2, 4, 8, 16], scales = [0.5, 4], learning_rates = [1e-4, 1e-2], seeds = [100, 101, 102]"
        ]
    found, by_label = [], {entry.label: entry for entry in study.methods}
    entry = by_label.get(tune.entry)
    if entry is None:
        found.append(f"tune.entry = {quoted(tune.entry)} is no label of a method{nearest(tune.entry, by_label)}; "
                     f"there are: {', '.join(by_label)}")  # fmt: skip
    elif entry.ranks_of is not None or not method(entry.method).settings.with_role("rank"):
        found.append(f"tune.entry = {quoted(tune.entry)}: it has no ranks of its own to search: name a low-rank method")
    if TUNED in by_label:
        found.append(f'a method is called "{TUNED}", as what the search finds will be: give it another label')
    if study.reference is None:
        found.append("reference is missing: name the method that what the search finds is tested against")
    if len(study.tasks) != 1:
        found.append(f"tasks = {study.tasks}: a search is on one task: name one, or give --tasks")
    if study.kind != "comparison" or study.protocol != "held-out":
        found.append('a search chooses on one part and tests on another: take kind = "comparison", protocol = "held-out"')
    if study.budget.equal != "steps":
        found.append(f'budget.equal = "{study.budget.equal}": a search over ranks is at equal steps: take [budget] out')
    if study.training.evaluations_per_epoch == 0:
        found.append("training.evaluations_per_epoch = 0: a search chooses by the selection score: give at least 1")
    if both := sorted(set(tune.seeds) & set(study.seeds)):
        found.append(f"tune.seeds = {tune.seeds}: {both} are final seeds too, and the test is on fresh ones: give others")
    reference = by_label.get(study.reference or "")
    if reference is not None and reference.swept and (both := sorted(set(study.sweep.seeds) & set(study.seeds))):
        found.append(
            f'sweep.seeds = {study.sweep.seeds}: {both} are final seeds too, and the rate of "{reference.label}" is chosen on '
            f"others: give others, or give it one learning rate"
        )
    if tune.choices < max(tune.finalists, 2):
        found.append(
            f"tune.runs = {tune.runs}: {tune.finalists} finalists with {len(tune.seeds) - 1} more seeds leave {tune.choices} "
            f"choices to search: give more runs, fewer finalists or fewer seeds"
        )
    if entry is not None and not found:
        try:
            for rank in tune.ranks:
                ends = tune.scales if isinstance(tune.scales, list) else [tune.scales]
                check(entry.method, _as_written(entry, rank, ends[0]))
        except ValueError as error:
            found += [f"tune: {line}" for line in str(error).splitlines()]
    return found


def missing() -> str | None:
    """What to install, where optuna is not there."""
    if importlib.util.find_spec("optuna") is None:
        return "a search needs optuna, which is not installed: pip install 'rankwise[tune]'"
    return None


def _as_written(entry: "Entry", rank: int, scale: float) -> dict[str, Any]:
    from rankwise.experiments.config import in_steps

    return in_steps(entry.method, settings_at(entry, rank, scale), 100)


def settings_at(entry: "Entry", rank: int, scale: float) -> dict[str, Any]:
    """The entry's settings at another rank and scale; a share of the run stays one."""
    kind = method(entry.method).settings
    kept = {k: v for k, v in entry.settings.items() if k not in kind.with_role("total", "rank pattern", "alpha pattern")}
    return {**kept, **at_rank(kind, kept, rank, scale, f"tune.entry = {shown(entry.label)}")}


def entries(tune: Tune, entry: "Entry") -> list["Entry"]:
    """One entry for each choice of targets, at the first rank: what is prepared, and what the runs of the search are of."""
    choices: Sequence[Any] = tune.targets or [entry.targets]
    scale = tune.scales[0] if isinstance(tune.scales, list) else tune.scales
    plain: Mapping[str, Any] = {"settings": settings_at(entry, tune.ranks[0], scale), "shared_with": None, "place": None}
    rates = [tune.learning_rates[0]]
    return [
        entry.model_copy(update={**plain, "learning_rates": rates, "targets": targets, "label": f"search {i}"})
        for i, targets in enumerate(choices)
    ]
