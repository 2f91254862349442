"""Dropout by a keyed, counter-based draw.

Whether an element is dropped depends only on (seed of the member, step, micro-batch, site, n-th call of that site in
this forward, position of the element within the member's rows).  So a draw does not depend on neighbours in a pack, on
what was drawn before, on a run having been cut off, or on a segment being computed again in the backward pass; and it is
the same on every device.  The bits are ((mixed position) xor key) times an odd second key, modulo 2**32, its upper half
folded into its lower, where mixed position is MurmurHash3's 32-bit finalizer of half the position; each such number gives
two 16-bit draws.  A rate is therefore rounded to a multiple of 2**-16, and the survivors' scale uses the rounded rate.
"""

import contextlib
import functools
import hashlib
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Draw:
    """Where a forward pass is: the key of every dropout draw, shared by all sites of one adapter."""

    def __init__(self, seeds: list[int]):
        self.seeds = list(seeds)
        self.step: int | None = None  # None: nobody drives the adapter, dropout is PyTorch's own
        self.micro_batch = 0
        self.calls: Counter[str] = Counter()
        self.rows: int | None = None  # rows of the model's input in this forward: members times batch

    def begin(self, step: int, micro_batch: int) -> None:
        self.step, self.micro_batch = step, micro_batch
        self.calls.clear()

    def keys(self, site: str) -> Tensor:
        """Two 32-bit keys for each member, (K, 2) int32, for the next call of `site` in this forward."""
        call = self.calls[site]
        self.calls[site] += 1
        where = f"/{self.step}/{self.micro_batch}/{site}/{call}"
        digests = b"".join(hashlib.blake2b(f"{seed}{where}".encode(), digest_size=8).digest() for seed in self.seeds)
        return torch.frombuffer(bytearray(digests), dtype=torch.int32).view(-1, 2)

    def apart(self, site: str, x: Tensor) -> Tensor:
        """The members' rows of an input of `site`, (K, N, features).

        Raises:
            ValueError: an input that is not the members' rows one after the other, where there are several members.
        """
        members = len(self.seeds)
        if members > 1 and self.rows is not None and x.shape[0] != self.rows:
            raise ValueError(
                f"{site} got an input of shape {tuple(x.shape)}, whose first axis is not the {self.rows} rows "
                f"of {members} members"
            )
        return x.reshape(members, -1, x.shape[-1])

    def recompute_contexts(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        """A `context_fn` for `torch.utils.checkpoint`: the second pass over a segment draws what the first drew."""
        before = self.calls.copy()

        @contextlib.contextmanager
        def again() -> Iterator[None]:
            now, self.calls = self.calls, before.copy()
            try:
                yield
            finally:
                self.calls = now

        return contextlib.nullcontext(), again()


def keep_mask(keys: Tensor, count: int, rate: float, device: torch.device) -> Tensor:
    """Which of `count` elements of each member survive, (K, count) bool.

    Args:
        keys: (K, 2) int32, from `Draw.keys`.
        rate: probability of being dropped, 0 <= rate < 1.
    """
    half = (count + 1) // 2
    keys = keys.to(device)
    bits = _mixed_positions(1 << max(half - 1, 1).bit_length(), device)[:half] ^ keys[:, :1]  # (K, half)
    bits *= keys[:, 1:] | 1
    fold = bits >> 16
    fold &= 0xFFFF  # int32 shifts copy the sign: this makes the shift logical
    bits ^= fold
    return bits.view(torch.int16)[:, :count] >= round(rate * 65536) - 32768


@functools.lru_cache(maxsize=4)
def _mixed_positions(count: int, device: torch.device) -> Tensor:
    """0 .. count-1 through MurmurHash3's 32-bit finalizer, (count,) int32: a fixed table, made once for a device."""
    bits = torch.arange(count, dtype=torch.int32, device=device)
    for shift, multiplier in ((16, -2048144789), (13, -1028477387), (16, 1)):  # 0x85EBCA6B, 0xC2B2AE35 as int32
        bits ^= (bits >> shift) & ((1 << (32 - shift)) - 1)
        bits *= multiplier
    return bits


class _Drop(torch.autograd.Function):
    """x * keep * scale, keeping one byte an element for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (x * keep).mul_(scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return (gradient * keep).mul_(ctx.scale), None, None


def drop(x: Tensor, rate: float, draw: Draw, site: str) -> Tensor:
    """`x`, whose rows are the members' rows one after the other, with elements dropped by the draw's key."""
    if rate == 0:
        return x
    if draw.step is None:
        return nn.functional.dropout(x, rate)
    members = len(draw.seeds)
    if x.shape[0] % members:
        raise ValueError(f"dropout at {site} got {x.shape[0]} rows, which is no multiple of {members} members")
    keep = keep_mask(draw.keys(site), x.numel() // members, rate, x.device).view(x.shape)
    return _Drop.apply(x, keep, 65536 / (65536 - round(rate * 65536)))


class KeyedDropout(nn.Module):
    """Stands in for a model's own dropout module while an adapter is attached."""

    # What attention code reads to pass on to a fused kernel.  Such a draw cannot be keyed, so it is off, for every
    # method alike; a model that calls the module gets `rate`.
    p = 0.0

    def __init__(self, rate: float, draw: Draw, site: str):
        super().__init__()
        self.rate, self.site = rate, site
        self._draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.rate, self._draw, self.site) if self.training else x

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
