"""LoRA files of diffusion models, as `diffusers` writes and reads them: `pipe.load_lora_weights(folder)`.

    pytorch_lora_weights.safetensors    unet.<module>.lora_A.weight (r, I), unet.<module>.lora_B.weight (O, r)

The scale of each site is folded into B, so that alpha is r everywhere.  Ranks that differ stand in the file's metadata, under
diffusers' key, which diffusers reads since 0.34.  Files of older versions (`.lora.down.weight`, `.alpha`, attention
processors) are read; those of other programs are not.  Nothing of diffusers is imported here.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.variants.adapter.interface import Adapter
from rankwise.variants.files import folders, json_text
from rankwise.variants.files.folders import Contents
from rankwise.variants.files.peft import reading, writing
from rankwise.variants.files.peft.config import PeftConfig
from rankwise.variants.files.peft.names import MAGNITUDE, PREFIX, part
from rankwise.variants.files.state import check_member, has_low_rank_form
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

FILE = "pytorch_lora_weights.safetensors"  # diffusers.loaders.lora_base.LORA_WEIGHT_NAME_SAFE
METADATA = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY
_OLD = re.compile(
    r"^(?P<site>.+?)(?:\.processor\.(?P<of>to_q|to_k|to_v|to_out)_lora|\.lora|\.(?P<at>to_q|to_k|to_v|to_out)_lora)"
    r"\.(?P<factor>down|up)\.weight$"
)


def save_diffusers(adapter: Adapter, folder: str | Path, member: int = 0, component: str = "unet") -> None:
    """Writes one member for `pipe.load_lora_weights(folder)`, whole or not at all.

    component: the part of the pipeline that was adapted: "unet", "transformer" or "text_encoder".

    Raises:
        ValueError: as `save_pretrained`; or a head, magnitudes or no low-rank form, none of which such files hold.
        OSError: as `save_pretrained`.
    """
    check_member(adapter, member)
    if not has_low_rank_form(adapter) or adapter.head_names:
        what = "trains a head" if adapter.head_names else "has no low-rank form"
        raise ValueError(f"{adapter.method} {what}, which a LoRA file of diffusers cannot hold: use save_pretrained")
    contents = writing.written(adapter, member, plain=True)
    config = PeftConfig.read(contents.config or {})
    tensors, ranks = {}, {}
    for name, value in contents.tensors.items():
        of = part(name.removeprefix(PREFIX))
        if of is None or of.part == MAGNITUDE or of.factor is None:
            raise ValueError(f"{name} cannot stand in a LoRA file of diffusers: merge the adapter, or use save_pretrained")
        if of.factor == "B":
            ranks[of.site] = value.shape[1]
            value = (value.double() * config.scale_of(of.site, value.shape[1])).to(value.dtype)
        tensors[f"{component}.{of.site}.{of.part}.weight"] = value.detach().cpu().contiguous()
    if not ranks:
        raise ValueError("no site has a rank, and a LoRA file of diffusers holds one at least: use save_pretrained")
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {site: rank for site, rank in ranks.items() if rank != usual}
    said = {"r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others, "target_modules": sorted(ranks)}
    metadata = {"format": "pt", METADATA: json.dumps({f"{component}.{key}": v for key, v in said.items()}, sort_keys=True)}
    with folders.placed(Path(folder)) as partial:
        folders.save_tensors(tensors, partial / FILE, metadata)


def load_diffusers(model: nn.Module, path: str | Path, component: str = "unet") -> Adapter:
    """The LoRA of a file that diffusers or `save_diffusers` wrote, attached to that component with one member.

    path: the file, or the folder that holds pytorch_lora_weights.safetensors.

    Raises:
        ValueError: no such file, one of another program, or tensors that do not fit the model.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json_text.parse((file.metadata() or {}).get(METADATA, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file ({error}): save or copy it again") from None
    try:
        return reading.load(model, _as_peft(tensors, metadata, component))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _as_peft(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], component: str) -> Contents:
    """
    Raises:
        ValueError: nothing of that component, names of another program, or ranks without what they are scaled by.
    """
    own = {name.removeprefix(f"{component}."): t for name, t in tensors.items() if name.startswith(f"{component}.")}
    if not own:
        there = ", ".join(sorted({name.partition(".")[0] for name in tensors})) or "none"
        raise ValueError(
            f'holds nothing of a component "{component}" (those there: {there}): name one, or save it by diffusers'
        )
    said = {name.removeprefix(f"{component}."): v for name, v in metadata.items() if name.startswith(f"{component}.")}
    alphas = {name.removesuffix(".alpha"): float(t) for name, t in own.items() if name.endswith(".alpha")}
    made, ranks = {}, {}
    for name, value in own.items():
        if name.endswith(".alpha"):
            continue
        name = _new_name(name)
        of = part(name)
        if of is None or of.factor not in ("A", "B"):
            raise ValueError(f"tensor {name} is none of a LoRA: save it by diffusers (pipe.save_lora_weights)")
        made[PREFIX + name] = value
        if of.factor == "B":
            ranks[of.site] = value.shape[1]
    if not said and not alphas and len(set(ranks.values())) > 1:
        raise ValueError("has several ranks and says not how they are scaled: save it by diffusers 0.34 or later")
    scaled = {site: alphas.get(site, rank) for site, rank in ranks.items()}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": list(ranks)}
    config |= {"rank_pattern": {f"^{re.escape(site)}": rank for site, rank in ranks.items()}}
    config |= {"alpha_pattern": {f"^{re.escape(site)}": alpha for site, alpha in scaled.items()}}
    if said:
        known = PeftConfig.read({"peft_type": "LORA", **said})
        config["alpha_pattern"] = {f"^{re.escape(site)}": known.scale_of(site, rank) * rank for site, rank in ranks.items()}
    return Contents(made, config, None)


def _new_name(name: str) -> str:
    """A tensor's name as PEFT writes it: attn1.processor.to_out_lora.down.weight -> attn1.to_out.0.lora_A.weight."""
    old = _OLD.match(name)
    if old is None:
        return name
    inner = old["of"] or old["at"]
    site = old["site"] if inner is None else f"{old['site']}.{inner}{'.0' if inner == 'to_out' else ''}"
    return f"{site}.{'lora_A' if old['factor'] == 'down' else 'lora_B'}.weight"
