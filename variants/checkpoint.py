"""Adapters on disk, in PEFT's files: what is trained here loads in PEFT, and the other way round.

    adapter_config.json         peft_type, r, lora_alpha, target_modules, ...  (the keys that every PEFT knows)
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight ...

any low-rank  a PEFT LORA: lora_A.weight (r, I), lora_B.weight (O, r) of the slots that act, a trained coefficient E
method        folded into A, and lora_magnitude_vector (O,) with use_dora; ranks and alphas (scale * r) of sites that differ
              stand in rank_pattern and alpha_pattern.  A site without a slot that acts is left out; PEFT knows no rank 0,
              so where it has a magnitude, or no site would be left, it holds one slot of zeros.
AdaLoRA       a PEFT ADALORA: lora_A (r', I), lora_B (O, r'), lora_E (r', 1) of the triplets that are kept or have E != 0, so
              that the file equals the live model at any step; r' may be 0.  rank_pattern says which of init_r they were.
              PEFT's scale is alpha / (init_r + 1e-5) at every site: E is multiplied by our scale over that one.
head only     a PEFT LORA whose target_modules is PEFT's own word for none.
full, BitFit  no PEFT form: adapter_model.safetensors alone, with "format": "rankwise" in its metadata.

Heads are PEFT's modules_to_save.  What PEFT's keys cannot say (settings, seed, slots kept, E that was folded) is JSON under
"rankwise" in the metadata of the safetensors file, which PEFT does not read; without it a file is read as PEFT would.
"""

import contextlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.linears import is_conv1d, is_linear, weight_of
from rankwise.variants.adapter.step import Uncalibrated
from rankwise.variants.adapter.surgery import Adapted, name_of
from rankwise.variants.adapter.targets import KEYWORDS, matches
from rankwise.variants.allocation.allocated import AllocatedAdapter
from rankwise.variants.allocation.sites import Triplets
from rankwise.variants.lowrank.adapter import LowRankAdapter
from rankwise.variants.lowrank.site import LowRank, first_slots
from rankwise.variants.settings import METHODS, PATTERNS, Settings, method, nearest
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # PEFT's wrapper and tuner around the model
NO_TARGETS = "dummy-target-modules"  # peft.utils.constants.DUMMY_TARGET_MODULES: matches nothing, and PEFT accepts it
SCHEMA = 1  # of the "rankwise" metadata
RANK_EPSILON = 1e-5  # peft adalora/layer.py divides by ranknum + 1e-5
PART = re.compile(r"^(?P<site>.+)\.(?P<part>lora_A|lora_B|lora_E|lora_magnitude_vector|ranknum)(?:\.weight)?$")

# PEFT's names for a task by the end of a transformers class name, and the heads that PEFT then expects in the file.
TASKS = {
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
    "ForCausalLM": ("CAUSAL_LM", ()),
    "LMHeadModel": ("CAUSAL_LM", ()),
    "ForConditionalGeneration": ("SEQ_2_SEQ_LM", ()),
}
# Starts that leave the base weight alone; the others (pissa, olora, corda, loftq, lora_ga, ...) change it.
HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
UNSUPPORTED = {
    "lora_bias": "B has a bias",
    "target_parameters": "bare parameters are adapted",
    "trainable_token_indices": "token embeddings are trained",
    "layer_replication": "layers are repeated",
    "loftq_config": "the base is quantised",
    "use_qalora": "the base is quantised",
    "alora_invocation_tokens": "the update acts on some tokens only",
    "use_bdlora": "the factors are block-diagonal",
    "arrow_config": "adapters are routed",
    "kasa_config": "the base weight is changed",
    "monteclora_config": "the update is sampled",
    "velora_config": "activations are compressed",
    "megatron_config": "layers are split over devices",
}


