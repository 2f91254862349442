"""Every draw of the experiments, by key: what a seed decides, and what no seed may change.

A draw is keyed by (seed, purpose, major, minor), and nothing else enters it: no generator is kept, so that any step of any
epoch can be computed from nothing, and two draws with one key are the same draw.  The purposes are listed here, once.  The
draws of a method (dropout, initialization) are keyed in variants/ and never meet these.

Two numbers serve two purposes each, by an oversight that data hashes and committed results now depend on.  The two draws of
a pair order different lists of rows, so that neither repeats the other's choice.  A new purpose takes a new number
(tests/test_draws.py).
"""

from typing import NewType

import numpy as np

Purpose = NewType("Purpose", int)

SPLIT_SEED = 0  # of every part that we carve ourselves; a constant, so that everyone has the same parts

SHELF_ROWS = Purpose(1)  # (seed, 1, epoch, shelf): the order of a shelf's rows (lengths.py)
STEP_ORDER = Purpose(2)  # (0, 2, epoch): the order of an epoch's steps, the same for every seed (lengths.py)
CARVED_CLASS = Purpose(3)  # (0, 3, class): which rows of a class are kept out of training (`carve`)
SUBSET = Purpose(3)  # (0, 3): the part of a split that a study asks for; the key of the first class of `carve`
SARCASM_SPLIT = Purpose(4)  # (0, 4): the splits of the sarcasm headlines
KNOCKOUT_ROWS = Purpose(4)  # (0, 4): the rows of a knock-out
SQUAD_ARTICLES = Purpose(5)  # (0, 5): which articles of SQuAD are kept out of training
EPOCH_ROWS = Purpose(6)  # (seed, 6, epoch): the order of all rows, where no lengths are planned (kinds/interface.py)
AUGMENTATION = Purpose(7)  # (seed, 7, step, row): how a row's inputs are changed at a step (Kind.augment)
SOCIALIQA_SPLIT = Purpose(8)  # (0, 8): the splits of Social IQa

SHARED = {3, 4}  # the numbers that stand twice above, and must stay so: data hashes and committed results depend on them


def shuffled(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count) that depends on `key` (up to 4 whole numbers, 0 <= each < 2**64) and nothing else."""
    return np.argsort(numbers(count, *key), kind="stable")


def numbers(count: int, *key: int) -> np.ndarray:
    """(count,) uint64, each equally likely, that depend on `key`, as in `shuffled`, and nothing else.

    They are the raw draws of Philox, which numpy promises not to change (its Generator methods it may).
    """
    for number in key:
        if not 0 <= number < 2**64:
            raise ValueError(f"seed {number} must be a whole number from 0 to 2**64 - 1")
    seed, purpose, major, minor = (*key, 0, 0, 0)[:4]
    counter, keys = (np.array(numbers, dtype=np.uint64) for numbers in ([0, 0, minor, major], [seed, purpose]))
    return np.random.Philox(key=keys, counter=counter).random_raw(count)


def carve(labels: np.ndarray, size: int) -> np.ndarray:
    """(n,) bool, True for `size` rows that make a validation part: drawn once and for all, each class by its share."""
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * (size / len(labels))
    take = np.floor(exact).astype(np.int64)
    rest = np.argsort(-(exact - take), kind="stable")[: size - int(take.sum())]
    take[rest] += 1
    chosen = np.zeros(len(labels), dtype=bool)
    for index, (value, number) in enumerate(zip(classes, take, strict=True)):
        rows = np.flatnonzero(labels == value)
        chosen[rows[shuffled(len(rows), SPLIT_SEED, CARVED_CLASS, index)[:number]]] = True
    return chosen
