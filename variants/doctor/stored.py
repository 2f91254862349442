"""A safetensors file read a tensor at a time with numpy, and written; bfloat16 too, which numpy does not know.

The bits of a bfloat16 are the upper half of a float32's.  Everything else of the format is safetensors' own.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16,
         "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}  # fmt: skip
STEPS = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}  # from 1 to the next number


@dataclass(frozen=True)
class Raw:
    """A tensor as it stands in a file."""

    kind: str  # safetensors' name of the type: a key of TYPES, or an 8-bit float's
    shape: tuple[int, ...]
    data: bytes


class Stored(Mapping[str, tuple[np.ndarray, str]]):
    """Name -> (the tensor in float64, the type it is stored in).  8-bit floats have a shape and no values.

    Raises:
        ValueError: cut off, or no safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, framework="numpy") as file:  # checks the header, the offsets and the length
                self.metadata: dict[str, str] = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); save the adapter again") from None
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        self._body = (
            np.memmap(path, np.uint8, "r", offset=8 + size) if path.stat().st_size > 8 + size else np.zeros(0, np.uint8)
        )
        self._entries = {name: entry for name, entry in header.items() if name != "__metadata__"}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, those without values too."""
        return {name: tuple(entry["shape"]) for name, entry in self._entries.items()}

    def raw(self, name: str) -> Raw:
        entry = self._entries[name]
        start, end = entry["data_offsets"]
        return Raw(entry["dtype"], tuple(entry["shape"]), self._body[start:end].tobytes())

    def kind(self, name: str) -> str:
        return self._entries[name]["dtype"]

    def __getitem__(self, name: str) -> tuple[np.ndarray, str]:
        raw = self.raw(name)
        if raw.kind not in TYPES:
            raise KeyError(name)
        values = np.frombuffer(raw.data, TYPES[raw.kind]).reshape(raw.shape)
        if raw.kind == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float64), raw.kind

    def __iter__(self) -> Iterator[str]:
        return (name for name, entry in self._entries.items() if entry["dtype"] in TYPES)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def rounded(values: np.ndarray, kind: str) -> Raw:
    """Numbers in one of the four types of STEPS, to the nearest, ties to even.

    Raises:
        ValueError: a number that the type cannot hold.
    """
    with np.errstate(over="ignore"):
        if kind == "BF16":
            bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
            near = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            is_finite, stored = bool(np.isfinite((near.astype(np.uint32) << 16).view(np.float32)).all()), near
        else:
            stored = np.ascontiguousarray(values, TYPES[kind])
            is_finite = bool(np.isfinite(stored).all())
    if not is_finite:
        most = float(np.abs(values).max())
        raise ValueError(f"a number of {most:.3g} does not fit into {kind.lower()}: the adapter cannot be written in that type")
    return Raw(kind, np.shape(values), stored.tobytes())


def write(path: Path, tensors: Mapping[str, Raw], metadata: Mapping[str, str]) -> None:
    """A whole safetensors file: the length of its header, the header, the tensors without gaps, the widest types first.

    Written here because the library's own writers take numpy's or torch's tensors, and its lower one changed in 0.8.
    """
    order = sorted(tensors, key=lambda name: (-_width(tensors[name]), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        start, end = end, end + len(tensors[name].data)
        header[name] = {"dtype": tensors[name].kind, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].data)


def _width(raw: Raw) -> int:
    """Bytes of one number."""
    return len(raw.data) // max(int(np.prod(raw.shape)), 1)
