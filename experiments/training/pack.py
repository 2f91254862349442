"""What trains together, and what becomes of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from rankwise.experiments.config import Training
from rankwise.experiments.tasks.task import Task
from rankwise.variants.adapter.kinds.scheme import Scheme
from rankwise.variants.settings import Settings, check


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Members of one method that train together; K = len(seeds)."""

    method: str
    settings: Settings
    targets: str | list[str]
    task: Task
    model: str
    training: Training
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    splits: tuple[str, ...]  # evaluated at the end; the first is also evaluated along the way
    device: torch.device
    precision: str
    quantization: Scheme | None = None  # of the base
    best_epoch: bool = False  # the first split's best evaluation is what counts, not the last

    @property
    def members(self) -> int:
        return len(self.seeds)

    def identity(self) -> str:
        """Everything that a checkpoint must agree with to be this pack's."""
        settings = self.settings.model_dump(mode="json")
        training = {**self.training.identity(), "head_learning_rate": self.training.head_learning_rate}
        parts = [self.method, settings, self.targets, self.task.name, self.model, training, self.seeds, self.learning_rates]
        parts += [self.splits, self.device.type, self.precision, *(["best epoch"] if self.best_epoch else [])]
        return json.dumps(parts if self.quantization is None else [*parts, self.quantization.as_fact()])

    def as_words(self) -> dict[str, Any]:
        """The pack as JSON can hold it, for another process."""
        return {
            "settings": self.settings.model_dump(mode="json", exclude_unset=True),
            "task": self.task.name,
            "training": self.training.model_dump(mode="json"),
            "quantization": None if self.quantization is None else self.quantization.as_fact(),
            **{name: getattr(self, name) for name in ("method", "targets", "model", "seeds", "learning_rates", "splits")},
            **{name: getattr(self, name) for name in ("precision", "best_epoch")},
        }

    @classmethod
    def of_words(cls, words: Mapping[str, Any], task: Task, device: torch.device) -> Self:
        """What `as_words` gave, on a device of this process."""
        return cls(
            settings=check(words["method"], words["settings"]),
            task=task,
            training=Training(**words["training"]),
            quantization=Scheme.of_fact(words["quantization"]),
            device=device,
            **{name: tuple(words[name]) for name in ("seeds", "learning_rates", "splits")},
            **{name: words[name] for name in ("method", "targets", "model", "precision", "best_epoch")},
        )


@dataclass
class Outcome:
    """What became of one member.

    By split: metrics, the standard error of the primary metric (points), the number of rows scored (of questions, where
    rows are their windows), and the predictions that were scored, in the order of the split's rows.
    """

    error: str | None = None
    detail: str | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    standard_errors: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    predictions: dict[str, np.ndarray] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
