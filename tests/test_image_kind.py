"""Image classification: the processor's own pixels, packed as alone, resumed to the bit, augmented by key."""

import errno
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rankwise import variants
from rankwise.experiments import config, kinds, knockout, models
from rankwise.experiments.config import Training
from rankwise.experiments.data import draws
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.data.images import Images, Pixels, upright
from rankwise.experiments.study.prepare import prepare
from rankwise.experiments.training.batches import Batches
from rankwise.experiments.training.pack import Pack

from tests import image_models, small_world
from tests.image_models import SIDE, SIZES, TASK
from tests.test_trainer import Stop, assert_near, assert_same, lines, logs, stopping_after, trained_tensors

KIND = kinds.get("image-classification")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    parent = tmp_path_factory.mktemp("images")
    return {name: image_models.saved(parent / name, name) for name in image_models.CONFIGS}


@pytest.fixture(params=["vit", "dinov2"])
def model(request, folders) -> str:
    return folders[request.param]


@pytest.fixture
def vit(folders) -> str:
    return folders["vit"]


@pytest.fixture
def dinov2(folders) -> str:
    return folders["dinov2"]


def pack(model: str, method: str, seeds=(5, 2), rates=(2e-2, 4e-3), **training) -> Pack:
    changes = {"accumulation": 2, "augmentation": ["crop", "flip"], "max_steps": 7, **training}  # an epoch is of 7 steps
    one = small_world.pack(model, method, seeds=seeds, learning_rates=rates, **changes)
    return replace(one, task=TASK, targets=["q_proj", "mlp.fc1", "projection"])


def data_of(model: str, dtype=np.float32, image_size=None) -> dict[str, Images]:
    _, processor, _ = models.load(model, TASK, image_size=image_size)
    data = {split: TASK.encode(processor, split, 24) for split in SIZES}
    for one in data.values():
        one.scale, one.offset = one.scale.astype(dtype), one.offset.astype(dtype)
    return data


@pytest.mark.parametrize(
    ("model", "method"), [("vit", "lora"), pytest.param("dinov2", "adalora", marks=pytest.mark.slow)], indirect=["model"]
)
def test_packed_as_alone(model, tmp_path, in_float64, method):
    """With a convolution (the patch projection) among the sites, and random crops and flips."""
    data, seeds, rates = data_of(model, np.float64), (5, 2), (2e-2, 4e-3)
    targets = ["q_proj", "mlp.fc1"] if method == "adalora" else ["q_proj", "mlp.fc1", "projection"]
    together, outcomes = small_world.trained(replace(pack(model, method), targets=targets), tmp_path / "together", data=data)
    assert together.info.heads == ("classifier",) and together.kind.num_tokens({}) == 0
    for k, (seed, rate) in enumerate(zip(seeds, rates, strict=True)):
        one = replace(pack(model, method, (seed,), (rate,)), targets=targets)
        alone, (expected,) = small_world.trained(one, tmp_path / f"alone-{k}", data=data)
        for name, tensor in trained_tensors(alone).items():
            torch.testing.assert_close(trained_tensors(together)[name][k], tensor[0], rtol=1e-9, atol=1e-12, msg=name)
        assert outcomes[k].error is expected.error is None
        assert outcomes[k].metrics == expected.metrics and outcomes[k].rows == {"validation": 12, "test": 15}
        assert outcomes[k].facts["tokens_per_second"] is None
        assert_near(lines(together, k), lines(alone), 1e-9)
    assert lines(together, 0)[0]["loss"] != lines(together, 1)[0]["loss"]


def test_a_stopped_run_ends_bit_for_bit_the_same(vit, tmp_path):
    packed, data = pack(vit, "lora"), data_of(vit)
    whole, expected = small_world.trained(packed, tmp_path / "whole", data=data)
    cut = small_world.trainer(packed, tmp_path / "cut", data=data, checkpoint_seconds=0.0, progress=stopping_after(4))
    with pytest.raises(Stop):
        cut.run()
    assert 0 < cut.step < cut.total
    again, outcomes = small_world.trained(packed, tmp_path / "cut", data=data)
    assert_same(again, whole)
    assert logs(again) == logs(whole)
    for one, other in zip(outcomes, expected, strict=True):
        assert one.metrics == other.metrics
        assert all(np.array_equal(one.predictions[split], other.predictions[split]) for split in ("validation", "test"))


