"""What was tried for the CPU's floor and not kept: other attention kernels, packed weights.  Read with reports/bench/notes.md.

rankwise bench --tried
"""

import statistics
from collections.abc import Callable, Iterator

import torch
from rankwise.experiments.bench import timing
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

CPU = torch.device("cpu")
ATTENTION = ((32, 32), (512, 16), (32, 128))  # rows, tokens; 12 heads of 32, as MiniLM has
PRODUCTS = ((1024, 384, 384), (1024, 384, 1536), (1024, 1536, 384), (8192, 384, 1536), (64, 2048, 2048))


def lines() -> Iterator[str]:
    """A line for each kernel and size, as soon as it is measured."""
    yield from attention_kernels()
    yield from packed_weights()


def milliseconds(step: Callable[[], object], rounds: int = 15) -> float:
    for _ in range(3):
        step()
    return 1000 * statistics.median(timing.seconds(step, CPU) for _ in range(rounds))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, -1) @ v


def fused(kind: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v)

    return attention


def attention_kernels() -> Iterator[str]:
    kernels = {"flash": fused(SDPBackend.FLASH_ATTENTION), "math": fused(SDPBackend.MATH), "plain": plain}
    for rows, tokens in ATTENTION:
        states = [torch.randn(rows, tokens, 384, requires_grad=True) for _ in range(3)]
        g = torch.randn(rows, tokens, 384)

        def run(kernel: Callable, states: list[Tensor] = states, g: Tensor = g) -> None:
            q, k, v = (x.view(*x.shape[:2], 12, 32).transpose(1, 2) for x in states)
            out = kernel(q, k, v).transpose(1, 2).reshape(g.shape)
            if out.requires_grad:
                out.backward(g)
                for x in states:
                    x.grad = None

        for name, kernel in kernels.items():
            train = milliseconds(lambda kernel=kernel, run=run: run(kernel))
            with torch.no_grad():
                evaluation = milliseconds(lambda kernel=kernel, run=run: run(kernel))
            yield (
                f"attention {rows:4} x {tokens:3}  {name:6} forward and backward {train:6.2f} ms, forward {evaluation:6.2f} ms"
            )


def packed_weights() -> Iterator[str]:
    for rows, inner, columns in PRODUCTS:
        x, weight, bias = torch.randn(rows, inner), torch.randn(columns, inner), torch.randn(columns)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        kinds = {
            "linear (MKL)": lambda x=x, w=weight, b=bias: F.linear(x, w, b),
            "oneDNN, packed": lambda x=x, w=packed, b=bias: torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], ""),
        }
        for name, product in kinds.items():
            with torch.no_grad():
                rate = 2 * rows * inner * columns / milliseconds(product, 30) / 1e6
            yield f"product {rows:5} x {inner:4} x {columns:4}  {name:15} {rate:5.0f} GFLOP/s"
