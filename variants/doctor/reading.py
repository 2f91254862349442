"""Any low-rank adapter as a list of sites: PEFT's, Rankwise's, Kohya's and diffusers' files, read with numpy.

A LORA's scale is alpha/r, or alpha/sqrt(r) with use_rslora, by rank_pattern and alpha_pattern; an ADALORA's is
alpha/(init_r + 1e-5); Kohya's alpha/r by the alpha of each site.  A convolution's factors are matrices
here, (r, I h w) and (O, r).

PEFT's target_parameters adapts a tensor of E experts by factors of E r rows (peft lora/layer.py, ParamWrapper): row e r + j of
A and column j E + e of B are rank j of expert e.  Each expert is a site here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from rankwise.variants.doctor import kohya
from rankwise.variants.doctor.findings import Finding
from rankwise.variants.doctor.stored import STEPS, Stored
from rankwise.variants.files import json_text
from rankwise.variants.files.peft.config import HARMLESS_STARTS, RANK_EPSILON, UNSUPPORTED, check_kinds
from rankwise.variants.files.peft.names import (
    BASE_LAYER,
    CONFIG,
    FACTORS,
    ORIGINAL_HEAD,
    PICKLE,
    PREFIX,
    WEIGHTS,
    head_tensor,
    is_meant,
)
from rankwise.variants.files.peft.names import part as peft_part
from rankwise.variants.settings import shown

# Tensors that PEFT writes of the base: an adapted output layer or embedding, a resized vocabulary, new tokens.
OF_THE_BASE = (BASE_LAYER, ORIGINAL_HEAD, "embed", "lm_head", "wte", "token_adapter", "trainable_tokens")
EXPERTS = ("gate_up_proj", "up_proj", "down_proj")  # as modules of transformers hold them, in their order
CLASSIFIERS = ("classifier", "score")  # peft_model.py: those of which PEFT takes whichever a classifier has
HARMLESS_SETTINGS = ("lora_bias", "trainable_token_indices", "layer_replication", "loftq_config")


@dataclass(frozen=True)
class Site:
    """One update dW = s B A of an adapter.

    keys: part ("A", "B", "E", "mid", "magnitude", "alpha", "bias") -> name of its tensor in the file.
    rank: rows of A.  nominal: what the configuration says, or what an allocator started with.
    expert, experts: which of how many are stacked in these tensors.
    """

    name: str
    keys: Mapping[str, str]
    rank: int
    nominal: int
    alpha: float | None
    scale: float
    rule: str  # how the scale follows from alpha
    expert: int | None = None
    experts: int = 1

    @property
    def is_embedding(self) -> bool:
        """Whether an embedding is adapted, whose update PEFT stores transposed.  (A linear's name may have the word too.)"""
        return (of := peft_part(self.keys["A"])) is not None and of.part == FACTORS["embedding"][0]


@dataclass
class ThinAdapter:
    """An adapter file.

    form: "PEFT", "Kohya" or "diffusers".  config: adapter_config.json, None where there is none.
    facts: what Rankwise notes in a file's metadata.  heads: tensors of modules_to_save.  rest: other tensors, the base's.
    """

    path: Path
    form: str
    method: str
    stored: Stored
    config: dict[str, Any] | None
    facts: dict[str, Any]
    sites: list[Site] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_rewritable(self) -> bool:
        """Whether other ranks can be written: the file is relative to the base itself, and dW is s B A."""
        return not any(finding.rule in ("base-changed", "acts-otherwise") for finding in self.findings)

    def parts(self, site: Site) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """A (R, I), B (O, R) and E (R,) or None, in float64 as they are stored; a Tucker core is multiplied into A."""
        A, B = (self.stored[site.keys[key]][0] for key in "AB")
        if "mid" in site.keys:
            mid = self.stored[site.keys["mid"]][0]  # (R, R, h, w)
            A = np.tensordot(mid, A.reshape(A.shape[0], -1), (1, 0)).transpose(0, 3, 1, 2)  # (R, I, h, w)
        A, B = (factor.reshape(len(factor), prod(factor.shape[1:])) for factor in (A, B))  # AdaLoRA's may have no ranks
        if site.expert is not None:
            A, B = A[site.expert * site.rank : (site.expert + 1) * site.rank], B[:, site.expert :: site.experts]
        return A, B, self.stored[site.keys["E"]][0].reshape(-1) if "E" in site.keys else None

    def factors(self, site: Site) -> tuple[np.ndarray, np.ndarray]:
        """B (O, R) with scale and coefficients in it, and A (R, I): dW = B A."""
        A, B, E = self.parts(site)
        return site.scale * (B if E is None else B * E), A

    def kind(self, site: Site) -> str:
        """The coarser of the types in which the two factors are stored."""
        kinds = [self.stored.kind(site.keys[key]) for key in "AB"]
        return next((kind for kind in ("BF16", "F16", "F32") if kind in kinds), kinds[0])


def read(path: str | Path) -> ThinAdapter:
    """An adapter's folder, a run's, or the file itself.

    Raises:
        ValueError: no adapter there, cut off, pickled, or of a kind that has no thin factors.
    """
    path = Path(path)
    file = _file(path)
    stored = Stored(file)
    if stored.metadata.get("format") == "rankwise":
        raise ValueError(f"{path} holds layers, full fine-tuning or BitFit, which have no ranks; give a low-rank adapter")
    others = sorted({match[1] for name in stored.shapes if (match := kohya.OTHER_KINDS.search(name))})
    known = [name for name in stored.shapes if peft_part(name.removeprefix(PREFIX)) or kohya.part(name)]
    if others and all(of.part == "alpha" for name in stored.shapes if (of := kohya.part(name))):  # LyCORIS has alphas too
        raise ValueError(
            f"{path} holds LoHa, LoKr, OFT or whole differences ({others[0]}), which are no product of two thin factors"
        )
    if file.name == WEIGHTS and (file.parent / CONFIG).is_file():
        adapter = _peft(path, stored, _config(file.parent / CONFIG))
    elif file.name == WEIGHTS or any(name.startswith(PREFIX) for name in known):
        raise ValueError(f"{file.parent} has no {CONFIG}, which says the scale; copy the one that was saved with the weights")
    else:
        adapter = _single_file(path, stored)
    if not adapter.sites and all(finding.rule == "stray-tensor" for finding in adapter.findings):
        raise ValueError(f"{path} holds no low-rank update: head only, or a foreign file")
    if others:
        message = f"tensors of another kind ({', '.join(others)}) are in the file too and are not examined"
        adapter.findings.append(Finding("acts-otherwise", message))
    return adapter


def matches(key: str, site: str) -> bool:
    """PEFT's rule: the key is a regular expression for the end of the path."""
    try:
        return is_meant(key, site)
    except re.error:
        return site == key or site.endswith("." + key)


def value_of(pattern: Mapping[str, Any], site: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if matches(key, site)), default)


