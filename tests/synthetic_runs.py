"""Run folders that look like real ones, written without training: what the report's tests read."""

import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

KINDS = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
)  # fmt: skip
BERT_SITES = tuple(f"bert.encoder.layer.{layer}.{kind}" for layer in range(6) for kind in KINDS)
CAPTION = ["MiniLM was tuned for sentence similarity already, so there is little to gain."]
RATES = {"full": (2e-5, 5e-5, 1e-4), "head": (1e-3, 5e-3, 2e-2)}
LOW_RANK_RATES = (5e-4, 1e-3, 5e-3)
LEVELS = {"full": 85.5, "head": 82.6, "bitfit": 84.3, "lora": 85.4, "adalora": 85.2, "dora": 85.5, "adalora+dora": 85.3}
MILLIONS = {"full": 22_565_376, "head": 0, "bitfit": 51_072, "lora": 663_552, "adalora": 663_840, "dora": 677_376,
            "adalora+dora": 677_664}  # fmt: skip
METHODS = ("full", "head", "lora", "adalora", "dora", "adalora+dora")


def is_low_rank(method: str) -> bool:
    return "lora" in method or "dora" in method


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, allow_nan=False, indent=1) + "\n", encoding="utf-8")


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")


def final_ranks(method: str, seed: int, sites: Sequence[str] = BERT_SITES, rank: int = 8, initial: int = 12) -> dict:
    """Uniform, or for AdaLoRA uneven with the exact total rank * sites: upper layers and values get more."""
    if "adalora" not in method:
        return {site: rank for site in sites}
    draw = np.random.default_rng([seed, zlib.crc32(method.encode())])
    appeal = np.array([0.10 * i + 3.0 * ("value" in site or "output" in site) for i, site in enumerate(sites)])
    order = np.argsort(-(appeal[:, None] - 0.9 * np.arange(initial) + draw.normal(0, 1, (len(sites), initial))), axis=None)
    kept = np.bincount(order[: rank * len(sites)] // initial, minlength=len(sites))
    return {site: int(count) for site, count in zip(sites, kept, strict=True)}


def rank_lines(method: str, final: dict[str, int], steps: int, initial: int = 12) -> list[dict]:
    sites, target = list(final), sum(final.values())
    if "adalora" not in method:
        return [{"step": s, "budget": None, "active": target, "live": target, "ranks": final} for s in (0, steps)]
    rows = []
    start, end, total = 0.1 * steps, 2 / 3 * steps, initial * len(sites)
    for step in range(0, steps + 1, max(steps // 60, 1)):
        left = 1 - min(max((step - start) / (end - start), 0), 1)
        budget = int(target + (total - target) * left**3)
        ranks = {s: round(final[s] + (initial - final[s]) * (budget - target) / (total - target)) for s in sites}
        wrong = sum(ranks.values()) - budget
        for site in sites:  # rounding left a few too many or too few
            change = max(min(wrong, ranks[site] - final[site]), ranks[site] - initial)
            ranks[site] -= change
            wrong -= change
        live = min(total, budget + (17 if 0 < left < 1 else 0))
        rows.append({"step": step, "budget": budget, "active": sum(ranks.values()), "live": live, "ranks": ranks})
    rows[-1]["step"] = steps
    return rows


def write_run(
    parent: Path,
    *,
    method: str = "lora",
    setting: str | None = None,
    seed: int = 0,
    rate: float = 1e-3,
    phase: str = "final",
    score: float | None = None,
    selection_score: float | None = None,
    error: str | None = None,
    finished: bool = True,
    study: str = "stsb-minilm",
    task: str = "glue/stsb",
    model: str = "sentence-transformers/all-MiniLM-L6-v2",
    quick: bool = False,
    steps: int = 540,
    sites: Sequence[str] = BERT_SITES,
    pack_size: int = 1,
    caption: Sequence[str] = tuple(CAPTION),
    seconds: float = 84.0,
    **changes: object,
) -> Path:
    """One run's folder by the contract; `changes` overwrite keys of result.json. Returns the folder."""
    setting = setting or method
    identity = [study, setting, task, model, phase, seed, rate]
    fingerprint = f"{zlib.crc32(repr(identity).encode()):08x}" * 3
    draw = np.random.default_rng(zlib.crc32(repr(identity).encode()))
    score = float(LEVELS.get(method, 84.0) + draw.normal(0, 0.25)) if score is None else score
    selection_score = score + 2.0 if selection_score is None else selection_score
    folder = parent / fingerprint
    low_rank = is_low_rank(method)
    config = {
        "schema": 1, "fingerprint": fingerprint, "study": study, "quick": quick, "phase": phase, "method": method,
        "setting": setting, "task": task, "model": model, "seed": seed, "learning_rate": rate,
        "method_settings": {"rank": 8, "alpha": 16} if low_rank else {},
        "training": {"epochs": 3, "batch_size": 32, "warmup": 0.06, "weight_decay": 0.01, "clip": 1.0},
        "targets": "all-linear", "targets_resolved": list(sites) if low_rank else [], "caption": list(caption),
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.1.0", "rankwise": "0.1.0"},
        "threads": 2, "device": "cpu", "device_name": "a processor", "precision": "float32",
        "commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False,
        "pack": {"index": seed % pack_size, "size": pack_size, "members": [fingerprint]},
    }  # fmt: skip
    write_json(folder / "config.json", config)
    ranks = final_ranks(method, seed, sites) if low_rank else {}
    lines = [] if low_rank is False else rank_lines(method, ranks, steps)
    start = 0.09 if method != "head" else 0.07
    metrics: list[dict] = []
    for step in range(1, steps + 1, 2):
        loss = (start - 0.02) * np.exp(-5 * step / steps) + 0.02 + abs(draw.normal(0, 0.004))
        metrics.append({"kind": "train", "step": step, "loss": float(loss), "learning_rate": rate, "penalty": 0.0})
        if step % max(steps // 6, 1) in (0, 1):
            value = selection_score - 4 * float(np.exp(-4 * step / steps))
            metrics.append({"kind": "evaluation", "step": step, "split": "validation", "epoch": 3 * step / steps,
                            "metrics": {"mean": value, "pearson": value + 0.1, "spearman": value - 0.1}})  # fmt: skip
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "ranks.jsonl", lines)
    if not finished:
        return folder
    failed = error is not None
    count = MILLIONS.get(method, 700_000)
    in_pack = pack_size > 1
    result = {
        "schema": 1, "study": study, "phase": phase, "fingerprint": fingerprint, "method": method, "setting": setting,
        "task": task, "model": model, "seed": seed, "learning_rate": rate, "status": "failed" if failed else "completed",
        "error": error, "traceback": "Traceback ..." if failed else None, "metric": "mean",
        "selection_score": None if failed else selection_score, "selection_split": "validation",
        "score": None if failed or phase == "sweep" else score, "split": "test",
        "metrics": {} if failed else {"validation": {"mean": selection_score}, "test": {"mean": score}},
        "steps": steps, "total_steps": steps, "epochs": 3, "skipped_steps": 0, "tokens_per_second": 5400.0,
        "seconds": seconds, "pack_seconds": seconds * pack_size, "pack_size": pack_size, "pack_index": seed % pack_size,
        "peak_memory_bytes": None if in_pack else 913 * 2**20, "pack_peak_memory_bytes": 1313 * 2**20 if in_pack else None,
        "trainable_parameters": int(1.5 * count) if "adalora" in method else count, "active_parameters": count,
        "head_parameters": 148_225, "scale": {site: 2.0 for site in sites} if low_rank else None, "ranks": ranks,
        "nominal_ranks": {site: 12 if "adalora" in method else 8 for site in sites} if low_rank else {},
        "device": "cpu", "precision": "float32", "dropout_note": "dropout inside fused attention is off for every method",
        "packing_note": None, "final_train_loss": 0.021,
    }  # fmt: skip
    write_json(folder / "result.json", result | changes)
    return folder


def write_anatomy(folder: Path, *, knocked: bool = True, slots: int = 12) -> Path:
    """sites.json, and knockout.json, beside a run that `write_run` wrote: the loss rises as the importance does."""
    config = json.loads((folder / "config.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    draw = np.random.default_rng(zlib.crc32(config["fingerprint"].encode()))
    ranks = result["ranks"] or dict.fromkeys(BERT_SITES, 384)
    sites, rises = {}, {}
    for place, (site, active) in enumerate(ranks.items()):
        scored = "adalora" in config["method"]
        scores = sorted(draw.lognormal(-8, 1, slots).tolist(), reverse=True) if scored else None
        sigma = [float(f"{0.3 * np.exp(-0.4 * i):.5g}") for i in range(min(active, 16))]
        importance = float(sum(scores[:active])) if scored else None
        sites[site] = {
            "nominal": result["nominal_ranks"].get(site, active), "active": active, "parameters": 768 * active,
            "share": active / max(sum(ranks.values()), 1), "update_norm": 0.5, "weight_norm": 20.0,
            "relative_norm": 0.01 + 0.001 * place, "effective_rank": 0.8 * active, "stable_rank": min(1.5, active),
            "energy_rank": min(3, active), "singular_values": sigma, "familiarity": [0.9] * 8 + [0.3] * 2, "intruders": 2,
            "importance": importance, "greatest_importance": scores[0] if scored and active else None, "scores": scores,
            "kept": "1" * active + "0" * (slots - active) if scored else None,
        }  # fmt: skip
        rises[site] = importance if scored else 0.001 * (place % 5)
    write_json(folder / "sites.json", {"schema": 1, "intruders": {"looked_at": 10, "cosine": 0.5}, "sites": sites})
    if knocked:
        measured = {site: {"loss": 0.5 + rise, "score": 80.0} for site, rise in rises.items()}
        write_json(folder / "knockout.json", {"schema": 1, "split": "validation", "rows": 128, "metric": "mean", "loss": 0.5,
                                              "score": 84.0, "sites": measured})  # fmt: skip
    return folder


def write_study(
    folder: Path,
    *,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0, 1, 2),
    sweep: bool = True,
    quick: bool = False,
    collapse: bool = True,
    complete: bool = True,
    **run: object,
) -> Path:
    """A whole study: a sweep of one seed, final runs at the best rate, LoRA collapsed at the highest one."""
    for method in methods:
        rates = RATES.get(method, LOW_RANK_RATES)
        level = LEVELS.get(method, 84.0)
        for i, rate in enumerate(rates if sweep else ()):
            lost = collapse and method == "lora" and i == 2
            write_run(folder, method=method, rate=rate, phase="sweep", score=level, pack_size=3, quick=quick,
                      selection_score=level + 1.5 - 0.7 * abs(i - 1) - 0.1 * i, seconds=31.0,
                      error="collapsed" if lost else None, **run)  # fmt: skip
        for seed in seeds:
            write_run(folder, method=method, seed=seed, rate=rates[1], quick=quick, pack_size=1 if method == "full" else
                      len(seeds), **run)  # fmt: skip
    write_json(
        folder / "study.json",
        {"schema": 1, "study": run.get("study", "stsb-minilm"), "quick": quick, "title": "Five methods on STS-B",
         "captions": [], "reference": "full" if "full" in methods else None, "methods": list(methods),
         "complete": complete},
    )  # fmt: skip
    return folder
