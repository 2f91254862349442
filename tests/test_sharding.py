"""A frozen base that several processes share: what one process has, to rounding, and no process holds more than its part."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rankwise import variants
from rankwise.experiments.config import Training
from rankwise.experiments.study import Runner
from rankwise.experiments.training import sharding
from rankwise.experiments.training.parallel import ALONE, Processes
from rankwise.variants.adapter import merging, probe
from rankwise.variants.adapter.shards import is_sharded, whole
from rankwise.variants.adapter.step import CannotMerge, NotPackable
from torch import nn

from tests import parallel_world as world
from tests import sharded_world, small_world
from tests import test_language_kinds as language_kinds
from tests.test_parallel import ROOT, THREE, UNEVEN, assert_equals_one, assert_goes_on, is_near
from tests.tiny import tiny

SHARED = {**UNEVEN, "shard_base": True, "epochs": 20, "log_every": 1}
CASES = {
    "lora": {},
    "adalora": {},
    "dora": {},
    "lora packed": THREE,
    "adalora packed": THREE,
    "adalora+dora by token": {"kind": "token-classification", **THREE},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, request):
    patch = pytest.MonkeyPatch()
    patch.setenv("RANKWISE_CACHE", str(tmp_path_factory.mktemp("cache")))
    request.addfinalizer(patch.undo)
    folder = tmp_path_factory.mktemp("models")
    return lambda name: small_world.model(folder / name, name)


@pytest.fixture(scope="module")
def model(models):
    return models("bert")


# -- one process -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_shared_is_refused_in_one_line_each(model):
    entries = ["lora", "full", {"method": "dora", "rank": 2, "learning_rate": 1e-2}]
    study = small_world.study(model, entries, quick=True, training={"shard_base": True, "max_steps": 2}, knock_out=True)
    lines = sharding.faults(study)
    assert len(lines) == 2 and lines[0].startswith("full: full trains the base's own weights, and training.shard_base = true")
    assert lines[1] == (
        "knock_out = true is measured in the first process, which has no whole base with training.shard_base = true: take one "
        "of them out"
    )
    quantised = study.methods[0].model_copy(update={"quantization": "nf4"})
    (line,) = sharding.faults(study.model_copy(update={"methods": [quantised], "knock_out": False}))
    assert line.startswith("lora: its base is quantised (nf4), and training.shard_base = true cannot cut codes")
    assert sharding.faults(study.model_copy(update={"training": Training()})) == []


def test_the_study_is_refused_before_anything_is_loaded(model, tmp_path):
    study = small_world.study(model, ["full"], quick=True, training={"shard_base": True, "max_steps": 2})
    with pytest.raises(ValueError, match="full: full trains the base's own weights"):
        Runner(study, tmp_path, "cpu", processes=Processes(0, 2)).prepare()


def test_one_process_says_that_it_changes_nothing(model, tmp_path):
    said = []
    study = small_world.study(model, ["lora"], quick=True, training={"shard_base": True, "max_steps": 2})
    assert not Runner(study, tmp_path, "cpu", say=said.append)._shared()
    assert said == ["note: training.shard_base = true shares the base among processes, and there is one: it changes nothing"]


def test_layers_are_the_members_of_the_outermost_module_lists():
    counts = {name: len(sharding.layers(tiny(name))) for name in ("bert", "gpt2", "llama", "deberta", "albert")}
    assert counts == {"bert": 2, "gpt2": 2, "llama": 2, "deberta": 2, "albert": 1}
    experts = nn.Sequential(nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})]))
    assert sharding.layers(experts) == [experts[0][0]["experts"][0]]
    with pytest.raises(ValueError, match="Linear has no list of layers"):
        sharding.layers(nn.Linear(2, 2))


def test_what_is_tied_to_the_outside_of_a_layer_is_not_cut():
    model = tiny("bert")
    first, second = sharding.layers(model)
    second.output.dense.weight = first.output.dense.weight
    uncut = sharding._uncut(first, sharding._places(model))
    assert uncut == {(id(first.output.dense._parameters), "weight")}


def test_a_model_is_known_by_its_shapes_and_ties():
    one, other = tiny("bert"), tiny("bert")
    assert sharding._form(one) == sharding._form(other.to("meta"))
    other.bert.encoder.layer[0].output.dense.weight = other.bert.encoder.layer[1].output.dense.weight
    assert sharding._form(one) != sharding._form(other)


def test_a_whole_weight_is_itself_and_a_model_of_one_process_is_not_shared():
    model = tiny("bert")
    assert whole(model.classifier.weight) is model.classifier.weight and not is_sharded(model)


def test_a_member_is_not_merged_into_a_shared_base(monkeypatch):
    adapter = variants.create("lora", rank=2).attach(tiny("bert"))
    monkeypatch.setattr(merging, "is_sharded", lambda model: True)
    with pytest.raises(CannotMerge, match=r"share the base \(shard_base\), and none has a whole weight to write into"):
        adapter.merge()


class Mixing(nn.Module):
    """Whose rows see each other."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x) - self.first(x).mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_model_is_probed_itself_and_is_afterwards_what_it_was(monkeypatch, dtype):
    monkeypatch.setattr(probe, "is_sharded", lambda model: True)
    monkeypatch.setattr(probe.copy, "deepcopy", None)
    for model, targets, can in ((tiny("bert"), "all-linear", True), (Mixing(), ["first"], False)):
        model = model.to(dtype).eval()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        modules = dict(model.named_modules())
        adapter = variants.create("dora", rank=2, members=3)
        head = ["classifier"] if can else []
        if can:
            probe.probe(adapter, model, targets, head, None)
        else:
            with pytest.raises(NotPackable, match="Mixing cannot pack dora: the output of a packed member differs"):
                probe.probe(adapter, model, targets, head, None)
        assert dict(model.named_modules()) == modules and not any(m.training for m in model.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 50])