def number(where: str, config: Mapping[str, Any], key: str) -> float:
    """
    Raises:
        ValueError: the key is missing, or no number.
    """
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: {key} is {shown(value)}, not a number: a foreign file")
    return value


def _file(path: Path) -> Path:
    if path.is_file():
        if path.name == CONFIG:
            return _file(path.parent)
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is no safetensors file; other formats can run code when they are read: save it as one")
        return path
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give an adapter's folder or its safetensors file")
    if (path / "adapter" / WEIGHTS).is_file():
        return path / "adapter" / WEIGHTS
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    if (path / PICKLE).is_file():
        raise ValueError(
            f"{path / PICKLE} is a pickle, which can run code when it is read, so it is refused; "
            "load it in PEFT where you trust it and save_pretrained(folder, safe_serialization=True)"
        )
    if (path / CONFIG).is_file():
        raise ValueError(f"{path / WEIGHTS} is missing: half an adapter; save the adapter again")
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} safetensors files: give one of them" if files else f"no {WEIGHTS} and no other safetensors file"
    raise ValueError(f"{path} holds {found}")


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json_text.read(path)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): copy the one that was saved with the weights") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not an object: a foreign file; save the adapter again")
    if config.get("peft_type") in ("LORA", "ADALORA"):  # what else there is has keys of its own, and is refused
        check_kinds(config, str(path))
    return config


