"""All that can be said of an adapter without its base model: spectra, findings, what each criterion would keep."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import numpy as np
from rankwise.variants.doctor import criteria, faults
from rankwise.variants.doctor.base import Base
from rankwise.variants.doctor.criteria import Spectrum, Suggestion
from rankwise.variants.doctor.findings import Finding
from rankwise.variants.doctor.reading import Site, ThinAdapter, matches
from rankwise.variants.doctor.stored import STEPS
from rankwise.variants.files.peft.names import PREFIX
from rankwise.variants.weights.spectrum import energy_rank

LARGE_SCALE = 16.0  # a choice: alpha/r is 1 or 2 in most recipes
LARGE_DRIFT = 0.25  # a choice: at a quarter the file is probably of another base, or its rate was far too high
OVERSIZED = 0.5  # of the live ranks: where 99 % of the energy is in fewer, much of the rank is not used
RULES_ALL = 0.5  # of the energy of all updates in one site
ENOUGH_SITES = 4  # below this one site may well hold most


@dataclass(frozen=True)
class Examined:
    """One site: its update and what of it stands out.

    spikes, edge: singular values above the Marchenko-Pastur edge, and the edge.
    share: of the energy of all updates.  norms: |A|_F and |B|_F as they are stored.
    drift: |m/|W| - 1| of DoRA, mean over rows, and the greatest; relative: |dW|/|W|; None where the base is not known.
    """

    site: Site
    update: faults.Update
    shape: tuple[int, int]
    spikes: int
    edge: float
    share: float
    norms: tuple[float, float]
    drift: tuple[float, float] | None = None
    relative: float | None = None

    @property
    def energies(self) -> list[float]:
        """Of each singular value the share of |dW|_F^2."""
        squares = np.square(self.update.singular_values)
        return (squares / squares.sum()).tolist() if squares.sum() else []


@dataclass(frozen=True)
class Examination:
    """An adapter examined."""

    adapter: ThinAdapter
    sites: list[Examined]
    findings: list[Finding]
    suggestions: Mapping[str, Suggestion]

    @property
    def has_errors(self) -> bool:
        return any(finding.level == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For `rankwise doctor --json`."""
        adapter = self.adapter
        return {
            "schema": 1,
            "kind": "doctor",
            "path": str(adapter.path),
            "form": adapter.form,
            "method": adapter.method,
            "findings": [finding.as_dict() for finding in self.findings],
            "criteria": {
                name: {"setting": one.setting, "total": one.total, "parameters": one.parameters, "error": one.error,
                       "ranks": dict(one.ranks), "errors": dict(one.errors)}
                for name, one in self.suggestions.items()
            },
            "sites": [_site_dict(one) for one in self.sites],
        }  # fmt: skip


def examine(adapter: ThinAdapter, base: Base | None = None, **settings: float | int | None) -> Examination:
    """
    Args:
        base: the weights that it is an update of, where they are at hand.  See `criteria.suggestions` for the settings.

    Raises:
        ValueError: a setting out of its range.
    """
    found = list(adapter.findings)
    found += _of_configuration(adapter)
    examined, spectra = [], []
    for site in adapter.sites:
        A, B, E = adapter.parts(site)
        kind = adapter.kind(site)
        found += _of_scale(site)
        scale = site.scale if isfinite(site.scale) else 0.0
        update, wrong = faults.examine(site.name, A, B, E, scale, kind)
        found += wrong
        sigma = np.asarray([value for value in update.singular_values if value > 0])
        shape = (B.shape[0], A.shape[1])
        found += _of_magnitude(adapter, site, shape[0])
        if "bias" in site.keys and not np.isfinite(adapter.stored[site.keys["bias"]][0]).all():
            found.append(Finding("not-finite", "the bias of B holds numbers that are not finite", site.name))
        drift, relative, more = _beside(base, adapter, site, update, shape)
        found += more
        # Ranks that are dependent up to the rounding of their type are no ranks of the update.
        real = _rank_up_to_rounding(sigma, wrong, update.live, kind)
        examined.append(
            Examined(
                site,
                update,
                shape,
                criteria.spikes(sigma, shape),
                criteria.mp_edge(sigma, shape),
                0.0,
                tuple(float(np.linalg.norm(factor)) for factor in (A, B)),
                drift,
                relative,
            )
        )
        spectra.append(Spectrum(site.name, sigma[:real], shape))
    found += _of_rest(adapter)
    examined = _shares(examined)
    found += _of_sizes(examined)
    found += _of_scales(adapter)
    order = {"error": 0, "warning": 1, "note": 2}
    found.sort(key=lambda finding: order[finding.level])
    return Examination(adapter, examined, found, criteria.suggestions(spectra, **settings))


