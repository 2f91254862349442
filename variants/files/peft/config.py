"""What adapter_config.json says, read in one place.  Without torch."""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from rankwise.variants.files.peft.names import CONFIG, is_meant
from rankwise.variants.settings import shown

RANK_EPSILON = 1e-5  # peft adalora/layer.py divides by ranknum + 1e-5
# Starts that leave the base weight alone; the others (corda, loftq, lora_ga, ...) change it.
HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
RESIDUAL_STARTS = ("pissa", "olora")  # methods here, whose start is made again from the weight
UNSUPPORTED = {
    "lora_bias": "B has a bias",
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
    *(
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "ensure_weight_tying",
    ),
    *("init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "runtime_config"),
    *("qalora_group_size", "init_r", "target_r", "tinit", "tfinal", "deltaT", "total_step"),
    *("beta1", "beta2", "orth_reg_weight"),
}

# peft_type of the forms that have no thin factors, and the keys of each that stand in no LoraConfig; each has its file here.
_TOKENS = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
OTHER_FORMS = {
    "IA3": ("feedforward_modules", "init_ia3_weights"),
    "PROMPT_TUNING": (*_TOKENS, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    "PREFIX_TUNING": (*_TOKENS, "encoder_hidden_size", "prefix_projection", "init_weights"),
}


MOST_RANK = 1 << 20  # of a file: no matrix of a model has as many rows, and a mask of so many still fits into memory
MOST_NUMBER = 1e30  # of any other number: a float32 holds it
LONGEST_PATTERN, MOST_REPETITIONS = 10_000, 12


def _is_number(value: Any) -> bool:
    # Compared and not converted: JSON's whole numbers have any length, and NaN is in no order.
    return isinstance(value, int | float) and not isinstance(value, bool) and -MOST_NUMBER <= value <= MOST_NUMBER


def _is_rank(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= MOST_RANK


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _are_ranks(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_rank, value.values()))


def _are_masks(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(kept, list) for kept in value.values())


def _are_layers(value: Any) -> bool:
    return all(isinstance(one, int) for one in (value if isinstance(value, list) else [value]))


# What each key that is read here or in variants/doctor holds where it holds anything: (its check, the words for it).
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("r", "init_r", "target_r"), (_is_rank, f"number from 0 to {MOST_RANK:,}")),
    **dict.fromkeys(("lora_alpha", "lora_dropout", "orth_reg_weight", "beta1", "beta2"), (_is_number, "number")),
    **dict.fromkeys(("tinit", "tfinal", "deltaT", "total_step"), (_is_number, "number")),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out"), (lambda v: isinstance(v, bool), "true or false")),
    **dict.fromkeys(("base_model_name_or_path", "task_type"), (lambda v: isinstance(v, str), "text")),
    **dict.fromkeys(("modules_to_save", "target_parameters"), (_are_texts, "list of names")),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern"),
        (lambda v: isinstance(v, str) or _are_texts(v), "text or list of names"),
    ),
    "layers_to_transform": (_are_layers, "number of a layer or list of them"),
    "auto_mapping": (lambda v: isinstance(v, dict), "object"),
    "rank_pattern": (_are_ranks, "object of patterns with ranks"),
    "alpha_pattern": (_are_numbers, "object of patterns with numbers"),
}
OF_ADALORA = {"rank_pattern": (_are_masks, "object of modules with lists")}


def check_kinds(values: Mapping[str, Any], where: str = CONFIG) -> None:
    """Whether every key that is read holds what it should, so that no reader need ask again.

    Args:
        where: what messages call the file.

    Raises:
        ValueError: a value of the wrong type, or a pattern that is none.
    """
    kinds = KINDS | OF_ADALORA if values.get("peft_type") == "ADALORA" else KINDS
    for key, (holds, words) in kinds.items():
        value = values.get(key)
        if value is not None and not holds(value):
            raise ValueError(f"{where}: {key} = {shown(value)} is no {words}: a foreign file; save the adapter again")
    expressions = [(key, text) for key in ("target_modules", "exclude_modules") if isinstance(text := values.get(key), str)]
    expressions += [(key, text) for key in ("rank_pattern", "alpha_pattern") for text in values.get(key) or {}]
    expressions += [("modules_to_save", text) for text in values.get("modules_to_save") or []]
    stacks = values.get("layers_pattern") or []
    expressions += [("layers_pattern", text) for text in ([stacks] if isinstance(stacks, str) else stacks)]
    for key, text in expressions:
        _check_expression(key, text, where)


