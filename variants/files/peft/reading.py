"""An adapter out of PEFT's tensors and configuration."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.linears import find_kind
from rankwise.variants.adapter.step import Uncalibrated
from rankwise.variants.adapter.targets import matches, resolve
from rankwise.variants.files.facts import Facts
from rankwise.variants.files.folders import Contents
from rankwise.variants.files.peft import experts, vera
from rankwise.variants.files.peft.base import put_base, take_base
from rankwise.variants.files.peft.checks import Sites, as_matrices, check_heads, check_sites, check_targets, heads_of
from rankwise.variants.files.peft.config import RANK_EPSILON, PeftConfig
from rankwise.variants.files.peft.names import (
    COEFFICIENTS,
    CONFIG,
    FACTORS,
    MAGNITUDE,
    ORIGINAL_HEAD,
    PREFIX,
    WEIGHTS,
    head_tensor,
    part,
)
from rankwise.variants.files.state import copy, detached_if_it_fails, first_rank, pattern_of, trained
from rankwise.variants.lowrank.adapter import LowRankAdapter
from rankwise.variants.lowrank.site import first_slots
from rankwise.variants.settings import BY_PATTERN, method
from torch import Tensor, nn

A, B = FACTORS["linear"]


@dataclass(frozen=True)
class _Slots:
    """What a file says of one site: how many slots there are, which of them it has values for, and the values."""

    size: int
    acting: Tensor
    values: dict[str, Any]


def load(model: nn.Module, contents: Contents) -> Adapter:
    """
    Raises:
        ValueError: what is not supported, or tensors that are missing, contradict the configuration or do not fit `model`.
    """
    if contents.config.get("peft_type") == "VERA":
        return vera.load(model, contents)
    config, facts = PeftConfig.read(contents.config), contents.facts
    sites, rest = _parts(contents.tensors)
    heads = heads_of(model, config)
    mixtures, stacks = experts.take(model, sites, config)
    config = replace(config, stacks=stacks)
    base = take_base(model, rest, heads)
    check_sites(model, sites, config)
    if not sites and not mixtures and (not rest or (facts is not None and method(facts.method).takes_targets)):
        raise ValueError(f"{WEIGHTS} holds none of an adapter's tensors: a foreign file; save the adapter again")
    check_heads(model, rest, heads, config)
    check_targets(model, sites, config)
    if facts is not None and facts.targets is not None and mixtures:  # PEFT's form has all experts of a parameter
        meant = set(resolve(model, facts.targets, facts.head))
        mixtures = {name: parts for name, parts in mixtures.items() if name in meant}
    sites = as_matrices(model, sites, config, ours=facts is not None) | mixtures
    seeds = [facts.seed if facts is not None else 0]
    if not sites:
        adapter, fill = method("head").load()(seeds=seeds), {}
    elif config.is_adalora:
        adapter, fill = _adalora(sites, config, facts)
    elif facts is not None and facts.folded is not None:
        adapter, fill = _folded(sites, config, facts)
    else:
        adapter, fill = _lora(sites, config, facts)
    with detached_if_it_fails(adapter):
        known = [n for n, m in model.named_modules() if find_kind(m) is not None]
        inside = experts.places(model, fill)
        outside = [name for name in fill if name not in inside]
        ends = list(experts.targets(model, inside))
        targets = [*(pattern_of(name, known) for name in outside), *ends] or "all-linear"
        head = heads if facts is None else list(facts.head)
        adapter.attach(model, targets, head=head, calibration=Uncalibrated({name: slots.size for name, slots in fill.items()}))
        adapter.targets = facts.targets if facts is not None and facts.targets is not None else [*outside, *ends]
        for name, key, parameter in trained(adapter.heads):
            copy(parameter, rest, f"{name}.{key}")
        _fill_sites(adapter, fill)
        put_base(adapter, base)
        if isinstance(adapter, LowRankAdapter):
            adapter.loaded(config.total_steps if facts is None or facts.folded is None else facts.total_step)
    return adapter


def _parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors by site and part; and the rest by name, which belongs to heads or to the base.

    The names may be those of a PeftModel's own state, in which each part also names its adapter.
    """
    sites: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    adapters = set()
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"tensor {key} does not start with {PREFIX}: no adapter file of PEFT's; save it there again")
        name = key.removeprefix(PREFIX)
        of = part(name)
        if re.search(r"\.lora_B(\.[^.]+)?\.bias$", name):
            raise ValueError(f"tensor {key}: lora_bias is not supported; train without")
        if of is None and ORIGINAL_HEAD not in name:
            name, adapter = head_tensor(name)
            rest[name] = value
        elif of is None:  # the head from before training
            continue
        else:
            adapter = of.adapter
            if of.part != "ranknum":  # in files of old PEFT; always init_r
                sites.setdefault(of.site, {})[of.part] = value
        adapters |= {adapter} if adapter is not None else set()
    if len(adapters) > 1:
        raise ValueError(
            f"{WEIGHTS} holds {len(adapters)} adapters, {', '.join(sorted(adapters))}: save one of them in PEFT with "
            f"save_pretrained(folder, selected_adapters=[...])"
        )
    return sites, rest


