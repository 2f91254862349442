"""The ranks of a folder: of a run, or of any adapter in PEFT's format, read without torch.

PEFT's file format: LoRA and DoRA keep `<site>.lora_A.weight` (r, I), AdaLoRA `<site>.lora_A` (r, I) with only the
triplets that survived, so that a site may have 0 rows; nominal ranks stand in adapter_config.json.
"""

import re
from contextlib import contextmanager
from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np
from rankwise.experiments.records import is_run, load_run, read_json
from rankwise.reports.ranks.maps import RankMap, SiteRank, bare_site, of_run
from rankwise.reports.ranks.sites import site_order
from rankwise.variants.doctor import faults
from rankwise.variants.doctor.findings import Finding
from rankwise.variants.doctor.reading import matches, number, value_of
from rankwise.variants.doctor.stored import Stored
from rankwise.variants.files import json_text
from rankwise.variants.files.peft.config import RANK_EPSILON, check_kinds
from rankwise.variants.files.peft.names import CONFIG, PICKLE, PREFIX, WEIGHTS, part
from rankwise.variants.settings import shown

TOP = 16  # singular values that are shown


def read(path: str | Path) -> RankMap:
    """The ranks of a run's folder or of an adapter folder.

    Raises:
        ValueError: neither of the two, cut off, foreign, or pickled.
    """
    path = Path(path)
    if path.is_file() and path.name in (CONFIG, WEIGHTS):
        path = path.parent
    if not path.is_dir():
        rule = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {rule}; give the folder of a run or of an adapter (adapter_config.json)")
    if is_run(path):
        return _read_run(path)
    if (path / CONFIG).is_file():
        return _read_adapter(path)
    if (path / WEIGHTS).is_file():
        if _is_whole_model(path):
            raise ValueError(f"{path} holds layers, full fine-tuning or BitFit, which have no ranks; give a low-rank adapter")
        raise ValueError(f"{path} has no adapter_config.json; copy the one that was saved with the weights")
    if (path / PICKLE).is_file():
        _refuse_pickle(path)
    below = [child.name for child in sorted(path.iterdir()) if child.is_dir() and is_run(child)]
    hint = f"; it holds runs, give one of them: {below[0]}" if below else ""
    raise ValueError(f"{path} is neither a run (config.json) nor an adapter folder (adapter_config.json){hint}")


def _read_run(folder: Path) -> RankMap:
    return of_run(load_run(folder))


def _read_adapter(folder: Path) -> RankMap:
    config = _read_config(folder / CONFIG)
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise ValueError(
            f"{folder}: peft_type {shown(kind)} has no ranks to read; LORA (DoRA among them) and ADALORA have, "
            "and full fine-tuning, BitFit and head only have none"
        )
    shapes = _shapes(folder)
    ranks = _factor_ranks(folder, shapes)
    _refuse_stacked(folder, config, ranks)
    adalora = kind == "ADALORA"
    sites = _adalora_sites(folder, config, ranks) if adalora else _lora_sites(folder, config, ranks)
    of_patterns = _adalora_faults if adalora else _lora_faults
    sites, found_faults = _measured(folder, sites, shapes)
    found_faults = [*of_patterns(config, ranks), *found_faults]
    if not sites:
        raise ValueError(f"{folder}: adapter_model.safetensors holds no lora_A: head only, or a foreign file")
    dora = any(".lora_magnitude_vector" in name for name in shapes)
    method = "adalora" if adalora else "dora" if dora else "lora"
    facts = _facts(folder)
    if "folded" in facts:  # AdaLoRA+DoRA has no PEFT type of its own: what PEFT's keys cannot say stands in the metadata
        method = str(facts.get("method", method))
        sites = [_unfolded(site, facts["folded"]) for site in sites]
    base = config.get("base_model_name_or_path")
    by_name = {site.site: site for site in sites}
    return RankMap(
        "adapter",
        f"{folder.name} on {base}" if base else folder.name,
        method,
        _ended_early(facts.get("unfinished")),
        tuple(by_name[name] for name in site_order(by_name)),
        tuple(fault.sentence for fault in found_faults),
    )


