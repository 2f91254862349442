"""A trained adapter for programs that know no Rankwise: a plain LoRA, or the whole model with the adapter merged into it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.kinds.quantised import Dequantised, bits, dequantised, scheme_of
from rankwise.variants.adapter.merging import Requantisation
from rankwise.variants.files import folders
from rankwise.variants.files.peft import writing
from rankwise.variants.files.state import check_member, has_low_rank_form, own_state
from torch import Tensor, nn

NOTED = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")  # by transformers


def export_lora(adapter: Adapter, folder: str | Path, member: int = 0) -> None:
    """Writes one member as a plain PEFT LORA (with use_dora where there are magnitudes), for programs that serve LoRA only.

    A' = A diag(E), and every site has the same scale: what differs from it goes into B, since programs such as vLLM read one
    scale for all sites (variants/bank/bank.md).  A site at rank 0 is left out.

    Raises:
        ValueError: as `save_pretrained`, and for a method that has no low-rank form.
        OSError: as `save_pretrained`.
    """
    check_member(adapter, member)
    if not has_low_rank_form(adapter):
        what = "changes the model's own tensors" if adapter.mergeable else "adds to the model what is no weight of its own"
        raise ValueError(
            f"{adapter.method} {what}, which no low-rank update expresses: it cannot be written as LoRA; use save_pretrained"
        )
    contents = writing.written(adapter, member, plain=True)
    folders.write(Path(folder), contents)


def export_merged(
    adapter: Adapter, folder: str | Path, member: int = 0, tokenizer: Any = None, requantize: bool = False
) -> Requantisation | None:
    """Writes the whole model with one member merged into it, as transformers writes one: no trace of an adapter is left.

    `AutoModel...from_pretrained(folder)` gives equal outputs, up to the rounding of the base's type.  The tokenizer, where
    one is given, is written beside it.  Of a quantised base every weight is written dequantised.

    Args:
        requantize: quantise the merged weights again, in the base's own form, so that the model is loaded in as little memory;
            its outputs are others.

    Returns:
        With `requantize` what it has cost.

    Raises:
        ValueError: as `save_pretrained`; a model that is not of transformers, or that is merged already; `requantize` of a base
            that is not quantised.
        CannotMerge: a weight that the adapter changes is also used elsewhere.
        OSError: as `save_pretrained`.
    """
    check_member(adapter, member)
    model = adapter.model
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise ValueError(
            f"{type(model).__name__} is no model of transformers: call adapter.merge({member}) and save its weights yourself"
        )
    if requantize and scheme_of(model) is None:
        raise ValueError(f"requantize: {type(model).__name__} has no quantised weights: leave it out")
    adapter.merge(member)
    try:
        cost = adapter.requantise() if requantize else None
        with folders.placed(Path(folder)) as partial:
            save_whole(model, partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
    finally:
        adapter.unmerge()
    return cost


def save_whole(model: nn.Module, folder: Path) -> None:
    """Writes a model of transformers as it is now, by its own names, without what an adapter added to it.

    Once a weight of it is dequantised all are, as one configuration holds for them all.
    """
    config = dict(vars(model.config))  # save_pretrained notes the type and the class in it
    noted = {name: vars(model).pop(name) for name in NOTED if name in vars(model)}  # it would write a state of its own
    state = model.state_dict()
    try:
        if any(isinstance(module, Dequantised) for module in model.modules()):
            state = _in_full(model, state)
            vars(model.config).pop("quantization_config", None)
        type(model).save_pretrained(model, folder, state_dict=own_state(model, state))
    finally:
        vars(model).update(noted)
        vars(model.config).clear()
        vars(model.config).update(config)


def _in_full(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with the weights that are quantised, or were until a merge, in the model's own type."""
    full = dict(state)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Dequantised):
            full[f"{name}.weight"] = module.weight.to(model.dtype)
        elif bits(module) is not None:
            parts = (f"{name}.weight.", f"{name}.SCB", f"{name}.weight_format")
            full = {key: value for key, value in full.items() if not key.startswith(parts)}
            full[f"{name}.weight"] = dequantised(module).to(model.dtype)
    return full
