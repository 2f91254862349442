"""`rankwise list`: what there is."""

import importlib.resources
import json
from dataclasses import asdict
from pathlib import Path

from rankwise.experiments.cli.options import Json
from rankwise.variants.settings import METHODS


def list_(as_json: Json = False) -> None:
    """List the methods, how they place rank, what each can do, models, tasks, kinds of data, and studies there are."""
    from rankwise.experiments import config, recipes, sources, tasks
    from rankwise.experiments.tasks.own_kinds import KINDS

    rows = {
        "methods": {m.name: f"{m.summary} ({m.source})" for m in METHODS.values()},
        "placements": {m.name: asdict(m.placement) for m in METHODS.values() if m.placement is not None},
        "abilities": abilities(),
        "models": {name: f"{e.kind}, {e.licence}" for name, e in sources.CATALOGUE.items() if e.kind == "model"},
        "tasks": {name: tasks.get(name).licence for name in tasks.names()},
        "kinds": {name: f"fields {kind.fields}; metrics {', '.join(kind.metrics)}" for name, kind in KINDS.items()},
        "studies": {name: first_comment(path) for name, path in config.shipped().items()},
        "papers": {name: recipes.load(name).title for name in recipes.names()},
    }
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for kind, entries in rows.items():
        print(kind)
        width = max(map(len, entries), default=0)
        for name, entry in entries.items():
            text = entry if isinstance(entry, str) else ", ".join(_said(key, word) for key, word in entry.items() if word)
            print(f"  {name:<{width}}  {text}")


def abilities() -> dict[str, dict[str, bool]]:
    """What each method can do, as it was tried when it was written down (tests/method_matrix.py)."""
    text = importlib.resources.files("rankwise.variants.settings").joinpath("abilities.json").read_text("utf-8")
    return json.loads(text)


def _said(key: str, word: str | bool) -> str:
    return key if word is True else f"{key} {word}"


def first_comment(path: Path) -> str:
    """The first line of a study file, where it is a comment."""
    first = path.read_text(encoding="utf-8-sig").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
