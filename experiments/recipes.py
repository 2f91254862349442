"""The papers' recipes: experiments/studies/papers/*.toml, a file for each published table, and what a cell of one runs.

A cell is a row of the table (a method with its size) on a task. Its settings are those of the row's groups, in the order
that the row names them, then what these groups say of the task, then the row's own; a file has them once for each variant
("paper": as the paper says; "script": as its released code does). `plan` makes a study of a cell, so that all that holds
for a study holds here. No torch here.

What a recipe says and Rankwise cannot do is not dropped in silence: it becomes a line of the departures, or, where it
moves the result, a reason why the numbers are not comparable.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError
from rankwise.experiments import config, sources
from rankwise.experiments.config import MOST_SEEDS, PAPERS, Study, Training
from rankwise.experiments.tasks import get as get_task
from rankwise.experiments.tasks import names as task_names
from rankwise.experiments.tasks.task import Task
from rankwise.variants.files import json_text
from rankwise.variants.settings import (
    METHODS,
    Count,
    Fraction,
    Positive,
    PositiveInt,
    Settings,
    explain,
    method,
    nearest,
    quoted,
    shown,
)

# Models that every machine with a package index can have: an encoder, and a decoder.
STAND_IN, STAND_IN_DECODER = "sentence-transformers/all-MiniLM-L6-v2", "SmolLM2-135M-Instruct-Q4_1"
DECODERS = ("gpt2", "llama")

# What a group, a task or a row of a recipe may say, besides the settings of `Training` and of the methods.
OWN_KEYS = {
    "model": "hub id of the pre-trained model",
    "method": "Rankwise's name of the method",
    "targets": "modules to adapt, by role: names of ROLES with commas between, or 'all six'",
    "learning_rate": "the rate",
    "learning_rates": "the rates that the paper searched; one is chosen by a sweep as long as the final runs",
    "lr_warmup_ratio": "share of the steps in which the rate rises",
    "lr_warmup_steps": "steps in which the rate rises",
    "cls_dropout": "dropout before the classifier",
    "label_smoothing": "of the loss",
    "generation": "how text is generated, in words",
    "quantization": "form of the frozen base's linears: nf4 or int8",
    "double_quantization": "whether the scales of nf4's blocks are quantised too",
    "start_from": "what the adapter starts from where that is not the pre-trained model alone",
    "departures": "sentences: what else is not as in the paper",
}
TRAINING_KEYS = frozenset(Training.model_fields) - {"warmup_ratio"}
METHOD_KEYS = frozenset(key for one in METHODS.values() for key in one.settings.model_fields)
KNOWN_KEYS = (*OWN_KEYS, *sorted(TRAINING_KEYS), *sorted(METHOD_KEYS))

PROTOCOLS = get_args(Study.model_fields["protocol"].annotation)


class Said(Training):
    """What a recipe's group, task or row says of the training, each value with the rule that it has in a study."""

    learning_rate: Positive | None = None
    """See `OWN_KEYS`, as for those that follow."""
    learning_rates: list[Positive] = Field(default=[1.0], min_length=1)
    lr_warmup_ratio: Fraction = 0.0
    lr_warmup_steps: Count = 0
    cls_dropout: Fraction | None = None
    label_smoothing: Fraction = 0.0
    quantization: Literal["nf4", "int8"] | None = None
    double_quantization: bool = False
    warmup_steps: Count = 0
    """Of the method, as those that follow; whole steps, so that they can be scaled."""
    final_steps: Count = 0
    interval: PositiveInt = 1
    rise_steps: Count = 0
    rank: PositiveInt = 1
    target_rank: PositiveInt = 1
    bottleneck: PositiveInt = 1


SIX = ("query", "key", "value", "attention output", "intermediate", "output")
ROLES = (*SIX, "gate", "up", "down")  # the last three of LLaMA's kind, which have three matrices where the others have two
ALL_SIX = "all six"
# Role -> module, by the model_type of a model's config.json; read off transformers' model classes.
_BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": r"layer\.\d+\.output\.dense",  # "output.dense" alone would be the attention's too
}
_DEBERTA = _BERT | {role: f"attention.self.{role}_proj" for role in ("query", "key", "value")}
MODULES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "deberta-v2": _DEBERTA,  # DeBERTaV3 too
    "llama": {"query": "q_proj", "key": "k_proj", "value": "v_proj", "attention output": "o_proj"}
    | {role: f"{role}_proj" for role in ("gate", "up", "down")},
    "gpt2": {  # one matrix of the three joined
        **dict.fromkeys(("query", "key", "value"), "attn.c_attn"),
        "attention output": "attn.c_proj",
        "intermediate": "mlp.c_fc",
        "output": "mlp.c_proj",
    },
}


