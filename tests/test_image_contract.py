"""The contract of tests/contract.py on a tiny ViT, and the adapter of one in Hugging Face's Trainer."""

import inspect

import pytest
import torch
from rankwise import variants
from torch import nn

from tests import contract, image_models, loop, test_callback


@pytest.fixture
def of_images(monkeypatch):
    """The checks' model is a ViT, and their batches are pixels, of the model's own type."""

    def packed(seeds, step=0):
        batches = [image_models.batch(seed, step) for seed in seeds]
        return {key: torch.cat([one[key] for one in batches]) for key in batches[0]}

    def outputs(model: nn.Module, batch):
        return model(pixel_values=batch["pixel_values"].to(next(model.parameters()).dtype)).logits

    monkeypatch.setattr(contract, "tiny", lambda name="bert", dtype=torch.float64: image_models.classifier(dtype))
    monkeypatch.setattr(contract, "batch", image_models.batch)
    monkeypatch.setattr(contract, "packed_batch", packed)
    monkeypatch.setattr(contract, "TARGETS", ["q_proj", "mlp.fc1", "layers.1.mlp.fc2"])  # five sites, of three shapes
    for module in (contract, loop):
        monkeypatch.setattr(module, "outputs", outputs)


OTHERS = {"the_models_own_head_is_kept_unless_a_fresh_one_is_asked_for"}  # calls its fp32 model itself, with pixels in float64
CHECKS = {name: check for name, check in contract.CHECKS.items() if name not in OTHERS}


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
@pytest.mark.parametrize("method", ["lora", "adalora", "dora", "full"])
def test_contract(of_images, method, check, tmp_path):
    check(method, tmp_path) if "folder" in inspect.signature(check).parameters else check(method)


@pytest.mark.parametrize("check", ["body_is_unchanged_at_the_start", "merged_equals_unmerged", "peft_gives_the_same_output"])
def test_contract_of_one_method(of_images, check, tmp_path):
    check = CHECKS[check]
    check("adalora", tmp_path) if "folder" in inspect.signature(check).parameters else check("adalora")


def test_a_resumed_run_of_transformers_trainer_ends_bit_for_bit(tmp_path):
    def adapted():
        settings = {"initial_rank": 4, "target_rank": 2, "alpha": 7.0, "warmup_steps": 1, "final_steps": 1, "dropout": 0.1}
        return variants.create("adalora", seeds=[3], orthogonality=0.3, **settings).attach(image_models.classifier())

    batches = [image_models.batch(0, step) for step in range(1, 7)]
    data = [{key: value[row] for key, value in one.items()} for one in batches for row in range(4)]
    arguments = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    uncut, again = adapted(), adapted()
    test_callback.trainer(uncut, tmp_path, data=data, **arguments).train()
    test_callback.trainer(again, tmp_path / "again", data=data, **arguments).train(str(tmp_path / "checkpoint-3"))
    theirs = uncut.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in again.state_dict().items())
    assert {int(rank) for rank in again.ranks().values()} != {4}
    slow = adapted()
    whole = test_callback.TorchsClip(slow, test_callback.RATE, 6, test_callback.CLIP, test_callback.DECAY)
    for one in batches:
        whole.step(one)
    test_callback.assert_same_tensors(uncut, slow, rtol=1e-9, atol=1e-9)
    loaded = variants.load_pretrained(image_models.classifier(), tmp_path / "checkpoint-3" / "adapter")
    assert loaded.method == "adalora"
