"""What training did to each weight: ranks, spectrum, size and intruder dimensions of every site's update dW.

    dW = B diag(c) A         sigma(dW) = sigma(R_B R_A^T)        B diag(c) = Q_B R_B,  A^T = Q_A R_A

A low-rank site is measured through its thin factors: two QR decompositions and the singular values of an (R, R) core.  What
has no thin form (full fine-tuning, weight-decomposed DoRA) is measured dense.  Effective rank: Roy & Vetterli 2007.
Intruder dimensions: the top left singular vectors of W + dW whose greatest |cosine| with every left singular vector of W is
below a threshold (Shuttleworth et al. 2024); the cosines are kept, so that any other threshold can be asked for afterwards.

Dense work is done where the smaller side of the weight is at most `MOST_DENSE`; what needs it is None in larger ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.site import Site
from rankwise.variants.allocation.allocated import AllocatedAdapter
from rankwise.variants.lowrank.site import LowRank
from rankwise.variants.weights.spectrum import effective_rank, energy_rank, stable_rank
from torch import Tensor, nn

TOP = 16  # singular values that are kept of each site, from the greatest; those that are zero are left out
INTRUDERS = 10  # left singular vectors of W + dW, from the top, that are looked up among those of W
COSINE = 0.5  # below this a vector counts as an intruder, as in reports/analysis/; the paper looks at a range of thresholds
MOST_DENSE = 1024  # of a 768-wide model a site takes 0.3 s on one core, of a 4096-wide one a minute

Facts = dict[str, Any]


@torch.no_grad()
def anatomy(adapter: Adapter, intruders: bool = True, bases: dict[str, Tensor] | None = None) -> list[dict[str, Facts]]:
    """For each member: site -> what became of its weight, as JSON holds it; empty for a method that changes no weight.

    intruders: count intruder dimensions too, which takes dense work for each weight; all else of a low-rank site is thin.
    bases: the left singular vectors of each W, kept by the caller for other adapters of the same model.
    """
    bases = {} if bases is None else bases
    names = adapter.changed_weights()
    importance = _importance(adapter)
    sites = dict(adapter.named_sites())
    of_members: list[dict[str, Facts]] = [{} for _ in range(adapter.members)]
    for name in names:
        weight, site = adapter.pretrained_weight(name), sites.get(name)
        is_dense_allowed = min(weight.shape) <= MOST_DENSE
        is_thin = isinstance(site, LowRank) and type(site).delta is LowRank.delta
        dense = adapter.delta(name) if not is_thin or (intruders and is_dense_allowed) else None  # (K, O, I)
        finite = torch.ones(adapter.members, dtype=torch.bool)
        sigma: list[Tensor | None]
        if is_thin:
            A, B = site.thin()
            finite &= (B.isfinite().all(2).all(1) & A.isfinite().all(2).all(1)).cpu()
            sigma = [thin_singular_values(b, a) if ok else None for b, a, ok in zip(B, A, finite, strict=True)]
        else:
            finite &= dense.isfinite().all(2).all(1).cpu()
            sigma = [dense_singular_values(d) if ok and is_dense_allowed else None for d, ok in zip(dense, finite, strict=True)]
        basis = None
        if intruders and is_dense_allowed:
            basis = bases.get(name)
            if basis is None:
                basis = bases[name] = left_singular_vectors(weight)  # (O, min(O, I))
        nominal, active, parameters = _sizes(site, weight, adapter.members)
        for k in range(adapter.members):
            seen = None
            if basis is not None and finite[k]:
                seen = familiarity(basis, weight.float() + dense[k].float(), INTRUDERS)
            norm = None if not finite[k] else float(dense[k].double().norm() if sigma[k] is None else sigma[k].norm())
            whole = float(weight.double().norm())
            values = None if sigma[k] is None else sigma[k].cpu().numpy()
            of_members[k][name] = {
                "nominal": nominal[k],
                "active": active[k],
                "parameters": parameters[k],
                "update_norm": _short(norm),
                "weight_norm": _short(whole),
                "relative_norm": _short(None if norm is None or not whole else norm / whole),
                "effective_rank": None if values is None else _short(effective_rank(values)),
                "stable_rank": None if values is None else _short(stable_rank(values)),
                "energy_rank": None if values is None else energy_rank(values),
                "singular_values": None if values is None else [_short(value) for value in values[values > 0][:TOP]],
                "familiarity": None if seen is None else [_short(value) for value in seen],
                "intruders": None if seen is None else sum(value < COSINE for value in seen),
                **importance.get(name, [NO_SCORE] * adapter.members)[k],
            }
    for facts in of_members:
        total = sum(site["parameters"] for site in facts.values())
        for site in facts.values():
            site["share"] = _short(site["parameters"] / total) if total else 0.0
    return of_members


def thin_singular_values(B: Tensor, A: Tensor) -> Tensor:
    """(min(O, R, I),) of B A, the greatest first, in float64; B (O, R), A (R, I), no (O, I) matrix is made."""
    if not len(A):  # a site of rank 0
        return A.new_zeros(0, dtype=torch.float64)
    left, right = (torch.linalg.qr(thin.double(), mode="r").R for thin in (B, A.mT))
    values = torch.linalg.svdvals(left @ right.mT)
    return values.masked_fill(values < 1e-12 * values[:1], 0.0)  # slots that are zero leave rounding


def dense_singular_values(change: Tensor) -> Tensor:
    """(min(O, I),) of a dense change (O, I), the greatest first.

    From the eigenvalues of its smaller Gram matrix in float64, which is several times faster; what lies below 1e-8 of the
    greatest singular value cannot be distinguished from 0 this way, and was rounding in float32 anyway.
    """
    wide = change.double()
    gram = wide @ wide.mT if wide.shape[0] <= wide.shape[1] else wide.mT @ wide
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    return values.masked_fill(values < 1e-16 * values[0], 0.0).sqrt()


def left_singular_vectors(matrix: Tensor, count: int | None = None) -> Tensor:
    """(O, count) of a matrix (O, I), that of the greatest singular value first; all min(O, I) without a count; on the CPU.

    From the eigenvectors of the smaller Gram matrix: all of them in float64; the top ones alone, which stand well apart from
    rounding, in float32 and without the others (a tenth of the time of a whole decomposition).
    """
    from scipy.linalg import eigh

    wide = matrix.cpu().to(torch.float64 if count is None else torch.float32)
    is_wide = wide.shape[0] <= wide.shape[1]
    gram = wide @ wide.mT if is_wide else wide.mT @ wide
    if count is None:
        vectors = torch.linalg.eigh(gram).eigenvectors
    else:
        last = len(gram) - 1
        eigenvectors = eigh(gram.numpy(), subset_by_index=[max(last - count + 1, 0), last], check_finite=False)[1]
        vectors = torch.from_numpy(eigenvectors)
    vectors = vectors.flip(1)
    if not is_wide:  # right singular vectors: W v = sigma u
        vectors = nn.functional.normalize(wide @ vectors, dim=0)
    return vectors.float()


def familiarity(basis: Tensor, tuned: Tensor, count: int) -> list[float]:
    """For each of the top left singular vectors of `tuned` (O, I) its greatest |cosine| with any column of `basis` (O, *)."""
    return (basis.mT @ left_singular_vectors(tuned, count)).abs().amax(0).clamp_max(1.0).tolist()


def _sizes(site: Site | None, weight: Tensor, members: int) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Nominal and active rank and active parameters of each member; a weight that is trained whole has all there are."""
    if site is None or not site.has_rank:
        return [min(weight.shape)] * members, [min(weight.shape)] * members, [weight.numel()] * members
    return site.nominal().tolist(), site.rank().tolist(), site.count(site.rank().cpu()).tolist()


NO_SCORE: Facts = {"importance": None, "greatest_importance": None, "scores": None, "kept": None}


def _importance(adapter: Adapter) -> dict[str, list[Facts]]:
    """Site -> for each member the allocator's own score: of every slot, and summed and greatest over the kept ones."""
    if not isinstance(adapter, AllocatedAdapter):
        return {}
    importances: dict[str, list[Facts]] = {}
    for site, scores in zip(adapter.triplets(), adapter.triplet_scores(), strict=True):
        importances[site.name] = []
        for values, slots, kept in zip(scores.double().cpu(), site.slots.bool().cpu(), site.kept.cpu(), strict=True):
            values, kept = values[slots], kept[slots]
            chosen = values[kept].tolist()
            importances[site.name].append(
                {
                    "importance": _short(sum(chosen)),
                    "greatest_importance": _short(max(chosen)) if chosen else None,
                    "scores": [_short(value) for value in values.tolist()],
                    "kept": "".join("01"[one] for one in kept.tolist()),
                }
            )
    return importances


def _short(value: float | None) -> float | None:
    """Five digits, which is what a report can use of it; None where JSON has no number."""
    if value is None or not abs(float(value)) < float("inf"):
        return None
    return float(f"{float(value):.5g}")
