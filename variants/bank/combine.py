"""Several adapters as one, whose change of each weight is a weighted sum of theirs: how the sum is made.

    linear       sum w_i dW_i, exact, at the least rank that holds it
    concatenate  the same sum, the factors side by side as they are: its rank is the sum of theirs
    svd          the same sum, cut to `rank` at its largest singular values
    ties, dare   merging.py on dense dW_i, then cut to `rank`

PEFT's "linear" adds the factors apart, so that its product also holds B_1 A_2, which no adapter learned; ours is the sum of the
changes.  A site's own scale (rsLoRA's, a pattern's), coefficients (AdaLoRA's) and magnitudes (DoRA's) are in its dW_i, and the
result is written with scale 1 and a rank of its own at each site: 1 x A + 0 x B is A for every kind.  A sum of magnitudes is
exact too (updates.py); "ties" and "dare" take them into the dense change.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.kinds.interface import trained_dtype
from rankwise.variants.adapter.linears import dtype_of, is_linear
from rankwise.variants.bank import merging
from rankwise.variants.bank.updates import Update, cut, of_dense, update_of, weighted_sum, with_direction
from torch import Tensor, nn

How = Literal["linear", "concatenate", "svd", "ties", "dare"]
DENSITY = {"ties": 0.2, "dare": 0.5}  # TIES: Yadav et al., sec. 5 (k = 20 %); DARE's is a choice of ours
Updates = Mapping[str, list[Update]]  # site -> of each adapter; one without a site there is a change of rank 0


@dataclass(frozen=True)
class Combined:
    """updates: of each site.  heads: module -> its tensors; head_names: as `attach` takes them.

    squares: of each site (|what is missing|^2, |the change asked for|^2), Frobenius norms.
    """

    how: str
    updates: Mapping[str, Update]
    heads: Mapping[str, Mapping[str, Tensor]]
    head_names: list[str]
    squares: Mapping[str, tuple[float, float]]


@torch.no_grad()
def combined(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, float],
    how: How,
    *,
    rank: int | None,
    density: float | None,
    seed: int,
) -> Combined:
    """
    Args:
        adapters: loaded, of one member, detached from `model`, which is as they found it.

    Raises:
        ValueError: as `Bank.combine`.
    """
    _check(weights, how, rank, density)
    used = {name: float(weight) for name, weight in weights.items() if weight}
    heads, head_names = _heads(model, {name: adapters[name] for name in used}, used)
    updates = _updates(model, {name: adapters[name] for name in used}, heads)
    values = list(used.values())
    if len(used) == 1:
        results = {name: (with_direction(weighted_sum(here, values)), None) for name, here in updates.items()}
    elif how in ("linear", "concatenate", "svd"):
        results = {name: (_summed(here, values, how, rank), None) for name, here in updates.items()}
    else:
        results = _merged(model, updates, used, how, rank, DENSITY[how] if density is None else density, seed)
    squares = {}
    for name, (update, goal) in results.items():
        base = model.get_submodule(name)
        if goal is None:
            goal = sum(w * u.dense(base) for u, w in zip(updates[name], values, strict=True))
        squares[name] = float((goal - update.dense(base)).square().sum()), float(goal.square().sum())
    updates = {name: update for name, (update, _) in results.items()}
    return Combined(how, updates, heads, head_names, squares)


def _summed(here: Sequence[Update], weights: Sequence[float], how: str, rank: int | None) -> Update:
    total = weighted_sum(here, weights)
    if how == "linear":
        total = cut(total)
    elif how == "svd":
        total = cut(total, rank or max(u.rank for u in here))
    return with_direction(total)


def _merged(
    model: nn.Module,
    updates: Updates,
    weights: Mapping[str, float],
    how: str,
    rank: int | None,
    density: float,
    seed: int,
) -> dict[str, tuple[Update, Tensor]]:
    """Of each site the update that is written, and the merged change that it stands for."""
    values, thresholds = list(weights.values()), []
    if how == "ties":  # over all weights that an adapter changes together, one adapter at a time
        for place in range(len(values)):
            own = [(name, here[place]) for name, here in updates.items() if not here[place].is_nothing]
            sizes = [_dense(model, name, update).abs().flatten() for name, update in own]
            thresholds.append(merging.trim_threshold(torch.cat(sizes), density) if sizes else 0.0)
    results = {}
    for name, here in updates.items():
        changes = [_dense(model, name, update) for update in here]
        if how == "ties":
            goal = merging.ties(changes, values, thresholds)
        else:
            dropped = [merging.dare(change, density, seed, of, name) for of, change in zip(weights, changes, strict=True)]
            goal = sum(w * change for w, change in zip(values, dropped, strict=True))
        results[name] = of_dense(goal, rank or max(max(u.rank for u in here), 1)), goal.double()
    return results


def _dense(model: nn.Module, name: str, update: Update) -> Tensor:
    """(O, I): dW, in the type that the model's weight is trained in."""
    base = model.get_submodule(name)
    return update.dense(base).to(trained_dtype(dtype_of(base)))


