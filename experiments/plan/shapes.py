"""A model's configuration without its weights: of a folder, of a model that is here, or of one whose shapes travel with us."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.variants.files import json_text

if TYPE_CHECKING:
    from torch import nn

FOLDER = Path(__file__).parent / "shapes"


def names() -> list[str]:
    """Models whose shapes travel with Rankwise."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def configuration(model: str) -> dict[str, Any]:
    """What config.json says of a model: of a folder, else of the models here, else of the hub's cache; nothing is downloaded.

    model: a folder, a name of the catalogue, a hub id, or the last part of one whose shapes travel with Rankwise.

    Raises:
        ValueError: no configuration is at hand, or it is none.
    """
    from rankwise.experiments import sources
    from rankwise.experiments.sources.hub import hub_snapshot

    last = model.rpartition("/")[2]
    places = [Path(model).expanduser() / "config.json", FOLDER / f"{last}.json"]
    if model in sources.CATALOGUE:  # SmolLM2-135M-Instruct-Q4_1 is a SmolLM2-135M
        places += [sources.cached(sources.CATALOGUE[model]) / "config.json"]
        places += [FOLDER / f"{name}.json" for name in names() if last.startswith(name)]
    else:
        with contextlib.suppress(Exception):  # whatever the hub's client makes of a name that is no id
            snapshot, _ = hub_snapshot(model, local=True)
            places += [Path(snapshot) / "config.json"] if snapshot else []
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ValueError(
            f"{model}: its configuration is not here, and nothing is downloaded for it: give a folder with config.json, or "
            f"one of {', '.join(names())}"
        )
    try:
        found = json_text.read(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no JSON ({error}): give a folder with the config.json of a model") from None
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise ValueError(f"{path} names no model_type: give a folder with the config.json of a model")
    return found


def build(model: str, kind: Any, num_labels: int, precision: str) -> "nn.Module":
    """The model with the head of a kind of task, on the meta device: every shape, no value, no memory.

    Raises:
        ValueError: no configuration is at hand, or transformers knows no such model for this kind.
    """
    return from_configuration(model, configuration(model), kind, num_labels, precision)


def read(given: dict[str, Any], **settings: Any) -> Any:
    """What a config.json says, and these settings instead of its own, as transformers' configuration with every default.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: transformers' own, of a configuration that is none.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    own = {key: value for key, value in given.items() if key not in ("model_type", "architectures", "torch_dtype", "dtype")}
    try:
        return transformers.AutoConfig.for_model(given["model_type"], **{**own, **settings})
    except StrictDataclassError as error:  # an Exception of its own kind, with lines of dashes
        raise ValueError(" ".join(str(error.__cause__ or error).split())) from None


def from_configuration(model: str, given: dict[str, Any], kind: Any, num_labels: int, precision: str) -> "nn.Module":
    """The same of what a config.json says; model: what it is called in an error."""
    import torch
    import transformers
    from rankwise.experiments.models import quiet

    with quiet(), torch.device("meta"):
        try:
            config = read(given, **kind.model_settings(num_labels))
            if getattr(config, "pad_token_id", None) is None:
                config.pad_token_id = 0
            auto = getattr(transformers, kind.model_class(config))
            made = auto.from_config(config, attn_implementation="sdpa")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{model} cannot be built from its configuration: {str(error).splitlines()[0]}") from error
    return made.to(torch.bfloat16 if precision == "bf16" else torch.float32)