def _rank_up_to_rounding(sigma: np.ndarray, wrong: list[Finding], live: int, kind: str) -> int:
    """How many sigma are of the update and not of the rounding of its factors."""
    if not any(finding.rule == "dependent-ranks" for finding in wrong):
        return len(sigma)
    return int((sigma > 2 * STEPS.get(kind, STEPS["F32"]) * sigma[0]).sum())


def _shares(examined: list[Examined]) -> list[Examined]:
    energies = [(one.update.update_norm or 0.0) ** 2 for one in examined]
    total = sum(energies)
    return [replace(one, share=energy / total if total else 0.0) for one, energy in zip(examined, energies, strict=True)]


def _of_configuration(adapter: ThinAdapter) -> list[Finding]:
    config = adapter.config
    if config is None:
        return []
    ranks = {site.name: site.rank for site in adapter.sites if site.expert is None}
    if config["peft_type"] == "ADALORA":
        kept = {key.removesuffix(".lora_E"): bits for key, bits in (config.get("rank_pattern") or {}).items()}
        return faults.of_adalora_patterns(config, ranks, kept)
    found = faults.of_lora_patterns(config, ranks, matches)
    stacks = [site.name for site in adapter.sites if site.expert is not None]
    return [
        one for one in found if not (stacks and one.rule == "pattern-without-effect")
    ]  # a parameter's name is not in the file


def _of_scale(site: Site) -> list[Finding]:
    alpha = site.alpha
    if alpha is None or not site.rank:
        return []
    if not isfinite(alpha):
        return [Finding("scale-not-finite", f"alpha is {alpha}", site.name)]
    if alpha == 0:
        return [Finding("scale-zero", "alpha is 0: dW is zero whatever was trained", site.name)]
    if alpha < 0:
        return [Finding("scale-negative", f"alpha is {alpha:g}: the update is subtracted", site.name)]
    if abs(site.scale) >= LARGE_SCALE:
        message = f"the scale {site.rule} is {site.scale:.4g} (alpha {alpha:g}, r {site.rank})"
        return [Finding("scale-large", message, site.name)]
    return []


def _of_scales(adapter: ThinAdapter) -> list[Finding]:
    scales = Counter(float(f"{site.scale:.6g}") for site in adapter.sites if site.rank and isfinite(site.scale))
    if len(scales) < 2:
        return []
    shown = ", ".join(f"{scale:.4g} ({count} sites)" for scale, count in scales.most_common(4))
    return [Finding("scales-differ", f"the scale differs between sites: {shown}{', ...' if len(scales) > 4 else ''}")]


def _of_magnitude(adapter: ThinAdapter, site: Site, rows: int) -> list[Finding]:
    uses = bool((adapter.config or {}).get("use_dora"))
    key = site.keys.get("magnitude")
    if key is None:
        message = "use_dora is set, and the file has no magnitude of this site"
        return [Finding("magnitude-missing", message, site.name)] if uses else []
    found = []
    if adapter.config is not None and not uses:
        found.append(Finding("magnitude-unexpected", "it has a magnitude, and use_dora is not set", site.name))
    m = adapter.stored[key][0].reshape(-1)
    if bad := int((~np.isfinite(m)).sum()):
        found.append(Finding("not-finite", f"its magnitude holds {bad} of {m.size} numbers that are not finite", site.name))
    elif bad := int((m <= 0).sum()):
        message = f"{bad} of {m.size} magnitudes are zero or negative, the least is {m.min():.3g}"
        found.append(Finding("magnitude-not-positive", message, site.name))
    return found


