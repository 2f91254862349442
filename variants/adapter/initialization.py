"""Where A and B start.  Every tensor of every member has a generator of its own, so that no start depends on another."""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

Start = Callable[[int, int, Generator], Tensor]  # (rank, fan in, random) -> (rank, fan in)


def generator(seed: int, *names: str) -> Generator:
    """A generator keyed by (seed, names); always on the CPU, so that a start is the same on every device."""
    digest = hashlib.sha256("/".join([str(seed), *names]).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def kaiming(rank: int, fan_in: int, random: Generator) -> Tensor:
    """U(-1/sqrt(in), 1/sqrt(in)), (rank, in): Kaiming uniform with a = sqrt(5), LoRA's release and PEFT."""
    return torch.empty(rank, fan_in).uniform_(-1, 1, generator=random) / math.sqrt(fan_in)


def gaussian(rank: int, fan_in: int, random: Generator) -> Tensor:
    """N(0, 1/rank^2), (rank, in): PEFT's "gaussian" (LoRA sec. 4.1 says only "random Gaussian")."""
    return torch.empty(rank, fan_in).normal_(generator=random) / rank


def triplet(rank: int, fan_in: int, random: Generator) -> Tensor:
    """N(0, 0.02^2), (rank, in): the release of AdaLoRA, for P and Q alike."""
    return torch.empty(rank, fan_in).normal_(generator=random) * 0.02


def head(shape: torch.Size, random: Generator) -> Tensor:
    """N(0, 0.02^2): the start of a task head in BERT and its relatives (config.initializer_range)."""
    return torch.empty(shape).normal_(generator=random) * 0.02


STARTS: dict[str, Start] = {"kaiming": kaiming, "gaussian": gaussian, "triplet": triplet}
