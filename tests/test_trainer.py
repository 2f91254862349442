"""The loop: stopped anywhere it ends bit for bit the same; packed is alone; one member's failure is its own."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from rankwise import variants
from rankwise.experiments import files, kinds
from rankwise.experiments.data.lengths import batches, collate
from rankwise.experiments.kinds import Undefined
from rankwise.experiments.training.trainer import Trainer
from rankwise.variants import native
from rankwise.variants.adapter.step import CannotMerge
from rankwise.variants.settings import method as method_named
from safetensors.torch import save

from tests import small_world
from tests.loop import Loop
from tests.small_world import ALL_METHODS
from tests.tiers import quick

KINDS = [kind for kind in kinds.names() if kind in small_world.KINDS]  # language models: test_language_kinds.py
PACKABLE = [m for m in ALL_METHODS if method_named(m).load().packable]


@pytest.fixture(scope="module")
def model(tmp_path_factory, request):
    """The tiny BERT's folder; the user's cache is not touched."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RANKWISE_CACHE", str(tmp_path_factory.mktemp("cache")))
    request.addfinalizer(patch.undo)
    return small_world.model(tmp_path_factory.mktemp("model"))


class Stop(Exception):
    pass


def stopping_after(calls: int):
    """A progress callback that ends the run at that call."""

    def progress(rows: float) -> None:
        nonlocal calls
        calls -= 1
        if calls <= 0:
            raise Stop

    return progress


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {**trainer.adapter.state_dict(), **trainer.optimizer.state(), "skipped": trainer.skipped, "alive": trainer.alive}


def logs(trainer: Trainer) -> list[bytes]:
    return [(folder / name).read_bytes() for folder in trainer.logs for name in ("metrics.jsonl", "ranks.jsonl")]


def lines(trainer: Trainer, member: int = 0, name: str = "metrics.jsonl", kind: str = "train") -> list[dict]:
    found = [json.loads(line) for line in (trainer.logs[member] / name).read_text().splitlines()]
    return [line for line in found if line.get("kind", kind) == kind]


def trained_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in trainer.adapter.named_parameters()}


def of_one_size(one: torch.Tensor, other: torch.Tensor) -> list[torch.Tensor]:
    """A member's tensor in two packs; slots that only a neighbour has are zeros."""
    sizes = [max(pair) for pair in zip(one.shape, other.shape, strict=True)]
    return [torch.nn.functional.pad(t, [x for s, n in zip(sizes[::-1], t.shape[::-1], strict=True) for x in (0, s - n)])
            for t in (one, other)]  # fmt: skip


def assert_same(one: Trainer, other: Trainer) -> None:
    a, b = state(one), state(other)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def assert_near(mine: list[dict], theirs: list[dict], rel: float) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert {**a, "kind": 0} == pytest.approx({**b, "kind": 0}, rel=rel)


# -- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", quick(ALL_METHODS, ["full", "adalora+dora"]))
def test_stopped_anywhere_a_run_ends_bit_for_bit_the_same(model, tmp_path, method):
    seeds, rates = ((3, 8), (1e-2, 3e-3)) if method in PACKABLE else ((3,), (3e-3,))
    pack = small_world.pack(model, method, seeds=seeds, learning_rates=rates, evaluation_batch_size=24)
    whole, expected = small_world.trained(pack, tmp_path / "whole")
    outcomes, attempts, met = None, 0, set()
    while outcomes is None:  # the n-th attempt ends at its (1 + n)-th report: in training, in evaluations, at the end
        attempts += 1
        trainer = small_world.trainer(pack, tmp_path / "cut", checkpoint_seconds=0.0, progress=stopping_after(1 + attempts))
        try:
            outcomes = trainer.run()
        except Stop:
            met.add(trainer.step)
            for folder in trainer.logs:  # a line that was being written when the process was killed
                for name in ("metrics.jsonl", "ranks.jsonl"):
                    with (folder / name).open("a") as file:
                        file.write('{"kind": "tr')
    assert attempts > 4
    assert len(met) > 3
    assert_same(trainer, whole)
    assert logs(trainer) == logs(whole)
    for got, want in zip(outcomes, expected, strict=True):
        assert got.error is None
        assert got.metrics == want.metrics
        for fact in ("steps", "skipped_steps", "ranks", "nominal_ranks", "scale", "final_train_loss", "dropout_note"):
            assert got.facts[fact] == want.facts[fact], fact
    if method.startswith("adalora"):
        assert {1, 2, 3} & met
        assert {4, 5, 6, 7, 8} & met
        assert {9, 10, 11, 12} & met


