"""A user's own images: which parts a folder has, each image looked at once, what is wrong with them.

A folder holds a subfolder for each class, or the subfolders train, validation and test with one for each class in them; or
metadata.csv (.jsonl, .parquet) with the fields file_name and label, as in `datasets`.  What is seen of an image (its size, a
digest of its pixels, whether it can be read) is kept in the cache of `datasets`.
"""

import glob
import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rankwise.experiments.data.images import pixel_digest, upright

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = 2  # of what is seen of an image: raise it when `_seen` sees something else
PART_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
MOST_NAMED = 5  # files that a note names
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


class OwnPicture:
    """One image of a user's table, a `Picture`; its bytes stay on the disk.

    table, index, field: where {"path", "bytes"} is, one of which may be None.  name: its file, or its row.
    size: width, height in pixels.  frames: of an animation or a file of several pages, of which the first is read.
    """

    def __init__(self, table: Any, index: int, field: str, name: str, digest: bytes, size: tuple[int, int], frames: int = 1):
        self.table, self.index, self.field = table, index, field
        self.name, self.digest, self.size, self.frames = name, digest, size, frames

    def image(self) -> "Image":
        """
        Raises:
            ValueError: its file has changed since it was looked at.
        """
        try:
            return _decoded(self.table[self.index][self.field])
        except Exception as error:  # whatever a decoder raises
            raise ValueError(f"{self.name}: cannot be read as an image any more ({_reason(error)}): put it back") from None

    def __str__(self) -> str:
        return f"{self.name} ({self.size[0]} x {self.size[1]})"


# -- folders -------------------------------------------------------------------------------------------------------------


def parts_of(folder: str) -> dict[str, str]:
    """The parts of a folder whose subfolders are called train, validation and test; empty where they are classes.

    Raises:
        ValueError: some are called so and others are not, or there is none to train on.
    """
    names = [entry.name for entry in sorted(os.scandir(folder), key=lambda e: e.name) if _is_folder(entry)]
    parts = {part: [n for n in names if n.lower() in known] for part, known in PART_FOLDERS.items()}
    meant = [name for of_part in parts.values() for name in of_part]
    if not meant or (len(names) > len(meant) and len(meant) == 1):
        return {}  # one class may be called "train"
    others = [name for name in names if name not in meant]
    if others:
        raise ValueError(
            f"{folder}: its subfolders {', '.join(meant)} are parts, and {others[0]} is none: move {', '.join(others[:3])} out"
        )
    twice = next((of_part for of_part in parts.values() if len(of_part) > 1), None)
    if twice:
        raise ValueError(f"{folder}: its subfolders {' and '.join(twice)} are the same part: put them together")
    if not parts["train"]:
        raise ValueError(f"{folder}: its subfolders {', '.join(meant)} are parts, and none is called train: add one")
    return {part: str(Path(folder) / of_part[0]) for part, of_part in parts.items() if of_part}


def load_folder(folder: str, split: str) -> Any:
    """The table of a folder of images: image, and label where subfolders are classes.

    Raises:
        ValueError: no image in it; images beside the classes; a class without any; folders in folders; a link to nothing.
    """
    import datasets
    import datasets.exceptions
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    files = [path for path in _visible(folder) if path.suffix.lower() in ImageFolder.EXTENSIONS]
    if not files:
        suffix = next((path.suffix for path in _visible(folder) if path.suffix), ".jsonl")
        raise ValueError(
            f"{folder}: a folder without images: give a file, a glob such as {folder}/*{suffix}, or a folder of images"
        )
    if dead := next((path for path in files if not path.is_file()), None):
        raise ValueError(f"{dead}: a link to a file that is not there: mend it, or take it out")
    described = [str(Path(folder) / name) for name in METADATA if (Path(folder) / name).is_file()]
    if not described:
        _check_classes(Path(folder), files)
    patterns = [glob.escape(os.path.abspath(path)) for path in (*files, *described)]
    try:
        return datasets.load_dataset(
            "imagefolder", data_files={"train": patterns}, split=split, drop_labels=None if described else False
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise ValueError(f"{folder}: cannot be read as a folder of images ({_reason(error.__cause__ or error)})") from None


def _check_classes(folder: Path, files: Sequence[Path]) -> None:
    faults = []
    for path in files:
        depth = len(path.relative_to(folder).parts)
        if depth == 1:
            faults.append(f"{path}: lies beside the classes: put the images of each class into a subfolder of its own")
        elif depth > 2:
            faults.append(f"{path}: lies in a folder of a folder: a class is one folder with its images, so move them up")
        if faults:
            break
    filled = {path.relative_to(folder).parts[0] for path in files}
    faults += [
        f"{entry.path}: a class without an image: add some, or remove the folder"
        for entry in sorted(os.scandir(folder), key=lambda e: e.name)
        if _is_folder(entry) and entry.name not in filled
    ]
    if faults:
        raise ValueError("\n".join(faults[:5]))


def _is_folder(entry: os.DirEntry) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _visible(folder: str) -> Iterator[Path]:
    """Every file below that is not hidden, nor in a hidden folder, in order; links to folders are followed, each once."""
    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        where = {name: os.path.realpath(os.path.join(parent, name)) for name in folders}
        folders[:] = [name for name in folders if where[name] not in seen]
        seen |= {*where.values()}
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


# -- images --------------------------------------------------------------------------------------------------------------


def column_of(table: Any, field: str) -> bool:
    """Whether a field holds images: files' bytes, or where they are."""
    import datasets

    feature = table.features.get(field)
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {"bytes", "path"} <= feature.keys())


