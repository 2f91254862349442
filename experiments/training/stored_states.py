"""AdamW's averages kept small between steps: in 8 bits, or in the CPU's memory of a run on a GPU.

8 bits, block by block (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"): each member's tensor is cut into
blocks of 256 numbers; of each block its greatest size is kept in fp32, and of each number the nearest of the 256 codes of the
dynamic map.  1 + 4/256 bytes for each average of a parameter instead of 4.  As in bitsandbytes, tensors below 4096 numbers
stay as they are: they are small, and most sensitive.

Departures: of the second average its root is kept, whose numbers spread over half as many orders of magnitude, so that the
map's codes reach all of them: where a gradient's columns lie four apart, ten steps end 8 % off the exact ones, and 29 % off
with codes of the average itself (tests/test_stored_states.py).  A root above zero keeps a code above zero, so that no step is
divided by epsilon alone.  Codes are found by an exact search and not by bitsandbytes, whose CPU pass misses the nearest code
near zero.

What it costs (reports/bench/optimizer-states.md): LoRA of rank 32 on MiniLM ends 40 steps 2.2 % off the exact update, with
scores within 0.3 points, in a quarter of the memory; coding a million numbers takes about 0.05 s of one core.

The step is `MemberAdamW`'s: one parameter after the other is opened, stepped and stored again, so that no more than one tensor
is whole at a time.  What a member that is not taken has stored stays bit for bit, and no block spans two members.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from rankwise.experiments.training.optim import MemberAdamW
from rankwise.variants.adapter.step import Group
from torch import Tensor

BLOCK = 256  # numbers that share a scale, as in bitsandbytes' 8-bit Adam
LEAST = 4096  # numbers of a member's tensor that is kept in 8 bits: bitsandbytes' min_8bit_size

Parts = dict[str, Tensor]  # what is kept of an average, by name; each has the member axis first


class StoredAdamW(MemberAdamW):
    """AdamW whose averages are stored between steps as a subclass says.

    on_device: whether what is stored lies where the parameters do.
    """

    on_device: ClassVar[bool] = True

    def __init__(self, groups: Sequence[Group], learning_rates: Tensor, weight_decay: float = 0.01, **options: Any):
        super().__init__(groups, learning_rates, weight_decay, **options)
        self.stored: list[dict[str, Parts]] = [{} for _ in self.params]
        self.shapes = [p.shape for p in self.params]  # of what is stored
        for i in range(len(self.params)):
            self._close(i)

    @staticmethod
    def store(average: Tensor, is_second: bool) -> Parts:
        """What is kept of an average (K, ...); nothing that shares its memory."""
        raise NotImplementedError

    @staticmethod
    def whole(parts: Parts, shape: torch.Size, like: Tensor) -> Tensor:
        """The average again, of this shape, and of the type and device of `like`."""
        raise NotImplementedError

    def _open(self, i: int) -> None:
        for name, averages in (("first", self.first), ("second", self.second)):
            averages[i] = self.whole(self.stored[i][name], self.shapes[i], self.params[i])

    def _close(self, i: int, taken: Tensor | None = None) -> None:
        """Stores both averages of a parameter; those of members that are not `taken` stay as they were stored."""
        new = {"first": self.store(self.first[i], False), "second": self.store(self.second[i], True)}
        if taken is not None:
            for name, parts in new.items():
                for key, tensor in parts.items():
                    others = ~taken.to(tensor.device)
                    tensor[others] = self.stored[i][name][key][others]
        self.stored[i], self.shapes[i] = new, self.first[i].shape
        self.first[i] = self.second[i] = torch.empty(0)

    def _update(
        self,
        factor: float,
        whole: Sequence[tuple[Group, list[int]]],
        apart: Sequence[tuple[Group, list[int]]],
        taken: Tensor | None,
    ) -> None:
        for is_whole, parts in ((True, whole), (False, apart)):
            for group, indices in parts:
                for i in indices:
                    self._open(i)
                    one = [(group, [i])]
                    super()._update(factor, one if is_whole else [], [] if is_whole else one, taken)
                    self._close(i, taken)

    @torch.no_grad()
    def follow(self, changes: Sequence[tuple[Tensor, Callable[[Tensor], Tensor]]]) -> None:
        place = {id(p): i for i, p in enumerate(self.params)}
        for parameter, change in changes:
            i = place[id(parameter)]
            self._open(i)
            super().follow([(parameter, change)])
            self._close(i)

    def state(self) -> dict[str, Tensor]:
        named = {
            f"{name}.{i}.{key}": tensor
            for i, averages in enumerate(self.stored)
            for name, parts in averages.items()
            for key, tensor in parts.items()
        }
        named |= {f"born.{i}": t for i, t in enumerate(self.born) if t is not None}
        return {**named, "taken": self.taken}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for i, parameter in enumerate(self.params):
            for name in ("first", "second"):
                prefix, device = f"{name}.{i}.", next(iter(self.stored[i][name].values())).device
                found = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
                self.stored[i][name] = {key: tensor.to(device, copy=True) for key, tensor in found.items()}
            self.shapes[i] = parameter.shape
            born = state.get(f"born.{i}")
            self.born[i] = None if born is None else born.to(self.taken, copy=True)
        self.taken.copy_(state["taken"])


class EightBitAdamW(StoredAdamW):
    """AdamW whose averages are stored in 8 bits."""

    @staticmethod
    def store(average: Tensor, is_second: bool) -> Parts:
        if average[0].numel() < LEAST:
            return {"plain": average.clone()}
        codes, scales = encoded(average.sqrt() if is_second else average, signed=not is_second)
        return {"root_codes" if is_second else "codes": codes, "scales": scales}

    @staticmethod
    def whole(parts: Parts, shape: torch.Size, like: Tensor) -> Tensor:
        if "plain" in parts:
            return parts["plain"].clone()
        if "codes" in parts:
            return decoded(parts["codes"], parts["scales"], signed=True).view(shape).to(like)
        return decoded(parts["root_codes"], parts["scales"], signed=False).view(shape).to(like).square_()


class OffloadedAdamW(StoredAdamW):
    """AdamW whose averages lie in the CPU's memory, one parameter's at a time on the device."""

    on_device: ClassVar[bool] = False

    @staticmethod
    def store(average: Tensor, is_second: bool) -> Parts:
        return {"plain": average.to("cpu", copy=True)}

    @staticmethod
    def whole(parts: Parts, shape: torch.Size, like: Tensor) -> Tensor:
        return parts["plain"].to(like.device, copy=True)


STORED: dict[str, type[MemberAdamW]] = {"32-bit": MemberAdamW, "8-bit": EightBitAdamW, "offloaded": OffloadedAdamW}


def encoded(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (K, N) uint8 of values (K, ...), and the scale of each block, (K, blocks) fp32.

    Of numbers without a sign, one above zero has no code of zero.
    """
    members, numbers = len(values), values[0].numel()
    blocks = -(-numbers // BLOCK)
    padded = torch.zeros(members, blocks * BLOCK, dtype=torch.float32, device=values.device)
    padded[:, :numbers] = values.flatten(1)
    cut = padded.view(members, blocks, BLOCK)
    scales = cut.abs().amax(2)  # (K, blocks)
    codes = dynamic_map(signed, str(values.device))
    between = (codes[1:] + codes[:-1]) / 2
    found = torch.bucketize(cut / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None], between)
    if not signed:
        found = torch.where((cut > 0) & (found == 0), 1, found)
    return found.to(torch.uint8).view(members, -1)[:, :numbers].contiguous(), scales


def decoded(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The values (K, N) fp32 of `encoded`."""
    each = scales.repeat_interleave(BLOCK, dim=1)[:, : codes.shape[1]]
    return dynamic_map(signed, str(codes.device))[codes.int()] * each


@lru_cache
def dynamic_map(signed: bool, device: str) -> Tensor:
    """The 256 codes of the dynamic map, ascending in (-1, 1] or [0, 1]: for each decimal exponent from 0 to -6 twice as many
    fractions as for the one below it, the middles of equal parts of [0.1, 1] (Dettmers et al. 2022, sec. 2; Dettmers 2016)."""
    codes = [0.0, 1.0]
    for exponent in range(7):  # of ten: exponent - 6
        parts = 2**exponent if signed else 2 ** (exponent + 1)
        ends = torch.linspace(0.1, 1, parts + 1, dtype=torch.float64)
        sizes = ((ends[1:] + ends[:-1]) / 2 * 10.0 ** (exponent - 6)).tolist()
        codes += sizes + [-size for size in sizes] if signed else sizes
    return torch.tensor(sorted(codes), dtype=torch.float32, device=device)
