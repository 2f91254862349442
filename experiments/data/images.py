"""Images: where one can be had (`Picture`), and one split of them (`Images`), decoded once and kept in the user's cache.

Pixels are kept as the model's own image processor resizes and crops them, one byte a channel; what it does to them afterwards
(rescaling, normalisation) is one factor and one offset a channel, and is done to a batch.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from rankwise.experiments import sources
from rankwise.experiments.data.dataset import Dataset
from rankwise.experiments.files import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = 1  # part of the name of kept pixels: raise it when the same images come out otherwise
CHUNK = 64  # images that are decoded at a time
TOLERANCE = 0.02  # by which an image processor may differ from one factor and offset a channel; a byte is 0.017 of ImageNet's


class Picture(Protocol):
    """One image, wherever it is kept.

    digest: of what is in it, the same wherever it lies.
    """

    digest: bytes

    def image(self) -> "Image":
        """Decoded, upright, in three channels."""
        ...


class Pixels:
    """A `Picture` in memory: (H, W) or (H, W, 3) bytes."""

    def __init__(self, values: np.ndarray):
        self.values = values

    @cached_property
    def digest(self) -> bytes:
        return pixel_digest(self.values)

    def image(self) -> "Image":
        from PIL import Image

        return Image.fromarray(self.values).convert("RGB")


def pixel_digest(values: np.ndarray) -> bytes:
    """16 bytes of what an image shows: its shape and every pixel."""
    return hashlib.blake2b(repr(values.shape).encode() + np.ascontiguousarray(values).tobytes(), digest_size=16).digest()


def upright(image: "Image") -> "Image":
    """Turned as its camera held it, in three channels of a byte; of an animation the first frame.

    Raises:
        ValueError: pixels that are no bytes, and cannot be made some without a choice.
    """
    from PIL import Image, ImageOps

    if image.mode == "F":
        raise ValueError("its pixels are fractions: save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would cut off at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise ValueError("its pixels have more than 16 bits: save it with 8 or 16 bits a channel")
        image = Image.fromarray((grey // 257).astype(np.uint8))
    return ImageOps.exif_transpose(image).convert("RGB")


class Images(Dataset):
    """n images of one size.

    pixels: (n, C, H, W) uint8, made when first asked for.  labels: (n,) int64.
    scale, offset: (C, 1, 1) float32: what the model reads is pixels * scale + offset.
    """

    def __init__(self, pictures: Sequence[Picture], labels: np.ndarray, processor: Any):
        self.pictures, self.labels, self.processor = pictures, labels, processor

    def __len__(self) -> int:
        return len(self.labels)

    def content(self) -> Iterator[bytes]:
        yield self._recipe().encode()
        yield b"".join(picture.digest for picture in self.pictures)
        yield self.labels.tobytes()

    def select_examples(self, examples: Sequence[int] | np.ndarray) -> "Images":
        return Images([self.pictures[i] for i in examples], self.labels[examples], self.processor)

    def make(self) -> None:
        _ = self.pixels

    @cached_property
    def pixels(self) -> np.ndarray:
        key = hashlib.sha256(self._recipe().encode() + b"".join(picture.digest for picture in self.pictures)).hexdigest()[:32]
        path = sources.cache_folder() / "encoded" / f"images-{key}.npy"
        kept = _read(path, len(self))
        if kept is not None:
            return kept
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                self._write(temporary)
        except OSError as error:  # they fit into memory or not; only the next start is slower
            with suppress(OSError):
                print(f"pixels are not kept: {error.strerror or error} in {path.parent}", file=sys.stderr)
            return np.stack(list(self._each()))
        kept = _read(path, len(self))
        assert kept is not None
        return kept

    @cached_property
    def scale(self) -> np.ndarray:
        return self._values()[0]

    @cached_property
    def offset(self) -> np.ndarray:
        return self._values()[1]

    def _recipe(self) -> str:
        """What decides the pixels beside the images: the processor and its settings."""
        known = {key: value for key, value in self.processor.to_dict().items() if not key.startswith("_")}
        return json.dumps([FORMAT, type(self.processor).__name__, known], sort_keys=True, default=str)

    def _resized(self, pictures: Sequence[Picture]) -> list[np.ndarray]:
        """(C, H, W) uint8 each."""
        made = self.processor(images=[picture.image() for picture in pictures], do_rescale=False, do_normalize=False)
        return [np.asarray(one) for one in made["pixel_values"]]

    def _each(self) -> Iterator[np.ndarray]:
        """(C, H, W) uint8 of every image.

        Raises:
            ValueError: the processor makes something else of one.
        """
        name = type(self.processor).__name__
        shape: tuple[int, ...] = ()
        for at in range(0, len(self), CHUNK):
            for pixels in self._resized(self.pictures[at : at + CHUNK]):
                if pixels.dtype != np.uint8 or pixels.ndim != 3:
                    raise ValueError(
                        f"its image processor ({name}) makes {pixels.dtype} of shape {pixels.shape}, and bytes (C, H, W) are "
                        f"needed: choose another model"
                    )
                if pixels.shape != (shape or pixels.shape):
                    raise ValueError(
                        f"its image processor ({name}) makes images of several sizes, {shape[1:]} and {pixels.shape[1:]}: "
                        f"give training.image_size, or choose another model"
                    )
                shape = pixels.shape
                yield pixels

    def _write(self, path: Path) -> None:
        """All of them into a file, one after the other: there need not be room for them in memory."""
        with open(path, "wb") as file:
            for row, pixels in enumerate(self._each()):
                if row == 0:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (len(self), *pixels.shape)}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(pixels.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def _values(self) -> tuple[np.ndarray, np.ndarray]:
        """The factor and the offset of each channel, read off the processor's own output for black, white and an image.

        Raises:
            ValueError: it does something else to the pixels.
        """
        first = self.pictures[0]
        (resized,) = self._resized([first])
        height, width = resized.shape[1:]
        flat = [np.full((height, width, 3), value, np.uint8) for value in (0, 255)]
        black, white = (np.asarray(one, np.float32).mean((1, 2)) for one in self.processor(images=flat)["pixel_values"])
        offset = black[:, None, None].astype(np.float32)
        scale = ((white - black)[:, None, None] / 255).astype(np.float32)
        (whole,) = self.processor(images=[first.image()])["pixel_values"]
        away = float(np.abs(resized * scale + offset - np.asarray(whole)).max())
        if not away <= TOLERANCE:
            raise ValueError(
                f"its image processor ({type(self.processor).__name__}) does more than resize, crop, rescale and normalise: "
                f"choose another model"
            )
        return scale, offset


def _read(path: Path, count: int) -> np.ndarray | None:
    """Kept pixels, read from the disk as they are needed; None where there are none."""
    with suppress(OSError, ValueError):
        kept = np.load(path, mmap_mode="r", allow_pickle=False)
        if kept.dtype == np.uint8 and kept.ndim == 4 and len(kept) == count:
            return kept
    return None