@dataclass(frozen=True)
class Shape:
    """What the estimates need of a model: its layers' matrices and all its parameters."""

    architecture: str  # model_type of its config.json
    layers: int
    hidden: int
    intermediate: int
    parameters: float

    @property
    def in_matrices(self) -> int:
        """Parameters in the layers' six matrices, of LLaMA's kind seven: what a token is multiplied with."""
        wide = 3 if self.architecture == "llama" else 2
        return self.layers * (4 * self.hidden**2 + wide * self.hidden * self.intermediate)


# Layers and widths: each model's config.json on the hub; parameters: as LoRA's Table 2 and AdaLoRA's Table 1 print them,
# MiniLM's counted. So nothing is downloaded for a list.
SHAPES = {
    "FacebookAI/roberta-base": Shape("roberta", 12, 768, 3072, 125.0e6),
    "FacebookAI/roberta-large": Shape("roberta", 24, 1024, 4096, 355.0e6),
    "microsoft/deberta-v2-xxlarge": Shape("deberta-v2", 48, 1536, 6144, 1500.0e6),
    "microsoft/deberta-v3-base": Shape("deberta-v2", 12, 768, 3072, 184e6),
    STAND_IN: Shape("bert", 6, 384, 1536, 22_713_216),
    # Parameters as transformers counts them; LoRA's Table 3 prints 354.92M and 774.03M.
    "openai-community/gpt2-medium": Shape("gpt2", 24, 1024, 4096, 354_823_168),
    "openai-community/gpt2-large": Shape("gpt2", 36, 1280, 5120, 774_030_080),
    **dict.fromkeys(
        ("yahma/llama-7b-hf", "huggyllama/llama-7b", "meta-llama/Llama-2-7b-hf"),
        Shape("llama", 32, 4096, 11008, 6_738_415_616),
    ),
    **dict.fromkeys(("yahma/llama-13b-hf", "huggyllama/llama-13b"), Shape("llama", 40, 5120, 13824, 13_015_864_320)),
    "huggyllama/llama-30b": Shape("llama", 60, 6656, 17920, 32_528_943_616),
    "huggyllama/llama-65b": Shape("llama", 80, 8192, 22016, 65_285_660_672),
    "meta-llama/Meta-Llama-3-8B": Shape("llama", 32, 4096, 14336, 8_030_261_248),
    "meta-llama/Llama-3.2-3B": Shape("llama", 28, 3072, 8192, 3_212_749_824),
    # Keys and values are counted as if they had 9 heads, and not 3: an eighth too many.
    STAND_IN_DECODER: Shape("llama", 30, 576, 1536, 134_515_008),
}

# The time estimate: 4 operations a matrix parameter and token for an adapter (forward, and backward to the inputs), 6 for
# full fine-tuning (to the weights too), 2 for a token that is only evaluated; at REACHED of the rate of plain matrix
# products that is measured here. 0.5: LoRA's 1,578 tokens/s of MiniLM in reports/studies/quick-look against the 133
# Gflop/s of the same processor in reports/bench/bench.json.
REACHED = 0.5
# Tokens of a row, on average: an assumption, not a measurement, and good to a factor of two or three.
TOKENS_OF_A_ROW = {"squad": 200, "metamathqa": 250, "commonsense": 120, "alpaca-mmlu": 120}
TOKENS_OF_A_SENTENCE_ROW = 40
# Bytes of activations for each element of (rows, tokens, hidden) and layer in fp32: 34 bytes in half precision (Korthikanti
# et al. 2022, eq. 2, without the scores, which fused attention does not keep), twice that in fp32, and twice again for what
# an allocator keeps of tensors of changing length.
ACTIVATION_BYTES = 34 * 2 * 2
PROCESS_BYTES = 0.7e9  # Python and torch themselves
# Bits of a weight with its share of the scales: one in fp32 for 64 weights, or one in 8 bits, of which 256 share one in fp32.
BITS = {("nf4", False): 4 + 32 / 64, ("nf4", True): 4 + 8 / 64 + 32 / (64 * 256), ("int8", False): 8.0}


@dataclass(frozen=True)
class Group:
    """Settings that rows share: for every task, and for single ones."""

    settings: Mapping[str, Any]
    tasks: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Variant:
    """One version of the recipe: the paper's own words, or those of the released script."""

    about: str
    departures: tuple[str, ...]
    groups: Mapping[str, Group]


@dataclass(frozen=True)
class Row:
    """One row of the published table; `waits` says why there is nothing to run, if there is not."""

    label: str
    groups: tuple[str, ...]
    settings: Mapping[str, Any]
    waits: str


