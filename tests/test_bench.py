"""`rankwise bench` at a size of milliseconds: what is timed is what it says, and the numbers fit each other."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from rankwise.experiments import cli, memory
from rankwise.experiments.bench import ablation, cases, run, throughput, timing, workloads
from rankwise.experiments.bench.arms import Floor, Ours, Setup
from rankwise.experiments.bench.cases import PEFT_METHODS, ImageSize, LlamaSize, Plan, Shape, StudySize
from rankwise.experiments.bench.language import LanguageArms
from rankwise.experiments.bench.workloads import EncoderArms, LinearArms, plain
from rankwise.variants.adapter.probe import fill

from tests import small_world
from tests.test_cli import ROOT, rankwise, refused

CPU = torch.device("cpu")
K1 = Shape("k1", 1, 4, 8, repetitions=2, evaluation_batches=2)
K3 = Shape("k16", 3, 4, 8, repetitions=1, warmup=0, peft_repeat=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_world.model(tmp_path_factory.mktemp("bench") / "model")


@pytest.fixture
def setup(tmp_path):
    return Setup(CPU, "fp32", tmp_path)


def tiny_plan(model_id: str) -> Plan:
    return Plan(
        model=model_id,
        shapes=(K1, K3),
        linear=Shape("", 1, 6, 1, repetitions=2),
        features=24,
        llama=LlamaSize(hidden=32, layers=2, heads=4, kv_heads=2, feed_forward=48, vocabulary=67),
        llama_shape=Shape("k1", 1, 2, 12, repetitions=1, warmup=0),
        images=ImageSize(hidden=32, layers=2, heads=4, patch=4, side=8),
        images_shape=Shape("k1", 1, 2, 5, repetitions=1, warmup=0),
        language=LlamaSize(hidden=32, layers=2, heads=4, kv_heads=2, feed_forward=48, vocabulary=67),
        language_shape=Shape("k8", 8, 2, 12, repetitions=1, warmup=0),
        throughput=Shape("run", 1, 4, 8, repetitions=1),
        packs=(1, 4, 16, 64),
        steps_per_run=10,
        evaluated_per_run=6,
        study=StudySize((1e-3, 1e-2), 2, 3, 4, 2, train_examples=None, evaluation_examples=None, task="small/regression"),
        products=((64, 64, 64),),
    )


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory):
    """Everything, once, and the cases that were asked for."""
    some = ("throughput/lora/k1", "throughput/lora/k16", "throughput/adalora+dora/k1")
    chosen = [case for case in cases.select(None, full=True) if case.group != "throughput" or case.name in some]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKWISE_CACHE", str(tmp_path_factory.mktemp("cache")))
        small_world.register(patch.setitem)
        lines = []
        found = run.Bench(tiny_plan(model), CPU, chosen, say=lines.append).run()
    return found, chosen, lines


# -- the JSON --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_case_comes_once_and_is_told_when_done(measured):
    found, chosen, lines = measured
    groups = {"allocator": "allocator", "throughput": "throughput"}
    for group in ("rows", "allocator", "throughput"):
        wanted = [case.name for case in chosen if case.group != "study" and groups.get(case.group, "rows") == group]
        assert [row["case"] for row in found[group]] == sorted(wanted, key=[row["case"] for row in found[group]].index)
        assert len(found[group]) == len(wanted)
    assert sorted(line.partition(":")[0] for line in lines) == sorted(case.name for case in chosen)


@pytest.mark.slow
def test_ratio_tax_and_memory_are_what_they_are_called(measured):
    for row in measured[0]["rows"]:
        assert row["tax"] == pytest.approx(row["seconds"] / row["floor_seconds"])
        assert row["spread"][0] <= row["seconds"] <= row["spread"][1]
        assert row["pack_peak_memory_bytes"] == pytest.approx(row["members"] * row["peak_memory_bytes"])
        if "adalora+dora" in row["case"]:
            assert row["peft_seconds"] is row["ratio"] is row["ratio_spread"] is row["peft_peak_memory_bytes"] is None
            continue
        assert row["ratio"] == pytest.approx(row["peft_seconds"] / row["seconds"])
        assert row["peft_peak_memory_bytes"] > 0 and row["peft_precision"] in ("fp32", "bf16 weights", "bf16 autocast")
        cached = row["peft_cached_seconds"]
        assert (cached is not None) == ("eval/dora" in row["case"] or "generate/dora" in row["case"])
        assert (row["improved_floor_seconds"] is None) == row["case"].startswith(("linear/", "language/"))


@pytest.mark.slow
def test_seconds_are_per_member_and_batch(model, setup, monkeypatch):
    """A clock on which every step takes 6 seconds: of 3 members each took 2, of one member's 2 batches each took 3."""
    monkeypatch.setattr(timing, "interleave", lambda steps, *_: {key: [6.0, 6.0] for key in steps})
    for shape, phase, ours, peft in ((K3, "train", 2.0, 6.0), (K1, "eval", 3.0, 3.0)):
        chosen = cases.select(f"{phase}/lora/{shape.name}", full=False)
        row = run.Bench(tiny_plan(model), CPU, chosen).run()["rows"][0]
        assert (row["seconds"], row["floor_seconds"], row["peft_seconds"]) == (ours, ours, peft)
        assert (row["ratio"], row["tax"]) == (peft / ours, 1.0)


