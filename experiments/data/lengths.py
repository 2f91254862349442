"""The plan of lengths: which rows of a split make each batch, and to how many tokens they are padded.

The rows, sorted by length, are cut into shelves of 8 batches.  The order of the steps over the shelves depends on the epoch
alone, so that the padded length of each step is the same for every seed, and members of other seeds are packed without
waste.  Which rows of a shelf come in which of its batches is drawn for each seed.  All draws are counter-based (draws.py):
any step of any epoch can be computed from nothing.
"""

import numpy as np
from rankwise.experiments.data import draws
from rankwise.experiments.data.encoded import IGNORED, Encoded

SHELF = 8  # batches of similar length that each seed shuffles among themselves
MULTIPLE = 4  # lengths are rounded up to it: few distinct shapes, little padding


def batches(encoded: Encoded, batch_size: int, seed: int, epoch: int) -> list[tuple[np.ndarray, int]]:
    """The steps of one epoch for one seed: (row indices, planned length) of each.

    Every row comes once. The number of rows and the planned length of a step are the same for every seed.
    """
    _check_batch_size(batch_size)
    order = np.argsort(encoded.lengths, kind="stable")
    lengths = encoded.lengths[order]
    width = SHELF * batch_size
    steps = []
    for shelf, start in enumerate(range(0, len(order), width)):
        rows = order[start : start + width]
        rows = rows[draws.shuffled(len(rows), seed, draws.SHELF_ROWS, epoch, shelf)]
        length = planned_length(int(lengths[start : start + width][-1]), encoded.max_length)
        steps += [(rows[at : at + batch_size], length) for at in range(0, len(rows), batch_size)]
    return [steps[step] for step in draws.shuffled(len(steps), 0, draws.STEP_ORDER, epoch)]


def evaluation_batches(encoded: Encoded, batch_size: int) -> list[tuple[np.ndarray, int]]:
    """Every row once, sorted by length, nothing shuffled: (row indices, length) of each batch."""
    _check_batch_size(batch_size)
    lengths = encoded.lengths
    order = np.argsort(lengths, kind="stable")
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [(rows, planned_length(int(lengths[rows[-1]]), encoded.max_length)) for rows in parts]


def planned_length(longest: int, max_length: int) -> int:
    """The longest row, in tokens, rounded up to a multiple of `MULTIPLE`, and never above max_length."""
    return min(-(-longest // MULTIPLE) * MULTIPLE, max_length)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")


def collate(encoded: Encoded, rows: np.ndarray, length: int, pad_id: int) -> dict[str, np.ndarray]:
    """These rows, padded on the right: input_ids, attention_mask, token_type_ids (if any) (rows, length), labels.

    Labels are those of the rows, whatever their shape, or (rows, length) with -100 at the padding for token classes.
    """
    rows = np.asarray(rows, dtype=np.int64)
    lengths = encoded.lengths[rows]
    if len(rows) and int(lengths.max()) > length:
        raise ValueError(f"a row of {int(lengths.max())} tokens does not fit the planned length {length}")
    positions = np.arange(length)
    mask = positions < lengths[:, None]  # (rows, length)
    flat = (encoded.offsets[rows][:, None] + positions)[mask]

    def padded(values: np.ndarray, filler: int) -> np.ndarray:
        out = np.full(mask.shape, filler, dtype=np.int64)
        out[mask] = values[flat]
        return out

    batch = {"input_ids": padded(encoded.ids, pad_id), "attention_mask": mask.astype(np.int64)}
    if encoded.token_type_ids is not None:
        batch["token_type_ids"] = padded(encoded.token_type_ids, 0)
    batch["labels"] = padded(encoded.labels, IGNORED) if encoded.is_by_token else encoded.labels[rows]
    return batch
