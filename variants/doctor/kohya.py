"""The names of Kohya's and of diffusers' tensors.

    lora_unet_down_blocks_0_..._to_q.lora_down.weight   A (r, I) or (r, I, h, w)      Kohya: dots of the module are underscores
    lora_unet_down_blocks_0_..._to_q.lora_up.weight     B (O, r) or (O, r, 1, 1)
    lora_unet_down_blocks_0_..._to_q.alpha              a number; the scale is alpha/r, and 1 where there is none
    lora_unet_..._conv1.lora_mid.weight                 M (r, r, h, w): dW = B M A (LyCORIS, "Tucker")
    lora_unet_..._to_q.dora_scale                       DoRA's magnitude (LyCORIS)

    unet.down_blocks.0....to_q.lora_A.weight            diffusers: PEFT's names behind the component's; ranks and alphas in
                                                        the metadata "lora_adapter_metadata", else the scale is 1
    unet.down_blocks.0....to_q.lora.down.weight         diffusers before 0.22, and
    unet.down_blocks.0....processor.to_q_lora.down.weight

Which module a Kohya name means cannot be told without the model, as underscores stand for dots too.
"""

import re
from typing import NamedTuple

KOHYA_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_", "lora_prior_unet_")
METADATA = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY
_ENDS = {
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    "_lora.down.weight": "A",
    "_lora.up.weight": "B",
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_A.default.weight": "A",
    ".lora_B.default.weight": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
# Of LyCORIS: updates that are no product of two thin factors.
OTHER_KINDS = re.compile(
    r"\.(hada_[wt][12](_[ab])?|lokr_[wt][12](_[ab])?|oft_\w+|a1\.weight|on_input|diff(_b)?|w_norm|b_norm)$"
)


class Part(NamedTuple):
    site: str
    part: str  # "A", "B", "mid", "alpha" or "magnitude"


def part(name: str) -> Part | None:
    """What a tensor is; None where it is no part of a low-rank update."""
    end = next((end for end in _ENDS if name.endswith(end)), None)
    return None if end is None or len(name) == len(end) else Part(name.removesuffix(end), _ENDS[end])


def is_kohya(site: str) -> bool:
    return site.startswith(KOHYA_PREFIXES)


def flat(module: str, prefix: str) -> str:
    """A module's name as Kohya writes it, behind `prefix` ("lora_te")."""
    return f"{prefix.removesuffix('_')}_{module.replace('.', '_')}"