@dataclass
class _Contents:
    """What stands in a folder. config is None in the rankwise format; facts is the "rankwise" metadata."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    facts: dict[str, Any] | None


@dataclass
class _Slots:
    """What a file says of one site: how many slots there are, which of them it has values for, and the values."""

    size: int
    acting: Tensor
    values: dict[str, Any]


def save_pretrained(adapter: Adapter, folder: str | Path, member: int = 0) -> None:
    """Writes one member of an attached adapter, whole or not at all.

    Raises:
        ValueError: not attached, no such member, or `folder` is a file.
        OSError: the disk is full or not writable; what was in `folder` before is untouched.
    """
    _check_member(adapter, member)
    contents = _as_peft(adapter, member) if _has_peft_form(adapter) else _as_rankwise(adapter, member)
    _write(Path(folder), contents)


def export_lora(adapter: Adapter, folder: str | Path, member: int = 0) -> None:
    """Writes one member as a plain PEFT LORA (with use_dora where there are magnitudes), for programs that serve LoRA only.

    Exact: A' = A diag(E), and the scale of each site goes into its alpha.  A site at rank 0 is left out.

    Raises:
        ValueError: as `save_pretrained`, and for a method that has no low-rank form.
        OSError: as `save_pretrained`.
    """
    _check_member(adapter, member)
    if not _has_peft_form(adapter):
        raise ValueError(
            f"{adapter.method} changes the model's own tensors, which no low-rank update expresses: "
            f"it cannot be written as LoRA; use save_pretrained"
        )
    contents = _as_peft(adapter, member, plain=True)
    _write(Path(folder), contents)


def export_merged(adapter: Adapter, folder: str | Path, member: int = 0, tokenizer: Any = None) -> None:
    """Writes the whole model with one member merged into it, as transformers writes one: no trace of an adapter is left.

    `AutoModel...from_pretrained(folder)` gives equal outputs, up to the rounding of the base's type.  The tokenizer, where
    one is given, is written beside it.

    Raises:
        ValueError: as `save_pretrained`; a model that is not of transformers, or that is merged already.
        CannotMerge: a weight that the adapter changes is also used elsewhere.
        OSError: as `save_pretrained`.
    """
    _check_member(adapter, member)
    model = adapter.model
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise ValueError(
            f"{type(model).__name__} is no model of transformers: call adapter.merge({member}) and save its weights yourself"
        )
    config = dict(vars(model.config))  # save_pretrained notes the type and the class in it
    adapter.merge(member)
    try:
        with _placed(Path(folder)) as partial:
            model.save_pretrained(partial, state_dict=_bare_state(model))
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
    finally:
        adapter.unmerge()
        vars(model.config).clear()
        vars(model.config).update(config)


def load_pretrained(model: nn.Module, folder: str | Path) -> Adapter:
    """The adapter in `folder`, ours or PEFT's, attached to `model` with one member.

    Sites are those that the file has tensors for, whatever target_modules says.  A triplet that was cut starts anew with
    E = 0.  Where this fails the model is as it was.

    Raises:
        ValueError: no adapter there, a cut-off or foreign file, a feature that is not supported, tensors that are
            missing, contradict the configuration or do not fit the model.
    """
    folder = Path(folder)
    contents = _read(folder)
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has an adapter already: detach it first")
    try:
        if contents.config is None:
            return _load_rankwise(model, contents)
        return _load_peft(model, contents)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


# -- saving --------------------------------------------------------------------------------------------------------------


def _as_peft(adapter: Adapter, member: int, plain: bool = False) -> _Contents:
    """PEFT's files of one member; `plain` without anything that a plain LORA lacks."""
    alone = adapter.alone(member)  # settings and seed of this member, not attached
    settings, model = alone.settings, adapter.model
    sites = dict(adapter.named_sites())
    facts = {
        "schema": SCHEMA,
        "method": adapter.method,
        "settings": settings.model_dump(exclude_unset=True),
        "seed": alone.seeds[0],
        "targets": adapter.targets,
        "head": adapter.head_names,
    }
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "revision": None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": any(is_conv1d(adapter.base(name)) for name in sites),
        "init_lora_weights": "gaussian" if settings.get("initialization") == "gaussian" else True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_dropout": settings.get("dropout", 0.0),
    }
    if not sites:
        tensors, more = {}, {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}
        more |= {"use_rslora": False, "use_dora": False}
    elif not plain and adapter.peft_type == "ADALORA" and all(isinstance(site, Triplets) for site in sites.values()):
        tensors, more = _triplets(adapter, alone, member, facts)
    else:
        tensors, more = _factors(adapter, alone, member, None if plain else facts)
    written = [name for name in sites if f"{name}.lora_A" in tensors or f"{name}.lora_A.weight" in tensors]
    head = _head_tensors(adapter, member)
    config |= more
    config |= {"target_modules": _target_modules(model, written), "modules_to_save": adapter.head_names or None}
    config["task_type"] = _task_type(model, adapter.head_names, written)
    tensors = {PREFIX + name: value.detach().cpu().contiguous() for name, value in (tensors | head).items()}
    return _Contents(tensors, config, None if plain else facts)


