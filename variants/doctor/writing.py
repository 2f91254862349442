"""An adapter at lower ranks as a plain LoRA, and the error that was made.

    dW = U diag(sigma) V^T        B' = U_k diag(sqrt(sigma_k / s)),  A' = diag(sqrt(sigma_k / s)) V_k^T,  scale s as before

By two thin QR decompositions and the SVD of an (R, R) core, in float64.  This is the best update of rank k; its error is
sqrt(sum of the squares of the sigma that went), and the rounding of the factors to the type of the file adds at most
(2 u + u^2) sum(sigma_k), u half the type's step at 1: of each number of A' and B' a share u at most is lost.  (Numbers below
the normal range of float16 lose more; `measured` sees that too.)

An adapter in PEFT's format, Rankwise's among them, is written as a LORA with rank_pattern and alpha_pattern; AdaLoRA's
coefficients go into the factors.  DoRA's magnitudes stay, its direction is cut.  A Kohya or diffusers file is written in its
own names with an alpha for each site, because names of modules cannot be told from Kohya's.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from rankwise.variants.doctor import kohya
from rankwise.variants.doctor.reading import ThinAdapter, read
from rankwise.variants.doctor.stored import STEPS, Raw, rounded, write
from rankwise.variants.files.peft.names import BASE_LAYER, CONFIG, FACTORS, ORIGINAL_HEAD, PREFIX, WEIGHTS, exact_pattern
from rankwise.variants.files.peft.names import part as peft_part

KOHYA_FILE = "adapter.safetensors"
# Findings with which there is no other form of the adapter: it is not s B A on its base, or not whole.
NOT_WRITTEN = ("base-changed", "acts-otherwise", "factors-do-not-fit", "missing-factor", "unreadable-type")
ADALORA_KEYS = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")


@dataclass(frozen=True)
class Cut:
    """What was written: ranks of each site; relative errors |dW - dW'|_F / |dW|_F of all sites together.

    bound: by Eckart-Young and the rounding of the file's type.  measured: of the file, read again.
    """

    file: Path
    ranks: Mapping[str, int]
    bound: float
    measured: float
    errors: Mapping[str, float]
    bytes_before: int
    bytes_after: int

    def moved(self, folder: Path) -> "Cut":
        """The same after its folder got its final name."""
        return replace(self, file=folder / self.file.name)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"file": str(self.file)}


def truncated(adapter: ThinAdapter, ranks: Mapping[str, int], folder: Path) -> Cut:
    """Writes the adapter at those ranks into a new or empty `folder`.

    Args:
        ranks: site -> how many singular values stay.

    Raises:
        ValueError: an adapter of which no other rank can be written, or nothing is left.
        OSError: the file could not be written.
    """
    if (reason := not_written(adapter)) is not None:
        raise ValueError(f"{adapter.path} cannot be written at other ranks: {reason}")
    if not any(ranks.values()):
        raise ValueError(f"{adapter.path}: nothing would be left: every site's update is zero, or the criterion keeps no rank")
    tensors, config, metadata, bounds = _contents(adapter, ranks)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (WEIGHTS if config is not None else KOHYA_FILE)
    write(file, tensors, metadata)
    if config is not None:
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    errors, norms = differences(adapter, read(folder if config is not None else file))
    whole = float(np.linalg.norm(list(norms.values())))
    relative = {name: error / norms[name] if norms[name] else 0.0 for name, error in errors.items()}
    bound, measured = (float(np.linalg.norm(list(v.values()))) / whole if whole else 0.0 for v in (bounds, errors))
    before, after = adapter.stored.path.stat().st_size, file.stat().st_size
    return Cut(file, dict(ranks), bound, measured, relative, before, after)


def as_kohya(adapter: ThinAdapter, prefix: str) -> dict[str, Raw]:
    """The tensors of a Kohya file with the same updates, each site's scale in its alpha; AdaLoRA's coefficients go into A.

    prefix: what stands before the modules' names: "lora_unet", "lora_te", "lora_te1", ...

    Raises:
        ValueError: what a Kohya file has no place for, and two modules of one name there.
    """
    reason = not_plain(adapter)
    tensors: dict[str, Raw] = {}
    modules: dict[str, str] = {}
    for site in adapter.sites:
        name = kohya.flat(site.name, prefix)
        shape_A, shape_B = (adapter.stored.shapes[site.keys[key]] for key in "AB")
        if reason is None and (site.expert is not None or site.is_embedding):
            reason = f"{site.name} is {'an embedding' if site.expert is None else 'a bare parameter'}"
        if reason is None and name in modules:
            reason = f"{site.name} and {modules[name]} both become {name}"
        if reason is not None:
            break
        modules[name] = site.name
        if not site.rank:
            continue
        A, B, E = adapter.parts(site)
        if E is None:
            down, up = (adapter.stored.raw(site.keys[key]) for key in "AB")
        else:
            down = rounded((A * E[:, None]).reshape(shape_A), adapter.kind(site))
            up = rounded(B.reshape(shape_B), adapter.kind(site))
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
        tensors[f"{name}.alpha"] = rounded(np.asarray(site.scale * site.rank), "F32")
    if reason is not None:
        raise ValueError(f"{adapter.path} has no exact form in Kohya's format: {reason}")
    return tensors


def not_written(adapter: ThinAdapter) -> str | None:
    """Why no other ranks of the adapter can be written; None where they can."""
    for finding in adapter.findings:
        if finding.rule in NOT_WRITTEN:
            return finding.sentence
    for site in adapter.sites:
        if not all(np.isfinite(part).all() for part in adapter.parts(site) if part is not None):
            return f"{site.name} holds numbers that are not finite"
        if not isfinite(site.scale):
            return f"{site.name} has a scale of {site.scale}"
    return None


def not_plain(adapter: ThinAdapter) -> str | None:
    """Why the adapter is more, or less, than s B A at each of its sites; None where it is just that.

    For forms that hold nothing else: no head, magnitude, bias or whole tensor.
    """
    if (reason := not_written(adapter)) is not None:
        return reason
    if adapter.heads:
        return f"it holds a head, {adapter.heads[0].removeprefix(PREFIX)}"
    trains_biases = (adapter.config or {}).get("bias", "none") != "none"
    for name in adapter.rest:
        is_copy = BASE_LAYER in name or ORIGINAL_HEAD in name
        if not is_copy or (trains_biases and name.endswith(".bias")):
            return f"it holds {name.removeprefix(PREFIX)}, a whole tensor of the model"
    for site in adapter.sites:
        if "magnitude" in site.keys:
            return f"{site.name} has a magnitude (DoRA), which a plain LoRA cannot hold: use --to merged"
        if "bias" in site.keys:
            return f"{site.name} has a bias"
    return None


def best(B: np.ndarray, A: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U (O, M), sigma (M,), V^T (M, I) of B A, thin: M = min(O, R, I); B (O, R), A (R, I)."""
    (Q_B, R_B), (Q_A, R_A) = np.linalg.qr(B), np.linalg.qr(A.T)
    U, sigma, Vt = np.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ U, sigma, Vt @ Q_A.T


