"""A study file: what it may say, and what is wrong with it when it is wrong.

No torch here: a wrong file is refused within a second.  `read` gives the study as written; `rankwise.experiments.study` expands
it into runs.
"""

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from rankwise.experiments import quantization
from rankwise.experiments.data_entries import OwnData
from rankwise.experiments.factors import KEY as FACTORS
from rankwise.experiments.factors import Cell, written_out
from rankwise.experiments.hypotheses import Hypothesis, contradictions
from rankwise.experiments.rank_curves import KEYS, Place, expanded
from rankwise.experiments.search_space import Searched, Tune
from rankwise.variants.adapter.kinds.scheme import Scheme
from rankwise.variants.settings import (
    BY_PATTERN,
    FROM_BUDGET,
    METHODS,
    Count,
    Fraction,
    NonNegative,
    Positive,
    PositiveInt,
    Settings,
    check,
    explain,
    method,
    nearest,
    quoted,
    shown,
)

STUDIES = Path(__file__).parent / "studies"
PAPERS = STUDIES / "papers"  # recipes of published tables, which experiments/recipes.py reads
DEFAULT_STUDY = STUDIES / "default.toml"
Seed = Annotated[int, Field(ge=0, lt=2**63)]
# What an entry says of itself, besides its method, rates, targets and the method's own settings.
OWN_OF_ENTRIES = ("ranks_of", "permuted", "ranks_seed", "shared_with", "seeds", "quantization", "double_quantization")
MOST_BYTES = 4 << 20  # of a study's file; the longest that ships has 6 kB
MOST_SEEDS = 10_000  # of `seeds = N`; more is a slip of the finger, and takes all memory where it is a large one
LONGEST_NAME = 100  # bytes; a pack's folder has the label, the task and numbers in its name, and 255 bytes are a name's limit


def _one_line(text: str) -> str:
    if any(character < " " or character == "\x7f" for character in text):
        raise ValueError(f"{quoted(text)} has control characters, such as a line break: take them out")
    return text


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty: give a text")
    return _one_line(text)


def _label(text: str) -> str:
    return _short_enough(_one_line(text))


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text):
        fitting = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")[:LONGEST_NAME] or "my-study"
        raise ValueError(
            f"{quoted(text)} cannot name the folder of the runs: use letters, digits, '.', '_' and '-', the first a letter or "
            f'digit; for example name = "{fitting}"'
        )
    return _short_enough(text)


