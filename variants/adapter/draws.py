"""Dropout by a keyed, counter-based draw.

Whether an element is dropped depends only on (seed of the member, step, micro-batch, site, n-th call of that site in
this forward, position of the element within the member's rows).  So a draw does not depend on neighbours in a pack, on
what was drawn before, on a run having been cut off, on a segment being computed again in the backward pass, or on which of
several processes has which of the member's rows (`Rows.before`); and it is the same on every device.  The draw is ((mixed
position) xor key) times an odd second key, modulo 2**32, where mixed position is MurmurHash3's 32-bit finalizer of the
position; an element survives where it is at least rate times 2**32.
"""

import contextlib
import functools
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rankwise.variants import native
from rankwise.variants.adapter.rows import Rows
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


class Draw:
    """Where a forward pass is: the key of every dropout draw, and the rows; shared by all sites of one adapter."""

    def __init__(self, seeds: list[int]):
        self.seeds = list(seeds)
        self.step: int | None = None  # None: nobody drives the adapter, dropout is PyTorch's own
        self.micro_batch = 0
        self.calls: Counter[str] = Counter()
        self.is_again = False  # a segment is computed once more in the backward pass
        self.rows = Rows(len(self.seeds))
        self.length: int | None = None  # tokens of a sequence, where only its first one is being computed

    @property
    def is_recomputing(self) -> bool:
        """Whether a segment is computed once more: under `recompute_contexts`, or by anyone in a backward pass."""
        return self.is_again or torch._C._current_graph_task_id() != -1

    def begin(self, step: int, micro_batch: int) -> None:
        self.step, self.micro_batch = step, micro_batch
        self.calls.clear()

    def keys(self, site: str) -> Tensor:
        """Two 32-bit keys for each member, (K, 2) int32, for the next call of `site` in this forward.

        In a backward pass it is the one call there was, which activation checkpointing computes again.

        Raises:
            ValueError: which call is computed again cannot be known.
        """
        call = self.calls[site]
        if self.is_recomputing and not self.is_again:  # by a door that restores no counter
            if call != 1:
                raise ValueError(
                    f"{site} was called {call} times since begin and is now computed again in the backward pass, so that its "
                    f"dropout is ambiguous: give torch.utils.checkpoint context_fn=adapter.draw.recompute_contexts and "
                    f"use_reentrant=False"
                )
            call = 0
        else:
            self.calls[site] += 1
        where = f"/{self.step}/{self.micro_batch}/{site}/{call}"
        digests = b"".join(hashlib.blake2b(f"{seed}{where}".encode(), digest_size=8).digest() for seed in self.seeds)
        return torch.frombuffer(bytearray(digests), dtype=torch.int32).view(-1, 2)

    def dropping(self, site: str, x: Tensor, rate: float, first: int = 0) -> "Dropping":
        """The draw of the next call of `site`, whose input is x (..., features). first: `Rows.first` of that input."""
        return Dropping(self.keys(site), rate, x.shape[-1] * (self.length or 1), first)

    @contextlib.contextmanager
    def first_tokens(self, length: int) -> Iterator[None]:
        """While only token 0 of each sequence of `length` tokens is computed: it keeps its draw from the full pass."""
        self.length = length
        try:
            yield
        finally:
            self.length = None

    def recompute_contexts(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """A `context_fn` for `torch.utils.checkpoint`: the second pass over a segment draws what the first drew."""
        before = self.calls.copy()

        @contextlib.contextmanager
        def again() -> Iterator[None]:
            now, self.calls, self.is_again = self.calls, before.copy(), True
            try:
                yield
            finally:
                self.calls, self.is_again = now, False

        return contextlib.nullcontext(), again()


class Recomputation:
    """Gives a model's own activation checkpointing the draw's `context_fn`, whoever turned it on and when.

    transformers keeps it as `_gradient_checkpointing_func`, a partial of `torch.utils.checkpoint.checkpoint`, on each module
    that has `gradient_checkpointing`.  A `context_fn` of the user's own stays.
    """

    def __init__(self, model: nn.Module, draw: Draw):
        self.draw = draw
        self.places = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self.given: list[tuple[nn.Module, Any, Any]] = []  # (module, its own function, ours)
        self.hook = model.register_forward_pre_hook(self._before) if self.places else None

    def _before(self, model: nn.Module, args: tuple) -> None:
        if not model.training:
            return
        for module in self.places:
            own = getattr(module, "_gradient_checkpointing_func", None)
            if (
                not module.gradient_checkpointing
                or getattr(own, "func", None) is not checkpoint
                or "context_fn" in own.keywords
            ):
                continue
            ours = functools.partial(own, use_reentrant=False, context_fn=self.draw.recompute_contexts)
            module._gradient_checkpointing_func = ours
            self.given.append((module, own, ours))

    def undo(self) -> None:
        if self.hook is not None:
            self.hook.remove()
        for module, own, ours in reversed(self.given):
            if module._gradient_checkpointing_func is ours:  # the user has not set another since
                module._gradient_checkpointing_func = own
        self.given.clear()


@dataclass(frozen=True)
class Dropping:
    """Which elements of an input (K, N, F) are dropped: the draw's keys, and how positions run over its rows.

    keys: (K, 2) int32, from `Draw.keys`.
    rate: probability of being dropped, 0 < rate < 1.
    pitch: positions from one row to the next; F, or more where only one row of several is computed.
    first: rows of each member before these, which other processes have.
    """

    keys: Tensor
    rate: float
    pitch: int
    first: int = 0

    @property
    def threshold(self) -> int:
        """The least draw that survives."""
        return min(round(self.rate * 2**32), 2**32 - 1) - 2**31

    def factor(self, x: Tensor) -> Tensor:
        """0, or 1/(1 - rate), for each element of x (K, N, F); in fp32 for 16-bit x, in which 1/0.9 is off by 0.15 %."""
        K, N, F = x.shape
        if x.dtype != torch.float64:
            # Made in integers as the bits of an fp32 number: on a CPU several times faster than to turn booleans into numbers.
            factor = self._drawn(N, F, x.device).ge_(self.threshold).mul_(_bits(1 / (1 - self.rate))).view(torch.float32)
        else:
            factor = (self._drawn(N, F, x.device) >= self.threshold).to(x.dtype) * (1 / (1 - self.rate))
        return factor.view(K, N, F)

    def _drawn(self, rows: int, features: int, device: torch.device) -> Tensor:
        return _drawn(self.keys, rows, features, self.pitch, device, self.first)


def _drawn(keys: Tensor, rows: int, features: int, pitch: int, device: torch.device, first: int = 0) -> Tensor:
    """(K, rows * features) int32, each equally likely: ((mixed position) xor first key) times the second key made odd."""
    if native.is_pretending():  # no value is asked for, and the table of positions must not be made of shapes
        return torch.empty(len(keys), rows * features, dtype=torch.int32, device=device)
    keys, count = keys.to(device), rows * pitch
    positions = _mixed_positions(1 << max(count - 1, 1).bit_length(), device, first * pitch)[:count]
    if pitch != features:
        positions = positions.view(rows, pitch)[:, :features].reshape(-1)
    return (positions ^ keys[:, :1]).mul_(keys[:, 1:] | 1)


def normal(like: Tensor, draw: Draw, site: str, of_tokens: bool = False, first: int = 0) -> Tensor:
    """Standard normal noise in the shape (K, N, F) and type of a tensor, by the same key as a dropout of that site.

    A number is sqrt(2) erfinv(u), u the upper 24 of its 32 bits as a number between -1 and 1, so that none is beyond 5.5.

    of_tokens: the rows are those of the model's input, of which only the first tokens may be computed.
    first: rows of each member before these, which other processes have.
    """
    if draw.step is None:
        return torch.randn_like(like)
    K, N, F = like.shape
    pitch = F * (draw.length or 1) if of_tokens else F
    bits = _drawn(draw.keys(site), N, F, pitch, like.device, first)
    wide = like.dtype if like.dtype == torch.float64 else torch.float32
    noise = bits.bitwise_right_shift_(8).to(wide).add_(0.5).mul_(2.0**-23).erfinv_().mul_(2**0.5)
    return noise.view(K, N, F).to(like.dtype)


def drop(x: Tensor, rate: float, draw: Draw, site: str, first: int | None = None) -> Tensor:
    """`x`, whose rows are the members' rows one after the other, with elements dropped by the draw's key.

    first: rows of each member before these, where x has no longer the shape by which `Rows.first` tells.
    """
    if rate == 0:
        return x
    if draw.step is None:
        return nn.functional.dropout(x, rate)
    draw.rows.check_divisible(f"dropout at {site}", x)
    rows = draw.rows.by_member(x)  # (K, N, F)
    dropping = draw.dropping(site, x, rate, draw.rows.first(x) if first is None else first)
    if native.usable(rows):
        return draw.rows.as_input(NativeDrop.apply(rows, dropping), x)
    return draw.rows.as_input((rows * dropping.factor(rows)).to(x.dtype), x)


class NativeDrop(torch.autograd.Function):
    """x (K, N, F) with elements dropped, in one pass; the backward pass draws again instead of keeping the factors."""

    @staticmethod
    def forward(ctx, x: Tensor, dropping: Dropping) -> Tensor:
        ctx.dropping = dropping
        return native.drop(x, dropping)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        return native.drop(g, ctx.dropping), None


@functools.lru_cache(maxsize=32)
def _mixed_positions(count: int, device: torch.device, start: int = 0) -> Tensor:
    """start .. start+count-1, modulo 2**32, through MurmurHash3's 32-bit finalizer, (count,) int32: made once for a device."""
    bits = torch.arange(count, dtype=torch.int32, device=device)
    if start:
        bits += (start + 2**31) % 2**32 - 2**31  # wraps
    for shift, multiplier in ((16, -2048144789), (13, -1028477387), (16, 1)):  # 0x85EBCA6B, 0xC2B2AE35 as int32
        bits ^= (bits >> shift) & ((1 << (32 - shift)) - 1)
        bits *= multiplier
    return bits


def _bits(number: float) -> int:
    """The bits of an fp32 number as int32."""
    return torch.tensor(number, dtype=torch.float32).view(torch.int32).item()


class KeyedDropout(nn.Module):
    """Stands in for a model's own dropout module while an adapter is attached."""

    # Fused attention kernels read `p`; their draw cannot be keyed, so it is 0, for every method alike.  A model that calls
    # the module gets `rate`.
    p = 0.0

    def __init__(self, rate: float, draw: Draw, site: str):
        super().__init__()
        self.rate, self.site = rate, site
        self._draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.rate, self._draw, self.site) if self.training else x

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