def test_every_arm_of_a_language_model_generates_the_same_tokens_and_steps_on_the_same_loss(setup, tmp_path):
    """At the start, where no adapter changes the model: ours in one batch, PEFT's and the floor's member by member."""
    plan = tiny_plan("")
    with workloads.llama(plan.language, tmp_path, "fp32", 24, "tiny", head=True) as folder:
        arms = LanguageArms(setup, folder, dataclasses.replace(plan.language_shape, members=3))
        together = arms.ours("lora").evaluate().view(3, 2, 6)
        assert len(set(map(tuple, together.flatten(0, 1).tolist()))) > 1
        first = arms.peft("lora", "fp32").evaluate()
        assert torch.equal(together[0], first)
        assert torch.equal(arms.floor.evaluate(), together.flatten(0, 1))
        theirs = arms.peft("lora", "fp32")
        theirs.model.eval()
        batch = arms.tensors()
        assert (batch["labels"][:, :6] == -100).all() and (batch["labels"][:, 6:] == batch["input_ids"][:, 6:]).all()
        trainer = arms.ours("lora").trainer
        labels = batch.pop("labels")
        losses = trainer.kind.training_losses(
            trainer.model, {k: v.repeat(3, 1) for k, v in batch.items()}, labels.repeat(3, 1), 3
        )
        assert losses.tolist() == pytest.approx([theirs.model(**batch, labels=labels).loss.item()] * 3, rel=1e-5)
        for method in ("lora", "adalora", "dora"):
            arms.ours(method).train()
            arms.peft(method, "fp32").train()


@pytest.mark.slow
def test_json_is_strict_and_names_the_machine(measured):
    found = measured[0]
    assert json.loads(json.dumps(found, allow_nan=False)) == json.loads(json.dumps(found))
    machine = found["machine"]
    assert found["schema"] == 1 and machine["cores"] == os.cpu_count() and machine["threads"] == torch.get_num_threads()
    assert machine["versions"]["peft"] == "0.21.2" and machine["matrix_product_gflops"]["fp32"] > 0
    names = {"model 4 x 8", "linear 24 x 24", "Llama shape 2 x 12", "DINOv2 shape 2 x 5", "SmolLM2 shape 2 x 12"}
    assert set(found["peft_precisions"]) == names
    assert all(set(tried) == {"fp32", "bf16 weights", "bf16 autocast"} for tried in found["peft_precisions"].values())