def _measured(folder: Path, sites: list[SiteRank], shapes: dict[str, tuple[int, ...]]) -> tuple[list[SiteRank], list[Finding]]:
    """The sites with what was measured of their tensors, and the faults of the tensors."""
    stored = Stored(folder / WEIGHTS)
    parts: dict[str, dict[str, tuple]] = {}
    wrong = []
    for name in shapes:
        tensor = part(name.removeprefix(PREFIX))
        if name not in stored:
            wrong.append(
                Finding("unreadable-type", f"{name} is stored in a type that is not read here: only its shape is known")
            )
        elif tensor is not None and tensor.factor is not None:
            parts.setdefault(tensor.site, {})[tensor.factor] = stored[name]
        elif bad := int((~np.isfinite(stored[name][0])).sum()):
            wrong.append(Finding("not-finite", f"{name} holds {bad:,} numbers that are not finite"))
    updates = {}
    for site in sites:
        if {"A", "B"} <= set(of := parts.get(site.site, {})):
            E = of["E"][0] if "E" in of else None
            updates[site.site], more = faults.examine(site.site, of["A"][0], of["B"][0], E, site.scale or 1.0, of["A"][1])
            wrong += more
    total = sum(update.parameters for update in updates.values())
    measured = []
    for site in sites:
        update = updates.get(site.site)
        if update is not None:
            site = replace(
                site,
                parameters=update.parameters,
                share=update.parameters / total if total else None,
                effective_rank=update.effective_rank,
                stable_rank=update.stable_rank,
                energy_rank=update.energy_rank,
                singular_values=update.singular_values[:TOP],
            )
        measured.append(site)
    return measured, wrong


def _lora_faults(config: dict, ranks: dict[str, int]) -> list[Finding]:
    return faults.of_lora_patterns(config, ranks, matches)


def _adalora_faults(config: dict, ranks: dict[str, int]) -> list[Finding]:
    return faults.of_adalora_patterns(config, ranks, _kept_triplets(config))


def _kept_triplets(config: dict) -> dict[str, list]:
    return {key.removesuffix(".lora_E"): kept for key, kept in (config.get("rank_pattern") or {}).items()}


def _read_config(path: Path) -> dict:
    try:
        config = read_json(path)
    except ValueError as error:
        raise ValueError(str(error).split("; ")[0] + "; save the adapter again") from None
    if config.get("peft_type") in ("LORA", "ADALORA"):  # what else there is has keys of its own, and is refused
        check_kinds(config, str(path))
    return config


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape. Only the header is read; nothing is unpickled."""
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLE).is_file():
            _refuse_pickle(folder)
        raise ValueError(f"{path} is missing: half an adapter; save the adapter again")
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _is_whole_model(folder: Path) -> bool:
    """Whether variants/files wrote it for a method without adapters."""
    with _opened(folder / WEIGHTS) as file:
        return (file.metadata() or {}).get("format") == "rankwise"


def _facts(folder: Path) -> dict:
    """The metadata that variants/files adds to PEFT's keys; empty for an adapter that others saved."""
    with _opened(folder / WEIGHTS) as file:
        text = (file.metadata() or {}).get("rankwise")
    try:
        facts = json_text.parse(text) if text else {}
    except ValueError:
        raise ValueError(f'{folder}: its "rankwise" metadata is no JSON; save the adapter again') from None
    return facts if isinstance(facts, dict) else {}


def _ended_early(unfinished: object) -> str | None:
    """The note on an adapter that was saved above the last budget of its schedule."""
    if not isinstance(unfinished, dict):
        return None
    unit = str(unfinished.get("unit"))
    what = {"rank": "ranks"}.get(unit, unit)
    ends = f"its schedule ends with {unfinished.get('budget')}"
    return f"training ended before its budget was reached: {unfinished.get('has')} {what}, {ends}"


