"""What a kind of frozen weight says of the modules that hold it."""

from collections.abc import Callable, Iterable
from typing import ClassVar, Literal, Protocol

import torch
from rankwise.variants.adapter.draws import Draw
from rankwise.variants.adapter.initialization import Start
from rankwise.variants.adapter.shards import whole
from torch import Generator, Tensor, nn

TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # types of a weight that products can be taken with


class Site(Protocol):
    """What a kind asks of a low-rank site (`lowrank.site.LowRank`)."""

    name: str
    draw: Draw
    dropout: float
    training: bool

    def operands(self) -> tuple[Tensor, Tensor, Tensor]: ...
    def rows(self, x: Tensor) -> Tensor: ...
    def add_update(self, y: Tensor, x: Tensor) -> Tensor: ...


class Kind:
    """One kind of weight.  It has no state: each function is given the module."""

    is_linear: ClassVar[bool] = True  # what "all-linear" means, and inputs are measured at
    factors: ClassVar[Literal["linear", "embedding"]] = "linear"  # PEFT's names of A and B: files.peft.names.FACTORS
    fan_in_fan_out: ClassVar[bool] = False  # PEFT's word for a linear that is stored (I, O)
    is_part: ClassVar[bool] = False  # the weight is a part of a parameter; `in_full` gives the module one of its own

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is of this kind."""
        raise NotImplementedError

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        """The shape in which such a module should store its weight."""
        raise NotImplementedError

    def fault(self, module: nn.Module) -> str | None:
        """Why such a module cannot be adapted, and the remedy, as the end of a sentence "it is a ..."; None where it can."""
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or isinstance(weight, nn.parameter.UninitializedTensorMixin):
            return "without a weight to adapt: choose other targets, or make the weight first"
        if weight.dtype not in TRAINABLE or tuple(weight.shape) != self.shape(module):
            types = ", ".join(str(dtype).removeprefix("torch.") for dtype in TRAINABLE)
            return (
                f"whose weight is {tuple(weight.shape)} of {weight.dtype}, and only {self.shape(module)} of {types} can be "
                f"adapted: load the model without quantisation or with bitsandbytes', or choose other targets"
            )
        return None

    def matrix(self, weight: Tensor) -> Tensor:
        """(O, I): a tensor of the weight's shape."""
        return weight

    def stored(self, matrix: Tensor, module: nn.Module) -> Tensor:
        """The inverse: a matrix (O, I) the way the module stores it."""
        return matrix

    def weight(self, module: nn.Module) -> Tensor:
        """(O, I): the module's weight as a matrix."""
        return self.matrix(whole(module.weight))

    def size(self, module: nn.Module) -> tuple[int, int]:
        """(O, I), without the weight's values."""
        out_features, in_features = self.matrix(module.weight).shape
        return out_features, in_features

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The type of that matrix."""
        return module.weight.dtype

    def row_blocks(self, module: nn.Module) -> Iterable[Tensor]:
        """That matrix as blocks of rows, of which one at a time is in the trained type."""
        weight = self.weight(module)
        return (weight,) if weight.dtype == trained_dtype(weight.dtype) else weight.split(1024)

    def squared_row_norms(self, module: nn.Module) -> Tensor:
        """(O,): |W|^2 of each row, in the trained type."""
        weight = self.weight(module).detach()
        return weight.to(trained_dtype(weight.dtype)).square().sum(1)

    def in_full(self, module: nn.Module) -> nn.Module | None:
        """The module with a floating-point weight of its own, for a member to be merged into; None where it is so already."""
        return None

    def prepare(self, module: nn.Module, dtype: torch.dtype) -> Callable[[], None] | None:
        """What else attaching changes in each such module of the model, adapted or not; returns what undoes it.

        dtype: the model's own.
        """

    def start(self, draw: Start, module: nn.Module, rank: int, random: Generator) -> tuple[Tensor, Tensor]:
        """Where LoRA's A (R, I) and B (O, R) start: A at a draw, B at zero."""
        out_features, in_features = self.size(module)
        return draw(rank, in_features, random), torch.zeros(out_features, rank)

    def adapted(self, site: Site, base: nn.Module, x: Tensor) -> Tensor:
        """The frozen module's output and the update of each member's rows.  x (K*N, ..., I) -> (K*N, ..., O) for a linear."""
        rows = site.rows(x)
        y = base_output(base, rows)
        return site.draw.rows.as_input(site.add_update(y, rows).to(y.dtype), x)

    def factor_shapes(self, module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes in which PEFT stores A and B; ours, (R, I) and (O, R), are the same with the last axes flattened."""
        out_features, in_features = self.size(module)
        return (rank, in_features), (out_features, rank)

    def out_axis(self, module: nn.Module) -> int:
        """The axis of the module's output along which its O outputs lie, from the end."""
        return -1

    def magnitude_shape(self, module: nn.Module) -> tuple[int, ...]:
        """The shape in which PEFT stores DoRA's magnitudes; ours, (O,), is the same flattened."""
        return (self.size(module)[0],)

    def unlike_peft(self, module: nn.Module) -> str | None:
        """Why PEFT's forward pass with the same factors is another one; None where it is the same."""
        return None


def trained_dtype(base: torch.dtype) -> torch.dtype:
    """Trained tensors are fp32 over a 16-bit base, else of the base's own type."""
    return torch.float32 if base in (torch.float16, torch.bfloat16) else base


def base_output(base: nn.Module, rows: Tensor) -> Tensor:
    """The frozen module's output, to be changed in place: a copy where a hook of somebody's may have kept it."""
    y = base(rows)
    return y.clone() if base._forward_hooks else y