@pytest.mark.slow
def test_targets_are_those_of_the_issue(measured):
    targets = {row["case"]: (row["target_ratio"], row["target_tax"]) for row in measured[0]["rows"]}
    assert targets["train/dora/k16"] == (2.4, 1.15) and targets["train/adalora/k1"] == (1.4, 1.35)
    assert targets["linear/eval/dora"] == (8.0, None) and targets["eval/lora/k1"] == (None, None)
    names = {case.name for case in cases.cases()}
    for kinds in cases.TARGETS.values():
        assert all(name in names for of_kind in kinds.values() for name in of_kind)


@pytest.mark.slow
def test_throughput_is_computed_from_steps_and_evaluations(measured):
    rows = {row["case"]: row for row in measured[0]["throughput"]}
    one = rows["throughput/lora/k16"]
    each = 10 * one["step_seconds"] + 6 / 4 * one["evaluation_batch_seconds"]
    assert one["members"] == 16 and one["runs_per_minute"] == pytest.approx(60 * 16 / each)
    peft = 10 * one["peft_step_seconds"] + 6 / 4 * one["peft_evaluation_batch_seconds"]
    assert one["peft_runs_per_minute"] == pytest.approx(60 / peft)
    assert rows["throughput/adalora+dora/k1"]["peft_runs_per_minute"] is None


def test_pack_that_does_not_fit_is_said_and_left_out(model, setup, monkeypatch):
    monkeypatch.setattr(throughput, "_free_memory", lambda device: 1000)
    case = next(c for c in cases.cases() if c.name == "throughput/lora/k16")
    plan = tiny_plan(model)
    arms = lambda k: EncoderArms(setup, model, throughput.of_members(plan.throughput, k))  # noqa: E731
    row = throughput.measure_case(case, 16, arms, plan, "fp32")
    assert "16" in row["note"] and row["runs_per_minute"] is None and row["step_seconds"] is None


@pytest.mark.slow
def test_study_is_run_whole_and_beside_peft(measured):
    study = measured[0]["study"]
    assert (study["sweep_runs"], study["final_runs"], study["failed_runs"]) == (4, 3, 0)
    each = study["peft_run_seconds"]
    assert study["peft_seconds"] == pytest.approx(4 * each["sweep"] + 3 * each["final"])
    assert study["ratio"] == pytest.approx(study["peft_seconds"] / study["seconds"])


@pytest.mark.slow
def test_allocator_is_a_part_of_its_step_and_left_as_it_was(measured, model, setup):
    for row in measured[0]["allocator"]:
        assert 0 < row["share"] < 1 and (row["peft_share"] is None) == ("dora" in row["case"])
    arm = EncoderArms(setup, model, K1).ours("adalora")
    arm.allocator_share(2)
    assert "after_step" not in vars(arm.trainer.adapter)


# -- what is timed ---------------------------------------------------------------------------------------------------


def test_rounds_take_every_arm_in_turn_and_drop_the_warm_up(monkeypatch):
    order, clock = [], iter([100.0, 100.0, 100.0, 1.0, 9.0, 2.0, 5.0, 7.0, 3.0])
    steps = {name: lambda name=name: order.append(name) for name in "ab"}

    def seconds(step, device):
        step()
        return next(clock)

    monkeypatch.setattr(timing, "seconds", seconds)
    times = timing.interleave(steps, CPU, repetitions=2, warmup=1, repeat={"b": 2})
    assert order == list("abb" * 3)
    assert times == {"a": [1.0, 5.0], "b": [5.5, 5.0]}  # of b the medians of (9, 2) and (7, 3)


def test_quartiles_by_hand():
    assert timing.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == [2.0, 4.0]
    assert timing.quartiles([7.0]) == [7.0, 7.0]


