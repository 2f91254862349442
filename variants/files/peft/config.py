"""What adapter_config.json says, read in one place.  Without torch."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from rankwise.variants.files.peft.names import CONFIG, is_meant

RANK_EPSILON = 1e-5  # peft adalora/layer.py divides by ranknum + 1e-5
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
# The other keys of PEFT 0.21's LoraConfig and AdaLoraConfig: read here, or without effect on a trained adapter.
KNOWN = {
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "ensure_weight_tying"),
    *("init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "runtime_config"),
    *("qalora_group_size", "init_r", "target_r", "tinit", "tfinal", "deltaT", "total_step"),
    *("beta1", "beta2", "orth_reg_weight"),
}


@dataclass(frozen=True)
class PeftConfig:
    """A LORA or an ADALORA.

    rank, alpha: of the sites that rank_pattern and alpha_pattern do not mean.  rank is a LORA's: None in an ADALORA.
    kept: site -> which of initial_rank triplets an ADALORA keeps; its rank_pattern.
    schedule: the settings of an ADALORA that allocates, by our names.
    base_model: name or folder of the model that was adapted.  task_type: PEFT's, or None.
    model_class, library: the model's class and its module, where no task type says it; PEFT's auto_mapping.
    """

    is_adalora: bool
    alpha: float
    dropout: float
    rank: float | None = None
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    is_rooted: bool = False  # alpha/sqrt(r)
    has_magnitude: bool = False
    is_gaussian: bool = False
    initial_rank: int = 0
    kept: Mapping[str, list[bool]] = field(default_factory=dict)
    schedule: Mapping[str, float] = field(default_factory=dict)
    total_steps: int | None = None
    modules_to_save: tuple[str, ...] = ()
    targets: str | tuple[str, ...] | None = None  # a regular expression, or names and ends of names
    excluded: str | tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None  # of `targets` that are no expression, those in these layers only
    layers_pattern: tuple[str, ...] = ()
    base_model: str | None = None
    task_type: str | None = None
    model_class: str | None = None
    library: str | None = None

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """
        Raises:
            ValueError: another kind of adapter, a feature that is not supported, or a value of the wrong type.
        """
        _refuse_unsupported(values)
        _warn_of_unknown(values)
        heads = values.get("modules_to_save") or []
        if not isinstance(heads, list) or not all(isinstance(end, str) for end in heads):
            raise ValueError(
                f"{CONFIG}: modules_to_save = {heads!r} is no list of names: a foreign file; save the adapter again"
            )
        for head in heads:
            _check_expression("modules_to_save", head)
        layers, stacks = values.get("layers_to_transform"), values.get("layers_pattern") or ()
        mapping = values.get("auto_mapping") or {}
        if not isinstance(mapping, dict):
            raise ValueError(f"{CONFIG}: auto_mapping = {mapping!r} is no object: a foreign file; save the adapter again")
        shared = {
            "base_model": _text(values, "base_model_name_or_path"),
            "task_type": _text(values, "task_type"),
            "model_class": _text(mapping, "base_model_class"),
            "library": _text(mapping, "parent_library"),
            "dropout": _number(values, "lora_dropout", 0.0),
            "modules_to_save": tuple(heads),
            "targets": _names(values, "target_modules"),
            "excluded": _names(values, "exclude_modules"),
            "layers": (layers,) if isinstance(layers, int) else tuple(layers) if layers else None,
            "layers_pattern": (stacks,) if isinstance(stacks, str) else tuple(stacks),
        }
        if values["peft_type"] == "LORA":
            return cls(
                is_adalora=False,
                rank=_number(values, "r"),
                alpha=_number(values, "lora_alpha"),
                rank_pattern=_patterns(values, "rank_pattern"),
                alpha_pattern=_patterns(values, "alpha_pattern"),
                is_rooted=bool(values.get("use_rslora")),
                has_magnitude=bool(values.get("use_dora")),
                is_gaussian=values.get("init_lora_weights") == "gaussian",
                **shared,
            )
        # As in PEFT, alpha_pattern and use_rslora have no effect in an ADALORA.
        initial, alpha = _number(values, "init_r"), _number(values, "lora_alpha")
        kept = values.get("rank_pattern") or {}
        if not isinstance(kept, dict):
            raise ValueError(
                f"{CONFIG}: rank_pattern is a {type(kept).__name__}, no object: a foreign file; save the adapter again"
            )
        return cls(
            is_adalora=True,
            alpha=alpha if alpha > 0 else initial,  # peft adalora/layer.py: scaling = alpha if alpha > 0 else r
            initial_rank=initial,
            kept={name.removesuffix(".lora_E"): bits for name, bits in kept.items()},
            has_magnitude=bool(values.get("use_dora")),
            schedule={
                "target_rank": _number(values, "target_r", 8),
                "warmup_steps": _number(values, "tinit", 0),
                "final_steps": _number(values, "tfinal", 0),
                "interval": _number(values, "deltaT", 1),
                "orthogonality": _number(values, "orth_reg_weight", 0.5),
                "beta1": _number(values, "beta1", 0.85),
                "beta2": _number(values, "beta2", 0.85),
            },
            total_steps=values.get("total_step"),
            **shared,
        )

    def rank_of(self, site: str) -> float:
        """Of a LORA."""
        return _of(self.rank_pattern, site, self.rank)

    def alpha_of(self, site: str) -> float:
        return _of(self.alpha_pattern, site, self.alpha)

    def takes(self, name: str) -> bool:
        """Whether PEFT adapts the module of that name, where it is of a kind that it can adapt: check_target_module_exists."""
        if _is_one_of(self.excluded, name) or any(re.match(rf"(^|.*\.){head}($|\..*)", name) for head in self.modules_to_save):
            return False
        if isinstance(self.targets, str) or name in (self.targets or ()) or self.layers is None:
            return _is_one_of(self.targets, name)
        patterns = [rf"(?:^|.*?\.){stack}\.(\d+)\." for stack in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        layer = next((match[1] for pattern in patterns if (match := re.match(pattern, name))), None)
        return layer is not None and int(layer) in self.layers and _is_one_of(self.targets, name)

    def scale_of(self, site: str, rank: int) -> float:
        """alpha/r or alpha/sqrt(r) of a LORA's site that has `rank`."""
        return self.alpha_of(site) / rank ** (0.5 if self.is_rooted else 1.0)


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    kind = values.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise ValueError(f"{CONFIG}: peft_type = {kind!r}: LORA (with or without use_dora) and ADALORA can be loaded")
    if values.get("bias", "none") != "none":
        raise ValueError(f"{CONFIG}: bias = {values['bias']!r}: biases trained beside LoRA are not supported; train with none")
    start = values.get("init_lora_weights", True)
    if kind == "LORA" and start not in HARMLESS_STARTS:
        raise ValueError(
            f"{CONFIG}: init_lora_weights = {start!r} changes the base weight, which this file is relative to: "
            f"convert it in PEFT (save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    for key, meaning in UNSUPPORTED.items():
        if values.get(key):
            raise ValueError(f"{CONFIG}: {key} = {values[key]!r} is not supported ({meaning}): use PEFT for this adapter")


def _warn_of_unknown(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if value and key not in KNOWN and key not in UNSUPPORTED:
            warnings.warn(
                f"{CONFIG}: {key} = {value!r} is of a newer PEFT than this version of rankwise knows, and is passed over: the "
                f"adapter may act otherwise than it did there; compare the outputs",
                stacklevel=2,
            )


def _text(values: Mapping[str, Any], key: str) -> str | None:
    text = values.get(key)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{CONFIG}: {key} = {text!r} is no text: a foreign file; save the adapter again")
    return text


def _names(values: Mapping[str, Any], key: str) -> str | tuple[str, ...] | None:
    names = values.get(key)
    if isinstance(names, str):
        _check_expression(key, names)
    if names is None or isinstance(names, str):
        return names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{CONFIG}: {key} = {names!r} is no list of names: a foreign file; save the adapter again")
    return tuple(names)


def _is_one_of(names: str | tuple[str, ...] | None, name: str) -> bool:
    """Whether a regular expression matches the whole name, or a list holds it or its end at a dot."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in names or ())


def _patterns(values: Mapping[str, Any], key: str) -> dict[str, float]:
    patterns = values.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{CONFIG}: {key} = {patterns!r} is no object of patterns: a foreign file; save the adapter again")
    for pattern in patterns:
        _number(patterns, pattern)
        _check_expression(key, pattern)
    return patterns


def _check_expression(key: str, text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{CONFIG}: {key} = {text!r} is no regular expression ({error}): mend it") from None


def _of(patterns: Mapping[str, float], site: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if is_meant(pattern, site)), default)


def _number(values: Mapping[str, Any], key: str, default: Any = None) -> Any:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{CONFIG}: {key} = {value!r} is no number: a foreign file; save the adapter again")
    return value
