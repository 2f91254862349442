"""What goes wrong around a study, and what is lost by it: nothing.

A kill in every phase, a full disk, a folder that cannot be written to, two processes, a clock that jumps, a damaged checkpoint,
a cache that somebody removes: the same command ends with the same bytes.  tests/test_study.py kills a study at every file.

RANKWISE_KILLS says how many kills the slow test deals out (50 if not given).
"""

import contextlib
import datetime
import errno
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rankwise.experiments.study.runner as study_runner
import torch
from matplotlib.figure import Figure
from rankwise.experiments import export, knockout, labels, records
from rankwise.experiments.study import Runner
from rankwise.experiments.training import state
from rankwise.experiments.training.trainer import Trainer
from rankwise.reports import page, results
from safetensors import SafetensorError

from tests import small_world
from tests.command import rankwise
from tests.synthetic_runs import write_study
from tests.test_study import contents
from tests.tiers import quick

TRAINING = small_world.training(epochs=1, max_steps=4, train_examples=24, evaluation_examples=12, log_every=1).model_dump()


@pytest.fixture(scope="module")
def cache(tmp_path_factory, request) -> str:
    folder = str(tmp_path_factory.mktemp("cache"))
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.setenv("RANKWISE_CACHE", folder)
    patch.setattr(study_runner, "COMMITTED", Path(folder) / "committed")
    small_world.register(patch.setitem)
    return folder


@pytest.fixture(scope="module")
def model(cache, tmp_path_factory) -> str:
    return small_world.model(tmp_path_factory.mktemp("model"))


def study(model: str, methods: Any = ("lora",), **changes: Any) -> Any:
    return small_world.study(model, methods, **{"training": TRAINING, **changes})


def ran(what: Any, out: Path) -> list[dict[str, Any]]:
    runner = Runner(what, out, device="cpu")
    runner.prepare()
    return runner.run()


# -- killed in every phase ---------------------------------------------------------------------------------------------------

SWEPT = {"method": "lora", "rank": 2, "learning_rates": [1e-2, 3e-3]}
ADALORA = {"method": "adalora", "initial_rank": 4, "target_rank": 2, "warmup_steps": 1, "final_steps": 1, "learning_rate": 1e-2}
PHASES = ("sweep", "final", "placement", "knock-out", "export", "report", "archive")


def everything(what: Any, out: Path, cache: str, phases: Any = None) -> None:
    """A study with a sweep, packs, ranks taken of another entry and knock-outs; then an export, a report and an archive.

    phases: a connection that is told of each phase when it begins.
    """
    os.environ["RANKWISE_CACHE"] = cache
    torch.set_num_threads(1)
    small_world.register()
    told = set()

    def tell(phase: str) -> None:
        if phases is not None and phase not in told:
            told.add(phase)
            phases.send(phase)

    measure = knockout.knock_out

    def knocked_out(*args: Any, **options: Any) -> Any:
        tell("knock-out")
        return measure(*args, **options)

    knockout.knock_out = knocked_out
    Figure.savefig = lambda figure, out, **_: out.write(b"a figure")  # most of a report's time, and no claim here
    runner = Runner(
        what,
        out / "runs",
        device="cpu",
        progress=lambda name, rows: tell(
            "placement" if name.startswith("placed") else "sweep" if "(sweep)" in name else "final"
        ),
    )
    runner.prepare()
    runner.run()
    tell("export")
    finals = sorted(path.parent for path in (out / "runs").glob("*/adapter"))
    export.export(export.find(finals[0], "lora", None), "lora", out / "exported")
    tell("report")
    page.write(out / "runs", out / "report")
    tell("archive")
    results.archive_finished(out / "runs", out / "kept")


def started(*args: Any) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_faults"])
    process = context.Process(target=everything, args=args)
    process.start()
    return process