def _updates(model: nn.Module, adapters: Mapping[str, Adapter], heads: Mapping[str, object]) -> Updates:
    """
    Raises:
        ValueError: a change that is no low-rank one, a head of one adapter that another adapts, or magnitudes beside a module
            that is no linear.
    """
    sites = {adapter_name: dict(adapter.named_sites()) for adapter_name, adapter in adapters.items()}
    places = [name for name, _ in model.named_modules() if any(name in here for here in sites.values())]
    for adapter_name, here in sites.items():
        for name, site in here.items():
            if site.low_rank is None:
                method = adapters[adapter_name].method
                raise ValueError(
                    f'"{adapter_name}" ({method}) changes {name} by no low-rank update, and only those can be summed'
                )
            if name in heads:
                raise ValueError(
                    f'{name} is a task head of one adapter, and "{adapter_name}" adapts it: these cannot be summed'
                )
    has_magnitude = [n for n in places if any(n in here and here[n].has_magnitude for here in sites.values())]
    others = [n for n in places if not is_linear(model.get_submodule(n))]
    if has_magnitude and others:
        raise ValueError(
            f"{has_magnitude[0]} has magnitudes and {others[0]} is no linear, where none can stand: no file holds both; "
            f"combine adapters of the same targets"
        )
    updates = {}
    for name in places:
        base = model.get_submodule(name)
        here = [update_of(site, base) if (site := of.get(name)) is not None else None for of in sites.values()]
        like = next(update for update in here if update is not None)
        nothing = Update(like.A[:0], like.B[:, :0])
        updates[name] = [nothing if update is None else update for update in here]
    return updates


def _heads(
    model: nn.Module, adapters: Mapping[str, Adapter], weights: Mapping[str, float]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The task heads, base + sum w_i (head_i - base), by module and tensor; and the names of the heads."""
    names = list(dict.fromkeys(name for adapter in adapters.values() for name in adapter.head_names))
    modules = list(dict.fromkeys(name for adapter in adapters.values() for name, _ in adapter.named_heads()))
    summed: dict[str, dict[str, Tensor]] = {}
    for name in modules:
        of = {
            key: dict(adapter.named_heads())[name] for key, adapter in adapters.items() if name in dict(adapter.named_heads())
        }
        summed[name] = {}
        for key, base in model.get_submodule(name).named_parameters(recurse=False):
            rest = 1 - sum(weights[adapter] for adapter in of)
            parts = [weights[adapter] * dict(site.named_parameters())[key][0].double() for adapter, site in of.items()]
            summed[name][key] = sum(parts, rest * base.detach().double() if rest else torch.zeros_like(base).double())
    return summed, names


def _check(weights: Mapping[str, float], how: str, rank: int | None, density: float | None) -> None:
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f'the weight of "{name}" is {weight!r}: give a finite number')
    if not any(weights.values()):
        raise ValueError("combine needs an adapter whose weight is not 0: with none the result is the frozen model")
    if how not in get_args(How):
        raise ValueError(f'how = "{how}" is none of {", ".join(get_args(How))}')
    if rank is not None and how in ("linear", "concatenate"):
        raise ValueError(f'rank = {rank} has no effect on how = "{how}", which is exact: leave it out, or take how = "svd"')
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank = {rank!r}: give a whole number of at least 1")
    if density is not None and how not in DENSITY:
        raise ValueError(f'density = {density} has no effect on how = "{how}": it is for {", ".join(DENSITY)}')
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density = {density}: give the share of entries that is kept, above 0 and at most 1")