# -- PEFT's and Rankwise's ---------------------------------------------------------------------------------------------------


def _peft(path: Path, stored: Stored, config: dict[str, Any]) -> ThinAdapter:
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise ValueError(
            f"{path}: peft_type {shown(kind)} has no thin factors to examine; LORA (DoRA among them) and ADALORA have"
        )
    if config.get("use_bdlora"):
        raise ValueError(f"{path}: use_bdlora: its factors are block-diagonal, and dW is not s B A; use PEFT for this adapter")
    grouped: dict[str, dict[str, str]] = {}
    heads, rest, names = [], [], set()
    for key in stored.shapes:
        name = key.removeprefix(PREFIX)
        of = peft_part(name)
        bias = re.fullmatch(r"(.+)\.lora_B(?:\.[^.]+)?\.bias", name)
        if bias:
            grouped.setdefault(bias[1], {})["bias"] = key
        elif of is None:
            (heads if ORIGINAL_HEAD not in f".{name}" and _is_head(name, config) else rest).append(key)
        elif of.part != "ranknum":
            names |= {of.adapter} if of.adapter else set()
            grouped.setdefault(of.site, {})[of.factor or "magnitude"] = key
    if len(names) > 1:
        raise ValueError(
            f"{path} holds {len(names)} adapters, {', '.join(sorted(names))}: save one of them in PEFT with "
            f"save_pretrained(folder, selected_adapters=[...])"
        )
    is_adalora = kind == "ADALORA"
    has_magnitude = bool(config.get("use_dora")) or any("magnitude" in keys for keys in grouped.values())
    method = "AdaLoRA" if is_adalora else "DoRA" if has_magnitude else "rsLoRA" if config.get("use_rslora") else "LoRA"
    facts = _facts(path, stored)
    adapter = ThinAdapter(path, "PEFT", str(facts.get("method", method)), stored, config, facts, [], heads, rest)
    where = f"{path}/{CONFIG}" if path.is_dir() else str(path.parent / CONFIG)
    if is_adalora:
        initial, alpha = int(number(where, config, "init_r")), float(number(where, config, "lora_alpha"))
        # peft adalora/layer.py: scaling = alpha if alpha > 0 else r
        scale = (alpha if alpha > 0 else float(initial)) / (initial + RANK_EPSILON)
    else:
        number(where, config, "r"), number(where, config, "lora_alpha")
    for name, keys in grouped.items():
        ranks = _checked(adapter, name, keys)
        if ranks is None:
            continue
        if is_adalora:
            adapter.sites.append(Site(name, keys, ranks, initial, alpha, scale, f"alpha/{initial}"))
        else:
            adapter.sites += _lora(adapter, name, keys, ranks, where)
    _note_settings(adapter)
    return adapter


def _lora(adapter: ThinAdapter, name: str, keys: dict[str, str], rows: int, where: str) -> list[Site]:
    config = adapter.config
    of = _parameter(config, name)
    nominal = value_of(config.get("rank_pattern") or {}, of, config["r"])
    alpha = value_of(config.get("alpha_pattern") or {}, of, config["lora_alpha"])
    number(where, {f"rank_pattern of {name}": nominal}, f"rank_pattern of {name}")
    number(where, {f"alpha_pattern of {name}": alpha}, f"alpha_pattern of {name}")
    rule, experts = "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r", 1
    if (stack := _stacked(config, name)) and nominal and rows != nominal and rows % nominal == 0:
        experts = rows // int(nominal)
    rank = rows // experts
    scale = float(alpha) / (sqrt(rank) if config.get("use_rslora") else rank) if rank else 0.0
    site = Site(name, keys, rank, int(nominal), float(alpha), scale, rule)
    if experts == 1:
        return [replace(site, expert=0)] if stack else [site]
    return [replace(site, name=f"{name}[{e}]", expert=e, experts=experts) for e in range(experts)]


