"""Convolutions, whose update is two convolutions."""

from collections.abc import Callable
from typing import ClassVar

from rankwise.variants.adapter.draws import drop
from rankwise.variants.adapter.kinds.interface import Kind, Site
from torch import Tensor, nn


class Convolution(Kind):
    """A convolution of one group, of any number of dimensions.

    groups > 1 is refused: there PEFT's A mixes the channels of all groups, so that its update is no change of the weight and
    cannot be merged.
    """

    is_linear = False
    module: ClassVar[type[nn.Module]]
    convolve: ClassVar[Callable[..., Tensor]]  # the function that the module computes

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, self.module)

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return module.out_channels, module.in_channels // module.groups, *module.kernel_size

    def fault(self, module: nn.Module) -> str | None:
        if type(module).forward is not self.module.forward:
            known = f"nn.{self.module.__name__}"
            return f"which has a forward pass of its own, and only {known}'s is known: choose other targets"
        if module.groups != 1:
            return f"with groups = {module.groups}, and only groups = 1 can be adapted: choose other targets"
        if module.padding_mode != "zeros":
            return f'with padding_mode = "{module.padding_mode}", and only "zeros" can be adapted: choose other targets'
        return super().fault(module)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def stored(self, matrix: Tensor, module: nn.Module) -> Tensor:
        return matrix.reshape(module.weight.shape)

    def adapted(self, site: Site, base: nn.Module, x: Tensor) -> Tensor:
        """Members are the groups of a convolution: x (K*N, C, H, W) goes in as (N, K*C, H, W); of nn.Conv1d without the H."""
        ones = (1,) * len(base.kernel_size)
        inputs = x if x.dim() == len(ones) + 2 else x[None]
        batch, size = x.shape[: -len(ones) - 1], inputs.shape[1:]
        owners, y = site.draw.rows, base(inputs)
        owners.check(site.name, inputs)
        A, B, c = site.operands()
        K, R = c.shape
        if not R:
            return y.view(*batch, *y.shape[1:])
        rate = site.dropout if site.training else 0.0
        values = drop(inputs.flatten(1).to(A.dtype), rate, site.draw, site.name)  # (K*N, C*H*W)
        packed = owners.by_member(values).transpose(0, 1).reshape(-1, K * size[0], *size[1:])
        kernel = A.reshape(K * R, size[0], *base.kernel_size)
        z = self.convolve(packed, kernel, None, base.stride, base.padding, base.dilation, groups=K)  # (N, K*R, h, w)
        z = z * c.reshape(-1, *ones)
        update = self.convolve(z, B.reshape(-1, R, *ones), groups=K)  # (N, K*O, h, w)
        update = owners.as_input(update.reshape(len(update), K, -1).transpose(0, 1), values)  # (K*N, O*h*w)
        return (y + update.view(y.shape)).to(y.dtype).view(*batch, *y.shape[1:])

    def factor_shapes(self, module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, *module.weight.shape[1:]), (module.out_channels, rank, *(1 for _ in module.kernel_size))

    def out_axis(self, module: nn.Module) -> int:
        return -1 - len(module.kernel_size)

    def magnitude_shape(self, module: nn.Module) -> tuple[int, ...]:
        return 1, module.out_channels, *(1 for _ in module.kernel_size)

    def unlike_peft(self, module: nn.Module) -> str | None:
        if any(step != 1 for step in module.dilation):
            return f"PEFT's A has no dilation where the module has {module.dilation}"
        return None


class Conv1d(Convolution):
    """nn.Conv1d of one group."""

    module, convolve = nn.Conv1d, staticmethod(nn.functional.conv1d)


class Conv2d(Convolution):
    """nn.Conv2d of one group."""

    module, convolve = nn.Conv2d, staticmethod(nn.functional.conv2d)
