"""PEFT's forms of an adapter by their peft_type, and which of them a file, or an adapter, has."""

from types import ModuleType

from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.files.folders import Contents
from rankwise.variants.files.peft import ia3, prompts, reading, writing
from rankwise.variants.files.state import has_low_rank_form
from torch import nn

# peft_type -> the module with `holds`, `written` and `load`; any other is a LORA or an ADALORA, or is refused as none.
OTHERS: dict[str, ModuleType] = {"IA3": ia3, "PROMPT_TUNING": prompts, "PREFIX_TUNING": prompts}


def holds(adapter: Adapter) -> bool:
    """Whether PEFT's files can hold an attached adapter."""
    return has_low_rank_form(adapter) or (adapter.peft_form is not None and OTHERS[adapter.peft_form].holds(adapter))


def written(adapter: Adapter, member: int) -> Contents:
    """PEFT's files of one member of an attached adapter."""
    form = OTHERS.get(adapter.peft_form or "", writing) if len(adapter.sites) else writing
    return form.written(adapter, member)


def load(model: nn.Module, contents: Contents) -> Adapter:
    """
    Raises:
        ValueError: what is not supported, or tensors that are missing, contradict the configuration or do not fit `model`.
    """
    return OTHERS.get(str((contents.config or {}).get("peft_type")), reading).load(model, contents)
