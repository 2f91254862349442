"""Experts' matrices in PEFT's form, its target_parameters: one pair of factors for the E experts of a parameter.

    A' (E r, I), row e r + j: rank j of expert e        B' (O, E r), column j E + e: the same

PEFT 0.21, lora.ParamWrapper.  Each parameter of a module is a wrapper around the one before it, so the last has the module's
name and the others ".base_layer" behind it, once for each that follows.  Llama 4 does not say that its parameters are stored
(I, O), and PEFT takes I for O there: its A' is our B^T, and B' our A^T.  An expert with less than r ranks is filled with zeros.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rankwise.variants.adapter import experts
from rankwise.variants.files.peft.config import PeftConfig
from rankwise.variants.files.peft.names import BASE_LAYER, CONFIG, FACTORS
from torch import Tensor, nn

A, B = FACTORS["linear"]
Pair = tuple[Tensor, Tensor]  # A (r, I) and B (O, r)


def stacked(pairs: Sequence[Pair | None], is_swapped: bool) -> Pair:
    """A' and B' of the experts of a parameter; None of one that has no update."""
    some = next(pair for pair in pairs if pair is not None)
    r = max(len(pair[0]) for pair in pairs if pair is not None)
    As = some[0].new_zeros(len(pairs), r, some[0].shape[1])
    Bs = some[1].new_zeros(len(pairs), some[1].shape[0], r)
    for e, pair in enumerate(pairs):
        if pair is not None:
            As[e, : len(pair[0])], Bs[e, :, : len(pair[0])] = pair
    if is_swapped:
        As, Bs = Bs.mT, As.mT
    return As.flatten(0, 1), Bs.permute(1, 2, 0).flatten(1)


def unstacked(A: Tensor, B: Tensor, count: int, is_swapped: bool) -> list[Pair]:
    """The inverse, for `count` experts."""
    As, Bs = A.unflatten(0, (count, -1)), B.unflatten(1, (-1, count)).permute(2, 0, 1)
    if is_swapped:
        As, Bs = Bs.mT, As.mT
    return list(zip(As, Bs, strict=True))


def is_swapped(module: nn.Module, name: str) -> bool:
    """Whether PEFT takes the inputs of a parameter's matrices for their outputs."""
    return experts.parameters(module)[name] and not getattr(module, "is_transposed", False)


def keys(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Of each of these parameters (whole names) the module's name under which PEFT has its factors."""
    found, places = experts.stacks(model), {}
    for stack in found:
        if stack in names:
            places.setdefault(experts.stack_of(stack), []).append(stack)
    wrapped = {place: list(reversed(inside)) for place, inside in places.items()}
    return {
        stack: place + "".join([BASE_LAYER[:-1]] * depth)
        for place, inside in wrapped.items()
        for depth, stack in enumerate(inside)
    }


def take(
    model: nn.Module, sites: dict[str, dict[str, Tensor]], config: PeftConfig
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Takes the factors of experts out of `sites`: those of each expert's own site, and the parameter that each is a part of.

    Raises:
        ValueError: parameters that are no experts', or factors that are missing or do not fit.
    """
    if not config.parameters:
        return {}, {}
    kind, found = type(model).__name__, experts.stacks(model)
    named = [(f"{path}.{name}", value) for path, module in model.named_modules() for name, value in module._parameters.items()]
    meant = [name for name, value in named if value is not None and config.takes_parameter(name)]
    strange = next((name for name in meant if name not in found), None)
    if strange is not None or not meant:
        what = f"{strange}, which is no stack of experts' matrices" if strange else "nothing"
        raise ValueError(
            f"{CONFIG}: target_parameters = {list(config.parameters)} means {what} in {kind}: only the experts of a model's "
            f"mixtures can be loaded (variants/adapter/experts.py); use PEFT for this adapter"
        )
    parts, stacks = {}, {}
    for stack, key in keys(model, meant).items():
        module, name = found[stack]
        shape, factors = getattr(module, name).shape, sites.pop(key, {})
        rank = config.rank_of(stack)
        sizes = {A: (shape[0] * rank, shape[2]), B: (shape[1], shape[0] * rank)}
        if getattr(module, "is_transposed", False):
            sizes = {A: (shape[0] * rank, shape[1]), B: (shape[2], shape[0] * rank)}
        for part, size in sizes.items():
            has = tuple(factors[part].shape) if part in factors else "nothing"
            if has != size or set(factors) != {A, B}:
                raise ValueError(
                    f"{stack} has {has} for {part} where {kind} needs {size} at r = {rank}: load the model it was trained on, "
                    f"or save the adapter again"
                )
        pairs = unstacked(factors[A], factors[B], shape[0], is_swapped(module, name))
        for e, (a, b) in enumerate(pairs):
            parts[f"{stack}.{e}"], stacks[f"{stack}.{e}"] = {A: a, B: b}, stack
    return parts, stacks


def places(model: nn.Module, sites: Iterable[str]) -> dict[str, str]:
    """Those of these sites that are experts' -> the parameter that each is a part of."""
    found = experts.stacks(model)
    return {site: stack for site in sites if (stack := experts.stack_of(site)) in found}


def targets(model: nn.Module, places: Mapping[str, str]) -> Iterator[str]:
    """What names these experts' sites (site -> parameter) and no others."""
    found = experts.stacks(model)
    for stack in dict.fromkeys(places.values()):
        module, name = found[stack]
        inside = [site for site in places if places[site] == stack]
        yield from [stack] if len(inside) == len(getattr(module, name)) else inside