def test_a_site_is_worth_something_and_files_go_to_peft_and_back(dinov2, tmp_path):
    import peft

    packed, data = pack(dinov2, "lora"), data_of(dinov2)
    trainer, _ = small_world.trained(packed, tmp_path / "run", data=data)
    first, second = knockout.knock_out(
        trainer.adapter, trainer.processor, TASK, "validation", data["validation"].random_part(9, 4), 4
    )
    assert (first["rows"], len(first["sites"])) == (9, 5) and json.dumps(first) != json.dumps(second)
    variants.save_pretrained(trainer.adapter, tmp_path / "ours", member=1)
    pixels = torch.from_numpy(KIND.collate(data["test"], np.arange(4), None, None)["pixel_values"])
    trainer.adapter.merge(1)
    expected = trainer.model.eval()(pixel_values=pixels).logits
    trainer.adapter.unmerge()
    theirs = peft.PeftModel.from_pretrained(models.load(dinov2, TASK)[0], tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(pixel_values=pixels).logits, expected, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = models.load(dinov2, TASK)[0]
    variants.load_pretrained(again, tmp_path / "theirs")
    torch.testing.assert_close(again.eval()(pixel_values=pixels).logits, expected, rtol=1e-4, atol=1e-5)
    assert trainer.model.config.id2label == {0: "top", 1: "middle", 2: "bottom"}


# -- pixels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [None, 24])
def test_pixels_are_those_of_the_models_own_processor(model, image_size):
    data = data_of(model, image_size=image_size)["test"]
    assert data.pixels.dtype == np.uint8 and data.pixels.shape == (15, 3, *[image_size or SIDE] * 2)
    loaded, processor, _ = models.load(model, TASK)
    options = {}
    if image_size and "dinov2" in model:  # shortest edge 20 for a crop of 16
        options = {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 24}}
    elif image_size:
        options = {"size": {"height": 24, "width": 24}}
    expected = processor(images=[p.image() for p in data.pictures], return_tensors="np", **options)["pixel_values"]
    batch = KIND.collate(data, np.array([3, 0, 7]), None, processor)
    np.testing.assert_allclose(batch["pixel_values"], expected[[3, 0, 7]], atol=2e-5)
    assert batch["pixel_values"].dtype == np.float32 and batch["labels"].tolist() == data.labels[[3, 0, 7]].tolist()
    logits = KIND.outputs(loaded, {"pixel_values": torch.from_numpy(batch["pixel_values"])})  # of another size too
    assert logits.shape == (3, 3)
    assert data.select_examples([3]).pixels.shape[0] == 1
    assert np.array_equal(data.select_examples([3]).pixels[0], data.pixels[3])


def test_images_are_decoded_once_and_kept_whole(vit, tmp_path, monkeypatch):
    counted = []
    image = Pixels.image
    monkeypatch.setattr(Pixels, "image", lambda self: counted.append(1) or image(self))
    data = data_of(vit)["test"]
    data.make()
    first, pixels = len(counted), data.pixels.copy()
    kept = list((tmp_path / "cache" / "encoded").iterdir())
    assert len(kept) == 1 and kept[0].suffix == ".npy"
    again = data_of(vit)["test"]
    counted.clear()
    again.make()
    assert first >= 15 and not counted and np.array_equal(again.pixels, pixels)
    del data, again  # which read from the disk
    kept[0].write_bytes(kept[0].read_bytes()[:500])  # cut off by something else
    torn = data_of(vit)["test"]
    counted.clear()
    assert np.array_equal(torn.pixels, pixels) and len(counted) == 15


def test_a_full_disk_costs_only_the_kept_pixels(vit, tmp_path, monkeypatch, capsys):
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    data, again = data_of(vit)["test"], data_of(vit)["test"]
    monkeypatch.setattr("rankwise.experiments.data.images.os.fsync", full)
    pixels = data.pixels.copy()
    assert "pixels are not kept: No space left on device" in capsys.readouterr().err
    assert not any((tmp_path / "cache" / "encoded").iterdir())
    monkeypatch.undo()
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "room"))
    assert np.array_equal(again.pixels, pixels)


def test_content_is_of_images_labels_and_processor(dinov2):
    _, processor, _ = models.load(dinov2, TASK)
    given = image_models.examples("test")

    def content(examples: Examples, processor=processor) -> bytes:
        return b"".join(KIND.encode(examples, processor, 24).content())

    assert content(given) == content(image_models.examples("test"))
    labels = given.labels.copy()
    labels[0] = (labels[0] + 1) % 3
    assert content(given) != content(Examples(given.first, None, labels))
    values = given.first[0].values.copy()
    values[0, 0, 0] ^= 1
    assert content(given) != content(Examples([Pixels(values), *given.first[1:]], None, given.labels))
    assert content(given) != content(given, KIND.sized(processor, 24))


def test_a_processor_that_does_more_is_refused(vit, monkeypatch):
    data = data_of(vit)["test"]
    del data.scale, data.offset
    processor = type(data.processor)
    whole = processor.__call__

    def squared(self, *args, **kwargs):
        made = whole(self, *args, **kwargs)
        if kwargs.get("do_rescale", True):
            made["pixel_values"] = [np.asarray(one) ** 2 for one in made["pixel_values"]]
        return made

    monkeypatch.setattr(processor, "__call__", squared)
    with pytest.raises(ValueError, match="does more than resize, crop, rescale and normalise: choose another model"):
        _ = data.scale