def _short_enough(text: str) -> str:
    size = len(text.encode())
    if size > LONGEST_NAME:
        raise ValueError(
            f"{quoted(text)} has {size} bytes, and at most {LONGEST_NAME} fit, because files and folders of the runs are "
            f"named by it: shorten it"
        )
    return text


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Training(_Section):
    """How every run of a study trains."""

    epochs: PositiveInt = 3
    """Passes over the training part."""
    max_steps: PositiveInt | None = None
    """Stop after so many optimizer steps, whatever `epochs` says."""
    batch_size: PositiveInt = 32
    """Rows of one member in one optimizer step."""
    accumulation: PositiveInt = 1
    """Micro-batches that a step's rows are cut into."""
    warmup_ratio: Fraction = 0.06
    """Share of the steps in which the learning rate rises from zero."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up; to zero, or not at all."""
    weight_decay: NonNegative = 0.01
    """AdamW's decoupled decay; biases, norms and magnitudes have none."""
    clip: Positive | None = 1.0
    """Greatest norm of a member's gradient; longer ones are shortened to it."""
    max_length: int = Field(default=128, ge=8)
    """Tokens at which an input is cut."""
    image_size: int | None = Field(default=None, ge=8, le=4096)
    """Side of an image in pixels, to which it is resized and cropped; what the model's image processor says, if not given."""
    augmentation: list[Literal["crop", "flip"]] = []
    """How images that are trained on are changed at random: "crop" moves by up to an eighth of the side, "flip" mirrors left
    and right.  Off if not given: a mirrored image may be of another class (digits, text, left and right shoes)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 keeps the frozen weights in bf16 and multiplies in it; auto takes it where the device is fast at it; a folder
    with runs goes on in theirs."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass: less memory, more time, the same result."""
    evaluations_per_epoch: Count = 1
    """Evaluations on the validation part, the last at the end; 0: none, a final run is then scored at its end alone."""
    evaluation_batch_size: PositiveInt = 64
    """Rows of one member in one evaluation batch."""
    train_examples: PositiveInt | None = None
    """Train on a fixed random part of so many examples; stated in every caption."""
    evaluation_examples: PositiveInt | None = None
    """Evaluate on a fixed random part of so many examples of each split; stated in every caption."""
    max_skipped_steps: Count = 10
    """Steps with a non-finite gradient after which a member fails as "diverged"."""
    log_every: PositiveInt = 10
    """Steps from one line of metrics.jsonl to the next."""

    @field_validator("augmentation")
    @classmethod
    def _in_one_order(cls, named: list[str]) -> list[str]:
        return sorted(set(named))

    optimizer_states: Literal["32-bit", "8-bit", "offloaded"] = "32-bit"
    """How AdamW's averages are kept between steps: "8-bit" in codes by blocks, of tensors of 4096 numbers or more
    (experiments/training/stored_states.py); "offloaded" in the CPU's memory, of a run on a GPU."""
    shard_base: bool = False
    """Of several processes (torchrun) each holds its share of every layer's frozen weights and gathers a layer while it is
    computed; the same result to rounding, and no part of a run's identity.  In one process it changes nothing."""
    head_learning_rate: Positive | None = None
    """Learning rate of the task head of every method that trains more than the head; that of the rest, if not given."""

    def identity(self) -> dict[str, Any]:
        """What tells one run from another; a setting that came later is left out while it has its default."""
        values = self.model_dump(mode="json", exclude={"log_every", "shard_base"})
        later = {"head_learning_rate": None, "image_size": None, "augmentation": [], "optimizer_states": "32-bit"}
        return {k: v for k, v in values.items() if k not in later or v != later[k]}

    def steps_per_epoch(self, rows: int) -> int:
        return -(-rows // self.batch_size)

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of a run over `rows` examples."""
        steps = self.epochs * self.steps_per_epoch(rows)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def evaluation_steps(self, rows: int) -> set[int]:
        """Steps after which the selection split is evaluated; the last step is always among them."""
        per_epoch, last, each = self.steps_per_epoch(rows), self.total_steps(rows), self.evaluations_per_epoch
        along = {round(per_epoch * (epoch + (i + 1) / each)) for epoch in range(self.epochs) for i in range(each)}
        return {step for step in along if 0 < step < last} | {last}


class Sweep(_Section):
    """How each method's learning rate is chosen before the final runs: by the selection score of short runs.

    A grid whose best rate stands at its edge is widened by its own step until the best is inside or `trials` are used up.
    """

    design: Literal["chosen-rate", "shared-rate", "whole-curve"] = "chosen-rate"
    """chosen-rate: the best of a sweep, as if it had been given; shared-rate: so too, but methods that are compared share it
    (shared_with), and no seed of the sweep is a final seed; whole-curve: no sweep, every rate is run with every final seed, and
    a test chooses the rates again each time.  Tests of the latter two count the choice (reports/designs.py), so that a study
    that is not quick and names no design has one of them: see `default_design`."""
    epochs: PositiveInt = 1
    """Passes over the training part."""
    max_steps: PositiveInt | None = None
    """Stop after so many steps."""
    seeds: list[Seed] = Field(default=[0, 1, 2], min_length=1)
    """Seeds of each rate; a rate chosen by one seed makes verdicts err too often (reports/studies/calibration).  With
    design = "whole-curve": those of the pilots that found the grids, which are other studies and not run here."""
    trials: PositiveInt | None = None
    """Most rates that a method may try, those of its grid among them; two more than the grid, if not given."""
    halving: int | None = Field(default=None, ge=2, le=1000)
    """Successive halving: after each rung one in so many rates goes on, to a rung so many times as long."""
    rungs: int = Field(default=2, ge=2, le=100)
    """Rungs of successive halving; the last is as long as `epochs` and `max_steps` say."""

    def most_trials(self, grid: int, quick: bool) -> int:
        """Rates that a method with a grid of so many may try; a quick look does not widen unless told to."""
        return self.trials if self.trials is not None else grid + (0 if quick else 2)


class Budget(_Section):
    """What is equal among the methods, besides data and model; every report says it, and what is not."""

    equal: Literal["steps", "parameters", "time", "memory"] = "steps"
    """steps: as many optimizer steps; parameters: as many active ones; time: as many seconds of training, by measured steps;
    memory: no more bytes at the peak, by micro-batches."""
    parameters: PositiveInt | None = None
    """Active parameters that each low-rank method may have, magnitudes counted, the head not; its ranks follow from it."""
    scale: Positive = 2.0
    """alpha/r of every site, where the ranks follow from a budget of parameters."""
    bytes: PositiveInt | None = None
    """Most bytes at the peak of a training step, where memory is the budget."""


class Entry(_Section):
    """One method of a study, with its settings."""

    method: str
    """Name of the method."""
    label: Annotated[str, AfterValidator(_label)] = ""
    """What tables call it; the method's name if not given."""
    learning_rates: list[Positive] = Field(min_length=1)
    """Rates to choose from; one rate means no choice."""
    targets: str | list[str] = "all-linear"
    """Modules to adapt."""
    settings: dict[str, Any] = {}
    """The method's own settings; step counts may be shares of the run, "10%"."""
    ranks_of: str | None = None
    """Label of another entry: each seed takes the ranks, and the scale alpha/r of each site, that this one's final run of the
    same seed ended with, and trains them from scratch."""
    permuted: bool = False
    """With `ranks_of`: these ranks permuted over the sites of the same shape, by the seed; the parameters stay as many."""
    ranks_seed: Literal["same", "other"] = "same"
    """With `ranks_of`: whose ranks a seed takes.  same: its own run's; other: those of its partner, the first and the second of
    the study's seeds for each other, the third and the fourth, and so on, so that an allocation is judged with another draw
    of data order and start than it was learned with.  A sweep's i-th seed takes those of the i-th final seed."""
    quantization: Literal["nf4", "int8", "none"] | None = None
    """How the base of this entry is quantised; "none": not at all; as the study says, which `parse` fills in, if not given."""
    double_quantization: bool = False
    """With `quantization`: as the study's setting of that name."""
    shared_with: str | None = None
    """Label of another entry with the same grid: both, and all that name it, train at one rate, the one with the best mean
    selection score over all of them.  Swapping two such methods leaves the choice as it is, so that an exact test of their
    difference counts it (for methods of one parameterization)."""
    seeds: PositiveInt | None = None
    """So many of the study's seeds alone, the first ones; of kind = "randomized", where one method has most of the runs."""
    scale: Positive | None = None
    """alpha/r of every site, where the ranks follow from a budget of parameters; the budget's, if not given."""
    place: Place | None = None
    """Where it stands on a curve of ranks; set where the file's entry has `ranks` (experiments/rank_curves.py)."""
    cell: Cell | None = None
    """Which combination of parts it is; set where the file's entry has `factors` (experiments/factors.py)."""
    searched: Searched | None = None
    """Set of an entry that a search found (experiments/study/search.py)."""
    source: "Entry | None" = None
    """The entry that `ranks_of` names, filled in by `parse`, so that it is known where --methods leaves it out."""

    @property
    def scheme(self) -> Scheme | None:
        """How its base is quantised; None where it is not."""
        return quantization.scheme(self.quantization, self.double_quantization)

    @property
    def swept(self) -> bool:
        """Whether its rate is chosen by a sweep."""
        return len(self.learning_rates) > 1

    def resolved(self, total_steps: int) -> Settings:
        """The settings with every share of the run made a number of steps.

        Raises:
            ValueError: phases that do not fit into `total_steps`.
        """
        settings = check(self.method, in_steps(self.method, self.settings, total_steps))
        warmup, final = (settings.get(name, 0) for name in ("warmup_steps", "final_steps"))
        if "final_steps" in settings.facts and warmup + final >= total_steps:
            raise ValueError(
                f"{self.label}: warmup_steps = {self.settings.get('warmup_steps', 0)} and final_steps = "
                f"{self.settings.get('final_steps', 0)} are {warmup} + {final} steps and leave "
                f"none to prune in a run of {total_steps}: shorten them or train longer"
            )
        return settings


class Study(_Section):
    """A comparison: methods x tasks x seeds, over one model."""

    name: Annotated[str, AfterValidator(_name)]
    """Name of the study and of its folder."""
    title: Annotated[str, AfterValidator(_one_line)] = ""
    """What the report is headed with."""
    kind: Literal["comparison", "randomized"] = "comparison"
    """comparison: methods are held against each other; randomized: random-rank draws an allocation for each seed, LoRA has one
    for all, and `rankwise analysis randomized` estimates what rank is worth at each site (see `_randomized_faults`)."""
    quick: bool = False
    """A quick look, not a fair comparison; the output says so."""
    reference: str | None = None
    """Label of the method that differences are taken to; full fine-tuning where it takes part, if not given."""
    model: Annotated[str, AfterValidator(_not_empty)]
    """Hub id of the pre-trained model."""
    quantization: Literal["nf4", "int8"] | None = None
    """Hold the frozen linears in 4 bits (nf4, as QLoRA has them) or in 8, by bitsandbytes; an entry may say otherwise."""
    double_quantization: bool = False
    """With nf4: quantise the scales of its blocks too, which leaves 4.127 bits a weight of 4.5."""
    tasks: list[Annotated[str, AfterValidator(_not_empty)]] = Field(min_length=1)
    """Names of the tasks; all of `data` if not given."""
    data: list[OwnData] = []
    """The user's own data, each of which makes a task."""
    seeds: list[Seed] = Field(min_length=1)
    """Seeds of the final runs: data order, head and adapter start, dropout."""
    margin: Positive = 0.5
    """Points within which a method counts as equivalent to the reference; fixed before the runs are looked at."""
    protocol: Literal["held-out", "best-dev-epoch"] = "held-out"
    """held-out: choose on one part, report on another; best-dev-epoch: as many papers do, every epoch is scored on the
    official development part and the best one is reported."""
    pack: PositiveInt | Literal["auto"] = "auto"
    """Most members that train at once over one frozen model."""
    checkpoint_seconds: Positive = 60.0
    """Seconds from one checkpoint to the next."""
    anatomy: bool = True
    """Write what became of each weight (spectrum, effective rank, intruder dimensions) for each final run: sites.json."""
    knock_out: bool | Literal["first seed"] = False
    """Measure for each final run (or those of the first seed) what each site's rank is worth: knockout.json."""
    across_tasks: bool = False
    """Score each final run on the other tasks too, which one head must answer: across.json, and a table of the report."""
    track: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    """Trackers that are shown the records of the runs while they are written (experiments/tracking/); none if not given."""
    accept_licences: list[str] = []
    """Research-only data whose terms the user accepts."""
    hypothesis: list[Hypothesis] = []
    """What the study sets out to test, in a fixed sequence: see experiments/hypotheses.py."""
    looks: list[PositiveInt] = []
    """Numbers of seeds at which the hypotheses are looked at, so that a study may end early; once, at all seeds, if none."""
    training: Training = Training()
    sweep: Sweep | None = None
    budget: Budget = Budget()
    tune: Tune | None = None
    """What `rankwise tune` searches (experiments/search_space.py)."""
    methods: list[Entry] = Field(min_length=1)

    def sweeps(self, entry: Entry) -> bool:
        """Whether the rate of this entry is chosen before its final runs, by a sweep."""
        return entry.swept and self.sweep.design != "whole-curve"

    def seeds_of(self, entry: Entry) -> list[Seed]:
        """Seeds of the final runs of this entry."""
        return self.seeds[: entry.seeds]

    @field_validator("methods")
    @classmethod
    def _labels_differ(cls, entries: list[Entry]) -> list[Entry]:
        labels = [e.label for e in entries]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f'two methods are called "{twice}": give one of them another label')
        return entries