def test_how_often_checkpoints_are_made_changes_nothing(model, tmp_path):
    pack = small_world.pack(model, "adalora", seeds=(0, 1))
    never, _ = small_world.trained(pack, tmp_path / "never", checkpoint_seconds=1e9)
    always, _ = small_world.trained(pack, tmp_path / "always", checkpoint_seconds=0.0)
    assert_same(never, always)
    assert logs(never) == logs(always)


def test_a_run_that_was_cut_off_in_its_last_evaluation_does_not_train_again(model, tmp_path, monkeypatch):
    pack = small_world.pack(model)
    trainer = small_world.trainer(pack, tmp_path)
    monkeypatch.setattr(trainer, "_finish", lambda: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        trainer.run()
    again = small_world.trainer(pack, tmp_path)
    monkeypatch.setattr(again, "train_step", lambda: pytest.fail("it trained again"))
    assert again.run()[0].metrics.keys() == {"validation", "test"}
    assert len(lines(again, kind="evaluation")) == 4


@pytest.mark.parametrize("method", quick([m for m in PACKABLE if method_named(m).load().mergeable]))
def test_an_evaluation_merged_member_by_member_is_that_of_the_pack(model, tmp_path, monkeypatch, method):
    trainer, _ = small_world.trained(small_world.pack(model, method, seeds=(0, 1, 5)), tmp_path)
    merge, merged = trainer.adapter.merge, []
    monkeypatch.setattr(trainer.adapter, "merge", lambda member: (merged.append(member), merge(member)))
    found = trainer.predictions("test")
    assert merged == [0, 1, 2] and not trainer.adapter.is_merged

    def tied(member: int) -> None:
        if member:
            raise CannotMerge("a weight is tied")
        merge(member)

    monkeypatch.setattr(trainer.adapter, "merge", tied)
    together = trainer.predictions("test")
    assert not trainer.adapter.is_merged
    # The predictions and not their Spearman correlation, in which rounding moves what nearly tie: rows lie 1e-3 apart, and
    # members 2e-3.
    for one, other in zip(found, together, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    assert min(np.abs(found[i] - found[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


@pytest.mark.skipif(native.library() is None, reason="no compiled passes here")
def test_a_run_that_goes_on_without_the_compiled_passes_says_so(model, tmp_path, monkeypatch):
    pack = small_world.pack(model)
    cut_off(pack, tmp_path)
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.warns(UserWarning, match="begun with the compiled passes and goes on without them"):
        small_world.trained(pack, tmp_path)


def test_a_resumed_adalora_gives_no_false_warning(model, tmp_path, recwarn):
    pack = small_world.pack(model, "adalora")
    small_world.trained(pack, tmp_path)
    small_world.trained(pack, tmp_path)
    assert not [w for w in recwarn if "after_step" in str(w.message)]


def cut_off(pack, folder: Path) -> Trainer:
    """A trainer that was stopped after some steps, with a checkpoint."""
    trainer = small_world.trainer(pack, folder, checkpoint_seconds=0.0, progress=stopping_after(9))
    with pytest.raises(Stop):
        trainer.run()
    return trainer


def test_a_cut_off_checkpoint_starts_over(model, tmp_path):
    pack = small_world.pack(model, "head")
    whole, _ = small_world.trained(pack, tmp_path / "whole")
    good = cut_off(pack, tmp_path / "cut").checkpoint.read_bytes()
    another = save({"x": torch.zeros(3)}, {"state": json.dumps({"step": 4})})
    for bad in (b"", good[: len(good) // 2], good[:-1], b"\x07" * 999, another):
        (tmp_path / "cut" / "checkpoint.safetensors").write_bytes(bad)
        again, outcomes = small_world.trained(pack, tmp_path / "cut")
        assert outcomes[0].error is None
        assert_same(again, whole)
        assert logs(again) == logs(whole)


def test_a_checkpoint_of_other_settings_is_not_taken_up(model, tmp_path):
    cut_off(small_world.pack(model), tmp_path)
    changes = (
        {"seeds": (1,)},
        {"learning_rates": (2e-2,)},
        {"weight_decay": 0.5},
        {"batch_size": 5},
        {"max_steps": 10},
        {"changes": {"dropout": 0.2}},
        {"changes": {"rank": 2}},
        {"changes": {"alpha": 7}},
        {"kind": "classification"},
    )
    for change in changes:
        assert not small_world.trainer(small_world.pack(model, **change), tmp_path)._resume(), change
    assert small_world.trainer(small_world.pack(model, log_every=3), tmp_path)._resume()


def test_logs_shorter_than_the_checkpoint_says_start_the_run_over(model, tmp_path):
    pack = small_world.pack(model, "head")
    whole, _ = small_world.trained(pack, tmp_path / "whole")
    trainer = cut_off(pack, tmp_path / "cut")
    (trainer.logs[0] / "metrics.jsonl").write_text("")  # what a power failure may leave
    again, _ = small_world.trained(pack, tmp_path / "cut")
    assert logs(again) == logs(whole)


def test_a_full_disk_is_an_os_error_and_leaves_the_last_checkpoint(model, tmp_path):
    trainer = small_world.trainer(small_world.pack(model), tmp_path)
    trainer.run()
    good = trainer.checkpoint.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # no file can grow beyond it, as on a disk that is full
    try:
        with pytest.raises(OSError):
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert trainer.checkpoint.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["checkpoint.safetensors"]


# -- packed = alone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", quick(PACKABLE, ["adalora+dora", "gora"]))
def test_packed_is_alone(model, tmp_path, in_float64, method):
    seeds, rates = (5, 0, 9), (2e-2, 1e-3, 7e-3)
    together, found = small_world.trained(
        small_world.pack(model, method, seeds=seeds, learning_rates=rates, clip=0.05), tmp_path / "together"
    )
    for k, (seed, rate) in enumerate(zip(seeds, rates, strict=True)):
        alone, expected = small_world.trained(
            small_world.pack(model, method, seeds=(seed,), learning_rates=(rate,), clip=0.05), tmp_path / f"alone-{k}"
        )
        packed, single = trained_tensors(together), trained_tensors(alone)
        for name in single:
            torch.testing.assert_close(*of_one_size(packed[name][k], single[name][0]), rtol=1e-9, atol=1e-12, msg=name)
        for split, metrics in expected[0].metrics.items():
            assert found[k].metrics[split] == pytest.approx(metrics, rel=1e-9)
        for key in ("ranks", "trainable_parameters", "active_parameters", "head_parameters", "scale"):
            assert found[k].facts[key] == expected[0].facts[key], key
        assert_near(lines(together, k), lines(alone), 1e-9)
        if method.startswith("adalora"):
            assert (together.logs[k] / "ranks.jsonl").read_bytes() == (alone.logs[0] / "ranks.jsonl").read_bytes()


# Regression is what every method is tried on; spans: tests/test_squad.py.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("regression", "span")])
def test_every_kind_trains_packed_as_alone_and_a_stopped_run_ends_the_same(model, tmp_path, in_float64, kind):
    seeds, rates = (3, 8), (1e-2, 3e-3)
    pack = small_world.pack(model, seeds=seeds, learning_rates=rates, kind=kind)
    together, outcomes = small_world.trained(pack, tmp_path / "together")
    for k, (seed, rate) in enumerate(zip(seeds, rates, strict=True)):
        one = small_world.pack(model, seeds=(seed,), learning_rates=(rate,), kind=kind)
        alone, (expected,) = small_world.trained(one, tmp_path / f"alone-{k}")
        for name, tensor in trained_tensors(alone).items():
            torch.testing.assert_close(trained_tensors(together)[name][k], tensor[0], rtol=1e-9, atol=1e-12, msg=name)
        for split, metrics in expected.metrics.items():
            assert outcomes[k].metrics[split] == pytest.approx(metrics, rel=1e-9)
        assert_near(lines(together, k), lines(alone), 1e-9)
    cut = small_world.trainer(pack, tmp_path / "cut", checkpoint_seconds=0.0, progress=stopping_after(8))
    with pytest.raises(Stop):
        cut.run()
    assert 0 < cut.step < cut.total
    again, ended = small_world.trained(pack, tmp_path / "cut")
    assert_same(again, together)
    assert logs(again) == logs(together)
    assert [one.metrics for one in ended] == [one.metrics for one in outcomes]


@pytest.mark.parametrize("method", ["lora", "adalora", "dora"])
def test_the_trainer_is_the_plain_loop(model, tmp_path, in_float64, method):
    seeds, rates = (4, 2), (1e-2, 3e-3)
    pack = small_world.pack(
        model,
        method,
        seeds=seeds,
        learning_rates=rates,
        kind="classification",
        schedule="constant",
        warmup_ratio=0.0,
        clip=None,
    )
    trainer, _ = small_world.trained(pack, tmp_path / "trainer")
    plain = small_world.trainer(pack, tmp_path / "plain")
    loop = Loop(plain.adapter, list(rates), total=plain.total, clip=None)  # its clipping lacks torch's 1e-6
    plain.model.train()
    data, losses = plain.data["train"], []
    for step in range(plain.total):
        epoch, at = divmod(step, 10)
        rows = [batches(data, 6, seed, epoch)[at] for seed in seeds]
        arrays = collate(data, np.concatenate([r for r, _ in rows]), rows[0][1], 0)
        losses.append(loop.step({k: torch.from_numpy(v) for k, v in arrays.items()}))
    for name, tensor in trained_tensors(plain).items():
        torch.testing.assert_close(trained_tensors(trainer)[name], tensor, rtol=1e-9, atol=1e-12, msg=name)
    for k in range(2):
        logged = [line["loss"] for line in lines(trainer, k)]
        assert logged == pytest.approx([float(losses[i][k] + losses[i + 1][k]) / 2 for i in range(0, 12, 2)])


def test_gradient_checkpointing_changes_nothing_with_dropout_on(model, tmp_path):
    for method in ("dora", "full"):
        seeds = (0, 6) if method in PACKABLE else (6,)
        plain, _ = small_world.trained(small_world.pack(model, method, seeds=seeds), tmp_path / f"{method}-plain")
        pack = small_world.pack(model, method, seeds=seeds, gradient_checkpointing=True)
        again, _ = small_world.trained(pack, tmp_path / f"{method}-again")
        assert again.model.is_gradient_checkpointing
        for name, tensor in trained_tensors(plain).items():
            torch.testing.assert_close(trained_tensors(again)[name], tensor, rtol=1e-5, atol=1e-7, msg=f"{method} {name}")
        assert [line["loss"] for line in lines(again)] == pytest.approx([line["loss"] for line in lines(plain)], rel=1e-5)


@pytest.mark.parametrize("method", quick(["full", "bitfit", "adalora+dora"], ["full"]))
def test_in_bf16_the_base_is_bf16_and_what_is_trained_is_fp32_and_a_stopped_run_ends_the_same(model, tmp_path, method):
    pack = small_world.pack(model, method, seeds=(0, 1) if method in PACKABLE else (0,), precision="bf16")
    whole, outcomes = small_world.trained(pack, tmp_path / "whole")
    assert [o.error for o in outcomes] == [None] * pack.members
    assert {t.dtype for t in trained_tensors(whole).values()} == {torch.float32}
    if method != "full":
        embeddings = whole.model.bert.embeddings.word_embeddings
        assert embeddings.weight.dtype == torch.bfloat16
    cut_off(pack, tmp_path / "cut")
    again, _ = small_world.trained(pack, tmp_path / "cut")
    assert_same(again, whole)
    assert logs(again) == logs(whole)
    exact, _ = small_world.trained(small_world.pack(model, method, seeds=pack.seeds), tmp_path / "fp32")
    assert [line["loss"] for line in lines(exact)] == pytest.approx([line["loss"] for line in lines(whole)], rel=0.2)


# -- the order of a step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", quick(KINDS, ["regression", "token-classification"]))
def test_accumulation_is_one_batch_in_pieces(tmp_path_factory, tmp_path, in_float64, kind):
    without_dropout = small_world.model(tmp_path_factory.mktemp("model"), dropout=0.0)
    ends = []
    for accumulation in (1, 4):  # which cuts 6 rows into 2, 2, 1, 1
        pack = small_world.pack(
            without_dropout,
            "adalora",
            seeds=(0, 1),
            kind=kind,
            accumulation=accumulation,
            changes={"dropout": 0.0},
            evaluations_per_epoch=0,
        )
        trainer, _ = small_world.trained(pack, tmp_path / f"{accumulation}")
        ends.append((trained_tensors(trainer), lines(trainer, 1)))
    for tensors, logged in ends[1:]:
        for name, tensor in ends[0][0].items():
            # A span's bias moves the scores of all tokens alike, so that its gradient is nothing but rounding.
            tolerance = 1e-6 if name.endswith("qa_outputs.bias") else 1e-11
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-8, atol=tolerance, msg=name)
        assert_near(logged, ends[0][1], 1e-8)  # the penalty among them: once a step


def test_a_micro_batch_without_a_scored_token_weighs_nothing(tmp_path_factory, tmp_path, in_float64):
    without_dropout = small_world.model(tmp_path_factory.mktemp("model"), dropout=0.0)
    task = small_world.task("token-classification")
    data = small_world.encoded(task)
    train = data["train"]
    for row in range(0, len(train), 2):
        train.labels[train.offsets[row] : train.offsets[row + 1]] = -100
    ends = []
    for accumulation in (1, 6):
        pack = small_world.pack(
            without_dropout,
            kind="token-classification",
            accumulation=accumulation,
            changes={"dropout": 0.0},
            schedule="constant",
        )
        trainer, _ = small_world.trained(pack, tmp_path / f"{accumulation}", data=data)
        ends.append([line["loss"] for line in lines(trainer)])
    assert ends[1] == pytest.approx(ends[0], rel=1e-9)


def test_reported_losses_are_task_losses_and_no_evaluation_asks_for_the_penalty(model, tmp_path, monkeypatch):
    first = []
    for weight in (0.0, 3.0):
        pack = small_world.pack(model, "adalora", changes={"orthogonality": weight}, log_every=1)
        trainer = small_world.trainer(pack, tmp_path / f"{weight}")
        asked, penalty = [], trainer.adapter.penalty
        monkeypatch.setattr(trainer.adapter, "penalty", lambda step, p=penalty, a=asked: (a.append(step.index), p(step))[1])
        trainer.run()
        assert asked == list(range(1, 13))
        first.append(lines(trainer)[0])
    assert first[0]["loss"] == first[1]["loss"]
    assert first[0]["penalty"] == 0.0
    assert first[1]["penalty"] > 1.0


def test_evaluations_change_nothing(model, tmp_path):
    often, _ = small_world.trained(small_world.pack(model, "dora", evaluations_per_epoch=5), tmp_path / "often")
    seldom, _ = small_world.trained(small_world.pack(model, "dora", evaluations_per_epoch=0), tmp_path / "seldom")
    assert_same(often, seldom)
    assert [line["step"] for line in lines(often, kind="evaluation")] == [2, 4, 6, 8, 10, 12, 12]
    assert [line["step"] for line in lines(seldom, kind="evaluation")] == [12, 12]


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_scores_each_row_of_each_member_in_its_place(model, tmp_path, monkeypatch, kind):
    pack = small_world.pack(model, seeds=(1, 2), kind=kind)
    trainer, _ = small_world.trained(pack, tmp_path)
    seen = []
    monkeypatch.setattr(trainer, "_score", lambda predicted, labels, offsets: seen.append((predicted, labels)))
    trainer.evaluate("test")
    data = trainer.data["test"]
    trainer.model.eval()
    for row in range(len(data)):  # one row at a time, without padding
        arrays = trainer.kind.collate(data, np.array([row]), int(data.lengths[row]), trainer.processor)
        batch = {name: torch.from_numpy(array) for name, array in arrays.items() if name != "labels"}
        with torch.no_grad():
            outputs = trainer.kind.outputs(trainer.model, {k: v.repeat(2, 1) for k, v in batch.items()})
        own = trainer.kind.predictions(outputs)
        for k, (predicted, labels) in enumerate(seen):
            assert labels is data.truth[0]
            mine = predicted[data.offsets[row] : data.offsets[row + 1]] if len(predicted) == len(data.ids) else predicted[row]
            np.testing.assert_allclose(mine, own[k].numpy(), rtol=1e-4, atol=1e-5)


def test_logged_rates_are_each_member_s_own_times_the_schedule(model, tmp_path):
    pack = small_world.pack(model, seeds=(0, 1), learning_rates=(1e-2, 1e-4), log_every=1)
    trainer, _ = small_world.trained(pack, tmp_path)
    shape = [1 / 2, 1, *(n / 10 for n in range(10, 0, -1))]  # 20 % of 12 steps is 2
    for k, rate in enumerate((1e-2, 1e-4)):
        assert [line["learning_rate"] for line in lines(trainer, k)] == pytest.approx([rate * f for f in shape])


@pytest.mark.parametrize("kind", KINDS)
def test_an_outcome_has_the_standard_error_and_rows_of_each_split_from_one_evaluation(model, tmp_path, monkeypatch, kind):
    rates = (1e-2, 1e30, 3e-3)
    pack = small_world.pack(model, seeds=(1, 2, 3), learning_rates=rates, kind=kind, evaluations_per_epoch=0)
    trainer = small_world.trainer(pack, tmp_path)
    made, predictions = {}, trainer.predictions
    monkeypatch.setattr(
        trainer, "predictions", lambda split: made.setdefault(split, []).append(predictions(split)) or made[split][0]
    )
    outcomes = trainer.run()
    assert {split: len(calls) for split, calls in made.items()} == {"validation": 1, "test": 1}
    assert (outcomes[1].error, outcomes[1].standard_errors, outcomes[1].rows) == ("diverged", {}, {})
    for k in (0, 2):
        assert outcomes[k].rows == {"validation": 24, "test": 20}
        for split in pack.splits:
            truth = trainer.data[split].truth
            assert outcomes[k].metrics[split] == pack.task.metrics(made[split][0][k], *truth)
            assert outcomes[k].standard_errors[split] == pack.task.standard_error(made[split][0][k], *truth) > 0


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", quick(PACKABLE))
def test_a_member_that_diverges_fails_alone(model, tmp_path, method):
    seeds, rates = (0, 1, 2), (1e-2, 1e30, 3e-3)
    trainer, outcomes = small_world.trained(
        small_world.pack(model, method, seeds=seeds, learning_rates=rates), tmp_path / "three"
    )
    two, expected = small_world.trained(
        small_world.pack(model, method, seeds=(0, 2), learning_rates=(1e-2, 3e-3)), tmp_path / "two"
    )
    assert [o.error for o in outcomes] == [None, "diverged", None]
    assert outcomes[1].metrics == {}
    assert outcomes[1].facts["skipped_steps"] == 4  # one more than max_skipped_steps
    assert "4 steps" in outcomes[1].detail
    for k, other in ((0, 0), (2, 1)):
        for name, tensor in trained_tensors(two).items():
            pair = of_one_size(trained_tensors(trainer)[name][k], tensor[other])
            torch.testing.assert_close(*pair, rtol=2e-3, atol=2e-5, msg=name)
        assert outcomes[k].metrics["test"] == pytest.approx(expected[other].metrics["test"], rel=1e-2)
        assert outcomes[k].facts["skipped_steps"] == 0
    assert all(torch.isfinite(t).all() for t in trained_tensors(trainer).values())  # nothing that is not finite was taken


def test_a_pack_whose_members_all_diverge_ends_at_once_and_is_not_evaluated(model, tmp_path):
    pack = small_world.pack(model, seeds=(0, 1), learning_rates=(1e30, 1e31), max_steps=None, epochs=50)
    trainer, outcomes = small_world.trained(pack, tmp_path)
    assert [o.error for o in outcomes] == ["diverged", "diverged"]
    assert trainer.step < 20
    assert not [line for line in lines(trainer, kind="evaluation") if line["step"] == trainer.step]


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_one_step_that_is_not_finite_is_skipped_for_its_member_alone(model, tmp_path, monkeypatch, method):
    pack = small_world.pack(model, method, seeds=(0, 1), log_every=1)
    clean, _ = small_world.trained(pack, tmp_path / "clean")
    trainer = small_world.trainer(pack, tmp_path / "poisoned")
    plain, kept = trainer.kind.losses, {}

    def losses(*args):
        found = plain(*args)
        if trainer.step == 5:
            kept.update({k: v[1].clone() for k, v in trained_tensors(trainer).items()})
            return found * torch.tensor([1.0, torch.nan])
        if trainer.step == 6:
            assert all(torch.equal(kept[k], v[1]) for k, v in trained_tensors(trainer).items())
        return found

    monkeypatch.setattr(trainer.kind, "losses", losses)
    outcomes = trainer.run()
    assert [o.error for o in outcomes] == [None, None]
    assert [o.facts["skipped_steps"] for o in outcomes] == [0, 1]
    assert lines(trainer, 1)[4]["loss"] is None
    for name, tensor in trained_tensors(clean).items():
        assert torch.equal(trained_tensors(trainer)[name][0], tensor[0]), name
    assert (trainer.logs[0] / "metrics.jsonl").read_bytes() == (clean.logs[0] / "metrics.jsonl").read_bytes()


def test_a_model_that_predicts_one_value_is_collapsed(model, tmp_path, monkeypatch):
    trainer = small_world.trainer(small_world.pack(model, seeds=(0, 1)), tmp_path)
    plain = trainer.kind.predictions

    def predictions(outputs):
        found = plain(outputs).clone()
        found[len(found) // 2 :] = 0.25  # member 1
        return found

    monkeypatch.setattr(trainer.kind, "predictions", predictions)
    outcomes = trainer.run()
    assert [o.error for o in outcomes] == [None, "collapsed"]
    assert "one value" in outcomes[1].detail
    assert lines(trainer, 1, kind="evaluation")[-1]["metrics"] == {}


def test_predictions_that_are_not_finite_are_collapsed_not_a_crash(model, tmp_path):
    trainer = small_world.trainer(small_world.pack(model), tmp_path)
    labels = trainer.data["test"].labels
    found = trainer._score(np.full(len(labels), np.nan), labels, None)
    assert isinstance(found, Undefined)
    assert found.error == "collapsed"


def test_what_is_written_is_strict_json(model, tmp_path):
    pack = small_world.pack(model, "adalora", seeds=(0, 1), learning_rates=(1e30, 1e-2), log_every=1)
    trainer, outcomes = small_world.trained(pack, tmp_path)

    def refuse(word):
        raise AssertionError(word)

    for folder in trainer.logs:
        for path in (folder / "metrics.jsonl", folder / "ranks.jsonl"):
            for line in path.read_text().splitlines():
                json.loads(line, parse_constant=refuse)
    for outcome in outcomes:
        json.dumps(outcome.facts, allow_nan=False)
        json.dumps(outcome.metrics, allow_nan=False)


def test_a_number_that_json_has_no_word_for_leaves_no_half_written_file(tmp_path: Path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "result.json", {"score": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_classifier_whose_outputs_are_not_finite_has_no_score(model, tmp_path):
    trainer = small_world.trainer(small_world.pack(model, "lora", kind="classification", seeds=(0, 1)), tmp_path)
    with torch.no_grad():
        for parameter in trainer.adapter.heads.parameters():
            parameter[0] = torch.nan
    first, *others = trainer.evaluate("validation")
    assert isinstance(first, Undefined) and first.error == "collapsed"
    assert others and all("accuracy" in metrics for metrics in others)


def test_dropout_that_no_key_reaches_is_drawn_from_seed_and_step(model, tmp_path):
    def losses(folder: str) -> list[float]:
        trainer = small_world.trainer(small_world.pack(model, "lora", seeds=(0,)), tmp_path / folder)
        layer = trainer.model.bert.encoder.layer[0]
        forward = layer.forward
        functional = torch.nn.functional.dropout
        layer.forward = lambda x, *args, **kwargs: forward(functional(x, 0.5, training=layer.training), *args, **kwargs)
        torch.manual_seed(len(folder))  # whatever has drawn before
        trainer.run()
        return [json.loads(line)["loss"] for line in (trainer.logs[0] / "metrics.jsonl").open() if "train" in line]

    assert losses("one") == losses("another")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_head_has_its_own_rate_where_the_study_gives_one(model, tmp_path, in_float64, method):
    """One step of AdamW moves every element by its rate, so that a head's rate is what its elements move by."""
    changes = {"warmup_ratio": 0.0, "schedule": "constant", "max_steps": 1, "weight_decay": 0.0}
    rates = (1e-2, 1e-3) if method == "lora" else (1e-3,)
    one = small_world.pack(model, method, seeds=(3, 4)[: len(rates)], learning_rates=rates, head_learning_rate=5e-2, **changes)
    trainer = small_world.trainer(one, tmp_path)
    before = {name: value.clone() for name, value in trained_tensors(trainer).items()}
    trainer.run()
    head = {f"heads.{name}" for name, _ in trainer.adapter.heads.named_parameters()}
    assert head
    for name, value in trained_tensors(trainer).items():
        moved = (value - before[name]).abs().flatten(1).amax(1)
        for k, rate in enumerate(rates):
            expected = 5e-2 if name in head else rate
            assert moved[k].item() < 1e-9 or moved[k].item() == pytest.approx(expected, rel=2e-2), (name, k)
    assert any(name in head for name in before)


def test_a_method_that_trains_the_head_alone_keeps_its_rate(model, tmp_path):
    groups = small_world.trainer(small_world.pack(model, "head", head_learning_rate=1.0), tmp_path).optimizer.groups
    assert all(not isinstance(group.lr_scale, torch.Tensor) for group in groups)


def test_a_run_that_has_no_step_left_writes_the_length_of_its_training(model, tmp_path, monkeypatch):
    """Killed between the last step and its end: its adapter's file is that of a run that was not."""
    one = small_world.pack(model, method="adalora")
    whole = small_world.trainer(one, tmp_path / "whole")
    whole.run()
    cut = small_world.trainer(one, tmp_path / "cut")
    monkeypatch.setattr(cut, "_finish", lambda: stopping_after(1)(0))
    with pytest.raises(Stop):
        cut.run()
    again = small_world.trainer(one, tmp_path / "cut")
    again.run()
    written = []
    for name, trainer in (("whole", whole), ("again", again)):
        variants.save_pretrained(trainer.adapter, tmp_path / name, member=0)
        written.append((tmp_path / name / "adapter_config.json").read_bytes())
    assert written[0] == written[1] and f'"total_step": {whole.total}'.encode() in written[0]