def undecoded(table: Any, field: str) -> Any:
    """The same table, its images as {"path", "bytes"}.

    Raises:
        ValueError: the field holds no images.
    """
    import datasets

    if not column_of(table, field):
        raise ValueError(f'field "{field}" holds no images: give a folder of images, or a Parquet file or hub id with them')
    return table.cast_column(field, datasets.Image(decode=False))


def look(table: Any, field: str, where: str) -> list[OwnPicture | str]:
    """Each image of a table that `undecoded` gave, or what is wrong with it."""
    import datasets

    features = {name: datasets.Value(kind) for name, kind in _SEEN.items()}
    seen = table.select_columns([field]).map(
        _seen,
        fn_kwargs={"field": field, "version": VERSION},
        remove_columns=[field],
        features=datasets.Features(features),
    )
    found: list[OwnPicture | str] = []
    of_folder = os.path.isdir(where)
    for index, (row, one) in enumerate(zip(table, seen, strict=True)):
        path = (row[field] or {}).get("path")
        name = os.path.join(where, os.path.relpath(path, where)) if of_folder and path else f"{where}, row {index + 1}"
        if one["fault"]:
            found.append(f"{name}: no image that can be read ({one['fault']}): save it again, or take it out")
        else:
            size = one["width"], one["height"]
            found.append(OwnPicture(table, index, field, name, one["digest"], size, one["frames"]))
    return found


_SEEN = {"width": "int32", "height": "int32", "digest": "binary", "frames": "int32", "fault": "string"}


def _seen(row: Mapping[str, Any], field: str, version: int) -> dict[str, Any]:
    try:
        with _opened(row[field]) as image:
            # The second image of a camera's JPEG is no frame of the first: a preview, or what a depth is told by.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            values = np.asarray(upright(image))
    except Exception as error:  # whatever a decoder raises
        return {"width": 0, "height": 0, "digest": b"", "frames": 0, "fault": _reason(error)}
    height, width = values.shape[:2]
    return {"width": width, "height": height, "digest": pixel_digest(values), "frames": frames, "fault": ""}


def _decoded(record: Mapping[str, Any] | None) -> "Image":
    with _opened(record) as image:
        return upright(image)


def _opened(record: Mapping[str, Any] | None) -> "Image":
    from PIL import Image

    if not record or not (record.get("bytes") or record.get("path")):
        raise ValueError("there is none")
    return Image.open(io.BytesIO(record["bytes"]) if record.get("bytes") else record["path"])


def _reason(error: BaseException) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return "of no known format"
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def remarks(where: str, pictures: Sequence[OwnPicture | str]) -> list[str]:
    """What is to be said of the images of one place: files of a folder that are not among them, images of several frames."""
    said, read = [], [picture for picture in pictures if isinstance(picture, OwnPicture)]
    if os.path.isdir(where):
        names = {os.path.normpath(picture.name) for picture in read}
        left = [str(path) for path in _visible(where) if os.path.normpath(path) not in names and path.name not in METADATA]
        if left:
            said.append(
                f"files of {where} that are not read, being no images by their names, or not in its table: {_some(left)}"
            )
    moving = [picture.name for picture in read if picture.frames > 1]
    if moving:
        said.append(f"images of several frames or pages, of which the first is read: {_some(moving)}")
    return said


def _some(names: Sequence[str]) -> str:
    """ "3 (a, b, c)", or the first of more."""
    return f"{len(names)} ({', '.join(names[:MOST_NAMED])}{', ...' if len(names) > MOST_NAMED else ''})"


def sizes(pictures: Sequence[OwnPicture]) -> str:
    """ "28 x 28 pixels", or the smallest, the middle one and the largest by area."""
    by_area = sorted((picture.size for picture in pictures), key=lambda size: (size[0] * size[1], size))
    shown = [f"{width} x {height}" for width, height in (by_area[0], by_area[len(by_area) // 2], by_area[-1])]
    if by_area[0] == by_area[-1]:
        return f"{shown[0]} pixels"
    return f"{shown[0]} to {shown[2]} pixels, {shown[1]} in the middle (width x height)"


def counts(labels: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, int]]:
    """Part -> class -> images."""
    of_parts = {part: Counter(str(row.target) for row in of_part) for part, of_part in rows.items()}
    return {part: {label: counter[label] for label in labels} for part, counter in of_parts.items()}
