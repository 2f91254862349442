"""A trained adapter for programs that know no Rankwise: a plain LoRA, or the whole model with the adapter merged into it."""

from pathlib import Path
from typing import Any

from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.files import folders
from rankwise.variants.files.peft import writing
from rankwise.variants.files.state import check_member, has_peft_form, own_state
from torch import nn


def export_lora(adapter: Adapter, folder: str | Path, member: int = 0) -> None:
    """Writes one member as a plain PEFT LORA (with use_dora where there are magnitudes), for programs that serve LoRA only.

    Exact: A' = A diag(E), and the scale of each site goes into its alpha.  A site at rank 0 is left out.

    Raises:
        ValueError: as `save_pretrained`, and for a method that has no low-rank form.
        OSError: as `save_pretrained`.
    """
    check_member(adapter, member)
    if not has_peft_form(adapter):
        raise ValueError(
            f"{adapter.method} changes the model's own tensors, which no low-rank update expresses: "
            f"it cannot be written as LoRA; use save_pretrained"
        )
    contents = writing.written(adapter, member, plain=True)
    folders.write(Path(folder), contents)


def export_merged(adapter: Adapter, folder: str | Path, member: int = 0, tokenizer: Any = None) -> None:
    """Writes the whole model with one member merged into it, as transformers writes one: no trace of an adapter is left.

    `AutoModel...from_pretrained(folder)` gives equal outputs, up to the rounding of the base's type.  The tokenizer, where
    one is given, is written beside it.

    Raises:
        ValueError: as `save_pretrained`; a model that is not of transformers, or that is merged already.
        CannotMerge: a weight that the adapter changes is also used elsewhere.
        OSError: as `save_pretrained`.
    """
    check_member(adapter, member)
    model = adapter.model
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise ValueError(
            f"{type(model).__name__} is no model of transformers: call adapter.merge({member}) and save its weights yourself"
        )
    config = dict(vars(model.config))  # save_pretrained notes the type and the class in it
    adapter.merge(member)
    try:
        with folders.placed(Path(folder)) as partial:
            save_whole(model, partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
    finally:
        adapter.unmerge()
        vars(model.config).clear()
        vars(model.config).update(config)


def save_whole(model: nn.Module, folder: Path) -> None:
    """Writes a model of transformers as it is now, by its own names, without what an adapter added to it."""
    type(model).save_pretrained(model, folder, state_dict=own_state(model, model.state_dict()))
