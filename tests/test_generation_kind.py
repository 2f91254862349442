"""A kind of task whose predictions are texts, defined here alone: a decoder goes on with a prompt.

It trains on the target's tokens alone, is asked with the padding on the left, and has no head of its own: its lm_head, not
tied to the embeddings, comes with the checkpoint.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rankwise.experiments import kinds, knockout, models
from rankwise.experiments.data.encoded import IGNORED, Encoded
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.kinds.text import Text
from rankwise.experiments.tasks import Task
from torch.nn import functional as F

from tests import small_world
from tests.test_trainer import lines, trained_tensors

ROWS = {"train": 36, "validation": 10, "test": 9}


class Continuation(Text):
    """Two letters after each prompt. Labels (K*N, L): the target's tokens, -100 elsewhere; logits (K*N, L, V)."""

    auto_class = "AutoModelForCausalLM"
    predicted = (object, ())

    def model_settings(self, num_labels):
        return {}

    def head_names(self, model, missing=()):
        return []

    def encode(self, examples, processor, max_length):
        prompts, targets = (
            processor(texts, add_special_tokens=False)["input_ids"] for texts in (examples.first, examples.second)
        )
        rows = [[*prompt, *target] for prompt, target in zip(prompts, targets, strict=True)]
        labels = [[IGNORED] * len(p) + t for p, t in zip(prompts, targets, strict=True)]
        offsets = np.cumsum([0, *map(len, rows)])
        flat = np.concatenate(rows).astype(np.int32)
        return Encoded(flat, offsets, None, np.concatenate(labels), max_length, is_by_token=True)

    def collate_evaluation(self, data, rows, size, processor):
        batch = self.collate(data, rows, size, processor)
        of_prompt = (batch["labels"] == IGNORED) & (batch["attention_mask"] == 1)
        ids, mask = np.full_like(batch["input_ids"], processor.pad_token_id), np.zeros_like(batch["input_ids"])
        for row, inside in enumerate(of_prompt):
            start = size - inside.sum()
            ids[row, start:], mask[row, start:] = batch["input_ids"][row, inside], 1
        return {**batch, "prompt_ids": ids, "prompt_mask": mask}

    def losses(self, logits, labels, members):
        after = labels[:, 1:]
        flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), after.flatten(), ignore_index=IGNORED, reduction="none")
        return flat.view(members, -1).sum(1) / self.counts(labels, members).clamp_min(1)

    def counts(self, labels, members):
        return (labels[:, 1:].reshape(members, -1) != IGNORED).sum(1)

    def outputs(self, model, inputs):
        ids, mask = inputs["prompt_ids"], inputs["prompt_mask"]
        made = model.generate(ids, attention_mask=mask, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        return made[:, ids.shape[1] :]

    def evaluation_losses(self, model, inputs, outputs, labels, members):
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return self.losses(output.logits, labels, members)

    def predictions(self, outputs):
        return np.array([" ".join(map(str, row)) for row in outputs.tolist()], dtype=object)

    def empty(self, data, members):
        return np.empty((members, len(data)), dtype=object)

    def scored(self, predictions, labels, offsets):
        rows = np.split(np.asarray(labels), offsets[1:-1])
        true = np.array([" ".join(map(str, row[row != IGNORED])) for row in rows], dtype=object)
        return (predictions, true), len(true)

    def stored(self, predictions):
        return None


def read(split: str) -> Examples:
    random = np.random.default_rng(list(ROWS).index(split))
    prompts = [" ".join(random.choice(list("abc"), random.integers(2, 9))) for _ in range(ROWS[split])]
    return Examples(prompts, [f"{prompt[-1]} x" for prompt in prompts], np.zeros(len(prompts)))


@pytest.fixture
def pack(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(kinds.REGISTRY, "continuation", f"{__name__}:Continuation")
    models.tiny("llama", kind="continuation").save_pretrained(tmp_path / "llama")
    models.tiny_tokenizer().save_pretrained(tmp_path / "llama")
    task = Task(
        name="small/continuation",
        kind="continuation",
        num_labels=0,
        metric="exact_match",
        licence="made up",
        read=read,
        measure=lambda predicted, true: {"exact_match": 100 * float((predicted == true).mean())},
        identity=lambda: "continuation 1",
    )
    one = small_world.pack(str(tmp_path / "llama"), "lora", seeds=(5, 2), learning_rates=(5e-2, 4e-3), epochs=4, max_steps=24)
    return replace(one, task=task, targets=["q_proj", "up_proj", "down_proj"])


def test_a_decoder_generates_what_its_members_predict_and_trains_no_copy_of_its_head(pack, tmp_path):
    data = {split: pack.task.encode(models.tiny_tokenizer(), split, 24) for split in ROWS}
    trainer, outcomes = small_world.trained(pack, tmp_path / "run", data=data)
    model = trainer.model
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    assert trainer.info.heads == () and not list(trainer.adapter.heads.parameters())
    assert not any("lm_head" in name for name in trained_tensors(trainer))
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert outcomes[0].metrics["test"]["exact_match"] > outcomes[1].metrics["test"]["exact_match"] >= 0
    predicted = outcomes[0].predictions["test"]
    assert predicted.shape == (9,) and all(isinstance(text, str) and len(text.split()) == 2 for text in predicted)
    model.eval()
    trainer.adapter.merge(0)
    for row in range(9):  # one prompt at a time, without padding
        own = slice(*data["test"].offsets[row : row + 2])
        prompt = torch.from_numpy(data["test"].ids[own][data["test"].labels[own] == IGNORED].astype(np.int64))[None]
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, do_sample=False)
        assert predicted[row] == " ".join(map(str, alone[0, prompt.shape[1] :].tolist()))
    trainer.adapter.unmerge()
    (first, _) = knockout.knock_out(trainer.adapter, trainer.processor, pack.task, "test", data["test"], 4)
    assert first["score"] == outcomes[0].metrics["test"]["exact_match"] and len(first["sites"]) == 6
    assert 0 < first["loss"] < lines(trainer)[0]["loss"]
