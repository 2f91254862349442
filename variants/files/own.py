"""The format of what PEFT has no form for (full fine-tuning, BitFit, bottleneck adapters): tensors by the model's own names."""

from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.files.facts import Facts
from rankwise.variants.files.folders import Contents
from rankwise.variants.files.state import as_fact, copy, detached_if_it_fails, trained
from rankwise.variants.settings import method
from torch import nn


def written(adapter: Adapter, member: int) -> Contents:
    """One member of an attached adapter."""
    sites = [*adapter.named_sites(), *adapter.named_heads()]
    tensors = {f"{name}.{key}": value for name, site in sites for key, value in site.tensors_of(member).items()}
    settings = adapter.alone(member).settings.model_dump(exclude_unset=True)
    own = {"quantization": as_fact(adapter.model)}
    return Contents(tensors, None, Facts(adapter.method, settings, adapter.seeds[member], adapter.head_names, **own))


def load(model: nn.Module, contents: Contents) -> Adapter:
    """
    Raises:
        ValueError: tensors that are missing, or not the model's.
    """
    facts = contents.facts
    adapter = method(facts.method).load()(seeds=[facts.seed], **facts.settings)
    with detached_if_it_fails(adapter):
        adapter.attach(model, head=facts.head)
        places = {f"{n}.{key}": p for part in (adapter.sites, adapter.heads) for n, key, p in trained(part)}
        unknown = sorted(set(contents.tensors) - set(places))
        if unknown:
            raise ValueError(f"tensor {unknown[0]} is not in {type(model).__name__}: load the model it was trained on")
        for name, parameter in places.items():
            copy(parameter, contents.tensors, name)
    return adapter