def differences(one: ThinAdapter, other: ThinAdapter) -> tuple[dict[str, float], dict[str, float]]:
    """Site -> |dW - dW'|_F of two adapters, and |dW|_F of the first; a site that the other lacks is zero there."""
    there = {site.name: site for site in other.sites}
    errors, norms = {}, {}
    for site in one.sites:
        B, A = one.factors(site)
        norms[site.name] = float(np.linalg.norm(_values(B, A)))
        if site.name in there:
            B_, A_ = other.factors(there[site.name])
            B, A = np.hstack([B, -B_]), np.vstack([A, A_])
        errors[site.name] = float(np.linalg.norm(_values(B, A)))
    return errors, norms


def _values(B: np.ndarray, A: np.ndarray) -> np.ndarray:
    return np.linalg.svd(np.linalg.qr(B, mode="r") @ np.linalg.qr(A.T, mode="r").T, compute_uv=False)


def _contents(
    adapter: ThinAdapter, ranks: Mapping[str, int]
) -> tuple[dict[str, Raw], dict[str, Any] | None, dict[str, str], dict[str, float]]:
    """Tensors, adapter_config.json, metadata, and the bound of each site's error."""
    written_ranks = dict(ranks)
    stacks = [site for site in adapter.sites if site.expert is not None]
    if stacks:  # the experts of all stacks have one rank in PEFT's format: what has fewer is filled with zeros
        most = max(max(ranks[site.name] for site in stacks), 1)
        written_ranks |= {site.name: most for site in stacks}
    tensors: dict[str, Raw] = {}
    bounds, sizes, scales, folded = {}, {}, {}, {}
    for site in adapter.sites:
        B, A = adapter.factors(site)
        U, sigma, Vt = best(B, A)
        rank = ranks[site.name]
        kind = adapter.kind(site)
        scale = stacks[0].scale if site.expert is not None and stacks[0].scale else site.scale or 1.0
        root = np.sqrt(sigma[:rank] / abs(scale))
        B, A = U[:, :rank] * root * np.sign(scale), root[:, None] * Vt[:rank]
        u = STEPS.get(kind, STEPS["F32"]) / 2
        bounds[site.name] = float(np.linalg.norm(sigma[rank:]) + (2 * u + u * u) * sigma[:rank].sum() + 1e-14 * sigma[:1].sum())
        rows = max(written_ranks[site.name], 1 if {"magnitude", "bias"} & site.keys.keys() else 0)
        A = np.vstack([A, np.zeros((rows - rank, A.shape[1]))])
        B = np.hstack([B, np.zeros((B.shape[0], rows - rank))])
        sizes[site.name], scales[site.name] = rows, scale
        folded.setdefault(site.keys["A"], []).append((site, A, B, kind))
    for parts in folded.values():
        site, kind = parts[0][0], parts[0][3]
        if not sizes[site.name]:
            continue
        A = np.vstack([A for _, A, _, _ in parts])  # row e r + j
        B = np.stack([B for _, _, B, _ in parts], 2).reshape(len(parts[0][2]), -1)  # column j E + e
        shape_A, shape_B = (adapter.stored.shapes[site.keys[key]] for key in "AB")
        if "mid" in site.keys:
            shape_A = (*shape_A[:2], *adapter.stored.shapes[site.keys["mid"]][2:])
        a, b = (_as_saved(site.keys[key], adapter.form) for key in "AB")
        tensors[a] = rounded(A.reshape(len(A), *shape_A[1:]), kind)
        tensors[b] = rounded(B.reshape(len(B), B.shape[1], *shape_B[2:]), kind)
        for part in ("magnitude", "bias"):
            if part in site.keys:
                tensors[_as_saved(site.keys[part], adapter.form)] = adapter.stored.raw(site.keys[part])
        if adapter.config is None:
            alpha = scales[site.name] * sizes[site.name]
            tensors[f"{site.name}.alpha"] = rounded(np.asarray(alpha), "F32")
    tensors |= {name: adapter.stored.raw(name) for name in (*adapter.heads, *adapter.rest)}
    if adapter.config is None:
        metadata = {key: value for key, value in adapter.stored.metadata.items() if key != kohya.METADATA}
        if adapter.form == "diffusers":
            metadata[kohya.METADATA] = json.dumps(_component_settings(adapter, sizes, scales), sort_keys=True)
        return tensors, None, metadata, bounds
    return tensors, _config(adapter, sizes, scales), {"format": "pt"}, bounds


