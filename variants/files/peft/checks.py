"""Whether the tensors of a file are all that its configuration promises, and fit the model."""

from collections.abc import Mapping, Sequence

from rankwise.variants.adapter.linears import is_linear, weight_of
from rankwise.variants.files.peft.config import PeftConfig
from rankwise.variants.files.peft.names import COEFFICIENTS, CONFIG, FACTORS, MAGNITUDE, PREFIX, WEIGHTS
from rankwise.variants.settings import nearest
from torch import Tensor, nn

A, B = FACTORS["linear"]
ADAPTED_BY_PEFT = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)  # beside linears
Sites = Mapping[str, Mapping[str, Tensor]]  # site -> part -> tensor


def check_sites(model: nn.Module, sites: Sites, config: PeftConfig) -> None:
    """Every site is a linear of the model, has all its parts, and they fit each other and the weight."""
    modules = dict(model.named_modules())
    needed = {A, B} | ({COEFFICIENTS} if config.is_adalora else {MAGNITUDE} if config.has_magnitude else set())
    for name, parts in sites.items():
        if name not in modules:
            raise ValueError(
                f"{name} is no module of {type(model).__name__}{nearest(name, modules)}: load the model it was for"
            )
        base = modules[name]
        if not is_linear(base) or not base.weight.is_floating_point():
            raise ValueError(f"{name} is a {type(base).__name__}: only adapters of nn.Linear and Conv1D can be loaded")
        if set(parts) != needed:
            missing, more = ", ".join(sorted(needed - set(parts))), ", ".join(sorted(set(parts) - needed))
            fault = f"lacks {missing}" if missing else f"has {more}, which peft_type and use_dora do not allow"
            raise ValueError(f"{name} {fault}: the file is not whole or not of this {CONFIG}; save the adapter again")
        out_features, in_features = weight_of(base).shape
        rank = parts[A].shape[0] if parts[A].dim() else 0
        shapes = {A: (rank, in_features), B: (out_features, rank), COEFFICIENTS: (rank, 1), MAGNITUDE: (out_features,)}
        for key, value in parts.items():
            if tuple(value.shape) != shapes[key]:
                raise ValueError(
                    f"{name}.{key} has shape {tuple(value.shape)} where {type(model).__name__} needs {shapes[key]}: "
                    f"load the model it was trained on"
                )


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