def _beside(
    base: Base | None, adapter: ThinAdapter, site: Site, update: faults.Update, shape: tuple[int, int]
) -> tuple[tuple[float, float] | None, float | None, list[Finding]]:
    """DoRA's drift and |dW|/|W|, where the base's weight is known."""
    is_transposed = site.is_embedding or bool((adapter.config or {}).get("fan_in_fan_out"))
    norms = None if base is None or site.expert is not None else base.row_norms(site.name, shape, is_transposed)
    if norms is None or not norms.any():
        message = "no weight of this site is in the base that was given" if base is not None and site.expert is None else None
        return None, None, [Finding("base-unknown", message, site.name)] if message else []
    whole = float(np.linalg.norm(norms))
    relative = None if update.update_norm is None else update.update_norm / whole
    if "magnitude" not in site.keys:
        return None, relative, []
    m = adapter.stored[site.keys["magnitude"]][0].reshape(-1)
    if m.shape != norms.shape or not np.isfinite(m).all():
        return None, relative, []
    moved = np.abs(m[norms > 0] / norms[norms > 0] - 1)
    drift = float(moved.mean()), float(moved.max())
    found = []
    if drift[0] > LARGE_DRIFT:
        message = f"magnitudes are {drift[0]:.0%} off |W| in the mean, {drift[1]:.0%} at most"
        found.append(Finding("magnitude-drift", message, site.name))
    return drift, relative, found


def _of_rest(adapter: ThinAdapter) -> list[Finding]:
    found = []
    for name in (*adapter.heads, *adapter.rest):
        if name not in adapter.stored:
            continue
        if bad := int((~np.isfinite(adapter.stored[name][0])).sum()):
            message = f"{name.removeprefix(PREFIX)} holds {bad:,} numbers that are not finite"
            found.append(Finding("not-finite", message))
    return found


def _of_sizes(examined: list[Examined]) -> list[Finding]:
    found = []
    trained = [one for one in examined if one.update.update_norm]
    used = sum(energy_rank(one.update.singular_values, 0.99) for one in trained)
    live = sum(one.update.live for one in trained)
    if live and used <= OVERSIZED * live:
        message = f"{used} of {live} live ranks hold 99 % of |dW|^2 of every site"
        found.append(Finding("oversized", message))
    if len(trained) >= ENOUGH_SITES:
        most = max(trained, key=lambda one: one.share)
        if most.share > RULES_ALL:
            found.append(Finding("one-site-rules", f"{most.share:.0%} of the energy of all updates is here", most.site.name))
    return found


def _site_dict(one: Examined) -> dict[str, Any]:
    site, update = one.site, one.update
    alpha = site.alpha if site.alpha is None or isfinite(site.alpha) else str(site.alpha)
    return {
        "site": site.name,
        "shape": list(one.shape),
        "rank": site.rank,
        "nominal": site.nominal,
        "live": update.live,
        "alpha": alpha,
        "scale": site.scale if isfinite(site.scale) else str(site.scale),
        "scale_rule": site.rule,
        "parameters": update.parameters,
        "norm": update.update_norm,
        "share": one.share,
        "relative_norm": one.relative,
        "effective_rank": update.effective_rank,
        "stable_rank": update.stable_rank,
        "energy_rank": update.energy_rank,
        "spikes": one.spikes,
        "mp_edge": one.edge,
        "norm_A": one.norms[0] if isfinite(one.norms[0]) else None,
        "norm_B": one.norms[1] if isfinite(one.norms[1]) else None,
        "magnitude_drift": None if one.drift is None else {"mean": one.drift[0], "greatest": one.drift[1]},
        "singular_values": list(update.singular_values),
        "energies": one.energies,
    }