def test_images_come_upright_in_three_channels():
    from PIL import Image

    values = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2000
    grey = np.asarray(upright(Image.fromarray(values)))
    assert np.array_equal(grey, np.repeat((values // 257)[..., None], 3, 2))
    turned = Image.fromarray((values // 257).astype(np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6  # held on its side
    turned.info["exif"] = exif.tobytes()
    assert upright(turned).size == (4, 6)
    with pytest.raises(ValueError, match="its pixels are fractions: save it with 8 or 16 bits"):
        upright(Image.fromarray(np.ones((2, 2), np.float32)))


# -- augmentation ----------------------------------------------------------------------------------------------------------


def plainly(image: np.ndarray, seed: int, step: int, row: int, how: list[str]) -> np.ndarray:
    """A crop and a flip pixel by pixel."""
    down, right, flipped = (int(n) for n in draws.numbers(3, seed, 7, step, row))
    margin = SIDE // 8 if "crop" in how else 0
    made = np.zeros_like(image)
    for y in range(SIDE):
        for x in range(SIDE):
            from_y, from_x = y + down % (2 * margin + 1) - margin, x + right % (2 * margin + 1) - margin
            if 0 <= from_y < SIDE and 0 <= from_x < SIDE:
                to_x = SIDE - 1 - x if "flip" in how and flipped % 2 else x
                made[:, y, to_x] = image[:, from_y, from_x]
    return made


@pytest.mark.parametrize("how", [["crop", "flip"], ["flip"], ["crop"]])
def test_augmentation_is_keyed_by_seed_step_and_row(vit, how):
    data = data_of(vit)["train"]
    training = Training(batch_size=6, accumulation=2, augmentation=how)
    batches = Batches(KIND, data, None, training, [5, 2], torch.device("cpu"))
    rows = [of_member for of_member, _ in batches.rows(3)]
    got = torch.cat([batch["pixel_values"].view(2, 3, 3, SIDE, SIDE) for batch, _ in batches.micro_batches(3)], 1).numpy()
    plain = data.pixels * data.scale + data.offset
    for member, seed in enumerate((5, 2)):
        for at, row in enumerate(rows[member]):
            np.testing.assert_array_equal(got[member, at], plainly(plain[row], seed, 3, row, how), str((member, at)))
    assert any(not np.array_equal(got[0, at], plain[row]) for at, row in enumerate(rows[0]))


def test_without_augmentation_a_batch_is_as_it_is_evaluated(vit):
    data = data_of(vit)["train"]
    batches = Batches(KIND, data, None, Training(batch_size=6), [5], torch.device("cpu"))
    ((batch, _),) = batches.micro_batches(1)
    expected = KIND.collate_evaluation(data, batches.rows(1)[0][0], None, None)["pixel_values"]
    assert np.array_equal(batch["pixel_values"].numpy(), expected)


# -- settings ----------------------------------------------------------------------------------------------------------------


def test_settings_of_images_are_refused_where_there_are_none(tmp_path, monkeypatch):
    small_world.register(monkeypatch.setitem)
    changes = {"image_size": 16, "augmentation": ["flip", "crop"]}
    study = small_world.study("nowhere", training=small_world.training(**changes).model_dump())
    assert study.training.augmentation == ["crop", "flip"]  # one order, as one run has one fingerprint
    with pytest.raises(ValueError) as refused:
        prepare(study, [])
    assert str(refused.value).splitlines() == [
        "training.image_size = 16 is about images, and small/regression has none: take it out",
        "training.augmentation = ['crop', 'flip'] is about images, and small/regression has none: take it out",
    ]
    with pytest.raises(ValueError, match=r"training.augmentation.0 = 'turn': should be 'crop' or 'flip'"):
        config.parse({"model": "m", "tasks": ["t"], "training": {"augmentation": ["turn"]}, "methods": [ENTRY]}, "name")


ENTRY = {"method": "head", "learning_rate": 1e-3}


def test_settings_that_came_later_leave_the_fingerprints_of_runs_without_them():
    plain = Training().identity()
    assert "image_size" not in plain and "augmentation" not in plain
    assert Training(image_size=32, augmentation=["flip"]).identity() == {**plain, "image_size": 32, "augmentation": ["flip"]}


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(vit):
    model, _, _ = models.load(vit, TASK, image_size=24)
    assert models.unfit(model, Training(image_size=24)) == []
    (fault,) = models.unfit(model, Training(image_size=26))
    assert fault.startswith("training.image_size = 26: this model reads patches of 4 pixels") and fault.endswith("such as 24")