def read(path: Path) -> Study:
    """The study in a TOML file.

    Raises:
        ValueError: the file is not there, is no TOML, or says something that it may not; one line for each fault.
    """
    path = find(path)
    study = parse(read_toml(path), default_name=path.stem, where=path.name)
    return study.model_copy(update={"data": [entry.beside(path.parent) for entry in study.data]})


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file, which may begin with a byte order mark.

    Raises:
        ValueError: the file is no TOML.
    """
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path}: {size:,} bytes, and a study's file has at most {MOST_BYTES:,}: name another file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a TOML file: byte {error.start} is not UTF-8: save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits, and of nesting as deep
        raise ValueError(f"{path}: not a TOML file: {error}") from None


def too_large(value: Any, place: str) -> list[str]:
    """A fault for every whole number of a file's content that is beyond TOML's 64 bits."""
    if isinstance(value, dict):
        return [fault for key, inner in value.items() for fault in too_large(inner, f"{place}.{key}")]
    if isinstance(value, list):
        return [fault for index, inner in enumerate(value) for fault in too_large(inner, f"{place}[{index}]")]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return [f"{place} = {shown(value)}: whole numbers of a TOML file have 64 bits: give one below 2^63"]
    return []


def find(path: Path) -> Path:
    """A study's file, by its path or by the name of one that ships with Rankwise."""
    studies = shipped()
    recipes = {p.resolve(): p.stem for p in PAPERS.glob("*.toml")}
    if path.is_file() and path.resolve() not in recipes:
        return path
    meant = (path.resolve(), (STUDIES / f"{path}.toml").resolve(), (PAPERS / f"{path}.toml").resolve())
    recipe = next((recipes[p] for p in meant if p in recipes), None)
    if recipe is not None:
        raise ValueError(f"{path}: this is a paper's recipe: rankwise paper {recipe}")
    if str(path) in studies:
        return studies[str(path)]
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a study file (.toml)")
    raise ValueError(f"{path}: no such study file{nearest(str(path), studies)}; shipped ones: {', '.join(studies)}")


