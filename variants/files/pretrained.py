"""An adapter saved to a folder, and loaded from one."""

import warnings
from pathlib import Path

from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.adapter.kinds.quantised import scheme_of
from rankwise.variants.adapter.kinds.scheme import Scheme
from rankwise.variants.adapter.surgery import Adapted
from rankwise.variants.files import folders, own
from rankwise.variants.files.budget import excess
from rankwise.variants.files.facts import Facts
from rankwise.variants.files.peft import forms
from rankwise.variants.files.state import check_member
from torch import nn


def save_pretrained(adapter: Adapter, folder: str | Path, member: int = 0) -> None:
    """Writes one member of an attached adapter, whole or not at all; warns where its ranks are above its final budget.

    Raises:
        ValueError: not attached, no such member, or `folder` is a file.
        OSError: the disk is full or not writable; what was in `folder` before is untouched.
    """
    write(adapter, folder, member)
    warn_if_unfinished(adapter, member)


def write(adapter: Adapter, folder: str | Path, member: int = 0) -> None:
    """`save_pretrained` in the middle of a run, where the ranks need not be final."""
    check_member(adapter, member)
    contents = forms.written(adapter, member) if forms.holds(adapter) else own.written(adapter, member)
    folders.write(Path(folder), contents)


def warn_if_unfinished(adapter: Adapter, member: int = 0) -> None:
    """Warns where training ended before it reached its rank budget."""
    over = excess(adapter, member)
    if over is not None:
        what = "ranks" if over.unit == "rank" else over.unit
        warnings.warn(
            f"{adapter.method} has {over.has} {what} where its schedule ends with {over.budget}: training ended before its "
            f"budget was reached (early stopping, or the best checkpoint is of an earlier step).  Train on to the last step, "
            f"or cut it: variants.truncate(adapter, total_{over.unit}={over.budget})",
            stacklevel=3,
        )


def load_pretrained(model: nn.Module, folder: str | Path) -> Adapter:
    """The adapter in `folder`, ours or PEFT's, attached to `model` with one member.

    Sites are those that the file has tensors for, whatever target_modules says.  A triplet that was cut starts anew with
    E = 0.  Where this fails the model is as it was.

    Raises:
        ValueError: no adapter there, a cut-off or foreign file, a feature that is not supported, tensors that are
            missing, contradict the configuration or do not fit the model.
    """
    folder = Path(folder)
    contents = folders.read(folder)
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has an adapter already: detach it first")
    try:
        adapter = own.load(model, contents) if contents.config is None else forms.load(model, contents)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    _warn_of_another_base(folder, contents.facts, model)
    return adapter


def _warn_of_another_base(folder: Path, facts: Facts | None, model: nn.Module) -> None:
    """Warns where the adapter was trained over weights that were quantised otherwise: they are other weights."""
    was, now = Scheme.of_fact(None if facts is None else facts.quantization), scheme_of(model)
    if facts is not None and was != now:
        said = [str(one or "not quantised") for one in (was, now)]
        warnings.warn(f"{folder} was trained over another base than this one: {said[0]}, and here {said[1]}", stacklevel=3)
