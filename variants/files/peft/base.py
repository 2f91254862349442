"""Tensors of the frozen base in a file: an adapted output layer's, or those of a vocabulary that was resized."""

import contextlib
from collections.abc import Mapping, Sequence

import torch
from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.files.peft.names import BASE_LAYER, PREFIX
from torch import Tensor, nn


def take_base(model: nn.Module, rest: dict[str, Tensor], heads: Sequence[str]) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Takes the tensors of the frozen base out of `rest`: what of them differs from the model's, by name.

    PEFT writes the embeddings and the output layer where the vocabulary was resized or one of them is adapted, the latter as
    base_layer; and reads them into the model.
    """
    places = dict(model.named_parameters(remove_duplicate=False))
    vocabulary = _vocabulary(model)
    words = tuple(f"{name}." for name, module in model.named_modules(remove_duplicate=False) if module in vocabulary)
    differing = {}
    for key in list(rest):
        name = key.replace(BASE_LAYER, ".")
        if name.startswith(tuple(f"{head}." for head in heads)) or name not in places:
            continue
        value, parameter = rest[key], places[name]
        if key == name and not name.startswith(words) and not _equals(value, parameter):
            continue  # PEFT would put it over the base, but writes no such thing
        del rest[key]
        if value.shape != parameter.shape:
            shapes = f"{tuple(value.shape)} where {type(model).__name__} has {tuple(parameter.shape)}"
            remedy = "load the model it was trained on"
            if name.startswith(words) and value.shape[1:] == parameter.shape[1:]:
                remedy = f"its vocabulary was resized: call model.resize_token_embeddings({len(value)}) first"
            raise ValueError(f"tensor {PREFIX}{key} of the base has shape {shapes}: {remedy}")
        if not _equals(value, parameter):
            differing[name] = parameter, value
    return differing


def _vocabulary(model: nn.Module) -> list[nn.Module]:
    """The embeddings of a language model and its output layer."""
    modules = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):  # transformers' models that have none
            modules.append(getattr(model, name)())
    return [module for module in modules if module is not None]


def _equals(value: Tensor, parameter: nn.Parameter) -> bool:
    return value.shape == parameter.shape and torch.equal(value.to(parameter), parameter)


def put_base(adapter: Adapter, tensors: Mapping[str, tuple[nn.Parameter, Tensor]]) -> None:
    """Gives the base the tensors that its adapter was trained with, until it is detached."""
    own = {name: parameter.data for name, (parameter, _) in tensors.items()}
    for parameter, value in tensors.values():
        parameter.data = value.to(parameter)
    adapter.base_tensors = {name: parameter for name, (parameter, _) in tensors.items()}

    def put_back() -> None:
        for name, parameter in adapter.base_tensors.items():
            parameter.data = own[name]
        adapter.base_tensors = {}

    adapter.when_detached(put_back)