def test_peak_counts_what_lives_at_once():
    def step():
        first = torch.empty(1000, 1000)
        second = torch.empty(500, 1000)
        del first
        third = torch.empty(250, 1000)
        del second, third

    assert memory.peak_growth(step, CPU) == 4 * 1_500_000


def test_live_memory_counts_a_storage_once():
    base = torch.empty(10, 10)
    module = torch.nn.Linear(4, 3)
    tensors = memory.tensors_in(module, {"state": [base, base[2:], base.T], 7: "no tensor"})
    assert memory.live_bytes(tensors) == 4 * (100 + 15)


def test_floor_has_no_gradient_of_a_parameter_and_goes_back_to_the_first_layer(model, setup):
    floor = EncoderArms(setup, model, K1).floor
    seen = {}

    def watch(out):
        out.register_hook(lambda gradient: seen.update(query=gradient))

    first = "bert.encoder.layer.0.attention.self.query"
    floor.model.get_submodule(first).register_forward_hook(lambda m, a, out: watch(out))
    embeddings = floor.model.get_submodule("bert.embeddings")
    embeddings.register_forward_hook(lambda m, a, out: seen.update(embeddings=out.requires_grad))
    floor.train()
    assert seen["query"].abs().sum() > 0 and seen["embeddings"] is False
    assert all(not p.requires_grad and p.grad is None for p in floor.model.parameters())


