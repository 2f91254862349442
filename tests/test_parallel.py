"""One run on several processes (gloo): what one process has, to rounding, whatever a step is made of and whoever dies."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rankwise import variants
from rankwise.experiments.study import Runner
from rankwise.experiments.training import parallel
from rankwise.experiments.training.parallel import ALONE, Processes
from rankwise.variants import native
from rankwise.variants.adapter.draws import Draw, drop
from rankwise.variants.adapter.step import NotPackable
from torch import nn

from tests import parallel_world as world
from tests import small_world
from tests.test_callback import attached, language_model, rows, trainer
from tests.tiny import tiny

ROOT = Path(__file__).parent.parent
THREE = {"seeds": (3, 8, 5), "learning_rates": (1e-2, 3e-3, 2e-2)}
UNEVEN = {"batch_size": 7}  # of 60 rows: eight steps of 7 rows, which no number of processes halves, and one of 4
CASES = {
    "lora": {},
    "adalora": {},
    "dora": {},
    "full": {},
    "adalora packed": THREE,
    "adalora+dora by token": {"kind": "token-classification", **THREE},
    "increlora packed": THREE,  # whose score is no function of the gradients
    "gora": {},
    "fewer rows than processes": {"method": "adalora", "accumulation": 4, **THREE},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory, request):
    patch = pytest.MonkeyPatch()
    patch.setenv("RANKWISE_CACHE", str(tmp_path_factory.mktemp("cache")))
    request.addfinalizer(patch.undo)
    return small_world.model(tmp_path_factory.mktemp("model"))


def assert_equals_one(
    model: str, folder: Path, size: int, changes: dict, is_double: bool, tolerance: float, train: Callable = world.train
) -> None:
    """Trained by one process and by several: weights, averages, losses, predictions; and all processes are alike."""
    one, many = folder / "one", folder / f"{size}"
    many.mkdir(parents=True)
    if not one.exists():
        one.mkdir()
        world.train(ALONE, one, model, changes, is_double)
    world.run(size, train, many, model, changes, is_double)
    expected, found = world.state(one), world.state(many)
    for rank in range(1, size):
        other = world.state(many, rank)
        assert other.keys() == found.keys() and all(torch.equal(other[name], found[name]) for name in found)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if name.endswith("key.bias"):
            continue  # its gradient is zero but for rounding, and AdamW makes a whole step of that
        mine, other = value.double(), found[name].double()
        assert mine.shape == other.shape and torch.allclose(mine, other, rtol=tolerance, atol=tolerance, equal_nan=True), name
    for member in range(len(changes.get("seeds", (0,)))):
        assert world.losses(many, member) == pytest.approx(world.losses(one, member), abs=tolerance)
    assert (one / "predictions.json").read_text() == (many / "predictions.json").read_text() or is_near(one, many, tolerance)
    facts = [json.loads((place / "facts.json").read_text())[0] for place in (one, many)]
    assert facts[0]["ranks"] == facts[1]["ranks"] and facts[1]["tokens_per_second"] > 0


def is_near(one: Path, many: Path, tolerance: float) -> bool:
    def flat(folder: Path) -> torch.Tensor:
        members = json.loads((folder / "predictions.json").read_text())
        return torch.cat([torch.tensor(values).flatten() for member in members for values in member.values()])

    return torch.allclose(flat(one), flat(many), rtol=0, atol=100 * tolerance)


# -- one pack ----------------------------------------------------------------------------------------------------------


def test_two_processes_train_a_pack_of_adalora_as_one_does(model, tmp_path):
    """Dropout on, the last batch uneven, ranks allocated, three members; fp32."""
    changes = {"method": "adalora", **THREE, **UNEVEN, "max_steps": 12}
    assert_equals_one(model, tmp_path, 2, changes, False, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 50])
@pytest.mark.parametrize("case", CASES)
def test_two_and_three_processes_train_as_one_does(model, tmp_path, case, steps):
    changes = {"method": case.split()[0], **UNEVEN, "max_steps": steps, "epochs": 20, "log_every": 1, **CASES[case]}
    if steps == 1 and (
        phases := {k: 0 for k in small_world.settings(changes["method"]) if k in ("warmup_steps", "final_steps")}
    ):
        changes["changes"] = phases
    for size in (2, 3):
        assert_equals_one(model, tmp_path, size, changes, False, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adalora+dora", "full"])
def test_in_double_precision_they_agree_far_beyond_single(model, tmp_path, method):
    """So that what differs in fp32 is rounding, and no draw."""
    changes = {"method": method, **UNEVEN, "max_steps": 20, "epochs": 20}
    assert_equals_one(model, tmp_path, 3, changes, True, 1e-11)


def cut_after(processes: Processes, folder: Path, model: str, changes: dict, steps: int) -> None:
    made = small_world.trainer(small_world.pack(model, **changes), folder, processes=processes)
    made._resume() or made.log.start()
    for _ in range(steps):
        made.step += 1
        made.train_step()
    made.save()


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_a_run_goes_on_with_another_number_of_processes(model, tmp_path, before, after):
    with contextlib.ExitStack() as stack:
        if (before, after) == (2, 1):
            stack.enter_context(
                pytest.warns(UserWarning, match="begun with 2 processes and goes on with 1: it ends equal to rounding")
            )
        assert_goes_on(model, tmp_path, before, after, {"method": "adalora", **THREE, **UNEVEN, "max_steps": 12})


def assert_goes_on(model: str, folder: Path, before: int, after: int, changes: dict) -> None:
    """A run that so many processes begin, and stop at step 5, ends with so many others as one process ends it."""
    one, cut = folder / "one", folder / "cut"
    for made in (one, cut):
        made.mkdir()
    world.train(ALONE, one, model, changes)
    for size, work, *rest in ((before, cut_after, 5), (after, world.train)):
        if size > 1:
            world.run(size, work, cut, model, changes, *rest)
        else:
            work(ALONE, cut, model, changes, *rest)
    expected, found = world.state(one), world.state(cut)
    assert all(torch.allclose(value, found[name], rtol=1e-6, atol=1e-6) for name, value in expected.items())


# -- draws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_process_draws_for_its_rows_what_one_would_draw_for_them(monkeypatch, plain, dtype):
    if plain:
        monkeypatch.setattr(native, "usable", lambda *_, **__: False)
    x = torch.randn(2, 7, 5, 3, dtype=dtype)  # K, N, tokens, F

    def dropped(rows: slice, first_token: bool = False) -> torch.Tensor:
        draw = Draw([4, 9])
        draw.begin(3, 1)
        own = x[:, rows]
        ids = torch.zeros(own.shape[0] * own.shape[1], 5)
        draw.rows._before(nn.Identity(), (ids,), {})
        with draw.rows.shared(rows.start, lambda t: t):
            if not first_token:
                return drop(own.flatten(0, 1), 0.4, draw, "here").view(own.shape)
            with draw.first_tokens(5):
                return drop(own[:, :, :1].flatten(0, 1), 0.4, draw, "here").view(*own.shape[:2], 1, 3)

    whole = dropped(slice(0, 7))
    parts = [dropped(slice(0, 3)), dropped(slice(3, 5)), dropped(slice(5, 7))]
    assert torch.equal(torch.cat(parts, 1), whole) and (whole == 0).any()
    assert torch.equal(torch.cat([dropped(slice(0, 3), True), dropped(slice(3, 7), True)], 1), whole[:, :, :1])


def test_positions_beyond_32_bits_wrap_as_the_compiled_passes_do():
    draw = Draw([4])
    draw.begin(1, 0)
    x = torch.ones(1, 4, 1000)
    dropping = draw.dropping("here", x, 0.5, 2**32 // 1000)  # the last positions below 2**32 and the first above
    plain = dropping.factor(x)
    assert torch.equal(plain, native.drop(x, dropping)) if native.library() else plain.any()


def test_what_is_not_made_of_the_model_s_rows_is_drawn_alike_everywhere():
    """DeBERTa's table of relative positions, (1, positions, F) or (positions, F)."""
    draw = Draw([4])
    draw.rows._before(nn.Identity(), (torch.zeros(3, 5),), {})
    with draw.rows.shared(7, lambda t: t):
        sizes = [(1, 8, 2), (8, 2), (3, 5, 2), (3, 2), (15, 2), (12, 5, 5), (3, 4, 4, 2)]
        assert [draw.rows.first(torch.zeros(size)) for size in sizes] == [0, 0, 35, 7, 35, 140, 112]
    assert draw.rows.first(torch.zeros(3, 5, 2)) == 0