def _unfolded(site: SiteRank, folded: dict) -> SiteRank:
    kept = (folded.get(site.site) or {}).get("kept")
    return site if not isinstance(kept, str) else replace(site, active=kept.count("1"), nominal=len(kept))


@contextmanager
def _opened(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); save the adapter again") from None


def _refuse_pickle(folder: Path) -> None:
    raise ValueError(
        f"{folder / PICKLE} is a pickle, which can run code when it is read, so it is refused; "
        "load it in PEFT where you trust it and save_pretrained(folder, safe_serialization=True)"
    )


def _refuse_stacked(folder: Path, config: dict, ranks: dict[str, int]) -> None:
    """PEFT's target_parameters adapts a tensor (E, O, I) of E experts by factors of E * r rows under its module's name.

    Neither E nor the parameter's name is in the file: what belongs to which expert cannot be read from it.
    """
    targets = config.get("target_parameters") or []
    modules = {str(target).rpartition(".")[0] for target in targets}
    for site, rows in ranks.items():
        module = re.sub(r"(\.base_layer)+$", "", site)
        named = any(not m or module == m or module.endswith(f".{m}") for m in modules)
        nominal = value_of(config.get("rank_pattern") or {}, module, config.get("r", 8))  # 8: PEFT's default
        if named and rows != nominal:
            raise ValueError(
                f"{folder}: {module} has factors of {rows} rows where r is {nominal}: target_parameters "
                f"({', '.join(map(str, targets))}) stacks the updates of several experts, and the file does not say "
                f"which rows are whose: ask `rankwise doctor`, which takes the experts one by one"
            )


def _factor_ranks(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Site -> rows of A, which must be the columns of B."""
    by_site: dict[str, dict[str, int]] = {}
    for name, shape in shapes.items():
        tensor = part(name.removeprefix(PREFIX))
        if tensor is not None and tensor.factor in ("A", "B") and len(shape) >= 2:
            by_site.setdefault(tensor.site, {})[tensor.factor] = shape[0] if tensor.factor == "A" else shape[1]
    for site, factors in by_site.items():
        if set(factors) != {"A", "B"} or factors["A"] != factors["B"]:
            raise ValueError(
                f"{folder}: {site} has factors of rank {factors}; A and B come in pairs of one rank; save the adapter again"
            )
    return {site: factors["A"] for site, factors in by_site.items()}


def _lora_sites(folder: Path, config: dict, ranks: dict[str, int]) -> list[SiteRank]:
    rank, alpha = number(f"{folder}/{CONFIG}", config, "r"), number(f"{folder}/{CONFIG}", config, "lora_alpha")
    rank_pattern, alpha_pattern = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    sites = []
    for name, active in ranks.items():
        ours = float(value_of(alpha_pattern, name, alpha))
        root = sqrt(active) if config.get("use_rslora") else active
        sites.append(bare_site(name, active, int(value_of(rank_pattern, name, rank)), ours, ours / root if active else None))
    # A site at rank 0 has no tensors in a LoRA file; if the pattern names it, it is shown.
    missing = [key for key, value in rank_pattern.items() if value == 0 and not any(matches(key, n) for n in ranks)]
    return sites + [bare_site(key.removeprefix("^").removesuffix("$").replace("\\.", "."), 0, 0, None, None) for key in missing]


def _adalora_sites(folder: Path, config: dict, ranks: dict[str, int]) -> list[SiteRank]:
    initial, alpha = (
        int(number(f"{folder}/{CONFIG}", config, "init_r")),
        float(number(f"{folder}/{CONFIG}", config, "lora_alpha")),
    )
    pattern = _kept_triplets(config)
    scale = (alpha if alpha > 0 else float(config.get("r", 8))) / (initial + RANK_EPSILON)
    return [
        bare_site(name, ranks.get(name, 0), len(pattern[name]) if name in pattern else initial, alpha, scale)
        for name in dict.fromkeys([*pattern, *ranks])
    ]