def _stacked(config: Mapping[str, Any], site: str) -> bool:
    """Whether target_parameters means a parameter of this module, whose tensors may be those of several experts."""
    module = re.sub(r"(\.base_layer)+$", "", site)
    for target in config.get("target_parameters") or []:
        owner = str(target).rpartition(".")[0]
        if not owner or module == owner or module.endswith(f".{owner}"):
            return True
    return False


def _parameter(config: Mapping[str, Any], site: str) -> str:
    """The name by which a pattern means a site: of experts that of their parameter, where the order of a module's is known.

    PEFT wraps each parameter of a module in that of the one after it, so the last has no `base_layer` in its name.
    """
    module = re.sub(r"(\.base_layer)+$", "", site)
    pairs = [str(target).rpartition(".")[::2] for target in config.get("target_parameters") or []]
    names = list(dict.fromkeys(name for owner, name in pairs if not owner or f".{module}".endswith(f".{owner}")))
    if len(names) > 1:
        names = sorted(names, key=EXPERTS.index) if set(names) <= set(EXPERTS) else []
    depth = (len(site) - len(module)) // len(".base_layer")
    return f"{module}.{names[-1 - depth]}" if depth < len(names) else site


def _checked(adapter: ThinAdapter, name: str, keys: Mapping[str, str]) -> int | None:
    """The rank of a site; None where its factors make no update, which becomes a finding."""
    missing = [part for part in "AB" if part not in keys]
    if missing:
        there = ", ".join(part for part in keys if part not in ("alpha",)) or "alpha"
        adapter.findings.append(
            Finding(
                "missing-factor",
                f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing (it has {there})",
                name,
            )
        )
        return None
    shapes = {part: adapter.stored.shapes[keys[part]] for part in "AB"}
    if any(len(shape) < 2 for shape in shapes.values()) or shapes["A"][0] != shapes["B"][1]:
        message = f"A has shape {shapes['A']} and B {shapes['B']}: the rows of A must be the columns of B"
        adapter.findings.append(Finding("factors-do-not-fit", message, name))
        return None
    unread = [part for part, key in keys.items() if adapter.stored.kind(key) not in STEPS]
    if unread:
        message = f"{unread[0]} is stored as {adapter.stored.kind(keys[unread[0]])}, which is not read here"
        adapter.findings.append(Finding("unreadable-type", message, name))
        return None
    rank = shapes["A"][0]
    mid = None if "mid" not in keys else adapter.stored.shapes[keys["mid"]]
    if mid is not None and (len(mid) != 4 or mid[:2] != (rank, rank) or prod(shapes["A"][2:]) != 1):
        message = f"A has shape {shapes['A']}, B {shapes['B']} and their Tucker core {mid}, which is not ({rank}, {rank}, h, w)"
        adapter.findings.append(Finding("factors-do-not-fit", message, name))
        return None
    if "alpha" in keys and prod(adapter.stored.shapes[keys["alpha"]]) != 1:
        message = f"its alpha has shape {adapter.stored.shapes[keys['alpha']]}, and is one number"
        adapter.findings.append(Finding("factors-do-not-fit", message, name))
        return None
    if "E" in keys and int(np.prod(adapter.stored.shapes[keys["E"]])) != rank:
        message = f"A has {rank} rows and E shape {adapter.stored.shapes[keys['E']]}"
        adapter.findings.append(Finding("factors-do-not-fit", message, name))
        return None
    if (adapter.config or {}).get("peft_type") == "ADALORA" and "E" not in keys:
        adapter.findings.append(Finding("missing-factor", "E is missing, the singular values of an AdaLoRA", name))
        return None
    return rank


def _is_head(name: str, config: Mapping[str, Any]) -> bool:
    """PEFT takes every module whose name ends like one of modules_to_save."""
    module, adapter = head_tensor(name)
    if adapter is not None:
        return True
    ends = tuple(str(end) for end in config.get("modules_to_save") or ())
    parents = [module[: match.start()] for match in re.finditer(r"\.", module)]
    return bool(ends) and any(parent.endswith(ends) for parent in parents)


