"""Slow, plain oracles of the two designs: every permutation one by one."""

from itertools import product

import numpy as np


def statistic(va, ya, vr, yr):
    return ya[va.mean(1).argmax()].mean() - yr[vr.mean(1).argmax()].mean()


def slow_whole_curve(va, ya, vr, yr):
    """Every subset of seeds, one by one: curves are swapped whole and both rates chosen again."""
    seen, count, n = abs(statistic(va, ya, vr, yr)), 0, va.shape[1]
    for flips in product([False, True], repeat=n):
        f = np.array(flips)
        swapped = statistic(np.where(f, vr, va), np.where(f, yr, ya), np.where(f, va, vr), np.where(f, ya, yr))
        count += abs(swapped) >= seen - 1e-9
    return count / 2**n


def slow_shared_rate(va, ya, vr, yr):
    k = (va + vr).mean(1).argmax()
    differences = ya[k] - yr[k]
    sums = [abs((np.array(signs) * differences).sum()) for signs in product([1, -1], repeat=len(differences))]
    return np.mean([total >= abs(differences.sum()) - 1e-9 for total in sums])
