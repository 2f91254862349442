"""Fashion-MNIST: which of ten kinds of clothing a grey image of 28 x 28 pixels shows (Xiao, Rasul and Vollgraf 2017)."""

import functools
import gzip
import zlib
from pathlib import Path

import numpy as np
from rankwise.experiments import sources
from rankwise.experiments.data.draws import carve
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.data.images import Pixels
from rankwise.experiments.tasks.metrics import accuracy_and_macro_f1
from rankwise.experiments.tasks.task import Task

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
OFFICIAL = {"train": 60_000, "test": 10_000}
VALIDATION = 6_000  # 10 % of the official training part
HUB = "zalando-datasets/fashion_mnist"  # the same images as Parquet
FILES = {"train": "train", "test": "t10k"}


def parse(path: Path) -> np.ndarray:
    """The bytes of an idx file: two zeros, the type (8: bytes), the number of axes, each axis in four bytes, the values.

    Raises: ValueError: another type, or a file that is cut off; names the file.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path.name}: no whole gzip file ({error})") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name}: no idx file of bytes")
    axes = content[3]
    shape = tuple(np.frombuffer(content[4 : 4 + 4 * axes], dtype=">u4").astype(int).tolist())
    values = np.frombuffer(content[4 + 4 * axes :], dtype=np.uint8)
    if len(shape) != axes or values.size != np.prod(shape):
        raise ValueError(f"{path.name}: {values.size} values where its header says {' x '.join(map(str, shape))}")
    return values.reshape(shape)


@functools.lru_cache(maxsize=2)
def official(part: str, folder: Path) -> Examples:
    """The examples of an official part.

    Raises: ValueError: images and labels that do not fit each other, or other classes.
    """
    images = parse(folder / f"{FILES[part]}-images-idx3-ubyte.gz")
    labels = parse(folder / f"{FILES[part]}-labels-idx1-ubyte.gz")
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise ValueError(f"{folder}: images of shape {images.shape} and labels of shape {labels.shape}")
    if labels.max(initial=0) >= len(CLASSES):
        raise ValueError(f"{folder}: a label is {labels.max()}, and there are {len(CLASSES)} classes")
    return Examples([Pixels(image) for image in images], None, labels.astype(np.int64))


def read(split: str) -> Examples:
    """
    Raises: Unavailable: no source could give it; says how the hub's copy, of another form, can be used instead.
    """
    try:
        folder = sources.fetch("fashion-mnist")
    except sources.Unavailable as error:
        hint = f'hub: give its copy as data of your own ([[data]] train = "{HUB}", test = "{HUB}")'
        raise sources.Unavailable(error.name_wanted, [line for line in error.tried if "hub:" not in line] + [hint]) from None
    if split == "test":
        return official("test", folder)
    examples = official("train", folder)
    kept = carve(np.asarray(examples.labels), VALIDATION) == (split == "validation")
    return examples.select(np.flatnonzero(kept))


ENTRY = sources.CATALOGUE["fashion-mnist"]
TASKS = (
    Task(
        name="fashion-mnist",
        kind="image-classification",
        num_labels=len(CLASSES),
        label_names=CLASSES,
        metric="accuracy",
        licence=ENTRY.licence,
        data="fashion-mnist",
        sizes={"train": OFFICIAL["train"] - VALIDATION, "validation": VALIDATION, "test": OFFICIAL["test"]},
        read=read,
        measure=accuracy_and_macro_f1,
        identity=lambda: sources.content_hash("fashion-mnist"),
        caption=(
            f"Fashion-MNIST has no official validation part: {VALIDATION:,} of the {OFFICIAL['train']:,} training images "
            "(10 % of each class, drawn once with a fixed seed) are kept out of training to choose on.",
        ),
        captions_by_model={
            "dinov2-small-saliency": (
                "The model is DINOv2-small after a third party tuned it further for saliency: its scores say nothing of "
                "facebook/dinov2-small.",
            ),
        },
    ),
)
