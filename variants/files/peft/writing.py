"""An adapter as PEFT's tensors and configuration."""

import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rankwise.variants.adapter import experts
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.linears import is_linear, kind_of
from rankwise.variants.allocation.allocated import AllocatedAdapter
from rankwise.variants.allocation.sites import Triplets
from rankwise.variants.files.budget import excess
from rankwise.variants.files.facts import Facts
from rankwise.variants.files.folders import Contents
from rankwise.variants.files.peft import experts as peft_experts
from rankwise.variants.files.peft.checks import unlike_peft_at_start
from rankwise.variants.files.peft.config import RANK_EPSILON
from rankwise.variants.files.peft.names import (
    BASE_LAYER,
    COEFFICIENTS,
    FACTORS,
    MAGNITUDE,
    NO_TARGETS,
    PREFIX,
    PROJECTIONS,
    VECTORS,
)
from rankwise.variants.files.state import as_fact, first_rank, pattern_of, trained
from rankwise.variants.lowrank.site import LowRank
from torch import Tensor, nn


@dataclass(frozen=True)
class _Task:
    """One of PEFT's tasks: heads that PEFT then expects in the file, and arguments that it calls the model with."""

    name: str
    heads: tuple[str, ...]
    arguments: frozenset[str]


# By the end of a transformers class name.
TASKS = {
    "ForSequenceClassification": _Task("SEQ_CLS", ("classifier", "score"), frozenset({"input_ids"})),
    "ForTokenClassification": _Task("TOKEN_CLS", ("classifier", "score"), frozenset({"input_ids"})),
    "ForQuestionAnswering": _Task(
        "QUESTION_ANS", ("qa_outputs",), frozenset({"input_ids", "start_positions", "end_positions"})
    ),
    "ForCausalLM": _Task("CAUSAL_LM", (), frozenset({"input_ids"})),
    "LMHeadModel": _Task("CAUSAL_LM", (), frozenset({"input_ids"})),
    "ForConditionalGeneration": _Task(
        "SEQ_2_SEQ_LM", (), frozenset({"input_ids", "decoder_input_ids", "decoder_inputs_embeds"})
    ),
}


@dataclass(frozen=True)
class Update:
    """The low-rank updates of an adapter as PEFT holds them.

    sites: those that have tensors.  config: the keys that say their form, ranks and scales.  facts: what undoes it.
    """

    sites: Sequence[str]
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)  # of all sites, by whole names


def written(adapter: Adapter, member: int, plain: bool = False) -> Contents:
    """PEFT's files of one member of an attached adapter; `plain` without anything that a plain LORA lacks."""
    alone = adapter.alone(member)  # settings and seed of this member, not attached
    settings, model = alone.settings, adapter.model
    sites = dict(adapter.named_sites())
    if not sites:
        none = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "use_dora": False}
        update = Update([], {}, {"peft_type": "LORA", **_lora(alone, plain), **none})
    elif not plain and adapter.peft_type == "VERA":
        update = _vectors(adapter, alone, member)
    elif not plain and adapter.peft_type == "ADALORA" and all(_has_adalora_form(adapter, name) for name in sites):
        update = _triplets(adapter, alone, member)
    else:
        update = _factors(adapter, alone, member, plain)
    config = {
        **common(adapter, update.sites),
        "bias": "none",
        "fan_in_fan_out": any(kind_of(adapter.base(name)).fan_in_fan_out for name in sites),
        "layers_pattern": None,
        "layers_to_transform": None,
        **update.config,
    }
    own = {"settings": settings.model_dump(exclude_unset=True), "seed": alone.seeds[0]}
    over = excess(adapter, member)
    own |= {"unfinished": asdict(over) if over is not None else None}
    own["quantization"] = as_fact(model)
    facts = Facts(adapter.method, **own, targets=adapter.targets, head=adapter.head_names, **update.facts)
    tensors = {**update.tensors, **beside_sites(adapter, member, update.sites)}
    tensors = {PREFIX + name: value for name, value in tensors.items()} | update.shared
    return Contents(tensors, config, None if plain else facts)