@torch.no_grad()
def _fill_sites(adapter: Adapter, fill: Mapping[str, _Slots]) -> None:
    """Gives each site the size that it was saved with, and its slots what the file says of them."""
    low_rank = {name: adapter.site(name).low_rank for name in fill}
    sizes = {name: slots.size if slots.size != int(low_rank[name].slots.sum()) else None for name, slots in fill.items()}
    if any(size is not None for size in sizes.values()):
        order = [name for name, _ in adapter.named_sites()]
        adapter.resize([None if sizes[n] is None else first_slots(low_rank[n], sizes[n]) for n in order])
        adapter.take_changes()  # no optimizer has seen the old size
    for name, slots in fill.items():
        if sizes[name] is not None:
            low_rank[name].slots.fill_(1)
        for key, value in slots.values.items():
            if key == "magnitude":
                adapter.site(name).magnitude[0].copy_(value)
            elif key in ("kept", "scale", *low_rank[name].slot_facts):
                getattr(low_rank[name], key)[0] = value
            elif key == "E":
                low_rank[name].put_coefficients(0, slots.acting.to(low_rank[name].A.device), value)
            elif key not in ("A", "B"):
                raise ValueError(f"the metadata of {name} has {key}, which {adapter.method} does not know: a foreign file")
            else:  # A (r, I), B (O, r)
                into = getattr(low_rank[name], key)[0]
                into.index_copy_(-1 if key == "B" else 0, slots.acting.to(into.device), value.to(into))


def _lora(sites: Sites, config: PeftConfig, facts: Facts | None) -> tuple[Adapter, dict[str, _Slots]]:
    """LoRA or DoRA, and what to fill in."""
    ranks = {name: len(parts[A]) for name, parts in sites.items()}
    for name, rank in ranks.items():
        if config.rank_of(name) != rank:
            raise ValueError(
                f"{name} has rank {rank} in {WEIGHTS} and {config.rank_of(name)} in {CONFIG}: save or copy both again"
            )
    adapter = _as_trained(ranks, config, facts) if facts is not None else None
    adapter = adapter or _as_configured(ranks, config, facts)
    fill = {}
    for name, parts in sites.items():
        values = {"A": parts[A], "B": parts[B]} | ({"magnitude": parts[MAGNITUDE]} if MAGNITUDE in parts else {})
        fill[name] = _Slots(ranks[name], torch.arange(ranks[name]), values)
    return adapter, fill


def _as_trained(ranks: Mapping[str, int], config: PeftConfig, facts: Facts) -> Adapter | None:
    """The adapter of our own settings; None where the configuration says other ranks, scales or starts, as after an edit by
    hand."""
    settings = dict(facts.settings)
    # Patterns of sites that the file lacks, because they had no rank, match nothing.
    for key in method(facts.method).settings.with_role(*BY_PATTERN):
        if key in settings:
            settings[key] = {p: v for p, v in settings[key].items() if any(matches(p, name) for name in ranks)}
    adapter = method(facts.method).load()(seeds=[facts.seed], **settings)
    if adapter.init_lora_weights != config.residual:
        return None
    for name, rank in ranks.items():
        scale = adapter.site_scales(name, [rank])[0]
        if adapter.site_ranks(name, first_rank(adapter.settings))[0] != rank:
            return None
        if abs(scale - config.scale_of(name, rank)) > 1e-9 * scale:
            return None
    return adapter


