"""A user's own images: the parts and classes of a folder, what is said and refused, and one line that trains on them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rankwise.experiments import config, knockout
from rankwise.experiments.data.images import pixel_digest
from rankwise.experiments.data_entries import OwnData
from rankwise.experiments.tasks import own_images, own_tasks
from rankwise.experiments.tasks.own import read

from tests import image_models
from tests.command import rankwise


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setenv("RANKWISE_CACHE", str(folder))
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


def folder(where: str = "photos", *parts: str) -> Path:
    """A folder of images, with a subfolder for each class; under one of each part where parts are named."""
    for part in parts or [""]:
        given = image_models.examples(part or "train")
        for number, (picture, label) in enumerate(zip(given.first, given.labels, strict=True)):
            path = Path(where) / part / image_models.LABELS[label] / f"test[{number}].png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.values).save(path)
    return Path(where)


def parts(train, **more):
    return read(OwnData(name="mine", train=str(train), **more))


def refused(capsys, *fragments: str, given=("photos",)) -> None:
    assert rankwise("data", *given) == 2
    shown = capsys.readouterr().err
    assert all(line.startswith("rankwise: ") for line in shown.splitlines()) and "Traceback" not in shown
    for fragment in fragments:
        assert fragment in shown


def test_subfolders_are_classes_and_every_image_is_read_once():
    one = parts(folder())
    assert one.reading.kind == "image-classification" and one.labels == ("bottom", "middle", "top")
    assert {part: len(rows) for part, rows in one.rows.items()} == {"train": 32, "validation": 4, "test": 4}
    rows = [row for of_part in one.rows.values() for row in of_part]
    assert len({row.input.name for row in rows}) == 40
    for row in rows:  # whatever its name says
        image = np.asarray(Image.open(row.input.name))
        assert row.target == Path(row.input.name).parent.name and row.input.size == (30, 24)
        assert row.input.digest == pixel_digest(image) and np.array_equal(np.asarray(row.input.image()), image)


@pytest.mark.parametrize("names", [("train", "test"), ("Training", "val", "testing")])
def test_subfolders_that_are_parts_are_recognised_and_said(names):
    folder("photos", "train", "validation", "test")
    known = {"train": "train", "training": "train", "val": "validation", "test": "test", "testing": "test"}
    for name in names:
        Path("photos", known[name.lower()]).rename(f"photos/{name}")
    for unused in {"train", "validation", "test"} - {known[name.lower()] for name in names}:
        shutil.rmtree(f"photos/{unused}")
    one = parts("photos")
    assert f"; {names[0]} as the train part and " in one.notes[0] and "by the folders' names" in one.notes[0]
    assert len(one.rows["test"]) == 15 and len(one.rows["train"]) == (40 if len(names) == 3 else 36)


def test_a_class_may_be_called_train():
    where = folder()
    (where / "top").rename(where / "train")
    assert parts(where).labels == ("bottom", "middle", "train")


def test_a_table_with_images_is_read_as_the_folder_is(tmp_path):
    import datasets

    where = folder()
    datasets.load_dataset("imagefolder", data_dir=str(where.resolve()), split="train").to_parquet("photos.parquet")
    for given in ({}, {"input": "image", "target": "label"}):
        one, of_folder = parts("photos.parquet", **given), parts(where)
        assert one.reading.kind == "image-classification" and one.labels == of_folder.labels
        assert {r.input.digest for r in one.rows["train"]} <= {r.input.digest for p in of_folder.rows.values() for r in p}
        assert one.rows["train"][0].input.name.startswith("photos.parquet, row ")
    rows = [json.dumps({"file_name": str(path.relative_to(where)), "label": path.parent.name}) for path in where.rglob("*.png")]
    (where / "metadata.jsonl").write_text("\n".join(rows))
    assert parts(where).labels == of_folder.labels


def test_the_same_images_elsewhere_are_the_same_task_and_one_pixel_is_not():
    def identity(where) -> str:
        return own_tasks.task(OwnData(name="mine", train=str(where))).data_hash()

    first = folder()
    shutil.copytree(first, "elsewhere")
    assert identity(first) == identity("elsewhere")
    path = next(Path("elsewhere").rglob("*.png"))
    values = np.asarray(Image.open(path)).copy()
    values[0, 0, 0] ^= 1
    Image.fromarray(values).save(path)
    assert identity(first) != identity("elsewhere")


def test_the_command_shows_classes_counts_and_sizes(capsys):
    where = folder("photos", "train", "test")
    Image.fromarray(np.full((8, 50, 3), 200, np.uint8)).save(where / "train" / "top" / "wide.png")
    shutil.copy(next((where / "train" / "top").iterdir()), where / "test" / "middle" / "copy.png")
    assert rankwise("data", where) == 0
    shown = capsys.readouterr().out
    assert "test: bottom 6, middle 5, top 5" in shown
    assert "sizes:  50 x 8 to 30 x 24 pixels, 30 x 24 in the middle (width x height)" in shown
    named = "(photos/test/middle/copy.png is photos/train/top/"
    assert "1 of the 16 rows of the test part have the input of a training row " + named in shown
    assert rankwise("data", where, "--json") == 0
    assert json.loads(capsys.readouterr().out)["counts"]["test"] == {"bottom": 6, "middle": 5, "top": 5}


def test_the_command_shows_the_size_that_a_model_reads(capsys):
    model, where = image_models.saved(Path("dinov2"), "dinov2"), folder()
    recipe = Path(model) / "preprocessor_config.json"
    recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"crop_size": {"height": 16, "width": 20}}))
    assert rankwise("data", where, "--model", model) == 0
    assert "as dinov2 sees them: images of 20 x 16 pixels, 32 rows to train on" in capsys.readouterr().out
    assert rankwise("data", where, "--model", model, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["image_size"] == [16, 20] and facts["trained_rows"] == 32 and facts["sizes"] == "30 x 24 pixels"
    refused(capsys, "--max-length 8: rows of kind = image-classification have no tokens: leave it out",
            given=("photos", "--model", model, "--max-length", "8"))  # fmt: skip


def test_images_that_cannot_be_read_are_named(capsys):
    where = folder()
    cut = next((where / "top").iterdir())
    cut.write_bytes(cut.read_bytes()[:90])
    (where / "middle" / "none.jpg").write_text("no image")
    refused(capsys, "photos/middle/none.jpg: no image that can be read (of no known format): save it again, or take it out")
    refused(capsys, f"photos/top/{cut.name}: no image that can be read (image file is truncated)")


def test_what_of_a_folder_is_not_read_is_said(capsys):
    where = folder()
    picture = next((where / "top").iterdir())
    (where / "top" / "photo.heic").write_bytes(b"x")
    (where / "middle" / ".DS_Store").write_bytes(b"x")
    frames = [Image.new("RGB", (30, 24), colour) for colour in ("red", "blue")]
    frames[0].save(where / "top" / "moves.gif", save_all=True, append_images=frames[1:])
    notes = parts(where).notes
    assert [note for note in notes if "not read" in note] == [
        "files of photos that are not read, being no images by their names, or not in its table: 1 (photos/top/photo.heic)"
    ]
    assert "images of several frames or pages, of which the first is read: 1 (photos/top/moves.gif)" in notes
    (where / "metadata.csv").write_text(f"file_name,label\n{picture.relative_to(where)},a\n" + "top/moves.gif,b\n")
    table = own_images.load_folder(str(where), "train")
    assert len(table) == 2
    said = own_images.remarks(str(where), own_images.look(own_images.undecoded(table, "image"), "image", str(where)))
    assert "not in its table: 40 (photos/bottom/" in said[0]


def test_links_are_followed_once_and_a_dead_one_is_named(capsys):
    where = folder()
    (where / "linked").symlink_to((where / "top").rename("elsewhere").absolute())
    assert parts(where).labels == ("bottom", "linked", "middle")
    (Path("elsewhere") / "round").symlink_to(Path("elsewhere").absolute())
    assert parts(where).labels == ("bottom", "linked", "middle")
    (where / "middle" / "dead.png").symlink_to("nowhere.png")
    refused(capsys, "photos/middle/dead.png: a link to a file that is not there: mend it, or take it out")


def test_classes_that_cannot_be_trained_are_refused(capsys):
    where = folder()
    (where / "none").mkdir()
    refused(capsys, "photos/none: a class without an image: add some, or remove the folder")
    (where / "none").rmdir()
    shutil.copytree(where, "test")
    (Path("test") / "top").rename("test/odd")
    remedy = 'test: label "odd" is in the test part and in no training row: add some, or take it out'
    refused(capsys, remedy, given=("photos", "--test", "test"))
    (where / "train").mkdir()
    (where / "test").mkdir()
    refused(capsys, "photos: its subfolders train, test are parts, and bottom is none: move bottom, middle, top out")


def test_images_beside_or_below_the_classes_are_refused(capsys):
    where = folder()
    image = next((where / "top").iterdir())
    (where / "top" / "deep").mkdir()
    shutil.copy(image, where / "top" / "deep")
    refused(capsys, "lies in a folder of a folder: a class is one folder with its images")
    shutil.rmtree(where / "top" / "deep")
    shutil.copy(image, where)
    refused(capsys, "lies beside the classes: put the images of each class into a subfolder of its own")


def test_what_is_no_image_is_refused(capsys):
    Path("a.jsonl").write_text("".join(json.dumps({"image": f"{i}.png", "label": str(i % 2)}) + "\n" for i in range(20)))
    refused(capsys, 'field "image" holds no images: give a folder of images, or a Parquet file', given=("a.jsonl",))
    with pytest.raises(ValueError, match=r"x\.png: cannot be read as an image any more"):
        own_images.OwnPicture([{"image": {"path": "x.png", "bytes": None}}], 0, "image", "x.png", b"", (1, 1)).image()


STUDY = """
model = "dinov2"
quick = true
checkpoint_seconds = 1e-6
seeds = 2
[training]
max_steps = 4
batch_size = 8
image_size = 20
augmentation = ["crop", "flip"]
[[data]]
name = "photos"
train = "photos"
[[methods]]
method = "lora"
rank = 2
alpha = 6
targets = ["all-linear", "projection"]
learning_rate = 1e-2
"""


@pytest.mark.slow
def test_killed_and_begun_again_a_study_of_images_ends_with_the_same_bytes(tmp_path):
    """Also while its pixels are written: kills are counted over every file that takes its name."""
    from tests.test_study import child, contents

    image_models.saved(Path("dinov2"), "dinov2")
    folder("photos", "train", "test")
    Path("study.toml").write_text(STUDY)
    study = config.read(Path("study.toml"))
    for out, kills in (("whole", []), ("cut", [(1, False), (8, False)])):
        for kill in [*kills, ()]:
            process = child(study, tmp_path / out, str(tmp_path / f"cache of {out}"), *kill)
            process.join()
            assert (process.exitcode < 0) == bool(kill), (out, kill)
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")
    assert len(list(tmp_path.glob("whole/*/adapter/*.safetensors"))) == 2


@pytest.mark.slow
def test_one_line_trains_on_a_folder_and_its_runs_are_exported(capsys):
    import transformers

    model, where = image_models.saved(Path("dinov2"), "dinov2"), folder("photos", "train", "test")
    assert rankwise("compare", "--model", model, "--data", where, "--methods", "lora", "--out", "out") == 0
    said = capsys.readouterr().err
    assert "20 epochs of 36 rows, 8 a step; images of 16 x 16 pixels" in said and "photos: reading image as the input" in said
    (run,) = (path.parent for path in Path("out").glob("*/result.json"))
    text = Path("out/study.toml").read_text()
    before = {path: path.read_bytes() for path in run.glob("*.json*")}
    assert rankwise("compare", "out/study.toml", "--out", "out") == 0
    assert {path: path.read_bytes() for path in run.glob("*.json*")} == before
    assert knockout.of_run(run, rows=4)["rows"] == 4
    assert rankwise("export", run, "--to", "merged", "--out", "merged") == 0
    merged = transformers.AutoModelForImageClassification.from_pretrained("merged")
    assert merged.config.id2label == {0: "bottom", 1: "middle", 2: "top"}
    assert transformers.AutoImageProcessor.from_pretrained("merged", backend="pil").crop_size["height"] == 16
    wrong = text.replace("batch_size = 8", "batch_size = 8\nimage_size = 18")
    Path("wrong.toml").write_text(wrong.replace("../photos", "photos"))
    assert rankwise("compare", "wrong.toml") == 2
    assert "image_size = 18: this model reads patches of 4 pixels, and the rest would be cut off" in capsys.readouterr().err