@dataclass(frozen=True)
class Recipe:
    """One file. tasks: name of a column of cells -> Rankwise's task; empty where Rankwise has none for them yet.

    miniature: what a stand-in of a whole table is and is not; beside: the published column that its curve is held against.
    """

    name: str
    table: str
    title: str
    source: str
    protocol: str
    seeds: int
    waits: str
    miniature: str
    beside: str
    tasks: Mapping[str, str]
    rows: Mapping[str, Row]
    variants: Mapping[str, Variant]


@dataclass(frozen=True)
class Reason:
    """Why a number is not comparable with the published one: a word for a table's cell, a sentence for its caption."""

    tag: str
    text: str


@dataclass(frozen=True)
class Plan:
    """A cell, ready to run: the study, its length, and in what it is not the paper's run."""

    recipe: str
    row: str
    cell: str  # name of the recipe's task
    variant: str
    scale: float
    study: Study
    total_steps: int
    stands_in_for: str | None
    reasons: tuple[Reason, ...]
    departures: tuple[str, ...]
    position: float | None  # of the row on a curve: its rank


# -- reading ------------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    """The recipes that ship with Rankwise."""
    return sorted(path.stem for path in PAPERS.glob("*.toml"))


def load(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: there is none, with the nearest; or its file says something that it may not.
    """
    if name not in names():
        raise ValueError(f'no paper\'s table "{name}"{nearest(name, names())}; there are: {", ".join(names())}')
    return read(PAPERS / f"{name}.toml")


def read(path: Path) -> Recipe:
    """The recipe in a file; see `load`."""
    return parse(config.read_toml(path), path)


def parse(raw: Mapping[str, Any], path: Path, within: tuple[str, ...] = ()) -> Recipe:
    """The recipe that a file has.

    Args:
        path: names the recipe, and says where the one is that it may be `like`.
        within: the recipes that are like this one, and are being read.

    Raises:
        ValueError: it says something that it may not.
    """
    where = path.name
    if faults := config.too_large(raw, where):
        raise ValueError("\n".join(faults))
    texts = {"table": path.stem, "title": "", "source": "", "protocol": "best-dev-epoch"}
    texts |= {"waits": "", "miniature": "", "beside": ""}
    known = (*texts, "like", "seeds", "tasks", "rows", "variants")
    _refuse_unknown(raw, known, where)
    for key in texts:
        _text(raw, key, where)
    if _text(raw, "protocol", where) not in (None, *PROTOCOLS):
        raise ValueError(f"{where}.protocol = {shown(raw['protocol'])}: should be one of: {', '.join(PROTOCOLS)}")
    seeds = raw.get("seeds", 1)
    if isinstance(seeds, bool) or not isinstance(seeds, int) or not 1 <= seeds <= MOST_SEEDS:
        raise ValueError(f"{where}.seeds = {shown(seeds)}: give how many, from 1 to {MOST_SEEDS:,}")
    tasks = dict(_table(raw, "tasks", where))
    for key in tasks:
        _text(tasks, key, f"{where}.tasks")
    like = _text(raw, "like", where)
    base: Mapping[str, Variant] = {}
    if like is not None:
        beside = sorted(one.stem for one in path.parent.glob("*.toml") if one.stem != path.stem)
        if like not in beside:
            raise ValueError(
                f"{where}.like = {quoted(like)}: no other recipe{nearest(like, beside)}; there are: {', '.join(beside)}"
            )
        if like in within:
            raise ValueError(
                f"{where}.like = {quoted(like)}: {' and '.join((*within, path.stem))} name one another: take one out"
            )
        other = path.with_name(f"{like}.toml")
        base = parse(config.read_toml(other), other, (*within, path.stem)).variants
    variants: dict[str, Variant] = {}
    for name in dict.fromkeys((*base, *_table(raw, "variants", where))):
        value = _table(raw, "variants", where).get(name, {})
        variants[name] = _variant(value, tasks, variants, base.get(name), f"{where}: variants.{name}")
    rows = {}
    for label, value in _table(raw, "rows", where).items():
        place = f"{where}: rows.{quoted(label)}"
        if not isinstance(value, dict):
            raise ValueError(f"{place} = {shown(value)}: should be a table")
        settings = {key: value[key] for key in value if key not in ("groups", "waits")}
        _check_values(settings, place)
        groups = _texts(value, "groups", place)
        there = sorted({group for variant in variants.values() for group in variant.groups})
        for group in groups:
            if group not in there:
                raise ValueError(
                    f"{place}: no variant has a group {quoted(group)}{nearest(group, there)}; there are: {', '.join(there)}"
                )
        rows[label] = Row(label, groups, settings, _text(value, "waits", place) or "")
    return Recipe(
        name=path.stem,
        **{key: raw.get(key, default) for key, default in texts.items()},
        seeds=seeds,
        tasks=tasks,
        rows=rows,
        variants=variants,
    )


def _variant(raw: Any, tasks: Mapping[str, str], known: Mapping[str, Variant], start: Variant | None, where: str) -> Variant:
    """A variant; `like` names an earlier one of the file, of which it says only what is different.

    start: the variant of the same name in the file that this one is like.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{where} = {shown(raw)}: should be a table")
    about, departures, like = _text(raw, "about", where) or "", _texts(raw, "departures", where), _text(raw, "like", where)
    raw = {key: value for key, value in raw.items() if key not in ("about", "departures", "like")}
    if like is not None and like not in known:
        raise ValueError(
            f"{where}.like = {quoted(like)}: no earlier variant of this file; there are: {', '.join(known) or 'none'}"
        )
    groups = {**(known[like].groups if like else {}), **(start.groups if start else {})}
    if start is not None:  # what this file adds to an earlier variant is there in a later one too
        about, departures = about or start.about, (*start.departures, *departures)
    for name, value in raw.items():
        if not isinstance(value, dict):
            own = ("about", "departures", "like")
            raise ValueError(
                f"{where}.{name} = {shown(value)}: no setting of a variant{nearest(name, own)}; there are: {', '.join(own)}, "
                f"and tables of settings"
            )
        by_task = _table(value, "tasks", f"{where}.{name}")
        value = {key: one for key, one in value.items() if key != "tasks"}
        _check_values(value, f"{where}.{name}")
        for task in by_task:
            if task not in tasks:
                raise ValueError(
                    f"{where}.{name}.tasks.{task}: not in [tasks]{nearest(task, tasks)}; there are: {', '.join(tasks)}"
                )
            _check_values(_table(by_task, task, f"{where}.{name}.tasks"), f"{where}.{name}.tasks.{task}")
        base = groups.get(name, Group({}, {}))
        merged = {task: {**base.tasks.get(task, {}), **by_task.get(task, {})} for task in {**base.tasks, **by_task}}
        groups[name] = Group({**base.settings, **value}, merged)
    return Variant(about, departures, groups)


def _table(raw: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = raw.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {key} should be a table, not {shown(value)}")
    return value


def _text(raw: Mapping[str, Any], key: str, where: str) -> str | None:
    value = raw.get(key)
    if value is not None and not (isinstance(value, str) and value.isprintable()):
        raise ValueError(f"{where}.{key} = {shown(value)}: should be a text on one line, in quotes")
    return value


def _texts(raw: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = raw.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where}.{key} = {shown(values)}: should be a list of texts")
    return tuple(values)


def _check_values(values: Mapping[str, Any], where: str) -> None:
    """Settings that a group, a task or a row says.

    Raises:
        ValueError: an unknown key, or a value that no study could have, whatever the rest is; one line for each.
    """
    _refuse_unknown(values, KNOWN_KEYS, where)
    for key in ("model", "method", "targets", "generation", "start_from"):
        if _text(values, key, where) == "":
            raise ValueError(f"{where}.{key}: is empty: give a text, or take it out")
    _texts(values, "departures", where)
    if "method" in values:
        method(values["method"])
    try:
        Said(**{key: value for key, value in values.items() if key in Said.model_fields})
    except ValidationError as error:
        raise ValueError("\n".join(explain(error, Said, where=where))) from None


def _refuse_unknown(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ValueError(f"{where}.{key}: unknown setting{nearest(key, known)}; there are: {', '.join(known)}")


# -- what is asked for ----------------------------------------------------------------------------------------------------


def waits(recipe: Recipe, row: str, cell: str, variant: str) -> str:
    """Why there is nothing to run in that cell of the table; empty where there is."""
    one = recipe.rows[row]
    if recipe.waits or one.waits:
        return one.waits or recipe.waits
    if recipe.tasks[cell] not in task_names():
        return f"the task {recipe.tasks[cell]}"
    if variant not in recipe.variants:
        return f"a recipe {variant}"
    lacking = [name for name in one.groups if name not in recipe.variants[variant].groups]
    if lacking:
        return f"a recipe {variant} of {', '.join(lacking)}"
    given = settings_of(recipe, row, cell, variant)
    needed = {"model": ("model",), "method": ("method",), "length": ("epochs", "max_steps")}
    needed["rate"] = ("learning_rate", "learning_rates")
    if "method" in given and method(given["method"]).takes_targets:
        needed["targets"] = ("targets",)
    for what, keys in needed.items():
        if not any(key in given for key in keys):
            return f"a recipe: it has no {what} for {cell}"
    return ""


def choose(recipe: Recipe, cells: Sequence[str], rows: Sequence[str], variant: str) -> list[tuple[str, str]]:
    """(row, cell) of what can run among the cells and rows asked for; no rows, or the cell "all", mean all.

    Raises:
        ValueError: an unknown name, with the nearest; nothing left to run, with why.
    """
    if recipe.waits:
        raise ValueError(f"{recipe.name} waits for {recipe.waits}: there is nothing to run yet")
    if variant not in recipe.variants:
        raise ValueError(
            f"--variant {variant}: {recipe.name} has no such recipe{nearest(variant, recipe.variants)}; "
            f"it has: {', '.join(recipe.variants)}"
        )
    wanted = list(recipe.tasks) if "all" in cells else list(dict.fromkeys(cells))
    for name in wanted:
        if name not in recipe.tasks:
            raise ValueError(
                f'--cells: {recipe.name} has no cell "{name}"{nearest(name, recipe.tasks)}; '
                f"it has: {', '.join(recipe.tasks)}, or all"
            )
    for label in rows:
        if label not in recipe.rows:
            there = ", ".join(f'"{one}"' for one in recipe.rows)
            raise ValueError(f'--rows: {recipe.name} has no row "{label}"{nearest(label, recipe.rows)}; it has: {there}')
    chosen = list(dict.fromkeys(rows)) or list(recipe.rows)
    why = {(row, cell): waits(recipe, row, cell, variant) for row in chosen for cell in wanted}
    runnable = [key for key, reason in why.items() if not reason]
    if not runnable:
        said = dict.fromkeys(f'"{row}" waits for {reason}' for (row, _), reason in why.items())
        raise ValueError(f"{recipe.name}: nothing of this can run: {'; '.join(said)}")
    return runnable


def settings_of(recipe: Recipe, row: str, cell: str, variant: str) -> dict[str, Any]:
    """The cell's settings as the recipe has them."""
    one, groups = recipe.rows[row], recipe.variants[variant].groups
    found: dict[str, Any] = {}
    for name in one.groups:
        found |= groups[name].settings
    for name in one.groups:
        found |= groups[name].tasks.get(cell, {})
    return {**found, **one.settings}


def plan(
    recipe: Recipe,
    row: str,
    cell: str,
    variant: str = "paper",
    model: str | None = None,
    scale: float = 1.0,
    seeds: int | None = None,
    pack: int | None = None,
) -> Plan:
    """The study of a cell.

    Args:
        model: stands in for the recipe's own; its architecture must have the modules that the recipe's roles name.
        scale: in (0, 1], shrinks the run with all its step counts in proportion, none below 1.
        seeds: how many, from 0; as many as the paper's where None.

    Raises:
        ValueError: a role that the model does not have, step counts that do not fit, settings that a study refuses.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"--scale {scale:g}: give a share of the recipe's length, above 0 and at most 1")
    given = settings_of(recipe, row, cell, variant)
    own, task = given["model"], get_task(recipe.tasks[cell])
    chosen = model or own
    spec = method(given["method"])
    what = f'{recipe.name}, "{row}", {cell}, {variant}' + (f", --scale {scale:g}" if scale < 1 else "")
    training, settings, total = _lengths(given, spec.settings, task, scale, what)
    entry: dict[str, Any] = {"method": spec.name, "label": _label(recipe, row, variant, scale), **settings}
    if spec.takes_targets:
        entry["targets"] = modules_of(given["targets"], chosen)
    rates = given.get("learning_rates")
    entry |= {"learning_rate": given["learning_rate"]} if rates is None else {"learning_rates": rates}
    raw: dict[str, Any] = {
        "name": recipe.name,
        "title": recipe.title,
        "protocol": recipe.protocol,
        "model": chosen,
        "tasks": [recipe.tasks[cell]],
        "seeds": recipe.seeds if seeds is None else seeds,
        "training": training,
        "methods": [entry],
    }
    raw |= {key: given[key] for key in ("quantization", "double_quantization") if key in given}
    if pack is not None:
        raw["pack"] = pack
    if rates is not None:  # every rate is tried in a run as long as the final ones
        lengths = {key: training[key] for key in ("epochs", "max_steps") if key in training}
        raw["sweep"] = {**lengths, "design": "chosen-rate", "seeds": [0], "trials": len(rates)}
    study = config.parse(raw, default_name=recipe.name, where=recipe.name)
    stands_in_for = own if chosen != own else None
    reasons = _reasons(recipe, given, chosen, stands_in_for, scale)
    departures = _departures(recipe, given, variant, task, study, stands_in_for, scale, total)
    rank = given.get("rank", given.get("target_rank"))
    return Plan(
        recipe=recipe.name,
        row=row,
        cell=cell,
        variant=variant,
        scale=scale,
        study=study,
        total_steps=total,
        stands_in_for=stands_in_for,
        reasons=tuple(reasons),
        departures=tuple(departures),
        position=None if rank is None else float(rank),
    )


def roles_of(text: str) -> list[str]:
    """The roles in "query, value" or "all six".

    Raises:
        ValueError: an unknown one, with the nearest.
    """
    wanted = list(SIX) if text == ALL_SIX else [one.strip() for one in text.split(",")]
    for role in wanted:
        if role not in ROLES:
            raise ValueError(
                f"targets = {quoted(text)}: no role {quoted(role)}{nearest(role, ROLES)}; there are: {', '.join(ROLES)}"
            )
    return wanted


def modules_of(roles: str, model: str) -> list[str]:
    """The names of a role's modules in that model ("query, value", "all six").

    Raises:
        ValueError: an unknown role, or an architecture of which the names are not known.
    """
    wanted = roles_of(roles)
    architecture = shape(model).architecture
    if architecture not in MODULES:
        raise ValueError(
            f'--model {model}: where "{roles}" is in a {architecture} is not known; known architectures: {", ".join(MODULES)}'
        )
    unknown = next((role for role in wanted if role not in MODULES[architecture]), None)
    if unknown is not None:
        raise ValueError(
            f'--model {model}: a {architecture} has no module for the role "{unknown}"; it has: '
            f"{', '.join(MODULES[architecture])}: take a model of the recipe's architecture"
        )
    return list(dict.fromkeys(MODULES[architecture][role] for role in wanted))


def stand_in(model: str) -> str:
    """What can take the place of a model that cannot be had; of one that nothing is known of the encoder."""
    known = SHAPES.get(model)
    return STAND_IN_DECODER if known is not None and known.architecture in DECODERS else STAND_IN


def shape(model: str) -> Shape:
    """The shape of a model, known by name or read from its config.json (which may download the model).

    Raises:
        ValueError: a config.json without layers and widths.
        Unavailable: no source could give the model.
    """
    if model in SHAPES:
        return SHAPES[model]
    folder = sources.fetch(model)
    try:
        facts = json_text.read(folder / "config.json")
        architecture = str(facts["model_type"])
        if architecture == "gpt2":  # which has names of its own, and often no width
            layers, hidden = int(facts["n_layer"]), int(facts["n_embd"])
            inner = int(facts.get("n_inner") or 4 * hidden)
        else:
            layers, hidden, inner = (int(facts[k]) for k in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"--model {model}: its config.json lacks layers and widths; known: {', '.join(MODULES)}") from None
    known = Shape(architecture, layers, hidden, inner, 0)
    return Shape(architecture, layers, hidden, inner, known.in_matrices + facts.get("vocab_size", 0) * hidden)


def check_at_hand(plans: Sequence[Plan]) -> None:
    """Fetches every model and data set of the plans.

    Raises:
        ValueError: some cannot be had; one line for each, with what was tried and what can be done.
    """
    faults = []
    for model in dict.fromkeys(one.study.model for one in plans):
        try:
            sources.fetch(model)
        except sources.Unavailable as error:
            faults.append(
                f"model {model} could not be obtained; tried: {'; '.join(error.tried)}; "
                f"put another in its place, labelled in every table: --model {stand_in(model)}"
            )
    for name in dict.fromkeys(one.study.tasks[0] for one in plans):
        task = get_task(name)
        try:
            task.load((task.official_train_split, task.dev_split))
        except sources.Unavailable as error:
            here = ", ".join(known for known, entry in sources.CATALOGUE.items() if entry.kind == "data")
            faults.append(
                f"data {name} could not be obtained; tried: {'; '.join(error.tried)}; without a hub there are: {here}"
            )
    if faults:
        raise ValueError("\n".join(faults))


# -- lengths --------------------------------------------------------------------------------------------------------------


def _lengths(
    given: Mapping[str, Any], own: type[Settings], task: Task, scale: float, what: str
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Training and method settings with every length in steps scaled, and the number of steps.

    Raises:
        ValueError: a warm-up, or warm-up and final phase together, as long as the run.
    """
    training = {key: given[key] for key in given if key in TRAINING_KEYS}
    read_by_method = own.model_fields.keys() - TRAINING_KEYS  # `schedule` is the rate's
    settings = {key: given[key] for key in given if key in read_by_method}
    rows, _ = rows_of(task)
    full = Training(**training)
    total = full.total_steps(rows)
    if scale < 1:
        epochs = scale * full.epochs
        whole = round(epochs)
        if whole >= 1 and math.isclose(epochs, whole) and full.max_steps is None:
            training["epochs"] = whole
        else:
            training |= {"epochs": max(1, math.ceil(epochs)), "max_steps": max(1, round(scale * total))}
        total = Training(**training).total_steps(rows)
        for key in own.with_role("steps"):
            if key in settings:
                settings[key] = _scaled(settings[key], scale)
    if "lr_warmup_steps" in given:
        rising = _scaled(given["lr_warmup_steps"], scale)
        if rising >= total:
            raise ValueError(f"{what}: the rate would rise for {rising} of {total} steps: {_remedy(scale)}")
        training["warmup_ratio"] = rising / total
    elif "lr_warmup_ratio" in given:
        training["warmup_ratio"] = given["lr_warmup_ratio"]
    first, last = settings.get("warmup_steps", 0), settings.get("final_steps", 0)
    if first + last >= total:
        raise ValueError(
            f"{what}: warm-up {first} + final phase {last} leave no step to prune in a run of {total}: {_remedy(scale)}"
        )
    return training, settings, total


def _scaled(steps: int, scale: float) -> int:
    return max(1, round(scale * steps)) if steps else 0


def _remedy(scale: float) -> str:
    return "give a larger --scale" if scale < 1 else "lengthen the run in the recipe"


def rows_of(task: Task) -> tuple[int, int]:
    """Rows of the official training and development parts, of SQuAD its questions (AdaLoRA, Table 11)."""
    return task.rows_of(task.official_train_split), task.rows_of(task.dev_split)


# -- in what it is not the paper's run ------------------------------------------------------------------------------------


def _reasons(recipe: Recipe, given: Mapping[str, Any], chosen: str, stands_in_for: str | None, scale: float) -> list[Reason]:
    found = []
    if recipe.miniature:
        found.append(Reason("miniature", recipe.miniature))
    if stands_in_for is not None:
        found.append(Reason("model", f"{chosen} stands in for {stands_in_for}."))
    if scale < 1:
        found.append(Reason("scaled", f"The recipe is scaled to {scale:g} of its length, all its step counts with it."))
    if given.get("generation"):
        found.append(
            Reason("decoding", f"The paper generates with {given['generation']}; here each token is the likeliest one.")
        )
    if given.get("label_smoothing"):
        found.append(
            Reason("labels", f"The paper smooths its labels by {given['label_smoothing']:g}; here they are not smoothed.")
        )
    if given.get("start_from"):
        found.append(Reason("start", f"The paper starts from {given['start_from']}; here from the pre-trained model alone."))
    return found


def _departures(
    recipe: Recipe,
    given: Mapping[str, Any],
    variant: str,
    task: Task,
    study: Study,
    stands_in_for: str | None,
    scale: float,
    total: int,
) -> list[str]:
    """Sentences, the ones that reasons say already left out."""
    lines = []
    if stands_in_for is not None and "targets" in given:
        modules = ", ".join(modules_of(given["targets"], study.model)).replace(r"\.\d+\.", ".N.")
        lines.append(f'"{given["targets"]}" of {stands_in_for} are here: {modules}.')
    if scale < 1:
        changed = [f"{total} steps"]
        for key, name in (("warmup_steps", "warm-up"), ("final_steps", "final phase"), ("interval", "interval")):
            if key in study.methods[0].settings:
                changed.append(f"{name} {study.methods[0].settings[key]} (of {given[key]})")
        if "lr_warmup_steps" in given:
            changed.append(f"the rate rises for {_scaled(given['lr_warmup_steps'], scale)} (of {given['lr_warmup_steps']})")
        lines.append(f"Scaled to {scale:g}: {', '.join(changed)}.")
    if given.get("cls_dropout") is not None and stands_in_for is None:
        lines.append(
            f"The recipe's dropout before the classifier, {given['cls_dropout']:g}, is not set: the model's own is used."
        )
    if task.kind == "span":
        lines.append(
            "Steps are counted by questions; windows of long texts make an epoch a little longer, and its warm-up too."
        )
    if "clip" not in given:
        lines.append(f"The recipe does not speak of clipping: {study.training.clip:g}, transformers' default.")
    if len(study.seeds) != recipe.seeds:
        lines.append(f"{len(study.seeds)} seed{'s' if len(study.seeds) > 1 else ''} where the paper has {recipe.seeds}.")
    if len(study.methods[0].learning_rates) > 1:
        rates = ", ".join(f"{rate:g}" for rate in study.methods[0].learning_rates)
        lines.append(f"The rate is the best of those that the paper searched ({rates}), by one run of full length each.")
    lines.append("A step's rows are of similar length, drawn so for every method alike; the papers draw rows at random.")
    return [*lines, *given.get("departures", ()), *recipe.variants[variant].departures]


def _label(recipe: Recipe, row: str, variant: str, scale: float) -> str:
    """The row's label, with what makes these runs others than those of the paper's recipe at full length."""
    marks = [variant] if variant != next(iter(recipe.variants)) else []
    marks += [f"scale {scale:g}"] if scale < 1 else []
    return f"{row} [{', '.join(marks)}]" if marks else row


# -- what this machine can do ---------------------------------------------------------------------------------------------


def here(recipes: Sequence[Recipe], variant: str) -> dict[str, Any]:
    """What every cell of these tables needs and whether this machine has it, as plain data; memory and time are estimates.

    A cell's "here" is "yes", "with --model" (the data is here, the model is not), "no", or "waits". Nothing is fetched.
    """
    flops, free = matrix_product_rate(), free_memory()
    tables = []
    cells = {recipe.name: _needs(recipe, variant, flops) for recipe in recipes}
    asked = any(one["model_at"] == "hub" or one["data_at"] == "hub" for found in cells.values() for one in found)
    away = sources.hub_out_of_reach() if asked else None
    for recipe in recipes:
        for one in cells[recipe.name]:
            lacking = []
            if one["model_at"] == "hub" and away:
                lacking.append("model")
            if one["data_at"] == "hub" and away:
                lacking.append("data")
            if one["memory_bytes"] is not None and free is not None and one["memory_bytes"] > free:
                lacking.append("memory")
            one["lacking"] = lacking
            one["here"] = (
                "waits" if one["waits"] else "yes" if not lacking else "with --model" if "data" not in lacking else "no"
            )
        about = recipe.variants.get(variant)
        tables.append(
            {
                "table": recipe.name,
                "title": recipe.title,
                "source": recipe.source,
                "waits": recipe.waits or None,
                "beside": recipe.beside,
                "variants": list(recipe.variants),
                "about": about.about if about else None,
                "departures": list(about.departures) if about else [],
                "cells": cells[recipe.name],
            }
        )
    return {
        "variant": variant,
        "hub": ("out of reach: " + away if away else "within reach") if asked else "not asked: nothing needs it",
        "free_memory_bytes": free,
        "matrix_product_flops": flops,
        "reached_share": REACHED,
        "stand_ins": [STAND_IN, STAND_IN_DECODER],
        "tables": tables,
    }


def _needs(recipe: Recipe, variant: str, flops: float) -> list[dict[str, Any]]:
    """What each cell of a table needs, and where that is to be had: "cache", "package" or "hub"."""
    found = []
    for row in recipe.rows:
        for cell in recipe.tasks:
            reason = waits(recipe, row, cell, variant)
            one = dict.fromkeys(("model", "model_at", "task", "data_at", "memory_bytes", "seconds", "settings"))
            if not reason:
                given, task = settings_of(recipe, row, cell, variant), get_task(recipe.tasks[cell])
                one |= {
                    "model": given["model"],
                    "model_at": sources.at_hand(given["model"]) or "hub",
                    "task": task.name,
                    "data_at": "hub" if task.data is None else sources.at_hand(task.data) or "hub",
                    "memory_bytes": round(memory_bytes(given)),
                    "seconds": round(seconds(given, task, recipe.seeds, flops)),
                    "settings": given,
                }
            found.append({"row": row, "cell": cell, "waits": reason or None, **one})
    return found


def memory_bytes(given: Mapping[str, Any]) -> float:
    """Peak memory of a run alone, of a micro-batch at full length, in fp32 but for the linears of a quantised base."""
    of = shape(given["model"])
    training = Training(**{key: given[key] for key in given if key in TRAINING_KEYS})
    rows = -(-training.batch_size // training.accumulation)
    states = 16 if given["method"] == "full" else 4  # weight, gradient and AdamW's two averages, or the weight alone
    of_layer = ACTIVATION_BYTES * rows * training.max_length * of.hidden
    activations = of_layer * of.layers
    if training.gradient_checkpointing:  # what goes into each layer is kept in fp32, and all of one layer at a time
        activations = of_layer + 4 * rows * training.max_length * of.hidden * of.layers
    weights = states * of.parameters
    if given.get("quantization"):
        bits = BITS[given["quantization"], given.get("double_quantization", False)]
        weights -= (4 - bits / 8) * of.in_matrices
    return PROCESS_BYTES + weights + activations


def seconds(given: Mapping[str, Any], task: Task, seeds: int, flops: float) -> float:
    """Time of a cell, all seeds and rates, one after the other."""
    of = shape(given["model"])
    training = Training(**{key: given[key] for key in given if key in TRAINING_KEYS})
    rows, dev_rows = rows_of(task)
    passes = training.total_steps(rows) / training.steps_per_epoch(rows)
    length = TOKENS_OF_A_ROW.get(task.name.partition("/")[0], TOKENS_OF_A_SENTENCE_ROW)
    each = (6 if given["method"] == "full" else 4) * rows + 2 * dev_rows
    runs = seeds + len(given.get("learning_rates", ()))
    return runs * passes * each * length * of.in_matrices / (REACHED * flops)


def matrix_product_rate(duration: float = 0.2) -> float:
    """Floating-point operations a second of fp32 matrix products here, measured for so many seconds."""
    import numpy as np

    size = 1024
    a = np.ones((size, size), dtype=np.float32)
    np.matmul(a, a)
    done, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < duration:
        np.matmul(a, a)
        done += 1
    return 2 * size**3 * done / passed


def free_memory() -> int | None:
    """Bytes that a new process can have; None where this system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
