"""The kinds of frozen weight that a site can stand at.

Whatever a module stores, a kind shows it as one matrix W (O, I), and a low-rank change of it is B A with A (R, I) and B (O, R):

    nn.Linear      W (O, I) as stored
    Conv1D         GPT-2's: stored (I, O)
    nn.Embedding   stored (I, O): I entries of the vocabulary, O features.  A column of A is looked up for each token
    nn.Conv1d      stored (O, C, w), I = C*w.  A is a convolution as the base's, B one of size 1
    nn.Conv2d      stored (O, C, h, w), I = C*h*w.  The same, B of size 1 x 1

Legend: K member, N rows or tokens, I in, O out, R rank slots.

To add a kind: write a class here that says how it is recognised (`holds`, `shape`), its matrix (`matrix`, `stored`), its
forward pass with K members (`adapted`) and, where they differ from a linear's, what is refused (`fault`), where A and B
start (`start`) and how PEFT stores the factors (`factors`, `factor_shapes`); then name it in KINDS.  No other file changes.
"""

from collections.abc import Callable
from typing import ClassVar, Literal, Protocol

import torch
from rankwise.variants.adapter.draws import Draw, drop
from rankwise.variants.adapter.initialization import Start
from rankwise.variants.adapter.step import CannotMerge
from rankwise.variants.adapter.surgery import Adapted
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

    is_linear: ClassVar[bool] = True  # what "all-linear" means, magnitudes can stand around, and inputs are measured at
    factors: ClassVar[Literal["linear", "embedding"]] = "linear"  # PEFT's names of A and B: files.peft.names.FACTORS
    fan_in_fan_out: ClassVar[bool] = False  # PEFT's word for a linear that is stored (I, O)

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
                f"adapted: load the model without quantisation, or choose other targets"
            )
        return None

    def matrix(self, weight: Tensor) -> Tensor:
        """(O, I): a tensor of the weight's shape."""
        return weight

    def stored(self, matrix: Tensor, module: nn.Module) -> Tensor:
        """The inverse: a matrix (O, I) the way the module stores it."""
        return matrix

    def squared_row_norms(self, module: nn.Module) -> Tensor:
        """(O,): |W|^2 of each row, in the trained type."""
        weight = self.matrix(module.weight).detach()
        return weight.to(trained_dtype(weight)).square().sum(1)

    def start(self, draw: Start, module: nn.Module, rank: int, random: Generator) -> tuple[Tensor, Tensor]:
        """Where LoRA's A (R, I) and B (O, R) start: A at a draw, B at zero."""
        out_features, in_features = weight_of(module).shape
        return draw(rank, in_features, random), torch.zeros(out_features, rank)

    def adapted(self, site: Site, base: nn.Module, x: Tensor) -> Tensor:
        """The frozen module's output and the update of each member's rows.  x (K*N, ..., I) -> (K*N, ..., O) for a linear."""
        rows = site.rows(x)
        y = base_output(base, rows)
        return site.draw.rows.as_input(site.add_update(y, rows).to(y.dtype), x)

    def factor_shapes(self, module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes in which PEFT stores A and B; ours, (R, I) and (O, R), are the same with the last axes flattened."""
        out_features, in_features = weight_of(module).shape
        return (rank, in_features), (out_features, rank)

    def unlike_peft(self, module: nn.Module) -> str | None:
        """Why PEFT's forward pass with the same factors is another one; None where it is the same."""
        return None


class Linear(Kind):
    """nn.Linear."""

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return module.out_features, module.in_features


class Conv1D(Kind):
    """GPT-2's Conv1D, a linear whose weight is stored (I, O)."""

    fan_in_fan_out = True

    def holds(self, module: nn.Module) -> bool:
        # By name, not by class: variants does not import transformers.
        return type(module).__name__.endswith("Conv1D") and hasattr(module, "nf")

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return module.weight.shape[0], module.nf

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def stored(self, matrix: Tensor, module: nn.Module) -> Tensor:
        return matrix.mT


class Embedding(Kind):
    """nn.Embedding.  As in PEFT no dropout acts here, and a padding token gives A no gradient."""

    is_linear = False
    factors = "embedding"

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return module.num_embeddings, module.embedding_dim

    def fault(self, module: nn.Module) -> str | None:
        if type(module).forward is not nn.Embedding.forward:
            return "which has a forward pass of its own, and only nn.Embedding's is known: choose other targets"
        if module.max_norm is not None:
            return f"with max_norm = {module.max_norm}, which changes the frozen weight: make it None, or choose other targets"
        return super().fault(module)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.mT

    def stored(self, matrix: Tensor, module: nn.Module) -> Tensor:
        return matrix.mT

    def start(self, draw: Start, module: nn.Module, rank: int, random: Generator) -> tuple[Tensor, Tensor]:
        """PEFT's: A at zero and B at N(0, 1).  A's draw is too small here: it falls with the size of the vocabulary."""
        out_features, in_features = weight_of(module).shape
        return torch.zeros(rank, in_features), torch.empty(out_features, rank).normal_(generator=random)

    def adapted(self, site: Site, base: nn.Module, x: Tensor) -> Tensor:
        owners = site.draw.rows
        owners.check(site.name, x)
        y, tokens = base(x), x[..., None]
        ids = owners.by_member(tokens).mT  # (K, 1, N)
        with torch.autocast(y.device.type, enabled=False):
            A, B, c = site.operands()
            z = A.gather(2, ids.expand(-1, A.shape[1], -1))  # (K, R, N)
            if base.padding_idx is not None:
                z = torch.where(ids == base.padding_idx, z.detach(), z)
            update = torch.bmm((z * c[:, :, None]).mT, B.mT)  # (K, N, O)
        return (y + owners.as_input(update, tokens)).to(y.dtype)


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


KINDS: tuple[Kind, ...] = (Linear(), Conv1D(), Embedding(), Conv1d(), Conv2d())


def find_kind(module: nn.Module) -> Kind | None:
    """The kind of the module's weight, adapted or not; None where it is no known one."""
    module = module.base if isinstance(module, Adapted) else module
    return next((kind for kind in KINDS if kind.holds(module)), None)


def kind_of(module: nn.Module) -> Kind:
    """
    Raises:
        ValueError: no known kind.
    """
    kind = find_kind(module)
    if kind is None:
        raise ValueError(f"a {type(module).__name__} has no weight of a known kind ({known_kinds()}): choose other targets")
    return kind


def known_kinds() -> str:
    """The kinds by name, for a message."""
    return ", ".join(type(kind).__name__ for kind in KINDS)


def check_adaptable(name: str, module: nn.Module) -> None:
    """
    Raises:
        ValueError: no site can stand at the module of that name: no known kind of weight, or one that is quantised.
    """
    fault = kind_of(module).fault(module)
    if fault is not None:
        raise ValueError(f'"{name}" is a {type(module).__name__} {fault}')


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, or GPT-2's Conv1D."""
    kind = find_kind(module)
    return kind is not None and kind.is_linear


def weight_of(base: nn.Module) -> Tensor:
    """The weight as a matrix (O, I), whichever way the module stores it."""
    return kind_of(base).matrix(base.weight)


def as_matrix(module: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor of the shape of the module's weight as a matrix (O, I); as it is where the module is of no known kind."""
    kind = find_kind(module)
    return tensor if kind is None else kind.matrix(tensor)


def as_stored(base: nn.Module, weight: Tensor) -> Tensor:
    """A weight (O, I) the way the module stores it, to be written into the module.

    Raises:
        CannotMerge: the module computes its weight out of other parameters.
    """
    if "weight" not in base._parameters:
        raise CannotMerge(
            f"the weight of a {type(base).__name__} is computed from other parameters (a parametrisation), so nothing can be "
            f'merged into it: call torch.nn.utils.parametrize.remove_parametrizations(module, "weight") before attach'
        )
    return kind_of(base).stored(weight, base)


def module_in(module: nn.Module) -> int:
    """I."""
    return weight_of(module).shape[1]


def module_out(module: nn.Module) -> int:
    """O."""
    return weight_of(module).shape[0]


def trained_dtype(base: Tensor) -> torch.dtype:
    """Trained tensors are fp32 over a 16-bit base, else of the base's own type."""
    return torch.float32 if base.dtype in (torch.float16, torch.bfloat16) else base.dtype


def base_output(base: nn.Module, rows: Tensor) -> Tensor:
    """The frozen module's output, to be changed in place: a copy where a hook of somebody's may have kept it."""
    y = base(rows)
    return y.clone() if base._forward_hooks else y
