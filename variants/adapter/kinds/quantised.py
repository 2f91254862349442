"""Linears whose weight bitsandbytes holds in 4 or in 8 bits: frozen, as QLoRA has them, and dequantised where W is needed.

    Linear4bit    codes of 4 bits (nf4, fp4), two in a byte, and a scale for each block of 64 elements: W = level[code] * scale.
                  Double quantization: these scales are codes of 8 bits, with a scale for each block of 256 and one offset.
    Linear8bitLt  codes of 8 bits and a scale for each row: W = code * scale / 127.

Dettmers et al. 2023 (QLoRA), sec. 3; Dettmers et al. 2022 (LLM.int8()), sec. 2.  transformers makes them of a model's nn.Linear
and Conv1D, both as W (O, I); an nn.Embedding stays one.

W is dequantised for a product and again for its backward pass, and never kept: outputs and gradients are bit for bit those
over nn.Linear with the dequantised W.

Departure: bitsandbytes' own evaluation is another function than its training.  It rounds the activations to 8 bits (int8), or
scales and activations to bf16, and leaves W so (4 bits, on a CPU with AVX512-BF16).  With an adapter in the model every such
module, adapted or not, computes x W^T in evaluation as in training (`compute_exactly`).
"""

import copy
import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rankwise.variants.adapter.kinds.interface import Kind, trained_dtype
from rankwise.variants.adapter.kinds.scheme import Scheme
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 2**22  # elements of the block of rows that norms are taken of at once
SHOWN_AS = "_rankwise_shown_as"  # attribute of a module while an adapter is attached: the model's type, in which W is shown


class Quantised(Kind):
    """A linear of bitsandbytes."""

    def holds(self, module: nn.Module) -> bool:
        return bits(module) is not None

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return self.size(module)

    def fault(self, module: nn.Module) -> str | None:
        weight, is_4bit = module.weight, bits(module) == 4
        if weight.is_meta:
            return "whose weight is not in memory (offloaded): load the model without offloading"
        if is_4bit and quant_state(module) is None:
            return "whose weight is not quantised yet: move the model to its device first, which is when bitsandbytes does it"
        if is_4bit and weight.dtype != torch.uint8:
            return f"whose 4 bits are stored as {weight.dtype}: load the model with bnb_4bit_quant_storage = torch.uint8"
        if not is_4bit and weight.dtype != torch.int8:
            return f"whose weight is still {weight.dtype}: load the model with llm_int8_has_fp16_weight = False"
        return None

    def weight(self, module: nn.Module) -> Tensor:
        return dequantised(module)

    def size(self, module: nn.Module) -> tuple[int, int]:
        return module.out_features, module.in_features

    def dtype(self, module: nn.Module) -> torch.dtype:
        own = quant_state(module).dtype if bits(module) == 4 else torch.float32
        return vars(module).get(SHOWN_AS, own)

    def row_blocks(self, module: nn.Module) -> Iterable[Tensor]:
        rows = max(1, BLOCK // module.in_features)
        if bits(module) == 4 and module.in_features % quant_state(module).blocksize:  # rows share scales: not apart
            rows = module.out_features
        for start in range(0, module.out_features, rows):
            block = dequantised(module, start, min(start + rows, module.out_features))
            yield block.to(trained_dtype(block.dtype))

    def squared_row_norms(self, module: nn.Module) -> Tensor:
        return torch.cat([block.square().sum(1) for block in self.row_blocks(module)])

    def in_full(self, module: nn.Module) -> "Dequantised":
        return Dequantised(module)

    def prepare(self, module: nn.Module, dtype: torch.dtype) -> Callable[[], None] | None:
        if self.fault(module) is not None:  # it is no target, and stays as it is
            return None
        if bits(module) == 4:
            warn_if_misread(module)
        undo = compute_exactly(module)
        setattr(module, SHOWN_AS, dtype)

        def put_back() -> None:
            delattr(module, SHOWN_AS)
            if undo is not None:
                undo()

        return put_back


# -- the weight --------------------------------------------------------------------------------------------------------


def bits(module: nn.Module) -> int | None:
    """4 or 8 for a linear of bitsandbytes; None for any other module."""
    if not isinstance(module, nn.Linear):
        return None
    # By name, not by class: bitsandbytes is an extra.
    names = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.partition(".")[0] == "bitsandbytes"}
    return 4 if "Linear4bit" in names else 8 if "Linear8bitLt" in names else None