VERA_KEYS = ("vera_dropout", "d_initial", "projection_prng_key", "save_projection", "init_weights", "r", "peft_type")


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
    residual: str | None = None  # the method whose start is taken out of the weight
    initial_rank: int = 0
    kept: Mapping[str, list[bool]] = field(default_factory=dict)
    schedule: Mapping[str, float] = field(default_factory=dict)
    total_steps: int | None = None
    modules_to_save: tuple[str, ...] = ()
    targets: str | tuple[str, ...] | None = None  # a regular expression, or names and ends of names
    parameters: tuple[str, ...] = ()  # bare parameters that are adapted, or ends of their names; PEFT's target_parameters
    stacks: Mapping[str, str] = field(default_factory=dict)  # an expert's site -> the parameter that it is a part of
    excluded: str | tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None  # of `targets` that are no expression, those in these layers only
    layers_pattern: tuple[str, ...] = ()
    base_model: str | None = None
    task_type: str | None = None
    model_class: str | None = None
    library: str | None = None

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """What a LORA or an ADALORA says; of a VERA, what a LORA with the same targets and heads would say.

        Raises:
            ValueError: another kind of adapter, a feature that is not supported, or a value of the wrong type.
        """
        if values.get("peft_type") == "VERA":
            shared = {key: value for key, value in values.items() if key not in VERA_KEYS}
            values = {**shared, "peft_type": "LORA", "r": values.get("r", 256), "lora_alpha": 1}  # 256: PEFT's default
        _refuse_unsupported(values)
        _warn_of_unknown(values)
        check_kinds(values)
        heads = values.get("modules_to_save") or []
        layers, stacks = values.get("layers_to_transform"), values.get("layers_pattern") or ()
        mapping = values.get("auto_mapping") or {}
        shared = {
            "base_model": values.get("base_model_name_or_path"),
            "task_type": values.get("task_type"),
            "model_class": _text(mapping, "base_model_class"),
            "library": _text(mapping, "parent_library"),
            "dropout": _number(values, "lora_dropout", 0.0),
            "modules_to_save": tuple(heads),
            "targets": _names(values, "target_modules"),
            "parameters": tuple(values.get("target_parameters") or ()),
            "excluded": _names(values, "exclude_modules"),
            "layers": (layers,) if isinstance(layers, int) else tuple(layers) if layers else None,
            "layers_pattern": (stacks,) if isinstance(stacks, str) else tuple(stacks),
        }
        if values["peft_type"] == "LORA":
            return cls(
                is_adalora=False,
                rank=_number(values, "r"),
                alpha=_number(values, "lora_alpha"),
                rank_pattern=values.get("rank_pattern") or {},
                alpha_pattern=values.get("alpha_pattern") or {},
                is_rooted=bool(values.get("use_rslora")),
                has_magnitude=bool(values.get("use_dora")),
                is_gaussian=values.get("init_lora_weights") == "gaussian",
                residual=values["init_lora_weights"] if values.get("init_lora_weights") in RESIDUAL_STARTS else None,
                **shared,
            )
        # As in PEFT, alpha_pattern and use_rslora have no effect in an ADALORA.
        initial, alpha = _number(values, "init_r"), _number(values, "lora_alpha")
        kept = values.get("rank_pattern") or {}
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

    @classmethod
    def read_shared(cls, values: Mapping[str, Any]) -> Self:
        """The same of any form that can be loaded; of one of OTHER_FORMS what it shares with a LORA, and rank 1 everywhere.

        Raises:
            ValueError: as `read`.
        """
        own = OTHER_FORMS.get(str(values.get("peft_type")))
        if own is None:
            return cls.read(values)
        return cls.read({k: v for k, v in values.items() if k not in own} | {"peft_type": "LORA", "r": 1, "lora_alpha": 1})

    def rank_of(self, site: str) -> float:
        """Of a LORA."""
        return _of(self.rank_pattern, self.stacks.get(site, site), self.rank)

    def alpha_of(self, site: str) -> float:
        return _of(self.alpha_pattern, self.stacks.get(site, site), self.alpha)

    def takes_parameter(self, name: str) -> bool:
        """Whether PEFT adapts the bare parameter of that name."""
        return _is_one_of(self.parameters, name)

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
        others = ", ".join(OTHER_FORMS)
        raise ValueError(
            f"{CONFIG}: peft_type = {shown(kind)}: LORA (with or without use_dora), ADALORA, {others} and VERA can be loaded"
        )
    if values.get("bias", "none") != "none":
        bias = shown(values["bias"])
        raise ValueError(f"{CONFIG}: bias = {bias}: biases trained beside LoRA are not supported; train with none")
    if kind == "ADALORA" and values.get("target_parameters"):
        raise ValueError(f"{CONFIG}: target_parameters of an ADALORA, which PEFT does not have: a foreign file; save it again")
    start = values.get("init_lora_weights", True)
    if kind == "LORA" and start not in (*HARMLESS_STARTS, *RESIDUAL_STARTS):
        raise ValueError(
            f"{CONFIG}: init_lora_weights = {shown(start)} changes the base weight, which this file is relative to: "
            f"convert it in PEFT (save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    for key, meaning in UNSUPPORTED.items():
        if values.get(key):
            raise ValueError(f"{CONFIG}: {key} = {shown(values[key])} is not supported ({meaning}): use PEFT for this adapter")


def _warn_of_unknown(values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if value and key not in KNOWN and key not in UNSUPPORTED:
            warnings.warn(
                f"{CONFIG}: {key} = {shown(value)} is of a newer PEFT than this version of rankwise knows, and is passed over: "
                f"the adapter may act otherwise than it did there; compare the outputs",
                stacklevel=2,
            )


def _text(values: Mapping[str, Any], key: str) -> str | None:
    text = values.get(key)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{CONFIG}: {key} = {shown(text)} is no text: a foreign file; save the adapter again")
    return text


def _names(values: Mapping[str, Any], key: str) -> str | tuple[str, ...] | None:
    names = values.get(key)
    return names if names is None or isinstance(names, str) else tuple(names)


def _is_one_of(names: str | tuple[str, ...] | None, name: str) -> bool:
    """Whether a regular expression matches the whole name, or a list holds it or its end at a dot."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in names or ())


def _check_expression(key: str, text: str, where: str = CONFIG) -> None:
    try:
        if not _is_quick(text):
            raise ValueError(
                f"{where}: {key} = {shown(text)} could take for ever to match (a repeated group that repeats or chooses, or "
                f"over {MOST_REPETITIONS} repetitions): write it without"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what later versions of Python will read otherwise
            re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{where}: {key} = {shown(text)} is no regular expression ({error}): mend it") from None


def _is_quick(expression: str) -> bool:
    """Whether no name makes matching it exponential, as "(a+)+" is: no group is repeated that repeats or chooses.

    PEFT's own patterns repeat single characters alone.  What remains is polynomial in the length of a module's name.
    """
    if len(expression) > LONGEST_PATTERN:
        return False
    pieces = re.findall(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[:=!P<]|.", expression, re.DOTALL)
    chooses, repetitions, closed = [False], 0, False  # of each open group; whether the piece before closed one that does
    for piece in pieces:
        if piece in ("*", "+", "{"):
            if closed:
                return False
            repetitions, chooses[-1] = repetitions + 1, True
        chooses[-1] |= piece == "|"
        closed = False
        if piece.startswith("("):
            chooses.append(False)
        elif piece == ")" and len(chooses) > 1:
            closed = chooses.pop()
            chooses[-1] |= closed
    return repetitions <= MOST_REPETITIONS


def _of(patterns: Mapping[str, float], site: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if is_meant(pattern, site)), default)


def _number(values: Mapping[str, Any], key: str, default: Any = None) -> Any:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{CONFIG}: {key} = {shown(value)} is no number: a foreign file; save the adapter again")
    return value
