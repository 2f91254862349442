"""A model that comes in another form, written once as transformers reads models: weights, configuration, processor.

GGUF    read by transformers.  Files of releases are quantised; what comes out are the dequantised weights, and not those of
        the original model.
ONNX    a DINOv2 among the parts of another network, whose other parts are left out.
"""

import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.experiments.files import system_errors
from rankwise.experiments.sources.cache import lock
from rankwise.experiments.sources.entries import Entry, Unavailable

if TYPE_CHECKING:
    import numpy as np

VERSION = 1  # part of what such a model is: raise it when the same file comes out otherwise


@dataclass(frozen=True)
class Form:
    """file: that the model is in. package: what reads it, and the extra of Rankwise that brings it. seconds: about."""

    file: str
    package: str
    convert: Callable[[Path, str, Path], None]
    seconds: int


def form_of(entry: Entry) -> Form | None:
    """None where its files are those of transformers."""
    if entry.gguf is not None:
        return Form(entry.gguf, "gguf", _from_gguf, 30)
    if entry.onnx is not None:
        return Form(entry.onnx, "onnx", _from_onnx, 2)
    return None


def converted(entry: Entry, folder: Path) -> Path:
    """The folder of the converted model, beside the file in `folder`; `folder` itself where nothing is to be converted.

    Raises:
        Unavailable: the package that reads such files is not installed, or the cache cannot be written.
    """
    form, ready = form_of(entry), folder / f"transformers-{VERSION}"
    if form is None:
        return folder
    if ready.is_dir():
        return ready
    if find_spec(form.package) is None:
        what = f"{form.file} is here, and the package {form.package}, which reads it, is not"
        raise Unavailable(entry.id, [f"{what}: pip install 'rankwise[{form.package}]'"])
    with lock(folder.parent / f".{folder.name}.lock", entry.id):
        if ready.is_dir():  # another process was faster
            return ready
        print(f"{entry.id}: converting {form.file}, once (about {form.seconds} s)", file=sys.stderr, flush=True)
        try:
            temporary = Path(tempfile.mkdtemp(prefix=".transformers.", suffix=".tmp", dir=folder))
        except OSError as error:
            raise Unavailable(entry.id, [f"the cache cannot be written: {error.strerror}; set RANKWISE_CACHE"]) from None
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # progress bars of transformers' own
                form.convert(folder, form.file, temporary)
            os.replace(temporary, ready)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return ready


def _from_gguf(folder: Path, file: str, out: Path) -> None:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # save_pretrained refuses a model that says it is quantised, so its weights move into one that does not.
    known = model.config.to_dict()
    config = type(model.config).from_dict({k: v for k, v in known.items() if k not in ("quantization_config", "_name_or_path")})
    plain = type(model)(config).bfloat16()
    plain.load_state_dict(model.state_dict())
    plain.config.dtype = torch.bfloat16
    plain.save_pretrained(out)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out)


# -- DINOv2 ------------------------------------------------------------------------------------------------------------

# What the hub says of every DINOv2; sizes are read off the weights.
DINOV2 = {"architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_act": "gelu", "qkv_bias": True}
DINOV2 |= {"layer_norm_eps": 1e-6, "layerscale_value": 1.0, "use_swiglu_ffn": False, "use_mask_token": False}
HEAD_SIZE = 64  # features of one attention head, in every size of DINOv2
PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,  # bicubic
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}


def _from_onnx(folder: Path, file: str, out: Path) -> None:
    """A graph keeps names of biases, norms and convolutions; a linear's weight has none and is found beside its bias."""
    import numpy as np
    import onnx
    from onnx.numpy_helper import to_array
    from safetensors.numpy import save_file

    graph = onnx.load(folder / file).graph
    arrays = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    prefix = "backbone."
    weights = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    products = {node.output[0]: node.input for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = next((name for name in node.input if name.startswith(prefix) and name.endswith(".bias")), None)
        product = next((products[name] for name in node.input if name in products), None)
        if bias is not None and product is not None:  # y = x W^T + b
            weights[bias.removeprefix(prefix).removesuffix("bias") + "weight"] = arrays[product[1]].T
    hidden = weights["embeddings.cls_token"].shape[-1]
    tables = [a for n, a in arrays.items() if not n.startswith(prefix) and a.ndim == 3 and a.shape[::2] == (1, hidden)]
    class_token, patches = sorted(tables, key=lambda table: table.shape[1])  # positions of the first token, of the others
    weights["embeddings.position_embeddings"] = np.concatenate([class_token, patches], axis=1)
    with system_errors(out / "model.safetensors"):
        save_file({name: np.ascontiguousarray(array) for name, array in weights.items()}, out / "model.safetensors")
    config = DINOV2 | _sizes(weights, hidden)
    for name, value in (("config.json", config), ("preprocessor_config.json", PROCESSOR)):
        (out / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sizes(weights: "dict[str, np.ndarray]", hidden: int) -> dict[str, Any]:
    patch = weights["embeddings.patch_embeddings.projection.weight"]  # (hidden, channels, height, width)
    layers = {int(match[1]) for name in weights if (match := re.match(r"encoder\.layer\.(\d+)\.", name))}
    side = round((weights["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    return {
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "num_attention_heads": hidden // HEAD_SIZE,
        "mlp_ratio": weights["encoder.layer.0.mlp.fc1.weight"].shape[0] // hidden,
        "patch_size": patch.shape[-1],
        "num_channels": patch.shape[1],
        "image_size": side * patch.shape[-1],
    }