def shipped() -> dict[str, Path]:
    """The studies that come with Rankwise, by name; a paper's recipe is none."""
    files = [path for path in sorted(STUDIES.rglob("*.toml")) if PAPERS not in path.parents]
    return {path.relative_to(STUDIES).with_suffix("").as_posix(): path for path in files}


def parse(raw: dict[str, Any], default_name: str, where: str = "study") -> Study:
    """A study from the content of its file: shorthands written out, defaults filled in, every fault named.

    Paths of its data stay as they are written; `read` makes them relative to the working folder.
    """
    faults = too_large(raw, where)
    if faults:
        raise ValueError("\n".join(faults))
    named_by_file = "name" not in raw
    raw = {"name": default_name, **raw}
    known = [*Study.model_fields, "task", "defaults"]
    for key in [k for k in raw if k not in known]:
        faults.append(f"{where}.{key}: unknown setting{nearest(key, known)}; there are: {', '.join(known)}")
        raw.pop(key)
    if "task" in raw and "tasks" not in raw:
        raw["tasks"] = [raw["task"]]
    raw.pop("task", None)
    if "data" in raw and not (isinstance(raw["data"], list) and all(isinstance(e, dict) for e in raw["data"])):
        faults.append(f"{where}.data = {shown(raw['data'])}: should be a list of tables, [[data]]")
        raw.pop("data")
    if "tasks" not in raw:
        raw["tasks"] = [entry["name"] for entry in raw.get("data", []) if isinstance(entry.get("name"), str)]
    raw["seeds"] = _seeds(raw.get("seeds", 1), f"{where}.seeds", faults)
    if isinstance(raw.get("sweep"), dict) and "seeds" in raw["sweep"]:
        raw["sweep"] = {**raw["sweep"], "seeds": _seeds(raw["sweep"]["seeds"], f"{where}.sweep.seeds", faults)}
    defaults = raw.pop("defaults", {})
    if not isinstance(defaults, dict):
        faults.append(f"{where}.defaults = {shown(defaults)}: should be a table, [defaults]")
        defaults = {}
    budget = raw.get("budget")
    solved = isinstance(budget, dict) and budget.get("equal") == "parameters"
    entries = raw.get("methods", [])
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        faults.append(f"{where}.methods: should be a list of tables, [[methods]]")
        entries = []
    elif not entries:
        faults.append(
            f"{where}.methods: a study names at least one method; add [[methods]] with method = one of: {', '.join(METHODS)}"
        )
    if not raw.get("tasks"):
        faults.append(f'{where}.tasks: a study names at least one task; add tasks = ["glue/stsb"], or [[data]] of your own')
        raw["tasks"] = ["-"]
    used: set[str] = set()
    built, at, refused = [], [], False  # the sound entries, and which of the file's each is
    for index, entry in enumerate(entries):
        place = f"{where}.methods[{index}]"
        try:
            for combination, cell in written_out(entry, place):
                for one, on_curve in expanded(combination, defaults, place, solved):
                    of_several = {"place": on_curve, "cell": cell}
                    built.append({**_entry(one, defaults, used, place, solved), **{k: v for k, v in of_several.items() if v}})
                    at.append(index)
        except ValueError as error:
            faults.append(str(error))
            refused = True
    if not refused:
        faults += _give_sources(built, where, at)
    for key in sorted(set(defaults) - used):
        readable = sorted({f for m in METHODS.values() for f in m.settings.model_fields} | set(Entry.model_fields))
        hint = nearest(key, readable) if key not in readable else ""
        faults.append(f"{where}.defaults.{key}: no method of this study reads it{hint}: take it out")
    names_design = not isinstance(raw.get("sweep"), dict) or "design" in raw["sweep"]
    if not names_design:
        raw["sweep"] = {**raw["sweep"], "design": default_design(raw, built)}
    study = None
    try:
        raw["methods"] = built or [{"method": "-", "learning_rates": [1.0]}]
        study = Study(**raw)
    except ValidationError as error:
        faults.extend(_with_the_files_places(explain(error, Study, where=where), where, at, named_by_file))
    if study is not None and not faults:
        study = quantized(study, study.quantization, study.double_quantization)
        faults.extend(f"{where}: {fault}" for fault in _contradictions(study, names_design))
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))  # entries that one of the file stands for share their faults
    return study