def _as_configured(ranks: Mapping[str, int], config: PeftConfig, facts: Facts | None) -> Adapter:
    names = list(ranks)
    alphas = {name: config.alpha_of(name) for name in names}
    settings = {
        "rank": config.rank,
        "alpha": config.alpha,
        "dropout": config.dropout,
        "scaling": "alpha/sqrt(r)" if config.is_rooted else "alpha/r",
        "rank_pattern": {pattern_of(n, names): r for n, r in ranks.items() if r != config.rank},
        "alpha_pattern": {pattern_of(n, names): a for n, a in alphas.items() if a != config.alpha},
    }
    if facts is not None and "lr_ratio" in facts.settings:
        settings["lr_ratio"] = facts.settings["lr_ratio"]
    seed = facts.seed if facts is not None else 0
    name = config.residual or ("dora" if config.has_magnitude else "lora")
    if config.residual is None:
        settings["initialization"] = "gaussian" if config.is_gaussian else "kaiming"
    elif config.has_magnitude:
        settings["magnitude"] = True
    return method(name).load()(seeds=[seed], **settings)


def unscaled(ranks: Mapping[str, int], has_magnitude: bool) -> Adapter:
    """An adapter, not attached, of sites of these ranks and of scale 1: LoRA or DoRA; of no site the task head alone."""
    if not ranks:
        return method("head").load()(seeds=[0])
    names = list(ranks)
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {pattern_of(name, names): rank for name, rank in ranks.items() if rank != usual}
    alphas = {name: float(rank) for name, rank in pattern.items()}
    settings = {"rank": usual, "alpha": float(usual), "rank_pattern": pattern, "alpha_pattern": alphas}
    return method("dora" if has_magnitude else "lora").load()(seeds=[0], **settings)


def _adalora(sites: Sites, config: PeftConfig, facts: Facts | None) -> tuple[Adapter, dict[str, _Slots]]:
    """AdaLoRA, and what to fill in."""
    initial = config.initial_rank
    alive: dict[str, Tensor] = {}
    for name, parts in sites.items():
        bits = config.kept.get(name, [True] * initial if isinstance(initial, int) else None)
        if not isinstance(bits, list) or not all(isinstance(bit, bool) for bit in bits) or len(bits) != initial:
            raise ValueError(f"rank_pattern of {name} is no list of init_r = {initial} truth values: save the adapter again")
        alive[name] = torch.tensor(bits, dtype=torch.bool)
        if sum(bits) != len(parts[A]):
            raise ValueError(
                f"rank_pattern keeps {sum(bits)} of {initial} triplets of {name}, and {WEIGHTS} holds {len(parts[A])}: "
                f"save or copy both files again"
            )
    unknown = [f"{name}.{COEFFICIENTS}" for name in config.kept if name not in sites]
    if unknown:
        raise ValueError(f"rank_pattern names {unknown[0]}, which {WEIGHTS} has no tensors for: save or copy both files again")
    if facts is not None:
        adapter = method(facts.method).load()(seeds=[facts.seed], **facts.settings)
    else:
        own = {"initial_rank": initial, "alpha": config.alpha, "dropout": config.dropout}
        adapter = method("adalora").load()(seeds=[0], **own, **config.schedule)
    fill = {}
    for name, parts in sites.items():
        ranks = adapter.site_ranks(name, adapter.settings.initial_rank)
        kept = alive[name]
        if facts is not None:  # other bits than the initial rank: the site has grown or shrunk since
            kept = _unbits((facts.kept or {}).get(name), ranks[0], name, exact=False)
        if alive[name][len(kept) :].any():
            raise ValueError(f"rank_pattern of {name} keeps triplets beyond its {len(kept)}: save the adapter again")
        scale = adapter.site_scales(name, ranks)[0]
        if facts is not None and name in (facts.scales or {}):
            scale = _scale(facts.scales[name], name)
        scale = torch.tensor(scale, dtype=parts[COEFFICIENTS].dtype).item()
        factor = config.alpha / (initial + RANK_EPSILON) / scale
        E = parts[COEFFICIENTS][:, 0]
        values = {"A": parts[A], "B": parts[B], "E": (E.double() * factor).to(E.dtype), "kept": kept, "scale": scale}
        fill[name] = _Slots(len(kept), alive[name].nonzero()[:, 0], values)
    return adapter, fill