def test_every_row_is_in_one_part_and_parts_differ_by_one_row_at_most():
    for count in range(12):
        parts = [range(count)[Processes(rank, 5).part(count)] for rank in range(5)]
        assert [row for part in parts for row in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


# -- failures ----------------------------------------------------------------------------------------------------------


def fail(processes: Processes, folder: Path) -> None:
    """One process fails: all raise, in kind; and all can go on."""

    def work(error: Exception | None) -> str:
        if error is not None and processes.rank == 1:
            raise error
        return "done"

    for error in (NotPackable("no"), torch.OutOfMemoryError("full"), ValueError("bad"), KeyError("x")):
        try:
            processes.attempt(lambda error=error: work(error))
            raise AssertionError
        except Exception as caught:
            assert processes.agreed(caught) and not processes.agreed(ValueError())
            kind = RuntimeError if isinstance(error, KeyError) and processes.rank != 1 else type(error)
            assert type(caught) is kind and (processes.rank == 1 or "process 1: " in str(caught)), caught
    assert processes.attempt(lambda: work(None)) == "done"
    weights = torch.ones(3, dtype=torch.bfloat16)
    processes.check_equal([weights, torch.tensor(torch.nan)], "at the start")
    try:
        processes.check_equal([weights + processes.rank / 128], "after step 3")
        raise AssertionError
    except ValueError as caught:
        assert processes.agreed(caught) and "after step 3 the processes have not the same weights" in str(caught)
    texts = [["a", "\u00e9 "], [str(processes.rank)]]
    arrays = [torch.arange(3).numpy() + processes.rank, *(np.array(text, dtype=object) for text in texts)]
    found = [parallel.from_bytes(one) for one in processes.gathered(parallel.as_bytes(arrays))]
    if processes.is_first:
        assert [[one.tolist() for one in of_rank] for of_rank in found] == [
            [[rank, rank + 1, rank + 2], texts[0], [str(rank)]] for rank in range(processes.size)
        ]
    (folder / str(processes.rank)).write_text("ended")


@pytest.mark.slow
def test_what_fails_in_one_process_fails_in_all_and_they_go_on(tmp_path):
    world.run(3, fail, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def study_of(model: str, **changes):
    return small_world.study(model, ["adalora", "dora"], quick=True, **changes)


def run_study(processes: Processes, model: str, out: Path, said: Path, slow: float = 0.0) -> None:
    """What `rankwise compare` does in each process; `slow`: seconds that each step takes more."""
    small_world.register()
    if slow:
        from rankwise.experiments.training.trainer import Trainer

        step = Trainer.train_step

        def slower(trainer: Trainer) -> None:
            time.sleep(slow)
            step(trainer)

        Trainer.train_step = slower
    try:
        runner = Runner(study_of(model), out, "cpu", processes=processes)
        runner.prepare()
        runner.run() if processes.is_first else runner.follow()
    except BaseException as error:
        with said.open("a") as file:
            file.write(f"{type(error).__name__}: {error}\n")
        raise


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_that_dies_ends_all_and_the_next_start_goes_on(model, tmp_path, victim):
    run_study(ALONE, model, tmp_path / "one", tmp_path / "said")
    out, said = tmp_path / "many", tmp_path / "said"
    processes = world.start(3, run_study, model, out, said, 0.05)
    until = time.monotonic() + 120
    while not list(out.glob("packs/*/checkpoint.safetensors")) and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(processes[victim].pid, signal.SIGKILL)
    codes = world.ended(processes)
    assert codes[victim] == -signal.SIGKILL and all(code not in (0, None) for code in codes), codes
    assert sorted(code for code in codes if code > 0) == [1, 2]  # the error, and a silent end
    assert set(said.read_text().splitlines()) == {f"ProcessLost: {parallel.LOST}"}
    assert not list(out.glob("*/result.json")) and list(out.glob("packs/*/checkpoint.safetensors"))
    world.run(2, run_study, model, out, said)  # and on another number
    small_world.assert_same_runs(out, tmp_path / "one", 4)
    configs = [json.loads(path.read_text()) for path in out.glob("*/config.json")]
    assert {one["processes"] for one in configs} <= {2, 3}
    assert not [path for path in out.rglob("*.tmp")]


@pytest.mark.slow
def test_torchrun_runs_a_study_and_one_process_speaks(model, tmp_path):
    """By the command, with a file of one's own; then a word that cannot be meant, which is said once."""
    lines = ["text,label", *(f"{'a b c' if i % 2 else 'x y z'} {chr(97 + i % 26)},{i % 2}" for i in range(40))]
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "rankwise", "compare"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["--model", model, "--data", "mine.csv", "--methods", "lora", "--out", "runs"]
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: runs/report/report.md") == 1
    assert done.stderr.count("rankwise: the study is") == 1
    (result,) = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/result.json")]
    assert result["status"] == "completed"
    for wrong, said in ((["smok"], 'did you mean "smoke"?'), (["smoke", "--device", "cuda:9"], "--device cuda:9")):
        done = subprocess.run([*torchrun, *wrong], capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode and done.stderr.count(said) == 1, done.stderr


@pytest.mark.slow
def test_what_is_measured_in_one_process_is_refused_in_several(model, tmp_path):
    context = SimpleNamespace(
        study=study_of(model, budget={"equal": "time"}), processes=Processes(0, 2), tasks={}, committed=tmp_path, out=tmp_path
    )
    from rankwise.experiments.study.equalize import Equalizer

    with pytest.raises(ValueError, match="measured in steps of one process, and there are 2"):
        Equalizer(context).measure()


# -- Hugging Face's Trainer --------------------------------------------------------------------------------------------


def train_in_trainer(rank: int, folder: Path, method: str, is_language_model: bool, arguments: dict) -> None:
    adapter = attached(method, language_model() if is_language_model else None)
    data = language_rows() if is_language_model else None
    made = trainer(adapter, folder / "trainer", data=data, **arguments)
    if is_language_model:
        made.model_accepts_loss_kwargs = True
    made.train()
    torch.save(adapter.state_dict(), folder / f"adapter-{rank}-of-{os.environ.get('WORLD_SIZE', 1)}")


def language_rows() -> list[dict[str, torch.Tensor]]:
    """With more scored tokens in some rows than in others."""
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"].clone()} for row in rows(6)]
    for i, row in enumerate(data):
        row["labels"][: i % 4] = -100
    return data


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "is_language_model", "accumulation"),
    [("adalora", False, 1), ("adalora+dora", False, 2), ("dora", False, 1), ("adalora", True, 2)],
)
def test_two_processes_of_trainer_are_one(tmp_path, method, is_language_model, accumulation):
    """Losses, penalty, clipping, dropout and allocation; a checkpoint is written once, and taken up by one process."""
    given = {"max_steps": 20, "gradient_accumulation_steps": accumulation}
    one, two = ({**given, "per_device_train_batch_size": size // accumulation} for size in (4, 2))
    if accumulation == 2:
        one["per_device_train_batch_size"], two["per_device_train_batch_size"] = 4, 2
    two |= {"ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 12}
    train_in_trainer(0, tmp_path, method, is_language_model, one)
    world.run(2, train_in_trainer, tmp_path, method, is_language_model, two, is_joined=False)
    alone, first, second = (torch.load(tmp_path / f"adapter-{name}") for name in ("0-of-1", "0-of-2", "1-of-2"))
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if is_language_model else {"rtol": 1e-7, "atol": 1e-9}  # a loss in fp32
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, msg=name, **tolerance)
    adapter = attached(method, language_model() if is_language_model else None)
    assert (tmp_path / "trainer" / "checkpoint-12" / "adapter" / "adapter_model.safetensors").is_file()
    data = language_rows() if is_language_model else None
    made = trainer(adapter, tmp_path / "again", data=data, **one)
    made.model_accepts_loss_kwargs = is_language_model
    made.train(str(tmp_path / "trainer" / "checkpoint-12"))
    for name, value in adapter.state_dict().items():
        torch.testing.assert_close(value, alone[name], msg=name, **tolerance)


def test_what_processes_of_trainer_cannot_share_is_refused():
    def on(method: str, **settings) -> variants.AdapterCallback:
        return variants.AdapterCallback(variants.create(method, **settings).attach(tiny("bert")))

    arguments = {"world_size": 2, "n_gpu": 1, "fsdp": None, "deepspeed": None, "process_index": 0}

    def begun(callback: variants.AdapterCallback, **changes) -> None:
        args = SimpleNamespace(**arguments | changes)
        callback.on_train_begin(args, None, None, model=callback.adapter.model, optimizer=None)

    with pytest.raises(ValueError, match=r"increlora \(growing\) gives its tensors other sizes while it trains"):
        begun(on("increlora", target_rank=3, warmup_steps=2, final_steps=3))
    pruned = {"initial_rank": 5, "target_rank": 2, "warmup_steps": 3, "final_steps": 5}
    with pytest.raises(ValueError, match=r"adalora \(shrink = True\) gives"):
        begun(on("adalora", **pruned, shrink=True))
    with pytest.raises(ValueError, match="fsdp or deepspeed: they cut the adapter's tensors"):
        begun(on("lora", rank=2), fsdp=True)
    with pytest.raises(ValueError, match="2 GPUs in one process: an adapter is driven on one: start a process for each"):
        begun(on("lora", rank=2), n_gpu=2)
