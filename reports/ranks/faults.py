"""The tensors of an adapter folder: the spectrum of each update, and everything that is wrong with them.

Read with numpy from adapter_model.safetensors, without torch and without the base model: |dW|/|W| is not known here, and
DoRA's magnitudes are left out, dW being s B diag(E) A.  A fault is a sentence that names the module, what is wrong, and the
consequence.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rankwise.variants.weights.spectrum import effective_rank, energy_rank, stable_rank

TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16,
         "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}  # fmt: skip
STEPS = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}  # from 1 to the next number
TOP = 16  # singular values that are shown


@dataclass(frozen=True)
class Update:
    """The update of one module: its parameters, live ranks, effective ranks and spectrum."""

    parameters: int
    live: int  # ranks that act on the output
    effective_rank: float | None
    stable_rank: float | None
    energy_rank: int | None
    singular_values: tuple[float, ...]
    update_norm: float | None


def tensors(path: Path) -> dict[str, tuple[np.ndarray, str]]:
    """Name -> (the tensor in float64, the type it is stored in), of a whole safetensors file; 8-bit floats are left out.

    numpy has no bfloat16, which safetensors' own reader therefore refuses: its 16 bits are the upper half of a float32.
    """
    content = memoryview(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    header, body = json.loads(bytes(content[8 : 8 + size])), content[8 + size :]
    by_name = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in TYPES:
            continue
        start, end = entry["data_offsets"]
        values = np.frombuffer(body[start:end], TYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        by_name[name] = values.astype(np.float64), entry["dtype"]
    return by_name


def examine(site: str, A: np.ndarray, B: np.ndarray, E: np.ndarray | None, scale: float, kind: str) -> tuple[Update, list[str]]:
    """One module's update s B diag(E) A and its faults, in words.

    Args:
        A: (R, I), or a convolution's (R, I, h, w).  B: (O, R), or (O, R, 1, 1).  E: (R, 1) or None.
        kind: the type in which the tensors are stored, whose rounding says what counts as linearly dependent.
    """
    rank = A.shape[0]
    parameters = A.size + B.size + (0 if E is None else E.size)
    A, B = A.reshape(rank, A[:1].size), B.reshape(B.shape[0], rank)
    e = np.ones(rank) if E is None else E.reshape(-1)
    faults = []
    for name, tensor in (("A", A), ("B", B), *((("E", e),) if E is not None else ())):
        if bad := int((~np.isfinite(tensor)).sum()):
            what = "NaN" if np.isnan(tensor).any() else "infinite"
            faults.append(f"{site}: {name} holds {bad:,} of {tensor.size:,} numbers that are {what}: its output is not finite")
    if faults:
        return Update(parameters, 0, None, None, None, (), None), faults
    if not rank:
        return Update(parameters, 0, 0.0, 0.0, 0, (), 0.0), []
    zero = {"row of A": ~A.any(1), "column of B": ~B.any(0), **({} if E is None else {"E": e == 0})}
    dead = np.logical_or.reduce(list(zero.values()))
    if dead.all():
        which = [name for name, of in (("A", A), ("B", B), ("E", e)) if not of.any()]
        why = f"{' and '.join(which)} {'are' if len(which) > 1 else 'is'} all zero" if which else "no rank has both factors"
        faults.append(f"{site}: dW is zero ({why}): the module does nothing, and was perhaps never trained")
        return Update(parameters, 0, 0.0, 0.0, 0, (), 0.0), faults
    if dead.any():
        why = "; ".join(f"{name} zero at {_numbers(np.flatnonzero(of))}" for name, of in zero.items() if of.any())
        faults.append(f"{site}: {int(dead.sum())} of {rank} ranks are dead ({why}): they cost parameters and change nothing")
    live = ~dead
    for name, factor in (("A", A[live]), ("B", B[:, live].T)):
        spanned = dimensions(factor, kind)
        if spanned < len(factor):
            faults.append(
                f"{site}: the {len(factor)} live ranks of {name} span {spanned} dimensions up to rounding ({kind.lower()}): "
                f"{len(factor) - spanned} of them are linear combinations of the others"
            )
    sigma = abs(scale) * singular_values(B * e, A)
    norm = float(np.linalg.norm(sigma))
    update = Update(
        parameters, int(live.sum()), effective_rank(sigma), stable_rank(sigma), energy_rank(sigma), tuple(sigma[:TOP]), norm
    )
    return update, faults


def singular_values(B: np.ndarray, A: np.ndarray) -> np.ndarray:
    """(min(O, R, I),) of B A, through its thin factors."""
    left, right = np.linalg.qr(B, mode="r"), np.linalg.qr(A.T, mode="r")
    sigma = np.linalg.svd(left @ right.T, compute_uv=False)
    return sigma[sigma > 1e-12 * sigma[0]] if len(sigma) else sigma


def dimensions(rows: np.ndarray, kind: str) -> int:
    """The number of dimensions that the rows (R, F) span, up to the rounding of the type they are stored in.

    Rows are taken at unit length, so that a small one counts as much as a large one.  Rounding moves each by at most half a
    step of its numbers; two equal rows that were rounded apart leave a singular value of about that size.
    """
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    sigma = np.linalg.svd(unit, compute_uv=False)
    return int((sigma > 2 * STEPS.get(kind, STEPS["F32"]) * sigma[0]).sum())


def of_lora_patterns(config: Mapping, ranks: Mapping[str, int], matches: Callable[[str, str], bool]) -> list[str]:
    """Contradictions between rank_pattern, alpha_pattern and r of a LORA file and its tensors.

    ranks: module -> rows of A.  matches: whether a key of a pattern means a module.
    """
    faults = []
    for setting in ("rank_pattern", "alpha_pattern"):
        for key, value in (config.get(setting) or {}).items():
            if not any(matches(key, site) for site in ranks) and value != 0:  # a rank of 0 leaves no tensors
                faults.append(
                    f'{setting} = {{"{key}": {value}}} matches none of the {len(ranks)} modules of the file: it has no effect'
                )
    for site, rank in ranks.items():
        match = next(((key, r) for key, r in (config.get("rank_pattern") or {}).items() if matches(key, site)), None)
        configured, where = (config.get("r"), "r") if match is None else (match[1], f'rank_pattern["{match[0]}"]')
        if configured != rank:
            faults.append(
                f"{site}: {where} is {configured}, its tensors have rank {rank}: PEFT builds {configured} and cannot load them"
            )
    return faults


def of_adalora_patterns(config: Mapping, ranks: Mapping[str, int], pattern: Mapping[str, Sequence[bool]]) -> list[str]:
    """The same for an ADALORA file, whose rank_pattern says for each module which of init_r triplets were kept."""
    faults = []
    for site, kept in pattern.items():
        if site not in ranks and any(kept):
            faults.append(f"rank_pattern keeps {sum(map(bool, kept))} triplets of {site}, which the file has no tensors for")
        elif len(kept) != config.get("init_r"):
            faults.append(f"{site}: rank_pattern has {len(kept)} places, init_r is {config.get('init_r')}")
        elif site in ranks and sum(map(bool, kept)) != ranks[site]:
            faults.append(f"{site}: rank_pattern keeps {sum(map(bool, kept))} triplets, its tensors hold {ranks[site]}")
    for site in ranks:
        if pattern and site not in pattern:
            faults.append(f"{site}: rank_pattern does not name it: PEFT builds it at init_r and cannot load a pruned one")
    if config.get("alpha_pattern"):
        faults.append("alpha_pattern has no effect in AdaLoRA: PEFT accepts and ignores it")
    return faults


def _numbers(places: np.ndarray) -> str:
    shown = ", ".join(map(str, places[:8]))
    return f"{shown}, ..." if len(places) > 8 else shown
