"""Whether the tensors of a file are all that its configuration promises, and fit the model."""

from collections.abc import Mapping, Sequence

from rankwise.variants.adapter.kinds.quantised import bits
from rankwise.variants.adapter.linears import check_adaptable, find_kind, is_linear, kind_of, known_kinds
from rankwise.variants.files.peft.config import PeftConfig
from rankwise.variants.files.peft.names import COEFFICIENTS, CONFIG, FACTORS, MAGNITUDE, PREFIX, WEIGHTS
from rankwise.variants.settings import nearest
from torch import Tensor, nn

A, B = FACTORS["linear"]
ADAPTED_BY_PEFT = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)  # beside linears
Sites = Mapping[str, Mapping[str, Tensor]]  # site -> part -> tensor


def check_sites(model: nn.Module, sites: Sites, config: PeftConfig) -> None:
    """Every site is a module of the model that can be adapted, has all its parts, and they fit each other and the weight."""
    modules = dict(model.named_modules())
    beside = {COEFFICIENTS} if config.is_adalora else {MAGNITUDE} if config.has_magnitude else set()
    for name, parts in sites.items():
        if name not in modules:
            raise ValueError(
                f"{name} is no module of {type(model).__name__}{nearest(name, modules)}: load the model it was for"
            )
        base = modules[name]
        kind = find_kind(base)
        if kind is None or (config.is_adalora and not kind.is_linear):
            loaded = f"only adapters of {'linears' if config.is_adalora else known_kinds()} can be loaded"
            form = f" where {CONFIG} has AdaLoRA" if config.is_adalora else ""
            raise ValueError(f"{name} is a {type(base).__name__}: {loaded}{form}; choose other targets in PEFT")
        check_adaptable(name, base)
        a, b = FACTORS[kind.factors]
        needed = {a, b} | beside
        if set(parts) != needed:
            missing, more = ", ".join(sorted(needed - set(parts))), ", ".join(sorted(set(parts) - needed))
            fault = f"lacks {missing}" if missing else f"has {more}, which peft_type and use_dora do not allow"
            raise ValueError(f"{name} {fault}: the file is not whole or not of this {CONFIG}; save the adapter again")
        rank = parts[a].shape[0] if parts[a].dim() else 0
        shapes = dict(zip((a, b), kind.factor_shapes(base, rank), strict=True))
        shapes |= {COEFFICIENTS: (rank, 1), MAGNITUDE: kind.magnitude_shape(base)}
        for key, value in parts.items():
            if tuple(value.shape) != shapes[key]:
                raise ValueError(
                    f"{name}.{key} has shape {tuple(value.shape)} where {type(model).__name__} needs {shapes[key]}: "
                    f"load the model it was trained on"
                )


def unlike_peft_at_start(base: nn.Module, method: str | None) -> str | None:
    """Why PEFT takes another start of that method out of a module's weight; None where it takes the same or none."""
    kind = kind_of(base)
    if method == "olora" and kind.fan_in_fan_out:
        return "PEFT decomposes the weight as it is stored, (I, O)"
    if method is not None and bits(base) is not None:
        return (
            "PEFT quantises what is left of the weight again"
            if method == "olora"
            else "PEFT starts so over no quantised weight"
        )
    return None


def as_matrices(model: nn.Module, sites: Sites, config: PeftConfig, ours: bool) -> dict[str, dict[str, Tensor]]:
    """The checked parts under the names of a linear's, A (r, I) and B (O, r), whatever the kind of weight.

    Raises:
        ValueError: a file that is not `ours`, of a module in which PEFT's update is another function of A and B.
    """
    matrices = {}
    for name, parts in sites.items():
        base = model.get_submodule(name)
        kind = kind_of(base)
        reason = kind.unlike_peft(base) or unlike_peft_at_start(base, config.residual)
        if reason is not None and not ours:
            raise ValueError(f"{name} was another function in PEFT: {reason}; train it here, or choose other targets")
        names = dict(zip(FACTORS[kind.factors], (A, B), strict=True))
        matrices[name] = {names.get(key, key): value.flatten(1) if key in names else value for key, value in parts.items()}
        if MAGNITUDE in parts:
            matrices[name][MAGNITUDE] = parts[MAGNITUDE].flatten()
    return matrices


def heads_of(model: nn.Module, config: PeftConfig) -> list[str]:
    """Names of the modules that PEFT takes for heads: those that end like one of modules_to_save."""
    ends = config.modules_to_save
    whole = [n for n, module in model.named_modules() if n and any(True for _ in module.parameters())]
    names = [n for n in whole if n.endswith(ends)] if ends else []
    return [n for n in names if not n.startswith(tuple(f"{m}." for m in names))]


def check_heads(model: nn.Module, rest: Mapping[str, Tensor], heads: Sequence[str], config: PeftConfig) -> None:
    for name in rest:
        if not any(name.startswith(f"{head}.") for head in heads):
            raise ValueError(
                f"tensor {PREFIX}{name} belongs to no adapter and to no head in {type(model).__name__} "
                f"(modules_to_save = {list(config.modules_to_save)}): load the model it was trained on, with its head"
            )
    for head in heads:
        if not any(name.startswith(f"{head}.") for name in rest):
            raise ValueError(
                f"{CONFIG} says that {head} was trained (modules_to_save), and {WEIGHTS} has no tensor of it: the file is not "
                f"whole; save or copy it again"
            )


def check_targets(model: nn.Module, sites: Sites, config: PeftConfig) -> None:
    """Every module that the configuration says is adapted has its tensors."""
    meant = [name for name, module in model.named_modules() if isinstance(module, ADAPTED_BY_PEFT) or is_linear(module)]
    meant = [name for name in meant if config.takes(name) and not (config.rank_of(name) == 0 and not config.is_adalora)]
    missing = [name for name in meant if name not in sites]
    if missing:
        raise ValueError(
            f"{CONFIG} says that {len(meant)} modules of {type(model).__name__} are adapted (target_modules), and {WEIGHTS} "
            f"lacks {len(missing)} of them, {missing[0]} among them: the file is not whole; save or copy it again"
        )