def _note_settings(adapter: ThinAdapter) -> None:
    config = adapter.config or {}
    start = config.get("init_lora_weights", True)
    if config.get("peft_type") == "LORA" and (start not in HARMLESS_STARTS or config.get("loftq_config")):
        message = (
            f"init_lora_weights = {shown(start)}: the base weight was changed at the start, so B A is no update of the base "
            f"itself, and other ranks would be of another base"
        )
        adapter.findings.append(Finding("base-changed", message))
    for key, meaning in UNSUPPORTED.items():
        if config.get(key) and key not in HARMLESS_SETTINGS:
            message = f"{key} = {shown(config[key])}: {meaning}; only s B A is examined"
            adapter.findings.append(Finding("acts-otherwise", message))
    _note_heads(adapter, config)
    for name in adapter.rest:
        if config.get("bias", "none") == "none" and not any(word in name for word in OF_THE_BASE):
            message = f"{name} is no part of an update and of no head in modules_to_save"
            adapter.findings.append(Finding("stray-tensor", message))
    _note_whole_tensors(adapter, config)
    _note_gaps(adapter, config)
    unfinished = adapter.facts.get("unfinished")
    if isinstance(unfinished, dict):
        what = {"rank": "ranks"}.get(unit := str(unfinished.get("unit")), unit)
        message = f"training ended at {unfinished.get('has')} {what}; its schedule ends with {unfinished.get('budget')}"
        adapter.findings.append(Finding("unfinished", message))


def _note_heads(adapter: ThinAdapter, config: Mapping[str, Any]) -> None:
    """PEFT passes over a name in modules_to_save that no module has, and names two for every classifier."""
    named = config.get("modules_to_save") or []
    lacking = [h for h in named if not any(_is_head(n.removeprefix(PREFIX), {"modules_to_save": [h]}) for n in adapter.heads)]
    if named and len(lacking) == len(named):
        message = f"modules_to_save names {' and '.join(named)}, and the file has no tensor of it"
        adapter.findings.append(Finding("head-missing", message))
        return
    if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"):
        lacking = [head for head in lacking if head not in CLASSIFIERS]
    for head in lacking:
        message = f"modules_to_save names {head} beside others, and the file has no tensor of it"
        adapter.findings.append(Finding("head-unmatched", message))


def _note_whole_tensors(adapter: ThinAdapter, config: Mapping[str, Any]) -> None:
    trains_biases = config.get("bias", "none") != "none"
    whole = [name.removeprefix(PREFIX) for name in adapter.rest]
    biases = [name for name in whole if trains_biases and name.endswith(".bias")]
    tokens = [name for name in whole if "trainable_tokens" in name or "token_adapter" in name]
    for names, what in ((biases, f"bias = {shown(config.get('bias'))}: biases"), (tokens, "embeddings of tokens")):
        if names:
            message = f"{what} are trained beside the updates ({len(names)} tensors, {names[0]} among them)"
            adapter.findings.append(Finding("whole-tensors", message))


def _note_gaps(adapter: ThinAdapter, config: Mapping[str, Any]) -> None:
    """Targets without tensors, in the whole file or in some layers: such a file loads, and the update is not there."""
    targets = config.get("target_modules")
    sites = [re.sub(r"\[\d+\]$", "", site.name) for site in adapter.sites]
    sites += [finding.site for finding in adapter.findings if finding.site is not None]  # it has tensors, if faulty ones
    if not isinstance(targets, list) or config.get("layers_to_transform") is not None or set(targets) & set(sites):
        return  # names of whole sites are chosen one by one
    stacks: dict[str, set[int]] = {}
    layers: dict[tuple[str, str], set[int]] = {}
    for site in sites:
        if match := re.match(r"(.+?)\.(\d+)\.(.+)", site):
            stacks.setdefault(match[1], set()).add(int(match[2]))
            layers.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for target in targets:
        if not any(site == target or site.endswith(f".{target}") for site in sites):
            adapter.findings.append(Finding("site-missing", f"target_modules names {target}, and the file has no tensor of it"))
    for (stack, module), there in layers.items():
        if lacking := sorted(stacks[stack] - there):
            numbers = ", ".join(map(str, lacking[:8])) + ", ..." * (len(lacking) > 8)
            message = f"{module} has tensors in {len(there)} of {len(stacks[stack])} layers of {stack}, and none in {numbers}"
            adapter.findings.append(Finding("site-missing", message))


