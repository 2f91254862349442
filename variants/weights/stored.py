"""A weight as the model's own files hold it, for what is compared with the weight in memory: before it was quantised, say."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # transformers' names


class StoredWeights:
    """The weights in a model's folder, each read when it is asked for."""

    def __init__(self, model: nn.Module):
        """
        Raises:
            ValueError: the model's files are not known, or not in safetensors.
        """
        named = getattr(model, "files", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
        self.folder = Path(named or "")
        if not named or not self.folder.is_dir():
            raise ValueError(
                f"the files of this {type(model).__name__} are at no folder that is known (config.name_or_path = {named!r}): "
                f'load it from a folder, or say where they are, model.files = "FOLDER"'
            )
        self.prefix = f"{prefix}." if (prefix := getattr(model, "base_model_prefix", "")) else ""
        self.places = self._places()

    def _places(self) -> dict[str, Path]:
        """Name of a tensor -> the file that holds it."""
        index = self.folder / INDEX
        if index.is_file():
            return {name: self.folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        path = self.folder / WHOLE
        if not path.is_file():
            raise ValueError(f"{self.folder} holds neither {WHOLE} nor {INDEX}: save the model there in safetensors")
        try:
            with safe_open(path, framework="pt") as file:
                return dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise ValueError(f"{path} is cut off or no safetensors file ({error}): save or copy it again") from None

    def weight(self, name: str, module: Any) -> Tensor:
        """W (O, I) of the linear of that name.

        Raises:
            ValueError: the files do not hold it, or it has another shape.
        """
        spellings = [f"{name}.weight", f"{self.prefix}{name}.weight", f"{name.removeprefix(self.prefix)}.weight"]
        found = next((spelling for spelling in spellings if spelling in self.places), None)
        if found is None:
            raise ValueError(f"{self.folder} holds no {name}.weight: give the folder that the model was loaded from")
        with safe_open(self.places[found], framework="pt") as file:
            W = file.get_tensor(found)
        if getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D":  # GPT-2's is stored (I, O)
            W = W.mT
        if tuple(W.shape) != (module.out_features, module.in_features):
            shapes = f"{tuple(W.shape)} where the model has {(module.out_features, module.in_features)}"
            raise ValueError(f"{found} of {self.folder} has shape {shapes}: give the folder that the model was loaded from")
        return W