def _triplets(adapter: AllocatedAdapter, alone: Adapter, member: int, facts: dict) -> tuple[dict[str, Tensor], dict]:
    """Tensors and configuration of a PEFT ADALORA."""
    settings = alone.settings
    initial = max(int(site.slots[member].sum()) for _, site in adapter.named_sites())
    tensors, pattern, kept, scales = {}, {}, {}, {}
    for name, site in adapter.named_sites():
        slots = site.slots[member].bool()
        A, B, E, keep = site.A[member][slots], site.B[member][:, slots], site.E[member][slots], site.kept[member][slots]
        alive = keep | (E != 0)
        factor = site.scale[member].item() * (initial + RANK_EPSILON) / settings.alpha
        if (told := _told_scale(alone, name, site, member))[1]:
            scales[name] = told[0]
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = A[alive], B[:, alive]
        tensors[f"{name}.lora_E"] = (E[alive].double() * factor).to(E.dtype)[:, None]
        pattern[f"{name}.lora_E"] = alive.tolist() + [False] * (initial - len(alive))
        kept[name] = _bits(keep)
    facts |= {"kept": kept} | ({"scales": scales} if scales else {})
    return tensors, {
        "peft_type": "ADALORA",
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


def _factors(adapter: Adapter, alone: Adapter, member: int, facts: dict | None) -> tuple[dict[str, Tensor], dict]:
    """Tensors and configuration of a PEFT LORA, and in `facts` what undoes it where the settings alone do not say."""
    settings = alone.settings
    parts = {name: _acting(name, _inner(site), member) for name, site in adapter.named_sites()}
    scales = {name: _told_scale(alone, name, _inner(site), member) for name, site in adapter.named_sites()}
    folds = any(told for _, _, told in parts.values()) or any(own for _, own in scales.values())
    folds = folds or any(len(A) != alone.site_ranks(name, _rank(settings))[0] for name, (A, _, _) in parts.items())
    rooted = settings.scaling == "alpha/sqrt(r)" and not folds
    tensors, ranks, alphas, folded = {}, {}, {}, {}
    needed = next(iter(parts)) if not any(len(A) for A, _, _ in parts.values()) else None  # a LORA has at least one site
    for name, site in adapter.named_sites():
        (A, B, told), (scale, own), magnitude = parts[name], scales[name], getattr(site, "magnitude", None)
        folded[name] = (told or {"alive": "1" * len(A)}) | ({"scale": scale} if own else {})
        if not len(A) and magnitude is None and name != needed:
            continue
        if not len(A):
            A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = A, B
        if magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = magnitude[member]
        ranks[name] = len(A)
        alphas[name] = _plain_number(float(f"{scale * len(A) ** (0.5 if rooted else 1.0):.15g}"))
    if folds and facts is not None:
        facts |= {"folded": folded}
        if isinstance(adapter, AllocatedAdapter):
            facts |= {"total_step": adapter.total_steps}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    names = list(dict(adapter.model.named_modules()))
    return tensors, {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_pattern(n, names): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {_pattern(n, names): a for n, a in alphas.items() if a != alpha},
        "use_rslora": rooted,
        "use_dora": all(hasattr(site, "magnitude") for _, site in adapter.named_sites()),
    }


def _acting(name: str, site: LowRank, member: int) -> tuple[Tensor, Tensor, dict]:
    """A (r, I) and B (O, r) of the slots of one member that act, a coefficient folded into A; and what undoes that.

    What a slot acts by is its coefficient; without one, being kept or having a column of B.

    Raises:
        ValueError: coefficients that are not finite.
    """
    slots = site.slots[member].bool()
    A, B = site.A[member][slots], site.B[member][:, slots]
    if not hasattr(site, "kept"):
        return A, B, {}
    kept = site.kept[member][slots]
    if not hasattr(site, "E"):
        alive = kept | (B != 0).any(0)
        return A[alive], B[:, alive], {"kept": _bits(kept), "alive": _bits(alive)}
    E = site.E[member][slots]
    if not E.isfinite().all():
        raise ValueError(f"{name} has singular values that are not finite: this member diverged and cannot be folded")
    alive = E != 0
    A, B = (A[alive].double() * E[alive].double()[:, None]).to(A.dtype), B[:, alive]
    return A, B, {"kept": _bits(kept), "alive": _bits(alive), "E": E[alive].tolist()}


def _told_scale(alone: Adapter, name: str, site: LowRank, member: int) -> tuple[float, bool]:
    """The scale in force of a site, in full precision where the settings say it; and whether they do not at its first rank."""
    scale = site.scale[member]
    ranks = (alone.site_ranks(name, _rank(alone.settings))[0], max(int(site.slots[member].sum()), 1))
    first, now = (alone.site_scales(name, [rank])[0] for rank in ranks)
    told = next((value for value in (first, now) if scale == torch.tensor(value, dtype=scale.dtype)), scale.item())
    return told, told != first


def _rank(settings: Settings) -> Any:
    """The rank that a site without a pattern starts with."""
    return settings.get("rank", settings.get("initial_rank"))


def _head_tensors(adapter: Adapter, member: int) -> dict[str, Tensor]:
    """The trained head; and the frozen values of other modules that PEFT would take for a head, and ask for.

    PEFT takes every module whose name ends like one of modules_to_save, at a dot or not: DistilBERT's pre_classifier
    for its classifier.
    """
    tensors = {f"{name}.{key}": p[member] for name, key, p in _trained(adapter.heads)}
    sites = dict(adapter.named_sites())
    for name, module in adapter.model.named_modules():
        inside = name.startswith(tuple(f"{head}." for head in adapter.head_names))
        adapted = any(site == name or site.startswith(f"{name}.") for site in sites)
        if name in adapter.head_names or inside or adapted or not name.endswith(tuple(adapter.head_names)):
            continue
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
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
    """PEFT's task type; None where it would make PEFT look for a head that is not in the file, or drop a site."""
    kind, heads = next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), (None, ()))
    ends = [n for n, _ in model.named_modules() if n.endswith(heads)] if heads else []
    known = all(any(name == h or name.startswith(f"{h}.") or name.endswith(h) for h in head) for name in ends)
    dropped = any(re.match(rf"(^|.*\.){h}($|\..*)", site) for h in heads for site in sites)
    return kind if known and not dropped else None