def killed(phase: str, delay: float, *args: Any) -> bool:
    """Whether a process of these arguments was killed so long after that phase began."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = started(*args, there)
    there.close()
    with contextlib.suppress(EOFError):
        while here.recv() != phase:
            pass
        process.join(delay)
        process.kill()
    process.join()
    return process.exitcode != 0


def ended(*args: Any) -> None:
    process = started(*args)
    process.join()
    assert process.exitcode == 0


def of_runs(out: Path) -> dict[str, Any]:
    """The runs and the export, whose record names the folder that it was made of."""
    found = contents(out / "runs") | {f"exported/{name}": value for name, value in contents(out / "exported").items()}
    found["exported/export.json"] = found["exported/export.json"].replace(str(out).encode(), b"OUT")
    return found


@pytest.mark.slow
def test_killed_in_every_phase_everything_ends_with_the_same_bytes(model, cache, tmp_path, figures_undrawn):
    placed = {"method": "lora", "label": "placed", "ranks_of": "adalora", "learning_rate": 1e-2}
    sweep = {"seeds": [0], "max_steps": 3, "trials": 3}
    what = study(model, [SWEPT, ADALORA, placed], quick=True, sweep=sweep, knock_out=True)
    ended(what, tmp_path / "whole", cache)
    whole = of_runs(tmp_path / "whole")
    assert sum(name.endswith("knockout.json") for name in whole) > 2 and any(name.startswith("exported/") for name in whole)
    moments, dealt, wanted = random.Random(0), dict.fromkeys(PHASES, 0), int(os.environ.get("RANKWISE_KILLS", "50"))
    for attempt in itertools.count():
        out = tmp_path / f"{attempt}"
        for phase in PHASES:
            dealt[phase] += killed(phase, moments.choice([0.0, 0.02, 0.1, 0.3]) * moments.random(), what, out, cache)
        ended(what, out, cache)
        assert of_runs(out) == whole, attempt
        assert not [path for path in out.rglob("*") if ".tmp" in path.name or path.name.endswith((".partial", ".new", ".old"))]
        page.write(out / "runs", out / "again")
        assert contents(out / "report") == contents(out / "again")
        kept = {name: [run.contents() for run in results.load(out / name).runs] for name in ("runs", "kept")}
        assert kept["runs"] == kept["kept"]
        shutil.rmtree(out)
        if sum(dealt.values()) >= wanted:
            break
    print(f"kills by phase: {dealt}")
    assert wanted < len(PHASES) or min(dealt.values()) > 0


REFUSED = re.compile("Permission denied|Read-only file system")

# -- the disk ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk():
    """A folder on a disk of its own, and what changes its size; skipped where none may be mounted."""
    folder = Path(tempfile.mkdtemp(prefix="rankwise-disk-"))

    def resize(kib: int, *more: str) -> None:
        subprocess.run(["mount", *more, "-o", f"remount,size={kib}k", str(folder)], check=True, capture_output=True)

    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        folder.rmdir()
        pytest.skip("no disk may be mounted here")
    yield folder, resize
    subprocess.run(["umount", "-l", str(folder)], check=True)
    folder.rmdir()


ON_A_SMALL_DISK = {
    "one run": (4, ["head"], {"seeds": 1}),
    "sweep, packs and knock-outs": (16, [SWEPT, ADALORA], {"quick": True, "sweep": {"seeds": [0]}, "knock_out": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_A_SMALL_DISK)
def test_a_disk_that_is_full_at_every_size_loses_nothing(name, model, cache, tmp_path, small_disk):
    """A disk that grows by a few KiB each time a study stopped on it: at last the study is whole, and so it is read."""
    folder, resize = small_disk
    step, methods, changes = ON_A_SMALL_DISK[name]
    what = study(model, methods, **changes)
    ran(what, tmp_path / "whole")
    whole, stops = contents(tmp_path / "whole"), 0
    for kib in itertools.count(8, step):
        resize(kib)
        try:
            ran(what, folder / "runs")
            break
        except OSError as error:
            assert error.errno == errno.ENOSPC or "No space left" in str(error), error
            stops += 1
        for path in (folder / "runs").rglob("*.json"):
            json.loads(path.read_text())
        assert not [path for path in folder.rglob("*") if ".tmp" in path.name]
    assert stops > 3 and contents(folder / "runs") == whole


COMMANDS = ("report", "archive", "ranks", "export")


def words_of(command: str, runs: Path, out: Path) -> list[Any]:
    """The command over a folder of runs; `export` takes the first one with an adapter."""
    return {
        "report": ["report", runs, "--out", out / "report"],
        "archive": ["report", runs, "--with-runs", "--out", out / "kept"],
        "ranks": ["ranks", runs, "--csv", out / "ranks.csv"],
        "export": [
            "export",
            *sorted(path.parent for path in runs.glob("*/adapter"))[:1],
            "--to",
            "lora",
            "--out",
            out / "exported",
        ],
    }[command]


def read_by(command: str, model: str, folder: Path) -> Path:
    """Runs as the command needs them: an export has tensors, the others only read what runs have written."""
    if command == "export":
        ran(study(model, ["lora"], seeds=1), folder)
        return folder
    return write_study(folder, methods=("full", "lora"), seeds=(0,), sweep=False)


def left_half(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".tmp" in path.name or path.name.endswith((".partial", ".new", ".old"))]


@pytest.mark.parametrize("command", quick(COMMANDS, ["ranks"]))
def test_a_full_disk_under_a_command_is_one_line_and_leaves_nothing_half(
    command, small_disk, model, tmp_path, capsys, figures_undrawn
):
    folder, resize = small_disk
    runs = read_by(command, model, tmp_path / "runs")
    resize(8)
    words = words_of(command, runs, folder / "made")
    (folder / "filler").write_bytes(b"x" * (4096 if command in ("ranks", "export") else 1024))
    capsys.readouterr()
    assert rankwise(*words) == 2
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if "the disk is full" in line]) == 1 and "Traceback" not in "".join(said)
    assert not left_half(folder)
    resize(64 << 10)
    assert rankwise(*words) == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "ranks"])  # whose file is a page
def test_a_disk_that_is_full_anywhere_in_a_command_leaves_nothing_half(
    command, small_disk, model, tmp_path, capsys, figures_undrawn
):
    """The disk grows in some 24 steps until the command goes through: what it leaves then is what it leaves elsewhere."""
    folder, resize = small_disk
    runs = read_by(command, model, tmp_path / "runs")
    assert rankwise(*words_of(command, runs, tmp_path / "made")) == 0
    whole, stops = contents(tmp_path / "made"), 0
    pages = sum(-(-path.stat().st_size // 4096) for path in (tmp_path / "made").rglob("*") if path.is_file())
    for kib in itertools.count(8, 4 * max(1, pages // 24)):
        resize(kib)
        capsys.readouterr()
        if rankwise(*words_of(command, runs, folder / "made")) == 0:
            break
        assert "the disk is full" in capsys.readouterr().err
        assert not left_half(folder)
        stops += 1
    assert stops > 0 and contents(folder / "made") == whole


@pytest.mark.parametrize("what", ["predictions", "labels"])
def test_a_full_disk_in_safetensors_words_is_a_full_disk(what, tmp_path, monkeypatch):
    import safetensors.numpy

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError) as refused:
        if what == "predictions":
            records.write_predictions(tmp_path, "test", np.zeros(3))
        else:
            labels.write(tmp_path, {("0", "test"): labels.Labels("regression", np.zeros(3), None)})
    assert refused.value.errno == errno.ENOSPC and str(tmp_path) in refused.value.filename
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def read_only(request):
    """A folder that this process may read and not write to; root may write everywhere, so there its disk is read-only."""
    if os.geteuid() == 0:
        folder, resize = request.getfixturevalue("small_disk")
        resize(4096)
        write_study(folder / "runs", methods=("full", "lora"), seeds=(0,), sweep=False)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True, capture_output=True)
        yield folder
        return
    folder = Path(tempfile.mkdtemp(prefix="rankwise-read-only-"))
    write_study(folder / "runs", methods=("full", "lora"), seeds=(0,), sweep=False)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("command", quick([*COMMANDS, "compare"], ["ranks", "report"]))
def test_a_folder_that_cannot_be_written_to_is_one_line(
    command, read_only, capsys, figures_undrawn, monkeypatch, model, tmp_path
):
    runs = read_only / "runs"
    before = sorted(read_only.rglob("*"))
    if command == "compare":
        with pytest.raises(OSError) as refused:
            ran(study(model, ["head"]), runs)
        assert REFUSED.search(str(refused.value))
    else:
        read = read_by(command, model, tmp_path / "runs") if command == "export" else runs
        capsys.readouterr()
        assert rankwise(*words_of(command, read, runs)) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and REFUSED.search(said[0]) and str(runs) in said[0]
    assert sorted(read_only.rglob("*")) == before


# -- a checkpoint ------------------------------------------------------------------------------------------------------------


def seeds_of(method: str) -> tuple[int, ...]:
    return (0,) if method == "full" else (0, 1)  # full fine-tuning cannot be packed


def cut_off(model: str, folder: Path, method: str) -> Path:
    """The checkpoint of a pack that was cut off after 7 of its 12 steps."""

    def stop(rows: float) -> None:
        if trainer.step == 7 and trainer.checkpoint.exists():
            raise KeyboardInterrupt

    pack = small_world.pack(model, method, seeds=seeds_of(method))
    trainer = small_world.trainer(pack, folder, checkpoint_seconds=0.0, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    return trainer.checkpoint


def identity(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["state"])["pack"]


def damages(content: bytes, every: int):
    """The file cut, and with one bit flipped, at every so many bytes, and at each byte of a few in its header."""
    draw = random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    for at in sorted({*range(0, len(content), every), *draw.sample(range(header), 40), len(content) - 1}):
        yield at, content[:at]
        yield at, content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def check_damages(model: str, tmp_path: Path, every: int) -> None:
    path = cut_off(model, tmp_path, "adalora")
    content, pack = path.read_bytes(), identity(path)
    tensors, facts = state.read(path, pack, torch.device("cpu"))
    tried = 0
    for at, damaged in damages(content, every):
        path.write_bytes(damaged)
        found = state.read(path, pack, torch.device("cpu"))
        if found is not None:  # a bit that says nothing: white space, or the case of a letter that JSON escapes
            assert found[1] == facts and all(torch.equal(found[0][name], value) for name, value in tensors.items()), at
        tried += found is None
    assert tried > 100


def test_no_damage_to_a_checkpoint_is_taken_for_a_checkpoint(model, tmp_path):
    check_damages(model, tmp_path, every=1024)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "adalora", "increlora"])
def test_a_run_whose_checkpoint_is_damaged_at_any_4_kib_ends_with_the_same_bytes(model, tmp_path, method):
    pack = small_world.pack(model, method, seeds=seeds_of(method))
    small_world.trained(pack, tmp_path / "whole")
    whole = of_members(tmp_path / "whole")
    path = cut_off(model, tmp_path / "cut", method)
    spare = tmp_path / "spare"
    shutil.copytree(tmp_path / "cut", spare)
    content, draw = path.read_bytes(), random.Random(1)
    every = [damaged for at, damaged in damages(content, 4096)]
    for damaged in [content, *draw.sample(every, min(len(every), 24))]:
        shutil.rmtree(tmp_path / "cut")
        shutil.copytree(spare, tmp_path / "cut")
        path.write_bytes(damaged)
        small_world.trained(pack, tmp_path / "cut")
        assert of_members(tmp_path / "cut") == whole


def of_members(folder: Path) -> dict[str, Any]:
    """What must not depend on the damage; the checkpoint holds seconds too."""
    return {name: value for name, value in contents(folder).items() if name.startswith("member-")}


# -- memory ------------------------------------------------------------------------------------------------------------------


def test_a_pack_for_which_the_processor_s_memory_is_too_small_is_split(model, tmp_path, monkeypatch):
    """What torch's own allocator says is no class of its own: an allocation that no machine grants."""
    run, tried = Trainer.run, []

    def scarce(self):
        tried.append(self.pack.members)
        if self.pack.members > 1:
            torch.empty(1 << 58)
        return run(self)

    monkeypatch.setattr(Trainer, "run", scarce)
    results = ran(study(model, ["head"], seeds=2, anatomy=False), tmp_path)
    assert tried == [2, 1, 1]
    assert [(r["status"], r["pack_size"]) for r in results] == [("completed", 1)] * 2
    assert all("does not fit in memory" in r["packing_note"] for r in results)


