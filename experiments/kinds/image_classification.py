"""Images with one class each, by cross-entropy: ViT, DINOv2 and the other image classifiers of transformers."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rankwise.experiments.data import draws
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.data.images import Images
from rankwise.experiments.kinds.interface import Kind
from rankwise.experiments.kinds.one_class import OneClass
from torch import Tensor

MARGIN = 8  # a crop lies at most an eighth of the side away from the middle: 4 pixels of 32, as He et al. 2016 for CIFAR


class ImageClassification(OneClass, Kind):
    """Labels (K*N,), logits (K*N, C); pixel_values (K*N, 3, H, W), as the model's own image processor makes them."""

    auto_class = "AutoModelForImageClassification"
    predicted = (np.int64, ())
    has_images = True

    def model_settings(self, num_labels: int) -> dict[str, Any]:
        return {"num_labels": num_labels, "problem_type": "single_label_classification"}

    def processor(self, folder: Path) -> Any:
        import transformers

        # PIL's, where torchvision is at hand too: one image gives the same pixels on every machine.
        return transformers.AutoImageProcessor.from_pretrained(
            folder, backend="pil", trust_remote_code=False, local_files_only=True
        )

    def sized(self, processor: Any, image_size: int | None) -> Any:
        """With this side; where it crops, from an image that is larger by its own ratio."""
        if image_size is None:
            return processor
        sized, size = copy.deepcopy(processor), dict(processor.size)
        if getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None):
            ratio = image_size / min(dict(processor.crop_size).values())
            sized.crop_size = {"height": image_size, "width": image_size}
            sized.size = {side: round(length * ratio) for side, length in size.items() if length}
        elif getattr(processor, "do_resize", True) and size.keys() & {"height", "shortest_edge"}:
            sized.size = {side: image_size for side, length in size.items() if length}
        else:
            name = type(processor).__name__
            raise ValueError(f"training.image_size: a {name} resizes to {size} by a rule of its own: take it out")
        return sized

    def encode(self, examples: Examples, processor: Any, max_length: int) -> Images:
        return Images(examples.first, np.asarray(examples.labels, dtype=np.int64), processor)

    def collate(self, data: Images, rows: np.ndarray, size: None, processor: Any) -> dict[str, np.ndarray]:
        return {"pixel_values": data.pixels[rows] * data.scale + data.offset, "labels": data.labels[rows]}

    def augment(
        self, batch: dict[str, np.ndarray], rows: Sequence[np.ndarray], seeds: Sequence[int], step: int, how: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Crops at a random place and flips; what a crop has of the outside is the mean colour, zero."""
        pixels = batch["pixel_values"]
        height, width = pixels.shape[2:]
        margins = [height // MARGIN, width // MARGIN] if "crop" in how else [0, 0]
        padded = np.pad(pixels, [(0, 0), (0, 0), *((margin, margin) for margin in margins)])
        made = np.empty_like(pixels)
        keys = [(seed, int(row)) for seed, of_member in zip(seeds, rows, strict=True) for row in of_member]
        for image, source, (seed, row) in zip(made, padded, keys, strict=True):
            down, right, flipped = draws.numbers(3, seed, draws.AUGMENTATION, step, row)
            top, left = down % (2 * margins[0] + 1), right % (2 * margins[1] + 1)
            crop = source[:, top : top + height, left : left + width]
            image[...] = crop[:, :, ::-1] if "flip" in how and flipped % 2 else crop
        return batch | {"pixel_values": made}

    def training_losses(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor, members: int) -> Tensor:
        return self.losses(self.outputs(model, inputs), labels, members)

    def outputs(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """A model with a table of positions for one size is told to interpolate it for others."""
        is_other = takes_other_sizes(model) and list(inputs["pixel_values"].shape[2:]) != sides(model.config)
        return self.logits(model(**inputs, **({"interpolate_pos_encoding": True} if is_other else {})), inputs)


def takes_other_sizes(model: Any) -> bool:
    """Whether it has to be asked for the interpolation of its positions."""
    return "interpolate_pos_encoding" in inspect.signature(type(model).forward).parameters


def sides(config: Any) -> list[int] | None:
    """Height and width that a model was trained with; None where its configuration says none."""
    size = getattr(config, "image_size", None)
    return [size, size] if isinstance(size, int) else list(size) if size else None
