"""The names in PEFT's files: of the files, of the tensors, and of the modules that a pattern means.  Without torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # PEFT's wrapper and tuner around the model
NO_TARGETS = "dummy-target-modules"  # peft.utils.constants.DUMMY_TARGET_MODULES: matches nothing, and PEFT accepts it

# The tensors of a site in a file, by the kind of weight that is adapted.  A convolution's factors have four axes under the
# names of a linear's: lora_A.weight (r, I, h, w) and lora_B.weight (O, r, 1, 1).
FACTORS = {
    "linear": ("lora_A", "lora_B"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
}
VECTORS, PROJECTIONS = ("vera_lambda_d", "vera_lambda_b"), ("base_model.vera_A", "base_model.vera_B")  # a VERA's
COEFFICIENTS, MAGNITUDE = "lora_E", "lora_magnitude_vector"
_PART = re.compile(
    r"^(?P<site>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_E|lora_magnitude_vector|ranknum)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.weight)?$"
)
_HEAD = re.compile(r"^(?P<head>.+)\.modules_to_save\.(?:(?P<adapter>[^.]+)\.)?(?P<tensor>.+)$")
BASE_LAYER = ".base_layer."  # PEFT's wrapper holds the frozen module under this name
ORIGINAL_HEAD = ".original_module."  # and the head that it replaced under this one


@dataclass(frozen=True)
class Part:
    """A tensor of a low-rank update.  adapter: PEFT's name for it, which its save_pretrained takes out ("default")."""

    site: str
    part: str
    adapter: str | None

    @property
    def factor(self) -> str | None:
        """ "A" or "B", whatever the kind of weight, "E", or None of a magnitude and of what old files hold beside them."""
        letters = {name: letter for pair in FACTORS.values() for name, letter in zip(pair, "AB", strict=True)}
        return (letters | {COEFFICIENTS: "E"}).get(self.part)


def part(name: str) -> Part | None:
    """What a tensor is, its name without PREFIX; None where it is no part of a low-rank update."""
    match = _PART.match(name)
    return Part(match["site"], match["part"], match["adapter"]) if match else None


def head_tensor(name: str) -> tuple[str, str | None]:
    """A tensor's name in the model, and the adapter that it names, where it is one of PEFT's wrapper around a head."""
    match = _HEAD.match(name)
    return (f"{match['head']}.{match['tensor']}", match["adapter"]) if match else (name, None)


def is_meant(pattern: str, name: str) -> bool:
    """PEFT's get_pattern_key: the pattern matches the module's name, or its end at a dot.

    Raises:
        re.error: no regular expression.
    """
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def exact_pattern(name: str, names: Iterable[str]) -> str:
    """A pattern that means this module and no other of `names`: its name, or else an anchored expression."""
    is_plain = all(other == name or not is_meant(name, other) for other in names)
    return name if is_plain else f"^{re.escape(name)}"