def _folded(sites: Sites, config: PeftConfig, facts: Facts) -> tuple[Adapter, dict[str, _Slots]]:
    """Any low-rank method out of the LORA that it was written as, sites that were left out too: A = A' / E."""
    adapter = method(facts.method).load()(seeds=[facts.seed], **facts.settings)
    fill = {}
    for name in {**facts.folded, **sites}:
        undo, parts = facts.folded.get(name), sites.get(name)
        E = undo.get("E", []) if isinstance(undo, dict) else None
        if not isinstance(E, list) or not all(isinstance(e, float) for e in E):
            raise ValueError(f"the metadata of {name} is {undo!r}, without its singular values: save the adapter again")
        ranks = adapter.site_ranks(name, first_rank(adapter.settings))
        alive = _unbits(undo.get("alive"), ranks[0], name, exact=False)
        acting = alive.nonzero()[:, 0]
        values: dict[str, Any] = {}
        if "kept" in undo:
            values["kept"] = _unbits(undo["kept"], len(alive), name)
        scale = adapter.site_scales(name, ranks)[0]
        if "scale" in undo:
            values["scale"] = scale = _scale(undo["scale"], name)
        values |= _slot_facts(undo, len(alive), name)
        if "E" in undo and parts is None:
            values["E"] = torch.tensor(E, dtype=torch.float64)
        rank, configured, least = 0, 0, 0
        if parts is not None:  # not left out
            rank, configured, least = len(parts[A]), config.rank_of(name), 1
        count = len(acting)
        needed = max(rank, count) if name in config.stacks else max(count, least)  # PEFT's experts have one rank
        if not configured == rank == needed or ("E" in undo and len(E) != count):
            raise ValueError(
                f"{name} has rank {rank} in {WEIGHTS}, {configured} in {CONFIG} and {count} in the metadata: save it again"
            )
        if parts is not None:
            # The scale that the file tells PEFT, over ours: 1 unless alpha was edited by hand.
            factor = config.scale_of(name, rank) / scale
            factor = 1.0 if abs(factor - 1) < 1e-9 else factor
            a, b = parts[A][:count], parts[B][:, :count]
            if "E" in undo:
                coefficients = torch.tensor(E, dtype=torch.float64)
                values |= {"A": (a.double() / coefficients[:, None]).to(a.dtype), "B": b, "E": coefficients * factor}
            else:
                values |= {"A": a, "B": b if factor == 1 else (b.double() * factor).to(b.dtype)}
            if MAGNITUDE in parts:
                values["magnitude"] = parts[MAGNITUDE]
        fill[name] = _Slots(len(alive), acting, values)
    return adapter, fill


def _slot_facts(undo: Mapping[str, Any], length: int, name: str) -> dict[str, Tensor]:
    """What a site keeps of each slot beside its factors (`LowRank.slot_facts`)."""
    found = {}
    for key in undo.keys() - {"kept", "alive", "scale", "E"}:
        numbers = undo[key]
        if not isinstance(numbers, list) or len(numbers) != length or not all(isinstance(n, float) for n in numbers):
            raise ValueError(f"the metadata of {name} has {key} = {numbers!r}, not {length} numbers: save the adapter again")
        found[key] = torch.tensor(numbers, dtype=torch.float64)
    return found


def _scale(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"the metadata of {name} has the scale {value!r}, no number: a foreign file; save the adapter again")
    return value


def _unbits(bits: Any, length: int, name: str, exact: bool = True) -> Tensor:
    if not isinstance(bits, str) or (exact and len(bits) != length) or set(bits) - {"0", "1"}:
        raise ValueError(f"the metadata of {name} is {bits!r}, not {length} bits: a foreign file; save the adapter again")
    return torch.tensor([bit == "1" for bit in bits], dtype=torch.bool)