def _facts(path: Path, stored: Stored) -> dict[str, Any]:
    try:
        facts = json_text.parse(stored.metadata.get("rankwise", "{}"))
    except ValueError:
        raise ValueError(f'{path}: its "rankwise" metadata is no JSON; save the adapter again') from None
    return facts if isinstance(facts, dict) else {}


# -- Kohya's and diffusers' --------------------------------------------------------------------------------------------------


def _single_file(path: Path, stored: Stored) -> ThinAdapter:
    grouped: dict[str, dict[str, str]] = {}
    rest = []
    for name in stored.shapes:
        of = kohya.part(name)
        if of is not None:
            grouped.setdefault(of.site, {})[of.part] = name
        elif not kohya.OTHER_KINDS.search(name):
            rest.append(name)
    elsewhere = {name[: match.start()] for name in stored.shapes if (match := kohya.OTHER_KINDS.search(name))}
    for site in elsewhere & grouped.keys():  # an update of another kind, which has an alpha too
        if grouped[site].keys() == {"alpha"}:
            del grouped[site]
    is_kohya = any(kohya.is_kohya(site) for site in grouped)
    settings = _diffusers_metadata(path, stored)
    method = "DoRA" if any("magnitude" in keys for keys in grouped.values()) else "LoRA"
    adapter = ThinAdapter(path, "Kohya" if is_kohya else "diffusers", method, stored, None, {}, [], [], rest)
    without = []
    for site, keys in grouped.items():
        rank = _checked(adapter, site, keys)
        if rank is None:
            continue
        component, _, module = site.partition(".")
        own = settings.get(component)
        alpha, rule = float(rank), "1, for want of an alpha"
        if "alpha" in keys:
            alpha, rule = float(stored[keys["alpha"]][0].reshape(-1)[0]), "alpha/r"
        elif own is not None:
            alpha = float(value_of(own.get("alpha_pattern") or {}, module, own.get("lora_alpha", rank)))
            rule = "alpha/sqrt(r)" if own.get("use_rslora") else "alpha/r"
        else:
            without.append(site)
        scale = alpha / (sqrt(rank) if rule == "alpha/sqrt(r)" else rank) if rank else 0.0
        adapter.sites.append(Site(site, keys, rank, rank, alpha, scale if isfinite(alpha) else alpha, rule))
    if without:
        message = (
            f"{len(without)} of {len(adapter.sites)} sites have no alpha, {without[0]} among them: their scale is taken for 1"
        )
        adapter.findings.append(Finding("alpha-missing", message))
    adapter.findings += [Finding("stray-tensor", f"{name} is no part of a low-rank update") for name in rest]
    return adapter


def _diffusers_metadata(path: Path, stored: Stored) -> dict[str, dict[str, Any]]:
    """Component ("unet", "text_encoder") -> its settings, PEFT's names."""
    try:
        flat = json_text.parse(stored.metadata.get(kohya.METADATA, "{}"))
    except ValueError:
        raise ValueError(f'{path}: its "{kohya.METADATA}" metadata is no JSON; save the adapter again') from None
    settings: dict[str, dict[str, Any]] = {}
    for key, value in flat.items() if isinstance(flat, dict) else ():
        component, _, name = key.partition(".")
        settings.setdefault(component, {})[name] = value
    for component, own in settings.items():
        check_kinds({"peft_type": "LORA", **own}, f'{path}: its "{kohya.METADATA}" metadata, {component}')
    return settings
