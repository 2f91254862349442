"""What a kind of task says of itself, and nobody else knows: model class, rows, loss, predictions, score, head.

The trainer, the knock-out and the loader of models call these functions and name no kind.  What stands here as a default
is right for rows of one shape (images, say) with one label and one prediction each; text.py has what rows of tokens need.
A kind holds no state: one instance serves every task and model.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from rankwise.experiments.data.draws import EPOCH_ROWS, shuffled

if TYPE_CHECKING:
    from rankwise.experiments.data.dataset import Dataset
    from rankwise.experiments.data.examples import Examples
    from torch import Tensor

# The rows of one batch, and the size to which they are brought (of text: tokens); None where all rows have one shape.
Planned = tuple[np.ndarray, int | None]


@dataclass(frozen=True)
class Seen:
    """A row as a model takes it, for people to look at.

    name: what the row is of its example ("target", "window 2"), where it is not all of it.
    tokens: the text of each. is_scored: of each, whether the loss is taken of it.
    label: what the row as a whole should give, where it is not its tokens that are scored.
    """

    tokens: tuple[str, ...]
    is_scored: tuple[bool, ...]
    name: str = ""
    label: str = ""


class Undefined(ArithmeticError):
    """A metric that has no value: error is the name for result.json ("collapsed"), detail says which and why."""

    def __init__(self, error: str, detail: str):
        self.error, self.detail = error, detail
        super().__init__(f"{error}: {detail}")


def at_least_fp32(logits: "Tensor") -> "Tensor":
    """Logits precise enough to take a loss of."""
    return logits.float() if logits.element_size() < 4 else logits


class Kind(ABC):
    """One kind of task.

    auto_class: the class of transformers that has the head. predicted: numpy type and shape of what is predicted for one
    row; `object` where that is no fixed number of numbers (a text, say). has_images: whether rows are images, which a
    study's settings image_size and augmentation are about.
    """

    auto_class: ClassVar[str]
    predicted: ClassVar[tuple[type, tuple[int, ...]]]
    has_images: ClassVar[bool] = False

    # -- the model ---------------------------------------------------------------------------------------------------

    def model_class(self, config: Any) -> str:
        """The class of transformers for a model of this configuration. Raises: ValueError: such models are of no use here."""
        return self.auto_class

    def model_settings(self, num_labels: int) -> dict[str, Any]:
        """What the model's configuration must say."""
        return {"num_labels": num_labels}

    @abstractmethod
    def processor(self, folder: Path) -> Any:
        """What turns examples into a model's inputs, read from the model's folder: of text its tokenizer."""

    def fit(self, processor: Any, config: Any) -> None:  # noqa: B027  (most kinds have nothing to do)
        """Makes processor and model configuration agree, before the model is made."""

    def head_names(self, model: Any, missing: Iterable[str] = ()) -> list[str]:
        """The modules of which every member trains a copy, in the model's order.

        Here what is made fresh for the task: all that stands outside the base model, and its pooler where the checkpoint
        had none.  A kind whose head comes with the checkpoint (a language model's, even where it is not tied to the
        embeddings) says so by another answer.

        missing: names of the parameters that were not in the checkpoint. Each name is the largest module all of whose
        parameters are new: "classifier" for BERT and RoBERTa, "score" for GPT-2, "pooler" and "classifier" for DeBERTa.
        """
        base = model.base_model_prefix
        fresh = {name for name, _ in model.named_parameters() if name.split(".")[0] != base}
        fresh |= {name for name in missing if "pooler" in name.split(".")}
        heads = []

        def descend(module: Any, path: str) -> None:
            names = [f"{path}.{name}" for name, _ in module.named_parameters()]
            if names and fresh.issuperset(names):
                heads.append(path)
            else:
                for name, child in module.named_children():
                    descend(child, f"{path}.{name}")

        for name, child in model.named_children():
            descend(child, name)
        return heads

    def sized(self, processor: Any, image_size: int | None) -> Any:
        """The processor for images of that side, in pixels; of other rows the same."""
        return processor

    # -- rows and batches --------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, examples: "Examples", processor: Any, max_length: int) -> "Dataset":
        """These examples as rows. max_length: in tokens, where rows have any."""

    def encode_split(self, task: Any, split: str, processor: Any, max_length: int) -> "Dataset":
        """One split of a task as rows; a kind whose rows take long to make keeps them in the user's cache."""
        return self.encode(task.examples(split), processor, max_length)

    def plan(self, data: "Dataset", batch_size: int, seed: int, epoch: int) -> list[Planned]:
        """The batches of one epoch for one seed: every row once.

        The number of rows of each batch, and their size, must be the same for every seed, or members cannot be packed.
        """
        order = shuffled(len(data), seed, EPOCH_ROWS, epoch)
        return [(order[at : at + batch_size], None) for at in range(0, len(order), batch_size)]

    def evaluation_plan(self, data: "Dataset", batch_size: int) -> list[Planned]:
        """Every row once, nothing shuffled."""
        return [(np.arange(at, min(at + batch_size, len(data))), None) for at in range(0, len(data), batch_size)]

    @abstractmethod
    def collate(self, data: "Dataset", rows: np.ndarray, size: int | None, processor: Any) -> dict[str, np.ndarray]:
        """A batch to train on: the model's inputs by name, each with the rows first, and "labels"."""

    def augment(
        self, batch: dict[str, np.ndarray], rows: Sequence[np.ndarray], seeds: Sequence[int], step: int, how: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """A batch to train on with its inputs changed at random, as a study asks for it.

        Like dropout it is keyed, by the member's seed, the step and the row: a packed member sees what it would see alone,
        and a run that goes on what it would have seen.

        rows: of each member, in the order of the batch. how: what a study may name (`Training.augmentation`).
        """
        return batch

    def collate_evaluation(self, data: "Dataset", rows: np.ndarray, size: int | None, processor: Any) -> dict[str, np.ndarray]:
        """A batch to predict; differs where a model is asked otherwise than it is trained (padding on the left, say)."""
        return self.collate(data, rows, size, processor)

    def whole_lengths(self, examples: "Examples", processor: Any) -> np.ndarray | None:
        """(n,) how much of max_length each example would take with nothing cut, in tokens; None where rows have no length."""
        return None

    def lost(self, processor: Any) -> str | None:
        """What becomes of an example that is longer than max_length; None where nothing of it is lost."""
        return None

    def num_rows(self, lengths: np.ndarray, max_length: int) -> int:
        """How many rows examples of these (n,) whole lengths are trained on as."""
        return len(lengths)

    def seen(self, data: "Dataset", row: int, processor: Any, labels: Sequence[str]) -> list[Seen]:
        """The row-th of a split, as the model takes it; nothing where rows are no tokens. labels: names of the classes."""
        return []

    def num_tokens(self, batch: Mapping[str, "Tensor"]) -> int:
        """Tokens of a batch without its padding, for tokens_per_second; 0 where rows have none."""
        return 0

    # -- loss --------------------------------------------------------------------------------------------------------

    def logits(self, output: Any, batch: Mapping[str, "Tensor"]) -> "Tensor":
        """(K*N, ...): what the loss reads of a model's output, each member's rows together."""
        return output.logits

    def training_losses(self, model: Any, inputs: Mapping[str, "Tensor"], labels: "Tensor", members: int) -> "Tensor":
        """(K,): each member's loss on a batch; a kind whose logits would take too much memory gets there without them."""
        return self.losses(self.logits(model(**inputs), inputs), labels, members)

    def example(self, config: Any, num_labels: int, rows: int, size: int | None) -> "dict[str, Tensor]":
        """A batch of the shapes that training has, without meaning: what `rankwise plan` counts a step's bytes with.

        Here that of images, with a class each. size: of text the tokens of each row; of images the pixels of a side, None where
        it is that of the model's configuration.
        """
        import torch

        side = size or config.image_size
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        pixels = torch.zeros(rows, config.num_channels, height, width)
        return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.int64)}

    def example_losses(
        self, model: Any, inputs: "Mapping[str, Tensor]", labels: "Tensor", members: int
    ) -> "tuple[Tensor, int]":
        """(K,) losses of an `example`, and the bytes of the logits that they read."""
        logits = self.outputs(model, inputs)
        return self.losses(logits, labels, members), logits.numel() * logits.element_size()

    @abstractmethod
    def losses(self, logits: "Tensor", labels: "Tensor", members: int) -> "Tensor":
        """(K,): each member's loss, the mean over its own rows, or over its own scored tokens."""

    def counts(self, labels: "Tensor", members: int) -> "Tensor":
        """(K,): over how many rows or scored tokens each member's mean is taken."""
        return labels.new_full((members,), len(labels) // members, dtype=int)

    # -- predictions and scores --------------------------------------------------------------------------------------

    def outputs(self, model: Any, inputs: Mapping[str, "Tensor"]) -> "Tensor":
        """(K*N, ...): what a batch is predicted from: one pass here; tokens that a model generates, in such a kind.

        Of one shape for every member, whichever of them is merged into the model.
        """
        return self.logits(model(**inputs), inputs)

    def evaluation_losses(
        self, model: Any, inputs: Mapping[str, "Tensor"], outputs: "Tensor", labels: "Tensor", members: int
    ) -> "Tensor":
        """(K,): each member's loss on a batch of an evaluation; a kind whose outputs are no logits passes once more."""
        return self.losses(outputs, labels, members)

    @abstractmethod
    def predictions(self, outputs: "Tensor") -> Any:
        """(K*N, ...): for each row what is predicted, a tensor or an array."""

    def decoded(self, predicted: np.ndarray, processor: Any) -> np.ndarray:
        """(K*N, ...): the predictions of a batch as they are kept: texts, where a model gave tokens."""
        return predicted

    def empty(self, data: "Dataset", members: int) -> np.ndarray:
        """(K, n, ...): room for every member's predictions of a split."""
        dtype, shape = self.predicted
        return np.zeros((members, len(data), *shape), dtype)

    def place(self, kept: np.ndarray, data: "Dataset", rows: np.ndarray, size: int | None, predicted: np.ndarray) -> None:
        """Puts the predictions of a batch, (K, N, ...), where `empty` has room for its rows."""
        kept[:, rows] = predicted

    @abstractmethod
    def scored(self, predictions: Any, labels: Any, offsets: np.ndarray | None) -> tuple[tuple, int]:
        """What `Task.measure` takes, and the number of examples that it is about.

        The arguments are those of `Task.metrics`; its standard error is that of so many examples.
        """

    def samples(self, data: "Dataset", predictions: np.ndarray, processor: Any) -> list[dict[str, Any]]:
        """A few rows of a split and what was predicted of them, for people to read: keys of `records.Sample`.

        The same rows for every run. None but where predictions are texts.
        """
        return []

    def stored(self, predictions: np.ndarray) -> np.ndarray | dict[str, np.ndarray] | None:
        """One member's predictions of a split as a finished run keeps them, an array or several by name.

        None where they are too large to keep.
        """
        return predictions
