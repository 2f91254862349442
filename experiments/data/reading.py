"""Reading the files of a data set, and the hub's copy of it: every error names file and line, none shows a text."""

import os
import sys
from pathlib import Path
from typing import Any

from rankwise.experiments import sources
from rankwise.experiments.data.examples import Examples


def lines_of(path: Path) -> list[str]:
    """The lines of a text file, cut at line feeds only (texts may hold other separators), the last one not empty.

    Raises: ValueError: the file is empty or not UTF-8; names file and line, shows no text.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise malformed(path, data.count(b"\n", 0, error.start) + 1, "not UTF-8") from None
    lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"{path.name}: the file is empty; at least one example is needed")
    return lines


def malformed(path: Path, line: int, rule: str) -> ValueError:
    """The error for a data file that breaks its format. It never shows the text itself."""
    return ValueError(f"{path.name}, line {line}: {rule}; remove the file from {path.parent} to fetch it anew")


def hub_columns(name: str, path: str, config: str | None, split: str, tried: list[str], revision: str | None = None) -> dict:
    """The columns of one split of a data set on the hub, through `datasets` (its cache first).

    Raises: Unavailable: with what was tried before (`tried`) and why the hub did not help.
    """
    if not _datasets_cache_may_hold(path) and (reason := sources.hub_out_of_reach()):
        raise sources.Unavailable(name, [*tried, f"hub ({path}): {reason}"])
    try:
        import datasets

        with _quiet_datasets(datasets):
            rows = datasets.load_dataset(path, config, split=split, revision=revision)
        return {column: list(rows[column]) for column in rows.column_names}
    except Exception as error:  # the client's errors differ between versions; all of them mean: not from there
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise sources.Unavailable(name, [*tried, f"hub ({path}): {reason}"]) from None


def _datasets_cache_may_hold(path: str) -> bool:
    cache = os.environ.get("HF_DATASETS_CACHE") or sources.huggingface_home() / "datasets"
    return (Path(cache).expanduser() / path.replace("/", "___")).is_dir()


def check_pinned(name: str, examples: Examples, sha256: str, path: str, tried: list[str]) -> Examples:
    """The hub's copy of data that we pin, taken only where texts and labels are the same."""
    if examples.content_hash() != sha256:
        raise sources.Unavailable(name, [*tried, f"hub ({path}): its texts or labels differ from the pinned ones"])
    return examples


class _quiet_datasets:
    """Progress bars of `datasets` only on a terminal."""

    def __init__(self, datasets: Any):
        self.datasets = datasets
        self.silence = not sys.stderr.isatty() and datasets.utils.logging.is_progress_bar_enabled()

    def __enter__(self) -> None:
        if self.silence:
            self.datasets.utils.logging.disable_progress_bar()

    def __exit__(self, *_: Any) -> None:
        if self.silence:
            self.datasets.utils.logging.enable_progress_bar()
