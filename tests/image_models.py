"""Small random models of images, saved as a hub has them, and small pictures that can be told apart."""

from pathlib import Path

import numpy as np
import torch
import transformers
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.data.images import Pixels
from rankwise.experiments.tasks import Task
from rankwise.experiments.tasks.metrics import accuracy_and_macro_f1

SIZES = {"train": 40, "validation": 12, "test": 15}
LABELS = ("top", "middle", "bottom")
SIDE = 16
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {
    "vit": lambda: transformers.ViTConfig(**SHAPE, image_size=SIDE, patch_size=4),
    "dinov2": lambda: transformers.Dinov2Config(
        **{k: v for k, v in SHAPE.items() if k != "intermediate_size"}, mlp_ratio=2, image_size=SIDE, patch_size=4
    ),
}
PROCESSORS = {
    "vit": {"size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
    "dinov2": {"size": {"shortest_edge": 20}, "crop_size": {"height": SIDE, "width": SIDE}},
}


def saved(folder: Path, name: str = "vit") -> str:
    """The id (a folder) of a tiny model without a head, and its image processor."""
    processor = {"vit": "ViTImageProcessorPil", "dinov2": "BitImageProcessorPil"}[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(CONFIGS[name]())
        for parameter in model.parameters():  # zeros and ones hide mistakes
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
        if name == "vit":  # whose classifier has none
            model.pooler = None
        model.save_pretrained(folder)
    getattr(transformers, processor)(**PROCESSORS[name]).save_pretrained(folder)
    return str(folder)


def classifier(dtype: torch.dtype = torch.float64, dropout: float = 0.1) -> torch.nn.Module:
    """A tiny ViT with a head, in training mode, the same values every time; in the place of `tiny.tiny`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.ViTConfig(**SHAPE, image_size=SIDE, patch_size=4, num_labels=3, hidden_dropout_prob=dropout)
        model = transformers.ViTForImageClassification(config)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model.to(dtype).train()


def batch(seed: int, step: int = 0, rows: int = 4, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Random pixels and labels of one member; in the place of `tiny.batch`."""
    random = torch.Generator().manual_seed(1000 * seed + step)
    pixels = torch.randn(rows, 3, SIDE, SIDE, generator=random, dtype=torch.float64)
    return {"pixel_values": pixels.to(dtype), "labels": torch.randint(3, (rows,), generator=random)}


def examples(split: str) -> Examples:
    """Wide images of three classes, by which third of the image is bright."""
    random = np.random.default_rng(list(SIZES).index(split))
    labels = random.integers(0, 3, SIZES[split])
    values = random.integers(0, 90, (SIZES[split], 24, 30, 3), dtype=np.uint8)
    for image, label in zip(values, labels, strict=True):
        image[8 * label : 8 * label + 8] += 160
    return Examples([Pixels(image) for image in values], None, labels)


TASK = Task(
    name="small/images",
    kind="image-classification",
    num_labels=3,
    label_names=LABELS,
    metric="accuracy",
    licence="made up",
    read=examples,
    measure=accuracy_and_macro_f1,
    identity=lambda: "images 1",
)
