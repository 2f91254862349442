"""What a site's rank is worth: the loss without it, against a model whose weight was set back by hand."""

import copy
import json

import numpy as np
import pytest
import torch
from rankwise import variants
from rankwise.experiments import kinds, knockout, models
from rankwise.experiments.data.draws import KNOCKOUT_ROWS
from rankwise.experiments.data.lengths import collate
from rankwise.experiments.study import Runner
from rankwise.variants.adapter.step import CannotMerge

from tests import small_world

TARGETS = ["query", "intermediate.dense"]


@pytest.fixture(scope="module")
def model_id(tmp_path_factory):
    return small_world.model(tmp_path_factory.mktemp("model"))


def trained(model_id, name, members=1, seed=2, kind="regression"):
    task = small_world.task(kind)
    model, tokenizer, info = models.load(model_id, task)
    adapter = variants.create(name, members=members, **small_world.settings(name)).attach(model, TARGETS, head=info.heads)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))
    return adapter, tokenizer, task


def by_hand(adapter, tokenizer, task, encoded, member, taken):
    """Loss and score of the bare model with every changed weight but `taken` written into it, row by row."""
    with torch.no_grad():
        deltas = {name: adapter.delta(name)[member] for name in adapter.changed_weights()}
    adapter.merge(member)
    merged = copy.deepcopy(adapter.model)
    adapter.unmerge()
    if taken is not None:
        module = merged.get_submodule(taken)
        weight = getattr(module, "base", module).weight
        weight.data = weight.data - deltas[taken]
    merged.eval()
    losses, predicted = [], []
    for row in range(len(encoded)):
        arrays = collate(encoded, np.array([row]), int(encoded.lengths[row]), 0)
        batch = {k: torch.from_numpy(v) for k, v in arrays.items()}
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = merged(**{k: v for k, v in batch.items() if k != "token_type_ids"}).logits
        losses.append(float(kinds.get(task.kind).losses(logits, labels, 1)))
        predicted.append(kinds.get(task.kind).predictions(logits).numpy()[0])
    return sum(losses) / len(losses), task.metrics(np.array(predicted), *encoded.truth)[task.metric]


@pytest.mark.parametrize(("name", "members"), [("lora", 2), ("dora", 2), ("full", 1)])
@pytest.mark.slow
def test_taking_a_site_out_is_setting_its_weight_back(model_id, name, members, monkeypatch):
    adapter, tokenizer, task = trained(model_id, name, members)
    encoded = small_world.encoded(task)["validation"].random_part(9, KNOCKOUT_ROWS)
    before = {key: value.clone() for key, value in adapter.model.state_dict().items()}
    merged = knockout.knock_out(adapter, tokenizer, task, "validation", encoded, 4)
    monkeypatch.setattr(adapter, "merge", lambda member: (_ for _ in ()).throw(CannotMerge("tied")))
    together = knockout.knock_out(adapter, tokenizer, task, "validation", encoded, 4)
    monkeypatch.undo()
    assert all(torch.equal(value, before[key]) for key, value in adapter.model.state_dict().items())
    for k in range(members):
        assert (merged[k]["rows"], merged[k]["split"], merged[k]["metric"]) == (9, "validation", "pearson_spearman")
        assert list(merged[k]["sites"]) == adapter.changed_weights()
        names = [None, *merged[k]["sites"]][:: 1 if name != "full" else 4]
        for taken in names:
            loss, score = by_hand(adapter, tokenizer, task, encoded, k, taken)
            for way in (merged, together):
                one = way[k] if taken is None else way[k]["sites"][taken]
                assert one["loss"] == pytest.approx(loss, rel=2e-4)
                assert one["score"] == pytest.approx(score, abs=0.5)
    losses = [one["loss"] for one in merged[0]["sites"].values()]
    assert len({round(loss, 7) for loss in losses}) == len(losses)


def test_a_site_that_changes_nothing_costs_nothing_and_an_unknown_one_is_refused(model_id):
    adapter, tokenizer, task = trained(model_id, "adalora")
    dead = adapter.triplets()[1]
    with torch.no_grad():
        dead.E.zero_()
    encoded = small_world.encoded(task)["validation"]
    (found,) = knockout.knock_out(adapter, tokenizer, task, "validation", encoded, 8)
    assert found["sites"][dead.name]["loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert sum(abs(one["loss"] - found["loss"]) > 1e-6 for one in found["sites"].values()) == 3
    with pytest.raises(ValueError, match='no site at "nowhere"'), adapter.without("nowhere"):
        pass


def test_a_study_writes_what_it_was_asked_for_and_a_run_can_be_measured_again(model_id, tmp_path, monkeypatch):
    small_world.register(monkeypatch.setitem)
    what = small_world.study(model_id, ["adalora", "head"], knock_out="first seed")
    runner = Runner(what, tmp_path, device="cpu")
    runner.prepare()
    results = runner.run()
    for result in results:
        folder = tmp_path / result["fingerprint"]
        low_rank, first = result["method"] == "adalora", result["seed"] == 0
        assert (folder / "sites.json").is_file() == low_rank
        assert (folder / "knockout.json").is_file() == (low_rank and first)
        if low_rank:
            sites = json.loads((folder / "sites.json").read_text())["sites"]
            assert {name: facts["active"] for name, facts in sites.items()} == result["ranks"]
        if low_rank and first:
            written = json.loads((folder / "knockout.json").read_text())
            assert (written["split"], written["rows"]) == ("validation", 24)
            again = knockout.of_run(folder)
            assert again["loss"] == pytest.approx(written["loss"], rel=1e-5)
            assert again["score"] == pytest.approx(result["selection_score"], abs=1e-3)
            for name, one in written["sites"].items():
                assert again["sites"][name]["loss"] == pytest.approx(one["loss"], rel=1e-4)
    off = small_world.study(model_id, ["lora"], seeds=1, anatomy=False)
    runner = Runner(off, tmp_path / "off", device="cpu")
    runner.prepare()
    (result,) = runner.run()
    assert {p.name for p in (tmp_path / "off" / result["fingerprint"]).iterdir()} == {
        "config.json", "metrics.jsonl", "ranks.jsonl", "result.json", "adapter", "predictions.safetensors",
    }  # fmt: skip


def test_a_run_without_weights_says_why_it_cannot_be_measured(tmp_path):
    with pytest.raises(ValueError, match="has no adapter/"):
        knockout.of_run(tmp_path)