def test_improved_floor_is_the_model_of_a_trainer_without_gradients_of_parameters(model, setup):
    floor = EncoderArms(setup, model, K3).improved_floor
    before = [p.clone() for p in floor.trainer.adapter.parameters()]
    floor.train()
    floor.evaluate()
    assert all(p.grad is None for p in [*floor.model.parameters(), *floor.trainer.adapter.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(before, floor.trainer.adapter.parameters(), strict=True))
    assert len(floor.inputs["input_ids"]) == K3.members * K3.rows


def test_operations_of_a_linear_are_two_a_multiply_add_and_double_with_the_backward_pass(setup, model):
    arms = LinearArms(setup, Shape("", 1, 6, 1, repetitions=1), features=24)
    assert arms.floor_flops("eval") == 2 * 6 * 24 * 24
    assert arms.floor_flops("train") == 2 * arms.floor_flops("eval")
    arms = EncoderArms(setup, model, K3)  # counted on one row, for all
    whole = Floor(*plain(model, "fp32", CPU)[::2], arms.tensors(torch.float32, K3.members))
    assert arms.floor_flops("train") == timing.flops(whole.train)


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_peft_and_ours_train_as_much_at_the_same_places_and_compute_the_same(model, setup, method):
    """The same values in both, none of them trivial: equal outputs without dropout."""
    arms = EncoderArms(setup, model, K1)
    ours, peft = arms.ours(method), arms.peft(method, "fp32")
    adapter = ours.trainer.adapter
    assert sum(p.numel() for p in adapter.parameters()) == sum(p.numel() for p in peft.trained)
    fill(adapter)
    theirs = dict(peft.model.base_model.model.named_modules())
    sites = dict(adapter.named_sites())
    assert {name for name, m in theirs.items() if hasattr(m, "lora_A")} == set(sites)
    with torch.no_grad():
        for name, site in sites.items():
            low, other = getattr(site, "inner", site), theirs[name]
            for mine, their in ((low.A, other.lora_A.default), (low.B, other.lora_B.default)):
                getattr(their, "weight", their).copy_(mine[0])
            if method == "adalora":
                other.lora_E.default.copy_(low.E[0][:, None])
            if method == "dora":
                other.lora_magnitude_vector.default.weight.copy_(site.magnitude[0])
        for key, value in adapter.heads["classifier"].named_parameters():
            getattr(theirs["classifier"].modules_to_save.default, key).copy_(value[0])
        batch = peft.evaluated[0]
        ours.trainer.model.eval()
        peft.model.eval()
        assert torch.allclose(ours.trainer.model(**batch).logits, peft.model(**batch).logits, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_a_step_of_peft_and_of_ours_moves_what_is_trained_and_prunes(model, setup, method):
    arms = EncoderArms(setup, model, K1)
    ours, peft = arms.ours(method), arms.peft(method, "fp32")
    for arm, trained in ((ours, list(ours.trainer.adapter.parameters())), (peft, peft.trained)):
        before = [p.detach().clone() for p in trained]
        arm.train()
        arm.train()
        assert all(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
        assert all(p.grad is None for p in trained)
    if method == "adalora":
        budget = sum(rank.item() for rank in ours.trainer.adapter.ranks().values())
        kept = sum(int((m.lora_E.default != 0).sum()) for m in peft.model.modules() if hasattr(m, "lora_E"))
        assert budget == kept < 12 * len(ours.trainer.adapter.ranks())


def test_nobody_draws_attention_dropout_and_everybody_the_hidden_one(model, setup):
    arms = EncoderArms(setup, model, K1)
    assert arms.floor.model.bert.encoder.layer[0].attention.self.dropout.p == 0.0
    assert arms.floor.model.bert.embeddings.dropout.p == 0.1
    peft = arms.peft("lora", "fp32").model.base_model.model.bert
    assert peft.encoder.layer[0].attention.self.dropout.p == 0.0 and peft.embeddings.dropout.p == 0.1
    ours = arms.ours("lora").trainer.model.bert
    assert ours.encoder.layer[0].attention.self.dropout.p == 0.0


def test_evaluation_without_the_cache_leaves_the_cached_one_its_cache(setup):
    arms = LinearArms(setup, Shape("", 1, 6, 1, repetitions=1), features=24)
    cached = arms.cached_peft("dora", "fp32")
    cached.evaluate_cached()
    arms.peft("dora", "fp32").evaluate()
    caches = [m._dora_cache for m in cached.model.modules() if hasattr(m, "_dora_cache")]
    assert len(caches) == 1 and caches[0]


def test_ours_is_fed_exact_rows_of_the_pool(model, setup):
    arms = EncoderArms(setup, model, K3)
    seen = {}
    ours = arms.ours("lora")
    ours.trainer.model.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
    ours.train()
    assert seen["input_ids"].shape == (K3.members * K3.rows, K3.length) and bool(seen["attention_mask"].all())
    assert bool((seen["input_ids"] >= 8).all())  # no special token


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cases", "train/droa/k1"], ["train/droa/k1", 'did you mean "train/dora/k1"?', "linear/eval/dora"]),
        (["--cases", "llama/*"], ["llama/*", "--full"]),
        (["--threads", "0"], ["--threads 0", "at least 1"]),
        (["--repetitions", "-3"], ["--repetitions -3", "at least 1"]),
        (["--json", "no/such/folder/bench.json"], ["no/such/folder", "not there"]),
        (["--json", "."], ["this is a folder"]),
        (["--out", "README.md"], ["README.md", "this is a file"]),
    ],
)
def test_wrong_words_are_refused(words, said):
    refused(rankwise("bench", *words), *said)


@pytest.mark.parametrize("version", [None, "0.20.0"])
def test_another_peft_is_refused_before_torch_is_loaded(version):
    code = f"""
import importlib.metadata, sys
found = importlib.metadata.version
def version(name):
    if name != "peft": return found(name)
    answer = {version!r}
    if answer: return answer
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = version
from rankwise.experiments import cli
sys.argv[1:] = ["bench"]
try: cli.main()
finally: assert "torch" not in sys.modules
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    refused(done, "0.21.2", version or "not installed", "pip install -c constraints.txt -e '.[bench]'")


def test_cases_are_picked_by_pattern():
    assert [c.name for c in cases.select("train/dora/*", full=False)] == ["train/dora/k1", "train/dora/k16"]
    names = [c.name for c in cases.select(None, full=True)]
    assert len(names) == len(set(names)) and not any(c.full for c in cases.select(None, full=False))


@pytest.fixture
def bench_of(monkeypatch, measured, tmp_path):
    """The command in this process, on what was measured here, or what `end` does instead."""

    def call(json_file, out=tmp_path / "out", end=lambda: None):
        def measure_nothing(bench):
            end()
            return measured[0]

        monkeypatch.setattr(run.Bench, "run", measure_nothing)
        cli.bench(json_file=json_file, out=out, cases="train/dora/k1", device="cpu", full=False)

    return call


@pytest.mark.slow
def test_command_writes_json_page_and_plot(tmp_path, bench_of, capsys, measured):
    bench_of(tmp_path / "bench.json", tmp_path / "out")
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(json.dumps(measured[0]))
    written = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert written == {"bench.json", "bench.md", "figures/throughput.svg", "figures/throughput.png"}
    assert "train/dora/k16" in capsys.readouterr().out


@pytest.mark.slow
def test_interrupted_bench_leaves_the_old_file(tmp_path, bench_of, capsys):
    def interrupt():
        raise KeyboardInterrupt

    (tmp_path / "bench.json").write_text("old")
    with pytest.raises(SystemExit) as exit:
        bench_of(tmp_path / "bench.json", end=interrupt)
    assert exit.value.code == 130 and "nothing was written" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["bench.json"] and (tmp_path / "bench.json").read_text() == "old"


@pytest.mark.slow
def test_write_that_is_cut_off_leaves_the_old_file(tmp_path, bench_of, monkeypatch):
    def half(value, file, **_):
        file.write('{"schema":')
        raise OSError(28, "No space left on device")

    (tmp_path / "bench.json").write_text("old")
    monkeypatch.setattr(json, "dump", half)
    with pytest.raises(OSError):
        bench_of(tmp_path / "bench.json")
    assert [p.name for p in tmp_path.iterdir()] == ["bench.json"] and (tmp_path / "bench.json").read_text() == "old"


def test_extra_names_the_version_that_is_checked():
    assert f'bench = ["peft=={cases.PEFT_VERSION}"]' in (ROOT / "pyproject.toml").read_text()
    assert f"peft=={cases.PEFT_VERSION}" in (ROOT / "constraints.txt").read_text().split()


def test_a_case_that_fails_is_written_down_and_the_others_go_on(model, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("too large\nfor this machine")

    monkeypatch.setattr(run.throughput, "measure_case", too_large)
    chosen = [case for case in cases.select(None, full=True) if case.name in ("throughput/lora/k1", "linear/train/lora")]
    found = run.Bench(tiny_plan(model), CPU, chosen).run()
    assert found["failures"] == [{"cases": ["throughput/lora/k1"], "error": "OutOfMemoryError: too large"}]
    assert [row["case"] for row in found["rows"]] == ["linear/train/lora"]


def test_an_ablation_takes_out_what_it_says(model, setup, monkeypatch):
    monkeypatch.setattr(ablation, "MINILM", model)
    made = []
    monkeypatch.setattr(ablation, "Ours", lambda *args: made.append(Ours(*args)) or made[-1])
    rows = list(ablation.measured(K1, "lora", setup, 1))
    assert [(r["case"].partition("/")[0], r["without"]) for r in rows] == [
        *(("train", name) for name in ("nothing", "compiled passes", "first token only", "fused AdamW")),
        *(("eval", name) for name in ("nothing", "first token only", "merged evaluation")),
    ]
    names = list(ablation.CHANGES)
    first = ["forward" in vars(arm.trainer.model.bert.encoder.layer[-1]) for arm in made]
    assert [name for name, used in zip(names, first, strict=True) if not used] == ["first token only"]
    with ablation.CHANGES["merged evaluation"]():
        assert not made[0].trainer.adapter.mergeable
    assert made[0].trainer.adapter.mergeable
