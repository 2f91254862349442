"""How a model with an adapter in it saves itself: `model.save_pretrained`, and all that calls it (Trainer, push_to_hub).

The wrapped modules have names that no program but this one knows, so that a model saved by them would start at random
elsewhere.  While an adapter is attached, `model.save_pretrained(folder)` writes the adapter's files, as PEFT's model does.
What changes the model's own weights, full fine-tuning and BitFit or an adapter that is merged, is written as a whole model.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.files import pretrained
from rankwise.variants.files.export import export_merged, save_whole
from rankwise.variants.files.peft import forms
from torch import nn


class Door:
    """Stands in the place of `model.save_pretrained`.

    checkpoint: writes a folder in the place of the adapter's files alone, while somebody trains who resumes from it.
    """

    def __init__(self, adapter: Adapter):
        self.adapter: Adapter | None = adapter
        self.checkpoint: Callable[[Path], None] | None = None

    def __call__(
        self, save_directory: str | Path, *args: Any, is_main_process: bool = True, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Takes what transformers' own method takes; the form of a whole model's files has no meaning for an adapter's.

        Raises:
            ValueError: several members, an upload, or a copy of the model, which the adapter is not attached to.
        """
        adapter = self.adapter
        if adapter is None:
            raise ValueError("this is a copy of a model with an adapter in it: save the model that the adapter is attached to")
        if adapter.members > 1:
            raise ValueError(
                f"{adapter.members} members share this model: write one of them with "
                f"variants.save_pretrained(adapter, folder, member=...)"
            )
        if push_to_hub:
            raise ValueError("push_to_hub = True: save to a folder, and upload that (huggingface_hub.upload_folder)")
        if not is_main_process:
            return
        if adapter.is_merged:
            save_whole(adapter.model, Path(save_directory))
        elif self.checkpoint is not None:
            self.checkpoint(Path(save_directory))
        elif forms.holds(adapter) or not adapter.mergeable:
            pretrained.save_pretrained(adapter, save_directory)
        else:
            export_merged(adapter, save_directory)

    def __getstate__(self) -> dict[str, Any]:
        return {"adapter": None, "checkpoint": None}  # a copied or pickled model is not the one that is attached to


def open_door(adapter: Adapter) -> None:
    """Has the adapter's model save the adapter, until it is detached."""
    model = adapter.model
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = Door(adapter)
        adapter.when_detached(functools.partial(close_door, model))


def close_door(model: nn.Module) -> None:
    """Gives the model its own `save_pretrained` back: model, door and adapter are a circle, freed only by the collector."""
    vars(model).pop("save_pretrained", None)
