"""The weights of a base model, looked up by the sites of an adapter: |W| of each row, without loading the model.

A folder of safetensors files, or one.  A checkpoint may leave out or add the names of outer modules ("bert.", "model."): the
longest end of a site's name that exactly one tensor has is taken, and no number of a layer is left out.
"""

from pathlib import Path

import numpy as np
from rankwise.variants.doctor.stored import Stored


class Base:
    """
    Raises:
        ValueError: no safetensors file there, or one that is cut off.
    """

    def __init__(self, path: Path):
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        files = [file for file in files if not file.name.startswith("adapter_")]
        if not files:
            raise ValueError(f"{path} holds no safetensors file of a model; give a folder that has model.safetensors")
        self.path = path
        self._owners = {name: stored for stored in map(Stored, files) for name in stored}

    def row_norms(self, site: str, shape: tuple[int, int], is_transposed: bool) -> np.ndarray | None:
        """(O,) of the weight (O, I) of a site; None where it is not found in that shape, or in a type that is not read.

        is_transposed: the weight is stored (I, O): an embedding's, or GPT-2's Conv1D (fan_in_fan_out).
        """
        name = self._find(f"{site}.weight")
        if name is None:
            return None
        weight = self._owners[name][name][0]
        weight = weight.T if is_transposed and weight.ndim == 2 else weight.reshape(len(weight), -1)
        return np.linalg.norm(weight, axis=1) if weight.shape == shape else None

    def _find(self, name: str) -> str | None:
        parts = name.split(".")
        for skipped in range(len(parts) - 1):
            if any(part.isdigit() for part in parts[:skipped]):
                return None  # without the number of its layer it would be another layer's
            end = ".".join(parts[skipped:])
            if end in self._owners:
                return end
            alike = [known for known in self._owners if known.endswith(f".{end}")]
            if alike:
                return alike[0] if len(alike) == 1 else None
        return None