def common(adapter: Adapter, sites: Sequence[str]) -> dict[str, Any]:
    """The keys of adapter_config.json that every form of PEFT's has which stands at modules of the model.

    sites: those that have tensors.
    """
    model = adapter.model
    task = _task_type(model, adapter.head_names, sites)
    return {
        "auto_mapping": _auto_mapping(model) if task is None else None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "revision": None,
        "inference_mode": True,
        "target_modules": _target_modules(model, sites),
        "modules_to_save": adapter.head_names or None,
        "task_type": task,
    }


def beside_sites(adapter: Adapter, member: int, sites: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a file that belong to no site, by the model's names: the head's, and those that the base came with."""
    return {**_head_tensors(adapter, member), **_base_tensors(adapter, sites)}


def _vectors(adapter: Adapter, alone: Adapter, member: int) -> Update:
    """A PEFT VERA."""
    settings, tensors, rank = alone.settings, {}, alone.settings.rank
    for name, site in adapter.named_sites():
        d, b = VECTORS
        tensors[f"{name}.{d}"], tensors[f"{name}.{b}"] = site.d[member, :rank], site.b[member]
    config = {
        "peft_type": "VERA",
        "r": rank,
        "vera_dropout": settings.dropout,
        "d_initial": settings.d_initial,
        "projection_prng_key": alone.projection_seeds()[0],
        "save_projection": settings.save_projection,
        "init_weights": True,
    }
    pair = adapter.projections.A[member, :rank], adapter.projections.B[member, :, :rank]
    shared = dict(zip(PROJECTIONS, pair, strict=True)) if settings.save_projection else {}
    return Update(list(dict(adapter.named_sites())), tensors, config, shared=shared)


def _triplets(adapter: AllocatedAdapter, alone: Adapter, member: int) -> Update:
    """A PEFT ADALORA."""
    settings = alone.settings
    initial = max(int(site.slots[member].sum()) for _, site in adapter.named_sites())
    tensors, pattern, kept, scales = {}, {}, {}, {}
    for name, site in adapter.named_sites():
        slots = site.slots[member].bool()
        A, B, E, keep = site.A[member][slots], site.B[member][:, slots], site.E[member][slots], site.kept[member][slots]
        alive = keep | (E != 0)
        factor = site.scale[member].item() * (initial + RANK_EPSILON) / settings.alpha
        scale, is_own = _scale_in_force(alone, name, site, member)
        if is_own:
            scales[name] = scale
        a, b = FACTORS["linear"]
        tensors[f"{name}.{a}"], tensors[f"{name}.{b}"] = A[alive], B[:, alive]
        tensors[f"{name}.{COEFFICIENTS}"] = (E[alive].double() * factor).to(E.dtype)[:, None]
        pattern[f"{name}.{COEFFICIENTS}"] = alive.tolist() + [False] * (initial - len(alive))
        kept[name] = _bits(keep)
    config = {
        "peft_type": "ADALORA",
        **_lora(alone, plain=False),
        "lora_alpha": _plain_number(settings.alpha),
        "init_r": initial,
        "target_r": settings.target_rank,
        "tinit": settings.warmup_steps,
        "tfinal": settings.final_steps,
        "deltaT": settings.interval,
        "beta1": settings.beta1,
        "beta2": settings.beta2,
        "orth_reg_weight": settings.orthogonality,
        "total_step": adapter.total_steps or settings.warmup_steps + settings.final_steps + settings.interval + 1,
        "rank_pattern": pattern,
    }
    return Update(list(kept), tensors, config, {"kept": kept} | ({"scales": scales} if scales else {}))


def _lora(alone: Adapter, plain: bool) -> dict[str, Any]:
    """What a LORA and an ADALORA say beside ranks and scales; how PEFT starts where that is taken out of the weight."""
    start: str | bool = "gaussian" if alone.settings.get("initialization") == "gaussian" else True
    if not plain and getattr(alone, "init_lora_weights", None) is not None:
        start = alone.init_lora_weights
    return {"init_lora_weights": start, "lora_dropout": alone.settings.get("dropout", 0.0)}


def _factors(adapter: Adapter, alone: Adapter, member: int, plain: bool) -> Update:
    """A PEFT LORA, and in its facts what undoes it where the settings alone do not say; `plain` on the unchanged weights."""
    settings = alone.settings
    parts = {name: _acting(name, site.low_rank, member, plain) for name, site in adapter.named_sites()}
    scales = {name: _scale_in_force(alone, name, site.low_rank, member) for name, site in adapter.named_sites()}
    folds = any(undo for _, _, undo in parts.values()) or any(is_own for _, is_own in scales.values())
    folds = folds or any(len(A) != alone.site_ranks(name, first_rank(settings))[0] for name, (A, _, _) in parts.items())
    folds = folds or any(experts.is_expert(adapter.base(name)) for name in _unlike_neighbours(parts, scales))
    rooted = settings.get("scaling") == "alpha/sqrt(r)" and not folds
    tensors, ranks, alphas, folded = {}, {}, {}, {}
    mixtures: dict[str, dict[str, tuple[Tensor, Tensor, float]]] = {}  # parameter -> site -> A, B and scale
    # Programs that serve LoRA may read one scale for all sites: a plain file has one, and B what differs from it.
    usual = Counter(abs(scale) for scale, _ in scales.values()).most_common(1)[0][0] if plain else 0.0
    needed = next(iter(parts)) if not any(len(A) for A, _, _ in parts.values()) else None  # a LORA has at least one site
    for name, site in adapter.named_sites():
        (A, B, undo), (scale, is_own), magnitude = parts[name], scales[name], site.magnitude if site.has_magnitude else None
        folded[name] = (undo or {"alive": "1" * len(A)}) | ({"scale": scale} if is_own else {})
        if not len(A) and magnitude is None and name != needed:
            continue
        if scale < 0:  # a trained one; readers take no negative alpha
            B, scale = -B, -scale
            folded[name]["scale"] = scale
        if usual and scale != usual:
            B, scale = B * (scale / usual), usual
        if not len(A):
            A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1)
        base = adapter.base(name)
        if experts.is_expert(base):
            mixtures.setdefault(experts.stack_of(name), {})[name] = A, B, scale
            continue
        tensors |= _named(name, base, A, B, None if plain else alone.init_lora_weights)
        if magnitude is not None:
            tensors[f"{name}.{MAGNITUDE}"] = magnitude[member].view(kind_of(base).magnitude_shape(base))
        ranks[name] = len(A)
        alphas[name] = _alpha(scale, len(A), rooted)
    sites, names = list(ranks), list(dict(adapter.model.named_modules()))
    for stack, factors, scale in _stacks(adapter.model, mixtures):
        tensors |= factors
        ranks[stack] = len(next(iter(factors.values()))) // len(adapter.model.get_submodule(stack)._modules)
        alphas[stack] = _alpha(scale, ranks[stack], rooted)
    facts: dict[str, Any] = {"folded": folded} if folds else {}
    if folds:
        facts["total_step"] = adapter.total_steps
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        **_lora(alone, plain),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {pattern_of(n, names): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {pattern_of(n, names): a for n, a in alphas.items() if a != alpha},
        "use_rslora": rooted,
        "use_dora": all(site.has_magnitude for _, site in adapter.named_sites()),
        **({"target_parameters": list(mixtures)} if mixtures else {}),
    }
    return Update(sites, tensors, config, facts)


def _unlike_neighbours(parts: Mapping[str, tuple[Tensor, Tensor, dict]], scales: Mapping[str, tuple[float, bool]]) -> list[str]:
    """Sites that have another rank or scale than one before them of the same parameter, which PEFT's experts cannot have."""
    first: dict[str, tuple[int, float]] = {}
    own = {name: (len(A), scales[name][0]) for name, (A, _, _) in parts.items()}
    return [name for name, form in own.items() if first.setdefault(experts.stack_of(name), form) != form]


def _stacks(
    model: nn.Module, mixtures: Mapping[str, Mapping[str, tuple[Tensor, Tensor, float]]]
) -> Iterator[tuple[str, dict[str, Tensor], float]]:
    """Of each parameter that holds experts: its name, PEFT's tensors, and the scale of all its experts."""
    keys, found = peft_experts.keys(model, list(mixtures)), experts.stacks(model)
    for stack, sites in mixtures.items():
        (scale, _), *_ = Counter(scale for *_, scale in sites.values()).most_common(1)
        ours = [sites.get(f"{stack}.{index}") for index in model.get_submodule(stack)._modules]
        pairs = [None if one is None else (one[0], one[1] if one[2] == scale else one[1] * (one[2] / scale)) for one in ours]
        factors = peft_experts.stacked(pairs, peft_experts.is_swapped(*found[stack]))
        a, b = FACTORS["linear"]
        yield stack, dict(zip((f"{keys[stack]}.{a}.weight", f"{keys[stack]}.{b}.weight"), factors, strict=True)), scale


def _alpha(scale: float, rank: int, rooted: bool) -> float | int:
    return _plain_number(float(f"{scale * rank ** (0.5 if rooted else 1.0):.15g}"))


def _has_adalora_form(adapter: Adapter, name: str) -> bool:
    """Triplets at a linear; PEFT's AdaLoRA adapts nothing else."""
    base = adapter.base(name)
    return isinstance(adapter.site(name), Triplets) and is_linear(base) and not experts.is_expert(base)


def _named(name: str, base: nn.Module, A: Tensor, B: Tensor, start: str | None) -> dict[str, Tensor]:
    """A (r, I) and B (O, r) of a LORA's site under PEFT's names and in its shapes; start: what was taken out of the weight."""
    kind = kind_of(base)
    if start is not None and (reason := unlike_peft_at_start(base, start)) is not None:
        warnings.warn(f"{name}: in PEFT this file has other outputs: {reason}; write it by export_lora instead", stacklevel=2)
    if (reason := kind.unlike_peft(base)) is not None:
        warnings.warn(f"{name}: in PEFT this file has other outputs until it is merged there: {reason}", stacklevel=2)
    end = ".weight" if kind.factors == "linear" else ""  # an embedding's are bare parameters in PEFT
    pairs = zip(FACTORS[kind.factors], (A, B), kind.factor_shapes(base, len(A)), strict=True)
    return {f"{name}.{factor}{end}": value.reshape(shape) for factor, value, shape in pairs}


def _acting(name: str, site: LowRank, member: int, plain: bool) -> tuple[Tensor, Tensor, dict]:
    """A (r, I) and B (O, r) of the slots of one member that act, a coefficient folded into A; and what undoes that.

    What a slot acts by is its coefficient; without one, being kept or having a column of B.  `plain`: where the change
    is no product of the site's own factors, those that give all of it.

    Raises:
        ValueError: coefficients that are not finite.
    """
    slots = site.slots[member].bool()
    if plain and not site.own_factors:
        A, B, c = (tensor[member] for tensor in site.matrices())
        acts = c != 0
        return A[acts], (B * (c / site.scale[member]))[:, acts], {}
    facts = {name: getattr(site, name)[member][slots].tolist() for name in site.slot_facts}
    facts |= {"kept": _bits(site.kept[member][slots])} if site.is_allocated else {}
    if not site.has_coefficients:
        A, B = site.A[member][slots], site.B[member][:, slots]
        if not facts:
            return A, B, {}
        alive = site.kept[member][slots] | (B != 0).any(0) if site.is_allocated else torch.ones_like(B[0], dtype=torch.bool)
        return A[alive], B[:, alive], {**facts, "alive": _bits(alive)}
    A, B, E = site.as_triplets(member)
    if not E.isfinite().all():
        raise ValueError(f"{name} has singular values that are not finite: this member diverged and cannot be folded")
    alive = E != 0
    A, B = (A[alive].double() * E[alive].double()[:, None]).to(A.dtype), B[:, alive]
    return A, B, {**facts, "alive": _bits(alive), "E": E[alive].tolist()}


def _scale_in_force(alone: Adapter, name: str, site: LowRank, member: int) -> tuple[float, bool]:
    """The scale of a site, in full precision where the settings say it; and whether it differs from that at its first rank."""
    scale = site.scale[member]
    ranks = (alone.site_ranks(name, first_rank(alone.settings))[0], max(int(site.slots[member].sum()), 1))
    first, now = (alone.site_scales(name, [rank])[0] for rank in ranks)
    known = (value for value in (first, now) if scale == torch.tensor(value, dtype=scale.dtype))
    exact = next(known, scale.item())
    return exact, exact != first


def _head_tensors(adapter: Adapter, member: int) -> dict[str, Tensor]:
    """The trained head; and the frozen values of other modules that PEFT would take for a head, and ask for.

    PEFT takes every module whose name ends like one of modules_to_save, at a dot or not: DistilBERT's pre_classifier
    for its classifier.
    """
    tensors = {f"{name}.{key}": p[member] for name, key, p in trained(adapter.heads)}
    sites = dict(adapter.named_sites())
    for name, module in adapter.model.named_modules():
        inside = name.startswith(tuple(f"{head}." for head in adapter.head_names))
        adapted = any(site == name or site.startswith(f"{name}.") for site in sites)
        if name in adapter.head_names or inside or adapted or not name.endswith(tuple(adapter.head_names)):
            continue
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    return tensors


def _base_tensors(adapter: Adapter, sites: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of the base that came with the adapter's file.

    Raises:
        ValueError: the adapter is merged into them.
    """
    if adapter.base_tensors and adapter.is_merged:
        raise ValueError(f"{adapter.method} came with {next(iter(adapter.base_tensors))} and is merged: call unmerge() first")
    tensors = {}
    for name, parameter in adapter.base_tensors.items():
        module, _, key = name.rpartition(".")
        tensors[f"{module}{BASE_LAYER}{key}" if module in sites else name] = parameter.detach().clone()  # may be tied
    return tensors


def _target_modules(model: nn.Module, sites: Sequence[str]) -> list[str] | str:
    """The sites' full names; as a pattern where PEFT, which goes by a name's end, would also take other modules."""
    if not sites:
        return NO_TARGETS
    others = [n for n, _ in model.named_modules() if n not in sites]
    if any(other.endswith(f".{site}") for other in others for site in sites):
        return "|".join(re.escape(site) for site in sites)
    return list(sites)


def _task_type(model: nn.Module, head: Sequence[str], sites: Sequence[str]) -> str | None:
    """PEFT's task type; None where it would make PEFT look for a head that is not in the file, drop a site, or call the
    model with what it does not take, as it would a speech or vision model whose class is named like a language model's."""
    task = next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None)
    if task is None or getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    takes = task.arguments <= inspect.signature(type(model).forward).parameters.keys()
    ends = [n for n, _ in model.named_modules() if n.endswith(task.heads)] if task.heads else []
    known = all(any(name == h or name.startswith(f"{h}.") or name.endswith(h) for h in head) for name in ends)
    dropped = any(re.match(rf"(^|.*\.){h}($|\..*)", site) for h in task.heads for site in sites)
    return task.name if takes and known and not dropped else None


def _auto_mapping(model: nn.Module) -> dict[str, str] | None:
    """PEFT's note of the class, where no task type says it."""
    kind = type(model)
    if kind.__module__.partition(".")[0] != "transformers":
        return None
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def _plain_number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _bits(mask: Tensor) -> str:
    return "".join("1" if bit else "0" for bit in mask.tolist())