# -- the clock, the cache, the neighbours ------------------------------------------------------------------------------------


def test_a_clock_that_jumps_back_changes_nothing(model, tmp_path, monkeypatch):
    """By a day with every look at it, while the files of the runs are a day younger than now."""
    what = study(model, ["head"], seeds=1, anatomy=False)
    ran(what, tmp_path / "plain")
    looks = itertools.count(1)
    now, wall = time.time(), datetime.datetime

    class Backwards(wall):
        @classmethod
        def now(cls, tz=None):
            return wall.fromtimestamp(now - 86_400 * next(looks), tz)

    monkeypatch.setattr(time, "time", lambda: now - 86_400 * next(looks))
    monkeypatch.setattr(datetime, "datetime", Backwards)
    step = Trainer.train_step

    def stopped(self):
        if self.step == 3:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(Trainer, "train_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        ran(what, tmp_path / "jumping")
    monkeypatch.setattr(Trainer, "train_step", step)
    for path in (tmp_path / "jumping").rglob("*"):
        os.utime(path, (now + 86_400, now + 86_400))
    ran(what, tmp_path / "jumping")
    assert next(looks) > 2 and contents(tmp_path / "jumping") == contents(tmp_path / "plain")


def test_a_cache_that_another_process_removes_costs_time_alone(model, tmp_path, monkeypatch):
    what = study(model, ["head"], seeds=1, anatomy=False)
    ran(what, tmp_path / "plain")
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    step, removed = Trainer.train_step, []

    def meanwhile(self):
        if (tmp_path / "cache").exists():
            shutil.rmtree(tmp_path / "cache")
            removed.append(self.step)
        step(self)

    monkeypatch.setattr(Trainer, "train_step", meanwhile)
    ran(what, tmp_path / "robbed")
    ran(what, tmp_path / "robbed")
    assert removed and contents(tmp_path / "robbed") == contents(tmp_path / "plain")


def race(what: Any, out: Path, cache: str, said: Any) -> None:
    try:
        small_world.run(what, out, cache)
        said.put("ended")
    except ValueError as error:
        said.put(str(error))


def reported(runs: Path, out: Path) -> None:
    Figure.savefig = lambda figure, out, **_: out.write(b"a figure")
    page.write(runs, out)


@pytest.mark.slow
def test_two_reports_into_one_folder_leave_what_one_leaves(tmp_path, figures_undrawn):
    runs = write_study(tmp_path / "runs", methods=("full", "lora"), seeds=(0, 1), sweep=False)
    page.write(runs, tmp_path / "alone")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_faults"])
    both = [context.Process(target=reported, args=(runs, tmp_path / "both")) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")


@pytest.mark.slow
def test_of_two_processes_on_one_folder_one_runs_and_one_is_refused(model, cache, tmp_path):
    what = study(model, ["lora"])
    ran(what, tmp_path / "alone")
    context = multiprocessing.get_context("forkserver")
    said = context.Queue()
    both = [context.Process(target=race, args=(what, tmp_path / "runs", cache, said)) for _ in range(2)]
    for process in both:
        process.start()
    words = sorted(said.get(timeout=300) for _ in both)
    for process in both:
        process.join()
    # The faster one may be at its end before the other looks.
    assert words[1] == "ended" and (words[0] == "ended" or "another compare is running there" in words[0])
    assert contents(tmp_path / "runs") == contents(tmp_path / "alone")