@pytest.mark.parametrize("case", CASES)
def test_processes_that_share_the_base_train_as_one_does(model, tmp_path, case, steps):
    changes = {"method": case.split()[0], **SHARED, "max_steps": steps, **CASES[case]}
    phases = {k: 0 for k in small_world.settings(changes["method"]) if k in ("warmup_steps", "final_steps")}
    if steps == 1 and phases:
        changes["changes"] = phases
    for size in (2, 3):
        assert_equals_one(model, tmp_path, size, changes, False, 1e-6, sharded_world.train)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["albert", "gpt2", "llama", "deberta-v2"])
def test_every_form_of_model_can_be_shared(models, tmp_path, name):
    """A layer that is called again and again, a weight stored the other way, a table that is read without being called."""
    targets = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "up_proj"], "albert": ["query", "ffn"]}
    targets = targets.get(name, ["query_proj", "intermediate.dense"])
    changes = {"method": "dora", **SHARED, "max_steps": 3, "targets": targets}
    changes["gradient_checkpointing"] = name in ("llama", "gpt2")
    assert_equals_one(models(name), tmp_path, 2, changes, True, 1e-9, sharded_world.train)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"), [("generation", "llama"), ("generation", "t5"), ("choice", "gpt2"), ("language-modelling", "qwen2")]
)
def test_language_models_that_are_shared_generate_the_same_texts(tmp_path, in_float64, kind, name):
    """However many tokens and batches each process has: the last text of any ends the generation of all.

    In float64: in fp32 AdamW makes whole steps of gradients that are small, rounding too, and another processor rounds others.
    """
    packed = language_kinds.pack(tmp_path, kind, name, "adalora", shard_base=True)
    data = language_kinds.data_of(packed, name == "t5")
    for size in (1, 2, 3):
        folder = tmp_path / str(size)
        folder.mkdir()
        if size == 1:
            sharded_world.train_pack(ALONE, folder, packed, data)
        else:
            world.run(size, sharded_world.train_pack, folder, packed, data)
    one = tmp_path / "1"
    for folder in (tmp_path / "2", tmp_path / "3"):
        for key, value in world.state(one).items():
            other = world.state(folder)[key]
            assert value.dtype == other.dtype != torch.float32
            assert torch.allclose(value, other, rtol=1e-9, atol=1e-9), key
        ours, theirs = (json.loads((part / "predictions.json").read_text()) for part in (folder, one))
        assert ours == theirs or is_near(one, folder, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    ["pissa", "eva", "gora", "increlora", "truncated", "heavy-tail", "ia3", "vera", "prompt-tuning", "houlsby", "dylora"],
)
def test_methods_that_read_the_weights_or_measure_the_model_read_them_whole(model, tmp_path, method):
    assert_equals_one(model, tmp_path, 2, {"method": method, **SHARED, "max_steps": 12}, True, 1e-9, sharded_world.train)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_a_run_goes_on_whoever_shares_the_base(model, tmp_path, before, after):
    """A checkpoint is the same whether the base is shared or not."""
    changes = {"method": "adalora", **THREE, **UNEVEN, "shard_base": True, "max_steps": 12}
    assert_goes_on(model, tmp_path, before, after, changes)


