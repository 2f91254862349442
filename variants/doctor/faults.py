"""The tensors of a site: the spectrum of its update, and everything that is wrong with them.

The base model is not known: |dW|/|W| neither, and DoRA's magnitudes are left out, dW being s B diag(E) A.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rankwise.variants.doctor.findings import Finding
from rankwise.variants.doctor.stored import STEPS
from rankwise.variants.weights.spectrum import effective_rank, energy_rank, stable_rank


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


def examine(
    site: str, A: np.ndarray, B: np.ndarray, E: np.ndarray | None, scale: float, kind: str
) -> tuple[Update, list[Finding]]:
    """One module's update s B diag(E) A and its faults.

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
            message = f"{name} holds {bad:,} of {tensor.size:,} numbers that are {what}: its output is not finite"
            faults.append(Finding("not-finite", message, site))
    if faults:
        return Update(parameters, 0, None, None, None, (), None), faults
    if not rank:
        return Update(parameters, 0, 0.0, 0.0, 0, (), 0.0), []
    zero = {"row of A": ~A.any(1), "column of B": ~B.any(0), **({} if E is None else {"E": e == 0})}
    dead = np.logical_or.reduce(list(zero.values()))
    if dead.all():
        which = [name for name, of in (("A", A), ("B", B), ("E", e)) if not of.any()]
        why = f"{' and '.join(which)} {'are' if len(which) > 1 else 'is'} all zero" if which else "no rank has both factors"
        message = f"dW is zero ({why}): the module does nothing, and was perhaps never trained"
        faults.append(Finding("zero-update", message, site))
        return Update(parameters, 0, 0.0, 0.0, 0, (), 0.0), faults
    if dead.any():
        why = "; ".join(f"{name} zero at {_numbers(np.flatnonzero(of))}" for name, of in zero.items() if of.any())
        message = f"{int(dead.sum())} of {rank} ranks are dead ({why}): they cost parameters and change nothing"
        faults.append(Finding("dead-ranks", message, site))
    live = ~dead
    for name, factor in (("A", A[live]), ("B", B[:, live].T)):
        spanned = dimensions(factor, kind)
        if spanned < len(factor):
            message = (
                f"the {len(factor)} live ranks of {name} span {spanned} dimensions up to rounding ({kind.lower()}): "
                f"{len(factor) - spanned} of them are linear combinations of the others"
            )
            faults.append(Finding("dependent-ranks", message, site))
    sigma = abs(scale) * singular_values(B * e, A)
    norm = float(np.linalg.norm(sigma))
    update = Update(
        parameters, int(live.sum()), effective_rank(sigma), stable_rank(sigma), energy_rank(sigma), tuple(sigma.tolist()), norm
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


def of_lora_patterns(config: Mapping, ranks: Mapping[str, int], matches: Callable[[str, str], bool]) -> list[Finding]:
    """Contradictions between rank_pattern, alpha_pattern and r of a LORA file and its tensors.

    ranks: module -> rows of A.  matches: whether a key of a pattern means a module.
    """
    faults = []
    for setting in ("rank_pattern", "alpha_pattern"):
        for key, value in (config.get(setting) or {}).items():
            if not any(matches(key, site) for site in ranks) and value != 0:  # a rank of 0 leaves no tensors
                message = (
                    f'{setting} = {{"{key}": {value}}} matches none of the {len(ranks)} modules of the file: it has no effect'
                )
                faults.append(Finding("pattern-without-effect", message))
    for site, rank in ranks.items():
        match = next(((key, r) for key, r in (config.get("rank_pattern") or {}).items() if matches(key, site)), None)
        configured, where = (config.get("r"), "r") if match is None else (match[1], f'rank_pattern["{match[0]}"]')
        if configured != rank:
            message = f"{where} is {configured}, its tensors have rank {rank}: PEFT builds {configured} and cannot load them"
            faults.append(Finding("rank-contradiction", message, site))
    return faults


def of_adalora_patterns(config: Mapping, ranks: Mapping[str, int], pattern: Mapping[str, Sequence[bool]]) -> list[Finding]:
    """The same for an ADALORA file, whose rank_pattern says for each module which of init_r triplets were kept."""
    faults, rule = [], "rank-contradiction"
    for site, kept in pattern.items():
        if site not in ranks and any(kept):
            message = f"rank_pattern keeps {sum(map(bool, kept))} triplets of {site}, which the file has no tensors for"
            faults.append(Finding(rule, message))
        elif len(kept) != config.get("init_r"):
            faults.append(Finding(rule, f"rank_pattern has {len(kept)} places, init_r is {config.get('init_r')}", site))
        elif site in ranks and sum(map(bool, kept)) != ranks[site]:
            message = f"rank_pattern keeps {sum(map(bool, kept))} triplets, its tensors hold {ranks[site]}"
            faults.append(Finding(rule, message, site))
    for site in ranks:
        if pattern and site not in pattern:
            message = "rank_pattern does not name it: PEFT builds it at init_r and cannot load a pruned one"
            faults.append(Finding(rule, message, site))
    if config.get("alpha_pattern"):
        message = "alpha_pattern has no effect in AdaLoRA: PEFT accepts and ignores it"
        faults.append(Finding("pattern-without-effect", message))
    return faults


def _numbers(places: np.ndarray) -> str:
    shown = ", ".join(map(str, places[:8]))
    return f"{shown}, ..." if len(places) > 8 else shown
