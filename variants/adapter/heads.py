"""The task head: K copies of each of its modules, trained whole."""

import torch
from rankwise.variants.adapter import initialization
from rankwise.variants.adapter.draws import Draw
from rankwise.variants.adapter.kinds.interface import trained_dtype
from rankwise.variants.adapter.linears import dtype_of, weight_of
from rankwise.variants.adapter.site import Site
from torch import Tensor, nn


class HeadSite(Site):
    """K copies of a linear or a layer norm of the task head, trained whole.

    weight (K, O, I) and bias (K, O) for a linear; weight and bias (K, O) for a layer norm.  Every member starts from the
    module's own values; with `fresh` a linear starts anew, each member's weight drawn by its seed, its bias zero.
    """

    def __init__(self, name: str, module: nn.Module, draw: Draw, fresh: bool = False):
        super().__init__()
        self.name, self._draw = name, draw
        self.is_norm = isinstance(module, nn.LayerNorm)
        seeds = draw.seeds
        dtype = trained_dtype(module.weight.dtype if self.is_norm else dtype_of(module))
        for key, value in module.named_parameters(recurse=False):
            value = weight_of(module) if key == "weight" and not self.is_norm else value
            if self.is_norm or not fresh:
                starts = [value.detach()] * len(seeds)
            elif key == "bias":
                starts = [torch.zeros(value.shape)] * len(seeds)
            else:
                starts = [initialization.head(value.shape, initialization.generator(s, "head", name)) for s in seeds]
            self.register_parameter(key, nn.Parameter(torch.stack([s.to(dtype) for s in starts])))

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # a head is small, and its outputs are ranked: in full precision
            return self._full_precision(base, x)

    def _full_precision(self, base: nn.Module, x: Tensor) -> Tensor:
        self._draw.rows.check(self.name, x)
        rows = self._draw.rows.by_member(x).to(self.weight.dtype)  # (K, N, I)
        bias = self._parameters.get("bias")
        if self.is_norm:
            normed = nn.functional.layer_norm(rows, base.normalized_shape, None, None, base.eps)
            y = normed * self.weight[:, None] + (0 if bias is None else bias[:, None])
        else:
            y = torch.bmm(rows, self.weight.mT)  # (K, N, O)
            y = y if bias is None else y + bias[:, None]
        return self._draw.rows.as_input(y, x)

    def merged(self, base: nn.Module, member: int) -> dict[str, Tensor]:
        return {key: value[member].clone() for key, value in self.named_parameters()}


def make_head(name: str, module: nn.Module, draw: Draw, fresh: bool = False) -> HeadSite:
    if not isinstance(module, nn.Linear | nn.LayerNorm):
        raise ValueError(
            f'head module "{name}" is a {type(module).__name__}: a head of nn.Linear and nn.LayerNorm can be trained; '
            f"give attach(head=[...]) the names of such modules"
        )
    return HeadSite(name, module, draw, fresh)


def leaves(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """(path, module) of each module at or under `name` that holds parameters itself."""
    try:
        root = model.get_submodule(name)
    except AttributeError:
        tops = [n for n, _ in model.named_children()]
        raise ValueError(f'head module "{name}" is not in {type(model).__name__}, which has {", ".join(tops)}') from None
    named = [(f"{name}.{n}" if n else name, m) for n, m in root.named_modules()]
    return [(n, m) for n, m in named if any(True for _ in m.parameters(recurse=False))]