def _as_rankwise(adapter: Adapter, member: int) -> _Contents:
    """The file of a method that has no PEFT form."""
    tensors = {f"{name}.{key}": p[member] for part in (adapter.sites, adapter.heads) for name, key, p in _trained(part)}
    facts = {
        "schema": SCHEMA,
        "method": adapter.method,
        "settings": adapter.alone(member).settings.model_dump(exclude_unset=True),
        "seed": adapter.seeds[member],
        "head": adapter.head_names,
    }
    return _Contents({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, None, facts)


def _bare_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model with an adapter in it, by the names that it has without."""
    adapted = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Adapted)]
    state = {}
    for key, value in model.state_dict().items():
        owner = next((name for name in adapted if key.startswith(f"{name}.")), None)
        if owner is not None:
            part, _, rest = key.removeprefix(f"{owner}.").partition(".")
            if part == "site":
                continue
            key = f"{owner}.{rest}"
        state[key] = value
    return state


def _write(folder: Path, contents: _Contents) -> None:
    with _placed(folder) as partial:
        metadata = {"format": "rankwise" if contents.config is None else "pt"}
        if contents.facts is not None:
            metadata["rankwise"] = json.dumps(contents.facts, sort_keys=True, allow_nan=False)
        save_file(contents.tensors, partial / WEIGHTS, metadata=metadata)
        if contents.config is not None:
            text = json.dumps(contents.config, indent=2, sort_keys=True, allow_nan=False)
            (partial / CONFIG).write_text(text + "\n", encoding="utf-8")
    if contents.config is None:
        (folder / CONFIG).unlink(missing_ok=True)  # of another adapter that was there before


@contextlib.contextmanager
def _placed(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write to, whose files are put in place when all are there.

    Raises:
        ValueError: `folder` is a file.
        OSError: what safetensors could not write.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder to write to")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a save that was killed
    partial.mkdir()
    try:
        plain = partial / "permissions"
        plain.touch()
        mode = plain.stat().st_mode
        plain.unlink()
        yield partial
        for file in partial.glob("*.safetensors"):
            file.chmod(mode)  # safetensors 0.8 leaves it readable for its owner only
        if not folder.exists():
            partial.rename(folder)
            return
        for file in sorted(partial.iterdir(), key=lambda file: file.suffix != ".safetensors"):
            file.replace(folder / file.name)
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# -- loading -------------------------------------------------------------------------------------------------------------


def _read(folder: Path) -> _Contents:
    """What stands in `folder`, each tensor read."""
    path = folder / WEIGHTS
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the folder that holds {WEIGHTS}")
    if not path.is_file() and (folder / PICKLE).is_file():
        raise ValueError(
            f"{folder / PICKLE} is a pickle, which can run any code when it is read, and is not opened: load it in PEFT "
            f"where you trust it, and save it there again with save_pretrained(..., safe_serialization=True)"
        )
    if not path.is_file():
        raise ValueError(f"{path} is missing: an adapter folder holds {WEIGHTS} and {CONFIG}; save or copy it again")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or no safetensors file ({error}): save or copy it again") from None
    facts = _json(path, metadata["rankwise"]) if "rankwise" in metadata else None
    if facts is not None and (facts.get("schema") != SCHEMA or facts.get("method") not in METHODS):
        raise ValueError(
            f"{path}: schema {facts.get('schema')}, method {facts.get('method')!r} is of another version of rankwise; "
            f"this one reads schema {SCHEMA}: load it with the version that saved it"
        )
    kinds = {"settings": dict, "seed": int, "head": list, "kept": dict, "scales": dict, "folded": dict}
    for key, kind in kinds.items():
        if facts is not None and not isinstance(facts.get(key, None if key in ("settings", "seed", "head") else {}), kind):
            raise ValueError(f"{path}: {key} = {facts.get(key)!r} in its metadata is no {kind.__name__}: a foreign file")
    if metadata.get("format") == "rankwise":
        if facts is None:
            raise ValueError(f'{path}: its metadata has no "rankwise": a foreign file; save it again')
        return _Contents(tensors, None, facts)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder / CONFIG} is missing: copy the one that was saved with the weights")
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{folder / CONFIG} is no text: copy the one that was saved with the weights") from None
    return _Contents(tensors, _json(folder / CONFIG, text), facts)


def _json(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}): save or copy it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object: a foreign file; save it again")
    return value


def _load_peft(model: nn.Module, contents: _Contents) -> Adapter:
    config, facts = contents.config, contents.facts
    _refuse_unsupported(config)
    sites, rest = _parts(contents.tensors)
    _check_sites(model, sites, config)
    head = _find_head(model, rest, config, facts)
    if not sites:
        if not rest or (facts is not None and method(facts["method"]).takes_targets):
            raise ValueError(f"{WEIGHTS} holds none of an adapter's tensors: a foreign file; save the adapter again")
        adapter, fill = method("head").load()(seeds=_seeds(facts)), {}
    elif config["peft_type"] == "ADALORA":
        adapter, fill = _read_adalora(sites, config, facts)
    elif facts is not None and "folded" in facts:
        adapter, fill = _read_folded(sites, config, facts)
    else:
        adapter, fill = _read_lora(sites, config, facts)
    with _whole(adapter):
        linears = [n for n, m in model.named_modules() if is_linear(m)]
        targets = [_pattern(name, linears) for name in fill] or "all-linear"
        adapter.attach(model, targets, head=head, calibration=Uncalibrated({name: slots.size for name, slots in fill.items()}))
        adapter.targets = facts.get("targets", list(fill)) if facts is not None else list(fill)
        _fill_head(adapter, rest)
        _fill_sites(adapter, fill)
        if isinstance(adapter, AllocatedAdapter):
            adapter.loaded(facts.get("total_step") if "folded" in (facts or {}) else config.get("total_step"))
    return adapter


def _refuse_unsupported(config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise ValueError(f"{CONFIG}: peft_type = {kind!r}: LORA (with or without use_dora) and ADALORA can be loaded")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{CONFIG}: bias = {config['bias']!r}: biases trained beside LoRA are not supported; train with none")
    start = config.get("init_lora_weights", True)
    if kind == "LORA" and start not in HARMLESS_STARTS:
        raise ValueError(
            f"{CONFIG}: init_lora_weights = {start!r} changes the base weight, which this file is relative to: "
            f"convert it in PEFT (save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    for key, meaning in UNSUPPORTED.items():
        if config.get(key):
            raise ValueError(f"{CONFIG}: {key} = {config[key]!r} is not supported ({meaning}): use PEFT for this adapter")


def _parts(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors by site and part; and the rest, which belongs to heads."""
    sites: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            raise ValueError(f"tensor {key} does not start with {PREFIX}: no adapter file of PEFT's; save it there again")
        name = key.removeprefix(PREFIX)
        if re.search(r"\.lora_embedding_[AB]$", name):
            raise ValueError(f"tensor {key} adapts an embedding, which is not supported: adapt linear modules only")
        if name.endswith(".lora_B.bias"):
            raise ValueError(f"tensor {key}: lora_bias is not supported; train without")
        match = PART.match(name)
        if match is None:
            rest[name] = value
        elif match["part"] != "ranknum":  # in files of old PEFT; always init_r
            sites.setdefault(match["site"], {})[match["part"]] = value
    return sites, rest


def _check_sites(model: nn.Module, sites: dict[str, dict[str, Tensor]], config: dict[str, Any]) -> None:
    """Every site is a linear of the model, has all its parts, and they fit each other and the weight."""
    modules = dict(model.named_modules())
    adalora, dora = config["peft_type"] == "ADALORA", bool(config.get("use_dora"))
    parts = {"lora_A", "lora_B"} | ({"lora_E"} if adalora else {"lora_magnitude_vector"} if dora else set())
    for name, found in sites.items():
        if name not in modules:
            raise ValueError(
                f"{name} is no module of {type(model).__name__}{nearest(name, modules)}: load the model it was for"
            )
        base = modules[name]
        if not is_linear(base) or not base.weight.is_floating_point():
            raise ValueError(f"{name} is a {type(base).__name__}: only adapters of nn.Linear and Conv1D can be loaded")
        if set(found) != parts:
            missing, more = ", ".join(sorted(parts - set(found))), ", ".join(sorted(set(found) - parts))
            fault = f"lacks {missing}" if missing else f"has {more}, which peft_type and use_dora do not allow"
            raise ValueError(f"{name} {fault}: the file is not whole or not of this {CONFIG}; save the adapter again")
        out_features, in_features = weight_of(base).shape
        rank = found["lora_A"].shape[0] if found["lora_A"].dim() else 0
        shapes = {"lora_A": (rank, in_features), "lora_B": (out_features, rank)}
        shapes |= {"lora_E": (rank, 1), "lora_magnitude_vector": (out_features,)}
        for part, value in found.items():
            if tuple(value.shape) != shapes[part]:
                raise ValueError(
                    f"{name}.{part} has shape {tuple(value.shape)} where {type(model).__name__} needs {shapes[part]}: "
                    f"load the model it was trained on"
                )


def _find_head(model: nn.Module, rest: dict[str, Tensor], config: dict, facts: dict | None) -> list[str]:
    """Names of the head modules, as PEFT finds them: those that end like one of modules_to_save."""
    ends = config.get("modules_to_save") or []
    if not isinstance(ends, list) or not all(isinstance(end, str) for end in ends):
        raise ValueError(f"{CONFIG}: modules_to_save = {ends!r} is no list of names: a foreign file; save the adapter again")
    names = [n for n, _ in model.named_modules() if n and n.endswith(tuple(ends))] if ends else []
    names = [n for n in names if not n.startswith(tuple(f"{m}." for m in names))]
    for name in rest:
        if not any(name.startswith(f"{head}.") for head in names):
            raise ValueError(
                f"tensor {PREFIX}{name} belongs to no adapter and to no head in {type(model).__name__} "
                f"(modules_to_save = {ends}): load the model it was trained on, with its head"
            )
    if facts is not None:
        return list(facts["head"])
    return [head for head in names if any(name.startswith(f"{head}.") for name in rest)]


@torch.no_grad()
def _fill_sites(adapter: Adapter, fill: dict[str, "_Slots"]) -> None:
    """Gives each site the size that it was saved with, and its slots what the file says of them."""
    inner = {name: _inner(adapter.site(name)) for name in fill}
    sizes = {name: slots.size if slots.size != int(inner[name].slots.sum()) else None for name, slots in fill.items()}
    if any(size is not None for size in sizes.values()):
        order = [name for name, _ in adapter.named_sites()]
        adapter.resize([None if sizes[n] is None else first_slots(inner[n], sizes[n]) for n in order])
        adapter.take_changes()  # no optimizer has seen the old size
    for name, slots in fill.items():
        if sizes[name] is not None:
            inner[name].slots.fill_(1)
        for key, value in slots.values.items():
            if key == "magnitude":
                adapter.site(name).magnitude[0].copy_(value)
            elif key in ("kept", "scale"):
                getattr(inner[name], key)[0] = value
            else:  # A (r, I), B (O, r), E (r,)
                into = getattr(inner[name], key)[0]
                into.index_copy_(-1 if key == "B" else 0, slots.acting.to(into.device), value.to(into))


def _fill_head(adapter: Adapter, rest: dict[str, Tensor]) -> None:
    for name, key, parameter in _trained(adapter.heads):
        _copy(parameter, rest, f"{name}.{key}")


def _read_lora(sites: dict, config: dict, facts: dict | None) -> tuple[Adapter, dict]:
    """LoRA or DoRA, and what to fill in."""
    default_rank, default_alpha = _number(config, "r"), _number(config, "lora_alpha")
    power = 0.5 if config.get("use_rslora") else 1.0
    alphas, ranks = {}, {name: len(parts["lora_A"]) for name, parts in sites.items()}
    for name, rank in ranks.items():
        told = _patterned(config, "rank_pattern", name, default_rank)
        if told != rank:
            raise ValueError(f"{name} has rank {rank} in {WEIGHTS} and {told} in {CONFIG}: save or copy both again")
        alphas[name] = _patterned(config, "alpha_pattern", name, default_alpha)
    adapter = None
    if facts is not None:
        settings = dict(facts["settings"])
        for key in PATTERNS:  # those of sites that the file has not, because they had no rank, match nothing
            if key in settings:
                settings[key] = {p: v for p, v in settings[key].items() if any(matches(p, name) for name in ranks)}
        adapter = method(facts["method"]).load()(seeds=_seeds(facts), **settings)
        for name, rank in ranks.items():  # a file whose alpha was edited by hand means what it says
            scale = adapter.site_scales(name, [rank])[0]
            told = adapter.site_ranks(name, _rank(adapter.settings))[0]
            if told != rank or abs(scale - alphas[name] / rank**power) > 1e-9 * scale:
                adapter = None
                break
    if adapter is None:
        names = list(sites)
        settings = {
            "rank": default_rank,
            "alpha": default_alpha,
            "dropout": _number(config, "lora_dropout", 0.0),
            "scaling": "alpha/sqrt(r)" if config.get("use_rslora") else "alpha/r",
            "initialization": "gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
            "rank_pattern": {_pattern(n, names): r for n, r in ranks.items() if r != default_rank},
            "alpha_pattern": {_pattern(n, names): a for n, a in alphas.items() if a != default_alpha},
        }
        kept_settings = {k: v for k, v in (facts or {}).get("settings", {}).items() if k == "lr_ratio"}
        kind = method("dora" if config.get("use_dora") else "lora")
        adapter = kind.load()(seeds=_seeds(facts), **settings, **kept_settings)
    fill = {}
    for name, parts in sites.items():
        values = {"A": parts["lora_A"], "B": parts["lora_B"]}
        if "lora_magnitude_vector" in parts:
            values["magnitude"] = parts["lora_magnitude_vector"]
        fill[name] = _Slots(ranks[name], torch.arange(ranks[name]), values)
    return adapter, fill


def _read_adalora(sites: dict, config: dict, facts: dict | None) -> tuple[Adapter, dict]:
    """AdaLoRA, and what to fill in.  As in PEFT, alpha_pattern and use_rslora have no effect in an ADALORA."""
    initial, alpha = _number(config, "init_r"), _number(config, "lora_alpha")
    alpha = alpha if alpha > 0 else initial  # peft adalora/layer.py: scaling = alpha if alpha > 0 else r
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise ValueError(
            f"{CONFIG}: rank_pattern is a {type(pattern).__name__}, no object: a foreign file; save the adapter again"
        )
    alive: dict[str, Tensor] = {}
    for name, parts in sites.items():
        bits = pattern.get(f"{name}.lora_E", [True] * initial if isinstance(initial, int) else None)
        if not isinstance(bits, list) or not all(isinstance(bit, bool) for bit in bits) or len(bits) != initial:
            raise ValueError(f"rank_pattern of {name} is no list of init_r = {initial} truth values: save the adapter again")
        alive[name] = torch.tensor(bits, dtype=torch.bool)
        if sum(bits) != len(parts["lora_A"]):
            raise ValueError(
                f"rank_pattern keeps {sum(bits)} of {initial} triplets of {name}, and {WEIGHTS} holds {len(parts['lora_A'])}: "
                f"save or copy both files again"
            )
    unknown = [key for key in pattern if key.removesuffix(".lora_E") not in sites]
    if unknown:
        raise ValueError(f"rank_pattern names {unknown[0]}, which {WEIGHTS} has no tensors for: save or copy both files again")
    if facts is not None:
        adapter = method(facts["method"]).load()(seeds=_seeds(facts), **facts["settings"])
    else:
        adapter = method("adalora").load()(
            initial_rank=initial,
            target_rank=_number(config, "target_r", 8),
            alpha=alpha,
            dropout=_number(config, "lora_dropout", 0.0),
            warmup_steps=_number(config, "tinit", 0),
            final_steps=_number(config, "tfinal", 0),
            interval=_number(config, "deltaT", 1),
            orthogonality=_number(config, "orth_reg_weight", 0.5),
            beta1=_number(config, "beta1", 0.85),
            beta2=_number(config, "beta2", 0.85),
        )
    fill = {}
    for name, parts in sites.items():
        ranks = adapter.site_ranks(name, adapter.settings.initial_rank)
        kept = alive[name]
        if facts is not None:  # other bits than the initial rank: the site has grown or shrunk since
            kept = _unbits(facts.get("kept", {}).get(name), ranks[0], name, exact=False)
        if alive[name][len(kept) :].any():
            raise ValueError(f"rank_pattern of {name} keeps triplets beyond its {len(kept)}: save the adapter again")
        scale = adapter.site_scales(name, ranks)[0]
        if facts is not None and name in facts.get("scales", {}):
            scale = _number(facts["scales"], name)
        scale = torch.tensor(scale, dtype=parts["lora_E"].dtype).item()
        factor = alpha / (initial + RANK_EPSILON) / scale
        E = parts["lora_E"][:, 0]
        values = {"A": parts["lora_A"], "B": parts["lora_B"], "E": (E.double() * factor).to(E.dtype), "kept": kept}
        values["scale"] = scale
        fill[name] = _Slots(len(kept), alive[name].nonzero()[:, 0], values)
    return adapter, fill


def _read_folded(sites: dict, config: dict, facts: dict) -> tuple[Adapter, dict]:
    """Any low-rank method out of the LORA that it was written as, sites that were left out too: A = A' / E."""
    adapter = method(facts["method"]).load()(seeds=_seeds(facts), **facts["settings"])
    default_rank, default_alpha = _number(config, "r"), _number(config, "lora_alpha")
    fill = {}
    for name in {**facts["folded"], **sites}:
        told, parts = facts["folded"].get(name), sites.get(name)
        E = told.get("E", []) if isinstance(told, dict) else None
        if not isinstance(E, list) or not all(isinstance(e, float) for e in E):
            raise ValueError(f"the metadata of {name} is {told!r}, without its singular values: save the adapter again")
        alive = _unbits(told.get("alive"), adapter.site_ranks(name, _rank(adapter.settings))[0], name, exact=False)
        acting = alive.nonzero()[:, 0]
        values: dict[str, Any] = {}
        if "kept" in told:
            values["kept"] = _unbits(told["kept"], len(alive), name)
        scale = adapter.site_scales(name, adapter.site_ranks(name, _rank(adapter.settings)))[0]
        if "scale" in told:
            values["scale"] = scale = _number(told, "scale")
        rank, configured, least = 0, 0, 0
        if parts is not None:  # not left out
            rank, configured, least = len(parts["lora_A"]), _patterned(config, "rank_pattern", name, default_rank), 1
        count = len(acting)
        if not configured == rank == max(count, least) or ("E" in told and len(E) != count):
            raise ValueError(
                f"{name} has rank {rank} in {WEIGHTS}, {configured} in {CONFIG} and {count} in the metadata: save it again"
            )
        if parts is not None:
            # The scale that the file tells PEFT, over ours: 1 unless alpha was edited by hand.
            power = 0.5 if config.get("use_rslora") else 1.0
            factor = _patterned(config, "alpha_pattern", name, default_alpha) / rank**power / scale
            factor = 1.0 if abs(factor - 1) < 1e-9 else factor
            A, B = parts["lora_A"][:count], parts["lora_B"][:, :count]
            if "E" in told:
                coefficients = torch.tensor(E, dtype=torch.float64)
                values |= {"A": (A.double() / coefficients[:, None]).to(A.dtype), "B": B, "E": coefficients * factor}
            else:
                values |= {"A": A, "B": B if factor == 1 else (B.double() * factor).to(B.dtype)}
            if "lora_magnitude_vector" in parts:
                values["magnitude"] = parts["lora_magnitude_vector"]
        fill[name] = _Slots(len(alive), acting, values)
    return adapter, fill


def _load_rankwise(model: nn.Module, contents: _Contents) -> Adapter:
    facts = contents.facts
    adapter = method(facts["method"]).load()(seeds=_seeds(facts), **facts["settings"])
    with _whole(adapter):
        adapter.attach(model, head=facts["head"])
        mine = [(f"{n}.{key}", p) for part in (adapter.sites, adapter.heads) for n, key, p in _trained(part)]
        unknown = sorted(set(contents.tensors) - {name for name, _ in mine})
        if unknown:
            raise ValueError(f"tensor {unknown[0]} is not in {type(model).__name__}: load the model it was trained on")
        for name, parameter in mine:
            _copy(parameter, contents.tensors, name)
    return adapter


# -- small things ----------------------------------------------------------------------------------------------------------


def _check_member(adapter: Adapter, member: int) -> None:
    if not 0 <= member < adapter.members:
        raise ValueError(f"member = {member}: there are {adapter.members}, counted from 0")
    _ = adapter.model  # raises where there is none


def _has_peft_form(adapter: Adapter) -> bool:
    return isinstance(adapter, LowRankAdapter) or not len(adapter.sites)


def _inner(site: nn.Module) -> LowRank:
    """The low-rank site inside a magnitude, or the site itself."""
    return getattr(site, "inner", site)


def _trained(modules: nn.ModuleDict) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(module name, parameter name, parameter) of an adapter's sites or heads."""
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            yield name_of(name), key, parameter


@torch.no_grad()
def _copy(parameter: nn.Parameter, tensors: dict[str, Tensor], name: str) -> None:
    """Takes over the tensor of that name as the one member."""
    if name not in tensors:
        raise ValueError(f"tensor {name} is missing: the file is not whole or was trained on another model; save it again")
    if tensors[name].shape != parameter.shape[1:]:
        shapes = f"{tuple(tensors[name].shape)} where the model needs {tuple(parameter.shape[1:])}"
        raise ValueError(f"tensor {name} has shape {shapes}: load the model it was trained on")
    parameter[0].copy_(tensors[name])


@contextlib.contextmanager
def _whole(adapter: Adapter) -> Iterator[None]:
    """Detaches the adapter where the block fails."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(ValueError):  # it was not attached yet
            adapter.detach()
        raise


def _pattern(name: str, names: Sequence[str]) -> str:
    """What names this module and no other of `names`, here and in PEFT: its name, or else an anchored expression."""
    plain = name not in KEYWORDS and all(other == name or not matches(name, other) for other in names)
    return name if plain else f"^{re.escape(name)}"


def _patterned(config: dict[str, Any], key: str, name: str, default: Any) -> Any:
    """PEFT's get_pattern_key: the first pattern that matches the name or its end at a dot."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{CONFIG}: {key} = {patterns!r} is no object of patterns: a foreign file; save the adapter again")
    for pattern in patterns:
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return _number(patterns, pattern)
        except re.error as error:
            raise ValueError(f"{CONFIG}: {key} = {pattern!r} is no regular expression ({error}): mend it") from None
    return default


def _number(config: dict[str, Any], key: str, default: Any = None) -> Any:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{CONFIG}: {key} = {value!r} is no number: a foreign file; save the adapter again")
    return value


def _plain_number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _seeds(facts: dict | None) -> list[int]:
    return [facts["seed"] if facts is not None else 0]


def _bits(mask: Tensor) -> str:
    return "".join("1" if bit else "0" for bit in mask.tolist())


def _unbits(bits: Any, length: int, name: str, exact: bool = True) -> Tensor:
    if not isinstance(bits, str) or (exact and len(bits) != length) or set(bits) - {"0", "1"}:
        raise ValueError(f"the metadata of {name} is {bits!r}, not {length} bits: a foreign file; save the adapter again")
    return torch.tensor([bit == "1" for bit in bits], dtype=torch.bool)