def default_design(raw: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """How rates are chosen in a study whose [sweep] does not say it.

    A test that takes chosen rates as given names a wrong winner in 16 to 56 % of families where neighbouring rates differ
    (reports/studies/designs).  So a comparison shares rates where one of its methods says so, and runs whole curves where none
    does; a quick look, which claims nothing, and a paper's own protocol sweep.
    """
    if raw.get("quick") is True or raw.get("protocol") == "best-dev-epoch":
        return "chosen-rate"
    return "shared-rate" if any(entry.get("shared_with") is not None for entry in entries) else "whole-curve"


def _with_the_files_places(lines: list[str], where: str, at: list[int], named_by_file: bool) -> list[str]:
    """The faults that pydantic names, with the places that the file has.

    Args:
        at: which of the file's entries each of the study's is.
        named_by_file: the file sets no name, so that its own is the study's.
    """
    faults = []
    for line in lines:
        if re.match(rf"{re.escape(where)}\.methods\.\d+\.source\b", line):
            continue  # a copy of another entry, which has the same fault
        line = re.sub(rf"^({re.escape(where)}\.data)\.(\d+)", r"\1[\2]", line)
        line = re.sub(r"\.methods\.(\d+)", lambda found: f".methods[{at[int(found[1])] if at else 0}]", line, count=1)
        if named_by_file:
            line = line.replace(f"{where}.name:", f"{where}: it sets no name, so that the file's own is taken, but", 1)
        faults.append(line)
    return faults


def in_steps(name: str, settings: Mapping[str, Any], total_steps: int) -> dict[str, Any]:
    """The settings of the method `name` with every share of the run, "10%", made a number of steps."""
    counts = method(name).settings.with_role("steps")
    return {k: _steps(v, total_steps) if k in counts else v for k, v in settings.items()}


def unsolved_ranks(kind: type[Settings]) -> dict[str, int]:
    """A method's ranks until experiments/study/budget.py has seen the model's shapes."""
    return dict.fromkeys(kind.with_role("rank"), 1)


def _entry(entry: dict[str, Any], defaults: dict[str, Any], used: set[str], where: str, solved: bool) -> dict[str, Any]:
    """An entry as `Entry` takes it: defaults that its method reads filled in, its own settings checked.

    Args:
        solved: the entry's ranks follow from a budget of parameters, so that it may name none.

    Raises:
        ValueError: one line for each fault.
    """
    if not isinstance(entry.get("method"), str):
        given = f".method = {shown(entry['method'])}: is no text" if "method" in entry else ".method: missing"
        raise ValueError(f"{where}{given}; name one of: {', '.join(METHODS)}")
    if not isinstance(entry.get("label", ""), str):  # others name it, so that it is needed before all else is checked
        raise ValueError(f"{where}.label = {shown(entry['label'])}: should be a text, in quotes, or left out")
    try:
        spec = method(entry["method"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    own = set(spec.settings.model_fields)
    shared = {"method", "label", "learning_rate", "learning_rates", *OWN_OF_ENTRIES[3:]} | (
        {"targets"} if spec.takes_targets else set()
    )
    shared |= {FACTORS} | (set(KEYS) if spec.settings.with_role("rank") else set())
    taken = "ranks_of" in entry
    budgeted = set(spec.settings.with_role(*FROM_BUDGET))  # what follows from the budget, or from the entry that ranks_of names
    step_counts = spec.settings.with_role("steps")
    if spec.takes_ranks:
        shared |= {"ranks_of", "permuted", "ranks_seed"}
    faults = []
    for key in [k for k in entry if k not in own | shared]:
        if key == "targets":
            faults.append(f"{where}.targets: {spec.name} inserts nothing at targets, so it has no effect: take it out")
        elif key in ("ranks_of", "permuted", "ranks_seed"):
            takers = ", ".join(one.name for one in METHODS.values() if one.takes_ranks)
            faults.append(f"{where}.{key}: {spec.name} takes no ranks; methods that do: {takers}; take it out")
        else:
            there = ", ".join(sorted(own | shared))
            faults.append(f"{where}.{key}: unknown setting of {spec.name}{nearest(key, own | shared)}; there are: {there}")
    inherited = {
        k: v for k, v in defaults.items() if k in own | (shared - {"method", "label", FACTORS, *KEYS, *OWN_OF_ENTRIES})
    }
    if taken:
        inherited = {k: v for k, v in inherited.items() if k not in budgeted | {"targets"}}
    used |= set(inherited)
    if {"learning_rate", "learning_rates"} & set(entry):
        inherited = {k: v for k, v in inherited.items() if k not in ("learning_rate", "learning_rates")}
    merged = {**inherited, **{k: v for k, v in entry.items() if k in own | shared}}
    if "learning_rate" in merged and "learning_rates" in merged:
        faults.append(f"{where}: learning_rate and learning_rates are both given: keep one")
    rates = merged.pop("learning_rates", None)
    rate = merged.pop("learning_rate", None)
    if rates is None and rate is None:
        faults.append(f"{where}.learning_rate: missing; give one, or learning_rates to choose from")
    settings = {k: v for k, v in merged.items() if k in own}
    if taken:
        given = sorted((budgeted | {"targets", "scale"}) & set(merged))
        faults.extend(f"{where}.{k}: follows from ranks_of: take it out" for k in given)
        settings |= unsolved_ranks(spec.settings)
    elif solved:
        given = sorted(budgeted & set(settings))
        faults.extend(f"{where}.{k}: follows from the budget of parameters: take it out, or [budget]" for k in given)
        settings |= unsolved_ranks(spec.settings)
    for key in step_counts:
        value = settings.get(key)
        if isinstance(value, str) and not _is_share(value):
            faults.append(
                f'{where}.{key} = {quoted(value)}: give a number of steps, or a share of the run such as "10%", at most "100%"'
            )
            settings.pop(key)
    try:
        check(spec.name, in_steps(spec.name, settings, 100))
        lists = [k for k, v in settings.items() if isinstance(v, list)]
        by_pattern = {k: settings.get(k, {}).values() for k in spec.settings.with_role(*BY_PATTERN)}
        lists += [k for k, values in by_pattern.items() if any(isinstance(v, list) for v in values)]
        faults.extend(f"{where}.{k} = {settings[k]}: a study's entry has one value; write an entry for each" for k in lists)
    except ValueError as error:
        faults.extend(line.replace(spec.name, where, 1) for line in str(error).splitlines())
    if faults:
        raise ValueError("\n".join(faults))
    return {
        "method": spec.name,
        "label": merged.get("label") or spec.name,
        "learning_rates": [rate] if rates is None else rates,
        **({"targets": merged["targets"]} if "targets" in merged else {}),
        "settings": settings,
        **{k: merged[k] for k in ("scale", *OWN_OF_ENTRIES) if k in merged},
    }


def _give_sources(entries: list[dict[str, Any]], where: str, at: list[int]) -> list[str]:
    """Gives each entry that takes its ranks from another that one and its targets; the faults of those that cannot.

    at: which of the file's entries each is.
    """
    faults = []
    by_label = {entry["label"]: entry for entry in entries}
    for index, entry in zip(at, entries, strict=True):
        place = f"{where}.methods[{index}]"
        if "ranks_of" not in entry:
            if entry.get("permuted"):
                faults.append(f"{place}.permuted has no effect without ranks_of: take it out, or name whose ranks")
            if "ranks_seed" in entry:
                faults.append(f"{place}.ranks_seed has no effect without ranks_of: take it out, or name whose ranks")
            continue
        label = entry["ranks_of"]
        source = by_label.get(label) if isinstance(label, str) else None
        if source is None:
            faults.append(f"{place}.ranks_of = {quoted(label)} is no label of a method{_labels(label, by_label)}")
        elif "ranks_of" in source:
            faults.append(f'{place}.ranks_of = "{label}": this takes its own ranks from "{source["ranks_of"]}": name that')
        elif not method(source["method"]).takes_targets:
            faults.append(f'{place}.ranks_of = "{label}": {source["method"]} has no ranks: name a low-rank method')
        else:
            entry["source"] = source
            if "targets" in source:
                entry["targets"] = source["targets"]
    return faults


def _labels(word: Any, known: Collection[str]) -> str:
    """The nearest label, and all of them."""
    return f"{nearest(str(word), known)}; there are: {', '.join(known)}"


def _contradictions(study: Study, names_design: bool = True) -> list[str]:
    """What no single field can tell: faults between them; names_design: the file says how rates are chosen."""
    faults = []
    labels = [e.label for e in study.methods]
    if study.reference is not None and study.reference not in labels:
        faults.append(f"reference = {quoted(study.reference)} is no label of a method{_labels(study.reference, labels)}")
    numbers = {e.label: len(e.learning_rates) for e in study.methods}
    if study.sweep is None and max(numbers.values()) > 1:
        label = max(numbers, key=numbers.get)
        faults.append(
            f"{label} has {numbers[label]} learning rates and the study no [sweep] that chooses: add one, or give one rate"
        )
    if study.sweep is not None and max(numbers.values()) == 1:
        faults.append("[sweep] has no effect, because every method has one learning rate: take it out, or give learning_rates")
    swept = {label: number for label, number in numbers.items() if study.kind == "comparison" or number > 1}
    if not study.quick and len(set(swept.values())) > 1:
        given = ", ".join(f"{k} {v}" for k, v in numbers.items())
        faults.append(f"methods have unequal numbers of learning rates ({given}): give each as many, or set quick = true")
    faults += _sharing_faults(study.methods)
    faults += _randomized_faults(study)
    faults += _design_faults(study, names_design) if study.sweep is not None else []
    faults += contradictions(study.hypothesis, study.looks, labels, study.tasks, len(study.seeds))
    faults += _budget_faults(study.budget)
    faults += quantization_faults(study)
    partners = [entry.label for entry in study.methods if entry.ranks_seed == "other"]
    if partners and len(study.seeds) % 2:
        faults.append(
            f'{partners[0]}: ranks_seed = "other" takes the ranks of a partner\'s run, and of {len(study.seeds)} seeds the '
            f"last has none: give an even number of seeds"
        )
    takers = [entry.label for entry in study.methods if entry.ranks_of is not None]
    if takers and study.budget.equal in ("time", "memory"):
        faults.append(
            f'{takers[0]}: ranks_of needs runs that are not made when budget.equal = "{study.budget.equal}" measures a step: '
            f"take another budget, or the entry out"
        )
    if study.protocol == "best-dev-epoch" and study.training.evaluations_per_epoch == 0:
        faults.append('training.evaluations_per_epoch = 0: protocol = "best-dev-epoch" scores every epoch, so give at least 1')
    sweep = study.sweep
    if sweep is not None and sweep.trials is not None and sweep.trials < max(numbers.values()):
        faults.append(
            f"sweep.trials = {sweep.trials} is below the {max(numbers.values())} learning rates of a method: raise it, or take "
            f"rates out"
        )
    if sweep is not None and sweep.halving is None and "rungs" in sweep.model_fields_set:
        faults.append(f"sweep.rungs = {sweep.rungs} has no effect without sweep.halving: take it out, or add halving = 2")
    for entry in study.methods:
        if len(set(entry.learning_rates)) < len(entry.learning_rates):
            faults.append(f"{entry.label}: learning_rates = {entry.learning_rates} has one twice: take it out")
    if len(set(study.tasks)) < len(study.tasks):
        faults.append(f"tasks = {study.tasks} has one twice: take it out")
    names = [entry.name for entry in study.data]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            faults.append(f'two [[data]] are called "{name}": give one of them another name')
        if name not in study.tasks:
            faults.append(f'data "{name}" has no effect, because tasks does not name it: add it there, or take it out')
    if len(set(study.seeds)) < len(study.seeds):
        faults.append(f"seeds = {study.seeds} has one twice: take it out")
    if study.training.accumulation > study.training.batch_size:
        faults.append(
            f"training.accumulation = {study.training.accumulation} is above batch_size = {study.training.batch_size}: "
            f"a micro-batch has at least one row"
        )
    return faults


def _sharing_faults(entries: list[Entry]) -> list[str]:
    """Entries that cannot train at one rate with the one that they name."""
    faults, by_label = [], {entry.label: entry for entry in entries}
    for entry in entries:
        if entry.shared_with is None:
            continue
        said, other = f"{entry.label}: shared_with = {quoted(entry.shared_with)}", by_label.get(entry.shared_with)
        if other is None or other is entry:
            faults.append(f"{said} is no label of another method{_labels(entry.shared_with, by_label)}")
        elif other.shared_with is not None:
            faults.append(f'{said}, which shares the rate of "{other.shared_with}": name that')
        elif entry.learning_rates != other.learning_rates:
            faults.append(f"{said}: learning_rates = {entry.learning_rates} and {other.learning_rates}: give both the same")
        elif (entry.ranks_of is None) != (other.ranks_of is None):
            faults.append(
                f"{said}: one of them takes its ranks from a third method (ranks_of), so it trains later: both or none"
            )
    return faults


def _randomized_faults(study: Study) -> list[str]:
    """What a study lacks for an estimate of what rank is worth: one random allocation for each seed, and a uniform one.

    Other entries may measure what is to be compared with the estimate (importances, ranks of allocators): with one rate each.
    """
    if study.kind == "comparison":
        few = next((entry for entry in study.methods if entry.seeds is not None), None)
        said = 'seeds has no effect without kind = "randomized": take it out'
        return [f"{few.label}: {said}; every method has the study's seeds"] if few is not None else []
    faults, said = [], 'kind = "randomized"'
    drawn = [entry for entry in study.methods if entry.method == "random-rank"]
    if len(drawn) != 1:
        return [f"{said}: {len(drawn)} entries of random-rank: give one, whose allocation each seed draws"]
    [drawn] = drawn
    shared = {drawn.label, drawn.shared_with}
    uniform = [e for e in study.methods if e.method == "lora" and e.ranks_of is None and {e.label, e.shared_with} & shared]
    alone = [e for e in study.methods if e.method == "lora" and e.learning_rates == drawn.learning_rates and not drawn.swept]
    if not uniform and not alone:
        faults.append(f'{said}: no entry of lora shares the rate of "{drawn.label}": add one, the uniform allocation')
    if study.budget.equal != "parameters":
        faults.append(f'{said}: allocations are compared at one budget: set budget.equal = "parameters"')
    if drawn.settings.get("cost") != "parameters":
        faults.append(f'{drawn.label}: {said} draws within a budget of parameters: set cost = "parameters"')
    if study.sweep is not None and study.sweep.design == "whole-curve":
        faults.append(f'{said}: allocations are compared at one rate: take sweep.design = "shared-rate"')
    if drawn.seeds is not None:
        faults.append(f"{drawn.label}: seeds = {drawn.seeds}: {said} draws an allocation for each of the study's: take it out")
    for entry in study.methods:
        if entry.seeds is not None and entry.seeds > len(study.seeds):
            faults.append(f"{entry.label}: seeds = {entry.seeds}: the study has {len(study.seeds)}: give at most as many")
    return faults


IDLE_IN_WHOLE_CURVE = ("epochs", "max_steps", "trials", "halving", "rungs")  # settings of a sweep that is not run


def _design_faults(study: Study, is_named: bool) -> list[str]:
    """What contradicts the design that the study names for its learning rates, or has by default."""
    design, given = study.sweep.design, study.sweep.model_fields_set
    if design == "chosen-rate":
        return []
    faults, said = [], f'sweep.design = "{design}"'
    instead = "" if is_named else ', or write design = "chosen-rate" for a sweep, whose choice no test counts'
    said += "" if is_named else ", the default of a study that is not quick"
    if study.protocol == "best-dev-epoch":
        faults.append(f'{said}: protocol = "best-dev-epoch" chooses on what it reports: take protocol = "held-out"')
    both = sorted(set(study.sweep.seeds) & set(study.seeds))
    if both and (design == "shared-rate" or "seeds" in given):
        faults.append(
            f"sweep.seeds = {study.sweep.seeds}: {both} are final seeds too, and {said} chooses on none of these: give others, "
            f"such as [100, 101]{instead}"
        )
    if design == "shared-rate":
        if not any(entry.shared_with for entry in study.methods):
            faults.append(f"{said}: no method shares its rate: name shared_with at one, or take another design")
        return faults
    idle = [key for key in IDLE_IN_WHOLE_CURVE if key in given]
    faults += [f"sweep.{key} has no effect with {said}: take it out{instead}" for key in idle]
    if study.training.evaluations_per_epoch == 0:
        faults.append(
            f"training.evaluations_per_epoch = 0: {said} chooses by the selection score of the final runs, so give at least 1"
        )
    for entry in study.methods:
        if entry.ranks_of is not None and entry.source is not None and entry.source.swept:
            faults.append(
                f'{entry.label}: ranks_of = "{entry.ranks_of}", which has a final run at each of its rates with {said}: give '
                f"it one rate, or take another design"
            )
    factors = {entry.label: _factor(entry.learning_rates) for entry in study.methods if entry.swept}
    if not study.quick and factors and max(factors.values()) > 1.1 * min(factors.values()):  # rates may be rounded
        steps = ", ".join(f"{label} {factor:.3g}" for label, factor in factors.items())
        faults.append(f"{said}: neighbouring rates differ by unequal factors ({steps}): give all methods the same")
    return faults


def _factor(rates: list[float]) -> float:
    """The mean ratio of neighbouring rates."""
    return (max(rates) / min(rates)) ** (1 / (len(rates) - 1))


def quantized(study: Study, name: str | None, is_double: bool) -> Study:
    """The study with this quantization in the place of its own, in every entry that has none of its own."""

    def told(entry: Entry) -> Entry:
        own = entry.quantization, entry.double_quantization
        source = None if entry.source is None else told(entry.source)
        if own not in ((None, False), (study.quantization, study.double_quantization)):
            return entry.model_copy(update={"source": source})
        return entry.model_copy(update={"quantization": name, "double_quantization": is_double, "source": source})

    entries = [told(entry) for entry in study.methods]
    return study.model_copy(update={"quantization": name, "double_quantization": is_double, "methods": entries})


def quantization_faults(study: Study) -> list[str]:
    """Settings that contradict each other, and methods that train what is quantised."""
    faults = [quantization.fault(study.quantization, study.double_quantization)]
    for entry in study.methods:
        own = entry.quantization, entry.double_quantization
        if own != (study.quantization, study.double_quantization) and (fault := quantization.fault(*own)) is not None:
            faults.append(f"{entry.label}: {fault}")
        if entry.scheme is not None and method(entry.method).trains_base:
            faults.append(
                f"{entry.label}: {entry.method} trains the base's own weights, and these are quantised ({entry.scheme}): take "
                f'the entry out, or give it quantization = "none"'
            )
    return [fault for fault in faults if fault]


def _budget_faults(budget: Budget) -> list[str]:
    """Settings of a budget that its kind lacks or does not read."""
    reads = {"parameters": {"parameters", "scale"}, "memory": {"bytes"}}.get(budget.equal, set())
    idle = sorted(budget.model_fields_set - {"equal"} - reads)
    faults = [f'budget.{key} has no effect with equal = "{budget.equal}": take it out' for key in idle]
    needed = {"parameters": "parameters", "memory": "bytes"}.get(budget.equal)
    if needed and getattr(budget, needed) is None:
        faults.append(f'budget.{needed}: missing; equal = "{budget.equal}" needs it')
    return faults


def _seeds(value: Any, place: str, faults: list[str]) -> Any:
    """`3` means seeds 0, 1, 2."""
    if isinstance(value, list):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_SEEDS:
        return list(range(value))
    faults.append(f"{place} = {shown(value)}: give how many, from 1 to {MOST_SEEDS:,}, or a list of them, such as [0, 1, 2]")
    return [0]


def _is_share(text: str) -> bool:
    return re.fullmatch(r"\d+(\.\d+)?\s*%", text, re.ASCII) is not None and float(text.rstrip()[:-1]) <= 100


def _steps(value: Any, total: int) -> Any:
    """A share of the run as a number of steps, at least one."""
    if isinstance(value, str) and value.rstrip().endswith("%"):
        return max(1, round(float(value.rstrip()[:-1]) / 100 * total))
    return value
