"""Members written into the model's own weights, and sites taken out of the way."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rankwise.variants.adapter.kinds.quantised import bits, requantised, scheme_of
from rankwise.variants.adapter.linears import kind_of, weight_of
from rankwise.variants.adapter.shards import is_sharded
from rankwise.variants.adapter.step import CannotMerge
from rankwise.variants.adapter.surgery import Adapted, Surgery, parameter_places
from torch import nn


def is_merged(model: nn.Module) -> bool:
    return any(module.merged for module in model.modules() if isinstance(module, Adapted))


@torch.no_grad()
def merge(surgery: Surgery, member: int) -> None:
    """Writes one member into the model's weights, all of them or, where one cannot be written, none.

    A quantised weight holds no sum: a dequantised one takes its place until `unmerge`, which is warned of.

    Raises:
        CannotMerge: a weight that is also used elsewhere (tied), or that several processes share.
    """
    model = surgery.model
    if is_sharded(model):
        raise CannotMerge(
            "the processes of this run share the base (shard_base), and none has a whole weight to write into: save the "
            "adapter, and merge it where the base is whole (rankwise export)"
        )
    adapted = [(n, m) for n, m in model.named_modules() if isinstance(m, Adapted)]
    places = parameter_places(model)
    news, bases = [], []
    for name, module in adapted:
        values = module.site.merged(module.base, member)
        full = kind_of(module.base).in_full(module.base) if "weight" in values and not module.site.is_norm else None
        for key, value in values.items():
            shared = places.get(id(getattr(module.base, key)), set()) - {f"{name}.base.{key}"}
            if shared:
                raise CannotMerge(f"{name}.{key} is tied to {sorted(shared)[0]}: merging would change that too; untie it first")
            old = getattr(full or module.base, key)
            news.append((old, value.to(old.dtype).contiguous()))
        if full is not None:
            bases.append((module, full))
    _warn_of_dequantised([full for module, full in bases if bits(module.base) is not None])
    try:
        for module, full in bases:
            surgery.in_full.append((module, module.base))
            module.base = full
        for old, value in news:
            surgery.kept.append((old, old.data))
            old.data = value
        for _, module in adapted:
            module.merged = True
    except BaseException:  # an interrupt
        unmerge(surgery)
        raise


@torch.no_grad()
def unmerge(surgery: Surgery) -> None:
    """Restores the weights that `merge` changed, which it set aside, bit for bit."""
    for tensor, value in reversed(surgery.kept):
        tensor.data = value
    surgery.kept.clear()
    for module, base in surgery.in_full:
        module.base = base
    surgery.in_full.clear()
    for module in surgery.model.modules():
        if isinstance(module, Adapted):
            module.merged = False


@contextlib.contextmanager
def without(surgery: Surgery, name: str) -> Iterator[None]:
    """The model with the change of the site at `name` taken out: of every member, or of the one that is merged."""
    adapted = surgery.model.get_submodule(name)
    if not adapted.merged:
        adapted.merged = True  # the frozen module alone
        try:
            yield
        finally:
            adapted.merged = False
        return
    originals = {id(tensor): value for tensor, value in surgery.kept}
    changed = [(p, p.data) for p in adapted.base.parameters() if id(p) in originals]
    merged = adapted.base
    try:
        adapted.base = next((base for module, base in surgery.in_full if module is adapted), merged)
        for parameter, _ in changed:
            parameter.data = originals[id(parameter)]
        yield
    finally:
        adapted.base = merged
        for parameter, value in changed:
            parameter.data = value


@dataclass(frozen=True)
class Requantisation:
    """What quantising merged weights again has cost: sizes of the errors (Frobenius norms) as shares.

    scheme: the weights' form. weights: how many. error: of the merged weights. of_change: of the adapter's change of them; None
    where it changes none. worst: the weight whose error is the greatest share of its change, and that share.
    """

    scheme: str
    weights: int
    error: float
    of_change: float | None
    worst: tuple[str, float] | None

    def __str__(self) -> str:
        line = f"{self.weights} merged weights, quantised again to {self.scheme}, are off by {self.error:.2%} of their size"
        if self.of_change is not None and self.worst is not None:
            name, share = self.worst
            line += f", which is {self.of_change:.0%} of the adapter's change (at most {share:.0%}, at {name})"
        return line


def dequantised(surgery: Surgery) -> list[tuple[Adapted, nn.Module]]:
    """The modules whose weight was quantised until the merge, and their bases from before it."""
    return [(module, base) for module, base in surgery.in_full if bits(base) is not None]


@torch.no_grad()
def requantise(surgery: Surgery) -> Requantisation:
    """Puts quantised weights in the place of those that a merge has dequantised, until `unmerge`."""
    originals = {id(module): base for module, base in dequantised(surgery)}
    squares: dict[str, tuple[float, float, float]] = {}  # name -> squared size of: merged weight, its error, the change
    for name, module in surgery.model.named_modules():
        if id(module) in originals:
            base, W = originals[id(module)], weight_of(module.base)
            module.base = requantised(base, W)
            parts = (W, weight_of(module.base) - W, W - weight_of(base))
            squares[name] = tuple(part.double().square().sum().item() for part in parts)
    merged, error, change = (sum(column) for column in zip(*squares.values(), strict=True))
    shares = {name: (e / c) ** 0.5 for name, (_, e, c) in squares.items() if c > 0}
    return Requantisation(
        scheme=str(scheme_of(surgery.model)),
        weights=len(squares),
        error=(error / merged) ** 0.5,
        of_change=(error / change) ** 0.5 if change > 0 else None,
        worst=max(shares.items(), key=lambda pair: pair[1]) if shares else None,
    )


def _warn_of_dequantised(bases: Sequence[nn.Module]) -> None:
    if not bases:
        return
    size = sum(full.weight.numel() * full.weight.element_size() for full in bases)
    warnings.warn(
        f"a sum cannot be written into a quantised weight: {len(bases)} weights are dequantised ({size / 1e6:,.1f} MB) until "
        f"unmerge() or detach(), and nothing is quantised again",
        stacklevel=4,
    )
