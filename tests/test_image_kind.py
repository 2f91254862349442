"""A kind of task whose rows are images, defined here alone: what a new kind needs, and that nothing else is text.

Images of 8 x 8 pixels in three classes, by which third of the image is bright, and a tiny ViT.
"""

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from rankwise.experiments import kinds, knockout, models
from rankwise.experiments.data.dataset import Dataset
from rankwise.experiments.kinds import Kind
from rankwise.experiments.kinds.predictions import as_array, as_classes, by_row
from rankwise.experiments.tasks import Task
from rankwise.experiments.tasks.metrics import accuracy_and_macro_f1
from rankwise.experiments.training.pack import Pack
from torch.nn import functional as F

from tests import small_world
from tests.test_trainer import Stop, assert_near, assert_same, lines, logs, stopping_after, trained_tensors

SIZES = {"train": 40, "validation": 12, "test": 15}


class Images(Dataset):
    """pixels: (n, 3, 8, 8) float32. labels: (n,) int64."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray):
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def content(self) -> Iterator[bytes]:
        yield from (self.pixels.tobytes(), self.labels.tobytes())

    def select_examples(self, examples) -> "Images":
        return Images(self.pixels[examples], self.labels[examples])


class ImageClassification(Kind):
    auto_class = "AutoModelForImageClassification"
    predicted = (np.int64, ())

    def processor(self, folder):
        return None  # the pixels are ready

    def encode(self, examples: Images, processor, max_length) -> Images:
        return examples

    def collate(self, data: Images, rows, size, processor):
        assert size is None
        return {"pixel_values": data.pixels[rows], "labels": data.labels[rows]}

    def losses(self, logits, labels, members):
        return F.cross_entropy(logits, labels, reduction="none").view(members, -1).mean(1)

    def predictions(self, outputs):
        return outputs.argmax(-1)

    def scored(self, predictions, labels, offsets):
        return by_row(as_classes(as_array(predictions)), labels)


def images(split: str) -> Images:
    random = np.random.default_rng(list(SIZES).index(split))
    labels = random.integers(0, 3, SIZES[split])
    pixels = random.normal(0, 0.3, (SIZES[split], 3, 8, 8)).astype(np.float32)
    for image, label in zip(pixels, labels, strict=True):
        image[:, 3 * label : 3 * label + 2] += 1
    return Images(pixels, labels)


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """Makes a pack over a tiny ViT; the kind is registered by its one line."""
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(kinds.REGISTRY, "image-classification", f"{__name__}:ImageClassification")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    task = Task(
        name="small/images",
        kind="image-classification",
        num_labels=3,
        metric="accuracy",
        licence="made up",
        read=images,
        measure=accuracy_and_macro_f1,
        identity=lambda: "images 1",
    )

    def made(method: str, seeds: tuple[int, ...], rates: tuple[float, ...]) -> Pack:
        one = small_world.pack(str(tmp_path / "vit"), method, seeds=seeds, learning_rates=rates, accumulation=2)
        return replace(one, task=task, targets=["q_proj", "mlp.fc1"])

    return made


def data_of(pack) -> dict[str, Images]:
    return {split: pack.task.encode(None, split, 24) for split in SIZES}


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_a_kind_without_text_trains_packed_as_alone(pack, tmp_path, monkeypatch, method):
    load = models.load

    def load_double(*args):
        model, processor, info = load(*args)
        return model.double(), processor, info

    monkeypatch.setattr("rankwise.experiments.training.trainer.models.load", load_double)
    seeds, rates = (5, 2), (2e-2, 4e-3)

    def doubled(one):
        return {split: Images(part.pixels.astype(np.float64), part.labels) for split, part in data_of(one).items()}

    packed = pack(method, seeds, rates)
    together, outcomes = small_world.trained(packed, tmp_path / "together", data=doubled(packed))
    assert together.info.heads == ("classifier",) and together.kind.num_tokens({}) == 0
    for k, (seed, rate) in enumerate(zip(seeds, rates, strict=True)):
        one = pack(method, (seed,), (rate,))
        alone, (expected,) = small_world.trained(one, tmp_path / f"alone-{k}", data=doubled(one))
        for name, tensor in trained_tensors(alone).items():
            torch.testing.assert_close(trained_tensors(together)[name][k], tensor[0], rtol=1e-9, atol=1e-12, msg=name)
        assert outcomes[k].error is expected.error is None
        assert outcomes[k].metrics == expected.metrics and outcomes[k].rows == {"validation": 12, "test": 15}
        assert outcomes[k].facts["tokens_per_second"] is None
        assert_near(lines(together, k), lines(alone), 1e-9)
    assert lines(together, 0)[-1]["loss"] < lines(together, 0)[0]["loss"]
    assert lines(together, 0)[0]["loss"] != lines(together, 1)[0]["loss"]


def test_a_run_over_images_that_is_stopped_ends_bit_for_bit_the_same(pack, tmp_path):
    packed = pack("lora", (5, 2), (2e-2, 4e-3))
    data = data_of(packed)
    whole, expected = small_world.trained(packed, tmp_path / "whole", data=data)
    cut = small_world.trainer(packed, tmp_path / "cut", data=data, checkpoint_seconds=0.0, progress=stopping_after(6))
    with pytest.raises(Stop):
        cut.run()
    assert 0 < cut.step < cut.total
    again, outcomes = small_world.trained(packed, tmp_path / "cut", data=data)
    assert_same(again, whole)
    assert logs(again) == logs(whole)
    for one, other in zip(outcomes, expected, strict=True):
        assert one.metrics == other.metrics
        assert all(np.array_equal(one.predictions[split], other.predictions[split]) for split in ("validation", "test"))


def test_what_a_site_of_an_image_model_is_worth_is_measured(pack, tmp_path):
    packed = pack("lora", (5, 2), (2e-2, 4e-3))
    trainer, _ = small_world.trained(packed, tmp_path / "run", data=data_of(packed))
    part = trainer.data["validation"].random_part(9, 4)
    first, second = knockout.knock_out(trainer.adapter, trainer.processor, packed.task, "validation", part, 4)
    assert (first["rows"], len(first["sites"])) == (9, 4) and json.dumps(first) != json.dumps(second)
