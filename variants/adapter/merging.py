"""Members written into the model's own weights, and sites taken out of the way."""

import contextlib
from collections.abc import Iterator

import torch
from rankwise.variants.adapter.step import CannotMerge
from rankwise.variants.adapter.surgery import Adapted, Surgery, parameter_places
from torch import nn


def is_merged(model: nn.Module) -> bool:
    return any(module.merged for module in model.modules() if isinstance(module, Adapted))


@torch.no_grad()
def merge(surgery: Surgery, member: int) -> None:
    """Writes one member into the model's weights, all of them or, where one cannot be written, none.

    Raises:
        CannotMerge: a weight that is also used elsewhere (tied).
    """
    model = surgery.model
    adapted = [(n, m) for n, m in model.named_modules() if isinstance(m, Adapted)]
    places = parameter_places(model)
    news = []
    for name, module in adapted:
        for key, value in module.site.merged(module.base, member).items():
            old = getattr(module.base, key)
            shared = places[id(old)] - {f"{name}.base.{key}"}
            if shared:
                raise CannotMerge(f"{name}.{key} is tied to {sorted(shared)[0]}: merging would change that too; untie it first")
            news.append((old, value.to(old.dtype).contiguous()))
    try:
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
    try:
        for parameter, _ in changed:
            parameter.data = originals[id(parameter)]
        yield
    finally:
        for parameter, value in changed:
            parameter.data = value