def quant_state(module: nn.Module) -> Any:
    """bitsandbytes' QuantState of a Linear4bit; None where its weight is not quantised yet."""
    of_weight = getattr(module.weight, "quant_state", None)
    return module.quant_state if of_weight is None else of_weight


def row_scales(module: nn.Module) -> Tensor:
    """(O,) of a Linear8bitLt, whose first forward pass moves them from its weight to its state."""
    of_weight = getattr(module.weight, "SCB", None)
    return module.state.SCB if of_weight is None else of_weight


@torch.no_grad()
def dequantised(module: nn.Module, start: int = 0, stop: int | None = None) -> Tensor:
    """W (O, I), or its rows from start to stop: 4 bits in the type that they were made from, 8 bits in fp32; in the model's
    own type while an adapter is attached.

    Some rows of a Linear4bit can be had where each begins with a block of codes.
    """
    from bitsandbytes import functional

    stop = module.out_features if stop is None else stop
    if bits(module) == 8:
        W = functional.int8_vectorwise_dequant(module.weight.data[start:stop], row_scales(module)[start:stop])
    else:
        lay_out_plainly(module)
        codes, state, part = module.weight.data, quant_state(module), stop - start
        if part < module.out_features:
            first, last = start * module.in_features, stop * module.in_features
            codes = codes.view(-1, 1)[first // 2 : -(-last // 2)].contiguous()
            own, state = state, copy.copy(state)
            if own.nested:
                state.nested, state.absmax = False, functional.dequantize_blockwise(own.absmax, own.state2) + own.offset
            state.absmax = state.absmax[first // own.blocksize : -(-last // own.blocksize)].float().contiguous()
            state.shape = torch.Size((part, module.in_features))
        W = functional.dequantize_4bit(codes, state)
    return W.to(vars(module).get(SHOWN_AS, W.dtype))


@torch.no_grad()
def lay_out_plainly(module: nn.Module) -> None:
    """Puts a Linear4bit's codes back in their order, which an evaluation on a CPU with AVX512-BF16 has changed.

    The scales stay as that has left them: in bf16, and no longer quantised themselves.  Nothing else can read the other order,
    and bitsandbytes trains no adapter through it.
    """
    packed = quant_state(module)
    if not getattr(packed, "packing_format_for_cpu", False):
        return
    from bitsandbytes import functional

    state = copy.copy(packed)
    state.original_nested = False  # else the scales would be quantised anew
    codes, state = functional._convert_weight_packed_for_cpu_inverse(module.weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    module.weight.data = codes
    module.weight.quant_state = module.quant_state = state


def warn_if_misread(module: nn.Module) -> None:
    """Warns of a Linear4bit that bitsandbytes dequantises wrongly: what it computes with is far from what was quantised."""
    state = quant_state(module)
    if module.weight.device.type == "cpu" and is_misread(module.in_features, state.blocksize, state.quant_type):
        warnings.warn(
            f"bitsandbytes dequantises {state.quant_type} weights of {module.in_features} inputs wrongly on this processor, "
            f"which takes multiples of {state.blocksize}: the model, and what is trained over it, is another than elsewhere.  "
            f"Load it in 8 bits, or leave such modules out (llm_int8_skip_modules)",
            stacklevel=2,
        )


@functools.cache
def is_misread(in_features: int, block: int, name: str) -> bool:
    """Whether rows of that width come out otherwise than the same codes as one long row (bitsandbytes 0.50.2 with AVX512)."""
    from bitsandbytes import functional

    if in_features % block == 0:
        return False
    W = torch.randn(block, in_features, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 2, block)[:, None]
    codes, state = functional.quantize_4bit(W, blocksize=block, quant_type=name)
    found = functional.dequantize_4bit(codes, state)
    state.shape = torch.Size((1, W.numel()))
    return not torch.equal(found, functional.dequantize_4bit(codes, state).view(W.shape))


# -- the forward pass --------------------------------------------------------------------------------------------------


def compute_exactly(module: nn.Module) -> Callable[[], None] | None:
    """Has a linear of bitsandbytes compute x W^T + b, in evaluation too; what undoes it, or None where it does so already."""
    place = "_old_forward" if "_old_forward" in vars(module) else "forward"  # the former where accelerate has wrapped it
    own = vars(module).get(place)
    if getattr(own, "func", None) is product:
        return None
    setattr(module, place, functools.partial(product, module))

    def undo() -> None:
        delattr(module, place)
        if own is not None:
            setattr(module, place, own)

    return undo


def product(module: nn.Module, x: Tensor) -> Tensor:
    """x W^T + b in the type that nn.Linear would multiply in, or in the 16-bit type that the module is told to compute in."""
    dtype = product_type(module, x)
    with torch.autocast(x.device.type, enabled=False):
        W = dequantised(module).to(dtype)
        bias = None if module.bias is None else module.bias.to(dtype)
        with _dequantised_again(module, W):
            y = F.linear(x.to(dtype), W, bias)
    return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)


def product_type(module: nn.Module, x: Tensor) -> torch.dtype:
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    asked = getattr(module, "compute_dtype", None)
    return asked if x.dtype == torch.float32 and asked in (torch.float16, torch.bfloat16) else x.dtype


def _dequantised_again(module: nn.Module, W: Tensor) -> torch.autograd.graph.saved_tensors_hooks:
    """While W, or a view of it, is saved for a backward pass: where it came from is saved in its place."""
    memory, dtype = W.untyped_storage().data_ptr(), W.dtype  # not W itself, which the hook would keep

    def pack(saved: Tensor) -> Any:
        if saved.untyped_storage().data_ptr() != memory:
            return saved
        return saved.shape, saved.stride(), saved.storage_offset()

    def unpack(saved: Any) -> Tensor:
        return saved if isinstance(saved, Tensor) else dequantised(module).to(dtype).as_strided(*saved)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Dequantised(nn.Linear):
    """A linear of bitsandbytes with its W in full, into which a member can be merged.  The bias is the same tensor."""

    def __init__(self, module: nn.Module):
        super().__init__(module.in_features, module.out_features, bias=False, device="meta")
        self.weight = nn.Parameter(dequantised(module), requires_grad=False)
        self.bias = module.bias
        self.compute_dtype = getattr(module, "compute_dtype", None)
        self.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        dtype = product_type(self, x)
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)


def hide_from_trainer(model: nn.Module) -> Callable[[], None] | None:
    """Has a model of transformers not say that it is quantised, which its Trainer refuses to train but with PEFT's adapters."""
    if not vars(model).get("is_quantized"):
        return None
    model.is_quantized = False
    return functools.partial(setattr, model, "is_quantized", True)


# -- its form ----------------------------------------------------------------------------------------------------------


def scheme_of(model: nn.Module) -> Scheme | None:
    """How a model's linears are quantised, by the first that is; None where none is."""
    for module in model.modules():
        if bits(module) == 8:
            return Scheme("int8")
        if bits(module) == 4 and quant_state(module) is not None:
            return Scheme(module.weight.quant_type, bool(module.weight.compress_statistics))
    return None


@torch.no_grad()
def requantised(module: nn.Module, W: Tensor) -> nn.Module:
    """A linear of bitsandbytes of the same form that holds W (O, I) instead; the bias is the same tensor."""
    import bitsandbytes

    size, device = (module.in_features, module.out_features, module.bias is not None), module.weight.device
    if bits(module) == 8:
        new = bitsandbytes.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=module.state.threshold, device="meta")
        new.weight = bitsandbytes.nn.Int8Params(W.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
    else:
        old = module.weight
        form = {"compress_statistics": old.compress_statistics, "quant_type": old.quant_type}
        new = bitsandbytes.nn.Linear4bit(*size, compute_dtype=module.compute_dtype, device="meta", **form)
        weight = bitsandbytes.nn.Params4bit(W, requires_grad=False, blocksize=old.blocksize, module=new, **form)
        new.weight = weight.to(device)
    new.bias = module.bias
    if hasattr(module, "source_cls"):  # transformers' note of what the module was
        new.source_cls = module.source_cls
    return new.train(module.training)
