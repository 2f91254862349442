"""Detectors and diffusion models from Python: steps packed as alone, ranks, maps, files; the examples of variants/vision.md."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from rankwise import variants
from rankwise.variants.adapter.probe import fill
from rankwise.variants.files.diffusion import FILE
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tests.command import rankwise
from tests.loop import Loop

PAGE = Path(variants.__file__).with_name("vision.md")
K, N = 2, 2


def detector():
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    size |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5, "num_labels": 3, "dropout": 0.0}
    stages = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    backbone = transformers.ResNetConfig(**stages, out_features=["stage4"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.DetrConfig(backbone_config=backbone, use_timm_backbone=False, backbone=None, **size)
        return transformers.DetrForObjectDetection(config).double().eval()


def detection(rows: int) -> dict:
    random = torch.Generator().manual_seed(1)
    pixels = torch.randn(rows, 3, 64, 64, generator=random, dtype=torch.float64)
    boxes = [0.2 + 0.4 * torch.rand(i % 2 + 1, 4, generator=random) for i in range(rows)]
    labels = [{"class_labels": torch.randint(3, (len(b),), generator=random), "boxes": b} for b in boxes]
    return {"pixel_values": pixels, "labels": labels}


def detection_losses(adapter, batch) -> torch.Tensor:
    model, members = adapter.model, adapter.members
    output, rows = model(pixel_values=batch["pixel_values"]), len(batch["labels"]) // members
    labels = [batch["labels"][k * rows : (k + 1) * rows] for k in range(members)]
    each = zip(output.logits.float().chunk(members), output.pred_boxes.float().chunk(members), labels, strict=True)
    return torch.stack([model.loss_function(one, own, model.device, boxes, model.config)[0] for one, boxes, own in each])


def unet():
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",), "layers_per_block": 1}
    size = {"sample_size": 8, "in_channels": 2, "out_channels": 2, "block_out_channels": (8,)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        more = {"cross_attention_dim": 12, "attention_head_dim": 4, "norm_num_groups": 4}
        return diffusers.UNet2DConditionModel(**size, **blocks, **more).double().eval()


def diffusion(rows: int) -> tuple[torch.Tensor, ...]:
    """Noisy latents, times, text; and the noise."""
    random = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, rows, 2, 8, 8, generator=random, dtype=torch.float64)
    text = torch.randn(rows, 5, 12, generator=random, dtype=torch.float64)
    return latents, torch.randint(1000, (rows,), generator=random), text, noise


def diffusion_losses(adapter, batch) -> torch.Tensor:
    *inputs, noise = batch
    return F.mse_loss(adapter.model(*inputs).sample, noise, reduction="none").view(adapter.members, -1).mean(1)


def part(batch, k: int):
    cut = slice(k * N, (k + 1) * N)
    return {key: value[cut] for key, value in batch.items()} if isinstance(batch, dict) else tuple(one[cut] for one in batch)


MODELS = {
    "detector": (detector, detection, detection_losses, ["all-linear", "model.input_projection"]),
    "unet": (unet, diffusion, diffusion_losses, ["all-linear", "conv1"]),
}
METHODS = {
    "lora": {"rank": [2, 3], "alpha": 5, "dropout": 0.2},
    "adalora": {"initial_rank": 3, "target_rank": 2, "alpha": 5, "warmup_steps": 1, "final_steps": 1, "orthogonality": 0.3},
}


SLOW = pytest.mark.slow  # detector and unet, lora and adalora are in the quick tier, each once
CASES = [
    ("detector", "adalora"),
    ("unet", "lora"),
    *(pytest.param(*one, marks=SLOW) for one in (("detector", "lora"), ("unet", "adalora"))),
]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_training_steps_of_packed_members_are_those_of_members_alone(name, method, tmp_path, capsys):
    make, data, losses, targets = MODELS[name]
    targets = targets if method == "lora" else "all-linear"
    batch = data(K * N)
    example = {"pixel_values": batch["pixel_values"]} if name == "detector" else batch[:3]

    def trained(members, seeds, **settings):
        adapter = variants.create(method, members=members, seeds=seeds, **settings)
        return Loop(adapter.attach(make(), targets, calibration=example), [1e-2, 3e-3][:members], 3, losses=losses)

    together = trained(K, [4, 1], **METHODS[method])
    seen = [together.step(batch) for _ in range(2)]
    assert seen[0][0] != seen[0][1] and not torch.equal(seen[0], seen[1])
    near = {"rtol": 1e-9, "atol": 1e-12} if name == "unet" else {"rtol": 1e-5, "atol": 1e-6}  # DETR's loss is in fp32
    for k, seed in enumerate((4, 1)):
        settings = {key: value[k] if isinstance(value, list) else value for key, value in METHODS[method].items()}
        alone = trained(1, [seed], **settings)
        alone.rates = [together.rates[k]]
        for losses_of_step in seen:
            torch.testing.assert_close(alone.step(part(batch, k))[0], losses_of_step[k], **near)
        ranks = {site: int(rank[k]) for site, rank in together.adapter.ranks().items()}
        assert ranks == {site: int(rank[0]) for site, rank in alone.adapter.ranks().items()}
    with warnings.catch_warnings():  # the run stops one step before its schedule ends
        warnings.simplefilter("ignore")
        variants.save_pretrained(together.adapter, tmp_path / "adapter", member=1)
    figures = ["--figures", tmp_path / "figures"] if (name, method) == ("unet", "adalora") else []
    assert rankwise("ranks", tmp_path / "adapter", "--json", *figures) == 0
    shown = {row["site"]: row["active"] for row in json.loads(capsys.readouterr().out)["sites"]}
    assert {site: shown.get(site, 0) for site in ranks} == ranks
    assert not figures or (tmp_path / "figures" / "rank-map.svg").is_file()


# -- files of diffusers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted():
    return filled()


def filled():
    """An adapter with two members of other ranks, filled, and what each member gives."""
    inputs = diffusion(2 * N)[:3]
    adapter = variants.create("lora", members=2, rank=[2, 3], alpha=5).attach(
        unet(), ["all-linear", "conv1"], calibration=inputs
    )
    fill(adapter)
    adapter.begin(variants.Step(1, 10), training=False)
    return adapter, inputs, adapter.model(*inputs).sample.detach()


def told(model, inputs) -> torch.Tensor:
    return model(*inputs).sample.detach()


@pytest.mark.parametrize("member", [0, 1])
def test_diffusers_reads_what_is_written_here_and_the_other_way_round(adapted, tmp_path, member):
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    adapter, inputs, outputs = adapted
    inputs, expected = part(inputs, member), outputs[member * N : (member + 1) * N]
    variants.save_diffusers(adapter, tmp_path / "ours", member=member)
    pipeline, theirs = diffusers.StableDiffusionPipeline, unet()  # what pipe.load_lora_weights calls
    state, alphas, metadata = pipeline.lora_state_dict(tmp_path / "ours", return_lora_metadata=True)
    pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=theirs, metadata=metadata)
    torch.testing.assert_close(told(theirs.double(), inputs), expected, rtol=1e-9, atol=1e-10)
    (name,) = theirs.peft_config
    pipeline.save_lora_weights(tmp_path / "theirs", unet_lora_layers=peft.get_peft_model_state_dict(theirs, adapter_name=name))
    for folder in ("ours", "theirs"):
        model = unet()
        again = variants.load_diffusers(model, tmp_path / folder)
        again.begin(variants.Step(1, 10), training=False)
        torch.testing.assert_close(told(model, inputs), expected, rtol=1e-9, atol=1e-10)
        assert {int(rank) for rank in again.ranks().values()} == {(2, 3)[member]}


def test_ranks_that_differ_keep_their_scale_in_diffusers(tmp_path):
    pytest.importorskip("diffusers")
    adapter, inputs, _ = filled()
    variants.truncate(adapter, total_rank=3 * len(adapter.ranks()) // 2)
    adapter.begin(variants.Step(1, 10), training=False)
    expected = told(adapter.model, inputs)[:N]
    variants.save_diffusers(adapter, tmp_path / "cut")
    ranks = {int(rank[0]) for rank in adapter.ranks().values()}
    assert {1, 2} <= ranks
    theirs = unet()
    theirs.load_lora_adapter(tmp_path / "cut", prefix="unet", weight_name=FILE)
    torch.testing.assert_close(told(theirs.double(), part(inputs, 0)), expected, rtol=1e-9, atol=1e-10)


def test_files_of_older_versions_are_read(adapted, tmp_path):
    """Their names, and alphas beside the factors."""
    adapter, inputs, outputs = adapted
    variants.save_diffusers(adapter, tmp_path, member=1)
    old = {}
    for name, value in load_file(tmp_path / FILE).items():
        site, factor = name.removesuffix(".weight").rsplit(".", 1)
        word = {"lora_A": "down", "lora_B": "up"}[factor]
        before, _, last = site.rpartition(".")
        if last in ("to_q", "to_k", "to_v"):
            old[f"{before}.processor.{last}_lora.{word}.weight"] = value / (2 if word == "up" else 1)
            old[f"{site}.alpha"] = torch.tensor(6.0)  # twice the rank
        elif before.endswith("to_out"):
            old[f"{before.removesuffix('.to_out')}.processor.to_out_lora.{word}.weight"] = value
        else:
            old[f"{site}.lora.{word}.weight"] = value
    save_file(old, tmp_path / "old.safetensors")
    model = unet()
    variants.load_diffusers(model, tmp_path / "old.safetensors").begin(variants.Step(1, 10), training=False)
    torch.testing.assert_close(told(model, part(inputs, 1)), outputs[N:], rtol=1e-9, atol=1e-10)


def test_what_such_a_file_cannot_hold_is_refused(adapted, tmp_path):
    adapter, _, _ = adapted
    variants.save_diffusers(adapter, tmp_path)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.r"] == 2
    tensors = load_file(tmp_path / FILE)
    with pytest.raises(ValueError, match=r'nothing of a component "transformer" \(those there: unet\)'):
        variants.load_diffusers(unet(), tmp_path, component="transformer")
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    for changed, said in (
        ({**tensors, "unet.x.hada_w1_a": torch.zeros(1)}, "is none of a LoRA: save it by diffusers"),
        (
            {**tensors, name: torch.zeros(8, 5), name.replace("_B", "_A"): torch.zeros(5, 8)},
            "has several ranks and says not how",
        ),
        ({name.replace("down_blocks.0", "down_blocks.7"): t for name, t in tensors.items()}, "is no module of UNet2DCondition"),
    ):
        save_file(changed, tmp_path / "changed.safetensors")
        with pytest.raises(ValueError, match=said):
            variants.load_diffusers(unet(), tmp_path / "changed.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / FILE).read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read as a safetensors file"):
        variants.load_diffusers(unet(), tmp_path / "cut.safetensors")
    magnitudes = variants.create("dora", rank=2, alpha=5).attach(unet(), "all-linear")
    with pytest.raises(ValueError, match="cannot stand in a LoRA file of diffusers: merge the adapter"):
        variants.save_diffusers(magnitudes, tmp_path / "dora")
    whole = variants.create("lora", rank=2, alpha=5).attach(detector(), "all-linear")
    with pytest.raises(ValueError, match="lora trains a head, which a LoRA file of diffusers cannot hold"):
        variants.save_diffusers(whole, tmp_path / "detector")
    assert not (tmp_path / "dora").exists() and not (tmp_path / "detector").exists()


# -- the page ------------------------------------------------------------------------------------------------------------


def test_the_examples_of_the_page_run(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.DetrForObjectDetection, "from_pretrained", lambda name: detector().float())
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "from_pretrained", lambda name, subfolder: unet())
    first, packed, second = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert all(len(example.splitlines()) <= 13 for example in (first, packed, second))
    names = {"torch": torch, "transformers": transformers, "variants": variants, "diffusers": diffusers}
    whole = detection(4) | {"pixel_values": detection(4)["pixel_values"].float()}
    names |= {"batches": [part(whole, 0), part(whole, 1)] * 2}
    exec(first, names)
    assert (tmp_path / "detector" / "adapter_model.safetensors").is_file()
    names["adapter"].detach()
    names |= {"pixels": whole["pixel_values"], "members": 2, "labels": [whole["labels"][:2], whole["labels"][2:]]}
    variants.create("lora", rank=2, alpha=4, members=2).attach(names["model"], calibration={"pixel_values": names["pixels"]})
    exec(packed, names)
    latents, times, text, noise = diffusion(2)
    names |= {"batches": [(latents, noise, times, text)], "scheduler": diffusers.DDPMScheduler()}
    exec(second, names)
    assert (tmp_path / "style" / FILE).is_file()