@pytest.mark.slow
def test_the_base_is_dealt_out_layer_by_layer(model, tmp_path):
    world.run(3, sharded_world.watch_memory, tmp_path, model)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_an_error_that_one_process_meets_with_ends_all(model, tmp_path):
    said = tmp_path / "said"
    codes = world.ended(world.start(2, sharded_world.fail_alone, tmp_path, model, said))
    assert all(code not in (0, None) for code in codes), codes
    assert "OutOfMemoryError: full" in said.read_text().splitlines()


@pytest.mark.slow
def test_an_error_that_all_meet_with_is_a_result_and_they_go_on(model, tmp_path):
    world.run(2, sharded_world.fail_alike, tmp_path, model)
    assert {path.name for path in tmp_path.glob("ended-*")} == {"ended-0", "ended-1"}


def run_study(processes: Processes, model: str, out: Path) -> None:
    """What `rankwise compare` does in each process."""
    small_world.register()
    training = small_world.training(shard_base=True).model_dump()
    study = small_world.study(model, ["adalora", "dora", "pissa"], quick=True, training=training)
    runner = Runner(study, out, "cpu", processes=processes)
    runner.prepare()
    runner.run() if processes.is_first else runner.follow()


@pytest.mark.slow
def test_a_study_over_a_shared_base_is_the_study_of_one_process(model, tmp_path):
    """Fingerprints, scores, what became of each weight, and adapters that one process reads."""
    run_study(ALONE, model, tmp_path / "one")
    world.run(2, run_study, model, tmp_path / "two")
    small_world.assert_same_runs(tmp_path / "two", tmp_path / "one", 6)
    for name in (path.parent.name for path in (tmp_path / "one").glob("*/result.json")):
        ours, theirs = (json.loads((tmp_path / part / name / "sites.json").read_text()) for part in ("two", "one"))
        assert ours["sites"].keys() == theirs["sites"].keys()
        for site, facts in theirs["sites"].items():
            for key in ("update_norm", "weight_norm"):
                assert ours["sites"][site][key] == pytest.approx(facts[key], rel=1e-3), (name, site, key)
        config = json.loads((tmp_path / "two" / name / "config.json").read_text())
        assert config["training"]["shard_base"] and config["processes"] == 2
        adapter = variants.load_pretrained(_bert(model), tmp_path / "two" / name / "adapter")
        assert adapter.ranks()


def _bert(folder: str) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)


# -- GPUs --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_a_base_over_nccl(model, tmp_path):
    lines = ["text,label", *(f"{'a b c' if i % 2 else 'x y z'} {chr(97 + i % 26)},{i % 2}" for i in range(40))]
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    (tmp_path / "study.toml").write_text(
        f'model = "{model}"\nquick = true\nseeds = 1\n[[data]]\nname = "mine"\ntrain = "mine.csv"\n'
        '[training]\nprecision = "fp32"\nshard_base = true\n[[methods]]\nmethod = "adalora"\ninitial_rank = 4\n'
        "target_rank = 2\nwarmup_steps = 1\nfinal_steps = 1\ninterval = 1\nlearning_rate = 1e-2\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    found = {}
    for out, words in (("two", torchrun), ("one", [])):
        command = [sys.executable, *words, "-m", "rankwise", "compare", "study.toml", "--out", out]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr
        (found[out],) = [json.loads(path.read_text()) for path in (tmp_path / out).glob("*/result.json")]
    ours, theirs = found["two"], found["one"]
    assert ours["status"] == "completed" and ours["fingerprint"] == theirs["fingerprint"] and ours["ranks"] == theirs["ranks"]
    assert ours["final_train_loss"] == pytest.approx(theirs["final_train_loss"], rel=1e-4)
