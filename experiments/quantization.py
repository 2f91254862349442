"""Bases in 4 or 8 bits by bitsandbytes: what a study may ask for, whether it can be had, and how transformers is told.

No torch here but in `options` and `finish`.
"""

import importlib.metadata
import re
from collections.abc import Sequence
from typing import Any

from rankwise.variants.adapter.kinds.scheme import Scheme

NAMES = ("nf4", "int8")
LEAST = {"bitsandbytes": (0, 50), "accelerate": (1, 1)}
REMEDY = "pip install 'rankwise[quantized]'"


def scheme(name: str | None, is_double: bool = False) -> Scheme | None:
    """The form of these settings; None of no name, or of "none"."""
    return None if name in (None, "none") else Scheme(str(name), is_double)


def fault(name: str | None, is_double: bool) -> str | None:
    """What is wrong with two settings together."""
    if is_double and name != "nf4":
        given = "no quantization" if name in (None, "none") else f'quantization = "{name}"'
        return f'double_quantization = true has no effect with {given}: take it out, or add quantization = "nf4"'
    return None


def missing() -> str | None:
    """Which package is not here or too old, and the remedy; None where quantised models can be loaded."""
    for package, least in LEAST.items():
        wanted = ".".join(map(str, least))
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"a quantised base needs {package} >= {wanted}, which is not installed: {REMEDY}"
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < least:
            return f"a quantised base needs {package} >= {wanted}, and {version} is installed: {REMEDY}"
    return None


def options(form: Scheme, dtype: Any, device: Any, skipped: Sequence[str] | None = None) -> dict[str, Any]:
    """What `from_pretrained` is given: each weight is quantised as it is read, on the device where it stays.

    skipped: names of modules that stay as they are; those that transformers itself leaves out where none are given.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if (lacking := missing()) is not None:
        raise ValueError(lacking)
    kept = None if skipped is None else list(skipped)
    if form.name == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=form.name,
            bnb_4bit_use_double_quant=form.is_double,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=kept,
        )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def finish(model: Any) -> None:
    """Has the quantised modules of a loaded model compute in evaluation as they train (variants/adapter/kinds/quantised.py)."""
    from rankwise.variants.adapter.kinds.quantised import bits, compute_exactly

    for module in model.modules():
        if bits(module) is not None:
            compute_exactly(module)
