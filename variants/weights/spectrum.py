"""What the singular values of an update dW say of its rank; no torch, so that a report can ask too.

Legend: sigma (R,) singular values, none negative, in any order.  An update that is zero has rank 0 by every measure.
"""

from collections.abc import Sequence

import numpy as np

ENERGY = 0.95  # share of |dW|_F^2 that `energy_rank` asks for


def effective_rank(sigma: Sequence[float] | np.ndarray) -> float:
    """exp(H(p)) with p = sigma / sum(sigma): the entropy rank of Roy & Vetterli 2007, sec. 2; R where all are equal."""
    sigma = np.asarray(sigma, np.float64)
    p = sigma[sigma > 0] / (sigma.sum() or 1.0)
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0


def stable_rank(sigma: Sequence[float] | np.ndarray) -> float:
    """|dW|_F^2 / |dW|_2^2 (Rudelson & Vershynin 2007): never above the rank, and hardly moved by small singular values."""
    sigma = np.asarray(sigma, np.float64)
    top = sigma.max(initial=0.0)
    return float(((sigma / top) ** 2).sum()) if top > 0 else 0.0


def energy_rank(sigma: Sequence[float] | np.ndarray, share: float = ENERGY) -> int:
    """How many of the greatest singular values hold that share of |dW|_F^2."""
    squares = np.sort(np.asarray(sigma, np.float64))[::-1] ** 2
    total = squares.sum()
    if not total > 0:
        return 0
    # The last sum may fall short of the total by rounding: at most all are needed.
    return min(int(np.searchsorted(squares.cumsum(), share * total * (1 - 1e-12)) + 1), int((squares > 0).sum()))