def _as_saved(name: str, form: str) -> str:
    """A tensor's name as PEFT saves it, without the adapter's own name that a PeftModel's state has."""
    if form != "PEFT":
        return name
    of = peft_part(name.removeprefix(PREFIX))
    if of is None:
        return name
    end = ".weight" if of.part in FACTORS["linear"] else ""  # AdaLoRA's factors are bare parameters, a LORA's are not
    return f"{PREFIX}{of.site}.{of.part}{end}"


def _config(adapter: ThinAdapter, sizes: Mapping[str, int], scales: Mapping[str, float]) -> dict[str, Any]:
    config = {key: value for key, value in (adapter.config or {}).items() if key not in ADALORA_KEYS}
    stacks = [site.name for site in adapter.sites if site.expert is not None]
    written = {name: rank for name, rank in sizes.items() if rank and name not in stacks}
    alphas = {name: _plain(scales[name] * rank) for name, rank in written.items()}
    if stacks:
        rank = sizes[stacks[0]]
        alpha = _plain(scales[stacks[0]] * rank)
    else:
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (written, alphas))
    names = list(written)
    changed = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {exact_pattern(n, names): r for n, r in written.items() if r != rank},
        "alpha_pattern": {exact_pattern(n, names): a for n, a in alphas.items() if a != alpha},
        "use_rslora": False,
        "use_dora": any("magnitude" in site.keys for site in adapter.sites),
        "init_lora_weights": True,
        "target_modules": names or config.get("target_modules"),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": True,
    }
    return {**config, **changed}


def _component_settings(adapter: ThinAdapter, sizes: Mapping[str, int], scales: Mapping[str, float]) -> dict[str, Any]:
    """diffusers' metadata: PEFT's settings behind the name of each component."""
    modules: dict[str, dict[str, str]] = {}
    for name, rank in sizes.items():
        component, _, module = name.partition(".")
        if rank:
            modules.setdefault(component, {})[module] = name
    settings: dict[str, Any] = {}
    for component, names in modules.items():
        ranks = {module: sizes[name] for module, name in names.items()}
        alphas = {module: _plain(scales[name] * sizes[name]) for module, name in names.items()}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        own = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {exact_pattern(n, list(ranks)): r for n, r in ranks.items() if r != rank},
            "alpha_pattern": {exact_pattern(n, list(alphas)): a for n, a in alphas.items() if a != alpha},
            "target_modules": list(ranks),
            "use_rslora": False,
        }
        settings |= {f"{component}.{key}": value for key, value in own.items()}
    return settings


def _plain(value: float) -> float | int:
    value = float(f"{value:.15g}")
    return int(value) if value.is_integer() else value
