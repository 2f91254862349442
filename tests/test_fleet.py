"""A study on many machines: tiny plans whose end is worked out by hand, and what holds of every plan."""

import json
import random
from pathlib import Path

import pytest
from rankwise.experiments import config
from rankwise.experiments.bench import fleet as bench
from rankwise.experiments.plan.fleet import Fleet, Job, Writer, lower_bounds, saturation, simulate
from rankwise.experiments.plan.step import StepCost
from rankwise.experiments.study import groups
from rankwise.reports import fleet as report

from tests.command import rankwise

NO_WRITER = Writer(0.0, float("inf"))
REST = {"activations": 1, "logits": 1, "peak": 1, "products": 1}
REPOSITORY = Path(__file__).resolve().parents[1]
NEVER = 1e9  # seconds between checkpoints


def test_the_first_free_machine_takes_the_first_pack_whose_needs_are_met():
    # Machine 0: [0, 3), then 5 long; machine 1: [0, 2), idle until 3, when what needs both begins; 4 long.
    jobs = [Job(3.0), Job(2.0), Job(5.0, needs=(0,)), Job(4.0, needs=(0, 1))]
    found = simulate(jobs, Fleet(2, NEVER), NO_WRITER)
    assert (found.makespan, found.busy) == (8.0, 14.0)
    assert found.idle_share == pytest.approx(2 / 16)  # [2, 3) and [7, 8) of machine 1
    assert lower_bounds(jobs, 2, NO_WRITER) == {"work": 7.0, "chain": 8.0, "writer": 0.0}
    assert simulate(jobs, Fleet(1, NEVER), NO_WRITER).makespan == 14.0


def test_what_needs_a_pack_waits_for_its_results_and_the_machine_does_not():
    # Results take 2 * 0.5 + 3 = 4 seconds.  The first pack ends at 10, is written at 14; the second trains 10..20 and waits
    # for nobody; the third begins at 20, when the only machine is free, ends at 21, and is written at 25.
    writer = Writer(0.5, 100.0)
    jobs = [Job(10.0, result_files=2, result_bytes=300), Job(10.0), Job(1.0, result_files=2, result_bytes=300, needs=(0,))]
    found = simulate(jobs, Fleet(1, NEVER), writer)
    assert found.makespan == 25.0 and found.busy == 21.0
    assert found.result_bytes == 600 and found.writer == 4.0 + 0.5 + 4.0
    two = simulate(jobs, Fleet(2, NEVER), writer)
    # Both end at 10, the first is written at 14, the second at 14.5; the third trains 14..15 and is written at 19.
    assert two.makespan == lower_bounds(jobs, 2, writer)["chain"] == 19.0 and two.longest_line == 1


def test_a_checkpoint_is_skipped_while_the_last_one_waits_for_the_writer():
    # Due at 2, 4, 6, 8 of 10 seconds; each takes 3: written at 5, due at 4 skipped; 6 written at 9, 8 skipped.
    found = simulate([Job(10.0, checkpoint_bytes=30, result_files=0)], Fleet(1, 2.0), Writer(0.0, 10.0))
    assert (found.checkpoints, found.skipped, found.checkpoint_bytes) == (2, 2, 60)
    assert found.makespan == 10.0 and found.writer_share == pytest.approx(0.6)
    fast = simulate([Job(10.0, checkpoint_bytes=30, result_files=0)], Fleet(1, 2.0), Writer(0.0, 1e9))
    assert (fast.checkpoints, fast.skipped) == (4, 0)  # none at the end


def test_results_first_leave_checkpoints_of_ended_packs_out():
    # Both hand a checkpoint over at 4 and end at 5.  As they come: 4..7, 7..10, results ..11, ..12.
    jobs = [Job(5.0, checkpoint_bytes=30), Job(5.0, checkpoint_bytes=30)]
    writer = Writer(1.0, 15.0)
    as_they_come = simulate(jobs, Fleet(2, 4.0), writer)
    assert as_they_come.makespan == 12.0 and as_they_come.checkpoints == 2
    first = simulate(jobs, Fleet(2, 4.0, results_first=True), writer)  # 4..7, results ..8, ..9
    assert first.makespan == 9.0 and first.checkpoints == 1


class Moments:
    """Failures at these moments after the start, or after the last repair."""

    def __init__(self, *seconds):
        self.seconds = list(seconds)

    def expovariate(self, rate):
        return self.seconds.pop(0) if self.seconds else NEVER


def test_a_failure_loses_what_was_trained_since_the_last_checkpoint(monkeypatch):
    # Fails at 7, saved at 6; back at 17 and trains the last 4 seconds.
    monkeypatch.setattr("rankwise.experiments.plan.fleet.random.Random", lambda seed: Moments(7.0))
    found = simulate([Job(10.0)], Fleet(1, 3.0, failure_seconds=1.0, repair_seconds=10.0), NO_WRITER)
    assert (found.makespan, found.lost, found.down, found.failures) == (21.0, 1.0, 10.0, 1)
    assert found.busy == 11.0 and found.idle_share == pytest.approx(0.0)


def test_another_machine_takes_up_a_pack_before_those_that_have_not_begun(monkeypatch):
    # Machine 0 ends the first at 2, before what it opens (the third) is known, and begins the fourth; it fails at 3.  Machine 1
    # ends the second at 4, trains the fourth again 4..12, then the third 12..13, whose results take 5 seconds.
    monkeypatch.setattr("rankwise.experiments.plan.fleet.random.Random", lambda seed: Moments(3.0))
    jobs = [Job(2.0), Job(4.0), Job(1.0, result_bytes=50, needs=(0,)), Job(8.0)]
    found = simulate(jobs, Fleet(2, NEVER, failure_seconds=1.0, repair_seconds=1000.0), Writer(0.0, 10.0))
    assert (found.makespan, found.lost, found.busy) == (18.0, 1.0, 16.0)
    assert found.down == 15.0  # until the end, not until it is repaired


@pytest.mark.parametrize("seed", range(12))
def test_no_schedule_is_under_the_bounds_and_a_list_schedule_is_within_its_own(seed):
    draw = random.Random(seed)
    jobs = [
        Job(
            draw.uniform(1, 50),
            draw.randrange(100),
            draw.randrange(4),
            draw.randrange(100),
            tuple(draw.sample(range(i), min(i, draw.randrange(3)))),
        )
        for i in range(30)
    ]
    machines, writer = draw.randrange(1, 9), Writer(0.01, 1000.0)
    plain = simulate(jobs, Fleet(machines, 7.0), writer)
    bounds = lower_bounds(jobs, machines, writer)
    assert plain.makespan >= max(bounds.values()) - 1e-9
    assert plain.makespan <= bounds["work"] + bounds["chain"] + plain.writer  # Graham 1966, and a writer that all wait for
    assert plain.busy == pytest.approx(sum(job.seconds for job in jobs)) and plain.lost == 0
    failing = simulate(jobs, Fleet(machines, 7.0, failure_seconds=60.0, repair_seconds=5.0, seed=seed), writer)
    assert failing.failures > 0 and failing.busy - failing.lost == pytest.approx(plain.busy)
    assert failing.result_bytes == plain.result_bytes
    assert failing == simulate(jobs, Fleet(machines, 7.0, failure_seconds=60.0, repair_seconds=5.0, seed=seed), writer)


def test_the_writer_is_full_at_the_number_of_machines_that_its_own_seconds_say():
    # 100 seconds, 3 checkpoints of 2 seconds and a result of 4: 10 seconds of the writer each.
    jobs = [Job(100.0, checkpoint_bytes=10, result_bytes=30)] * 200
    writer = Writer(1.0, 10.0)
    assert saturation(jobs, 30.0, writer) == 10.0
    half, twice = (simulate(jobs, Fleet(machines, 30.0), writer) for machines in (5, 20))
    assert half.writer_share == pytest.approx(0.5, abs=0.02) and half.skipped == 0
    assert twice.writer_share > 0.95 and twice.skipped > 0


# -- a study's packs ---------------------------------------------------------------------------------------------------------

THOUSAND = config.read(config.find(Path("thousand")))
TIMES = REPOSITORY / "reports" / "bench" / "bench.json"


def test_the_scaled_study_has_ten_thousand_runs_and_its_finals_need_their_sweeps():
    study = bench.scaled(THOUSAND, 10)
    plans = groups(study, 32)
    assert sum(len(one.members) for one in plans) == 10_000
    found = bench.needs(study, plans)
    for one, needed in zip(plans, found, strict=True):
        assert (not needed) == (one.phase == "sweep")
        of = {(plans[i].phase, plans[i].entry.label, plans[i].task) for i in needed}
        assert of <= {("sweep", one.entry.label, one.task)}
        assert sum(len(plans[i].members) for i in needed) == (800 if one.phase == "final" else 0)


def test_what_takes_ranks_needs_the_final_runs_that_it_takes_them_of_and_sharers_each_other_s_sweeps():
    raw = {"name": "s", "model": "m", "quick": True, "tasks": ["glue/stsb"], "seeds": 2}
    rates = {"learning_rates": [1e-3, 1e-2], "rank": 2}
    raw["methods"] = [
        {"method": "lora", "label": "a", **rates},
        {"method": "dora", "label": "b", "shared_with": "a", **rates},
        {"method": "lora", "label": "c", "ranks_of": "a", "learning_rate": 1e-3},
    ]
    study = config.parse(raw | {"sweep": {"seeds": [5]}}, "s")
    plans = groups(study, 8)
    wanted = {
        (one.phase, one.entry.label): {(plans[i].phase, plans[i].entry.label) for i in needed}
        for one, needed in zip(plans, bench.needs(study, plans), strict=True)
    }
    sweeps = {("sweep", "a"), ("sweep", "b")}
    assert wanted == {
        ("sweep", "a"): set(),
        ("sweep", "b"): set(),
        ("final", "a"): sweeps,
        ("final", "b"): sweeps,
        ("final", "c"): {("final", "a")},
    }


def small(monkeypatch):
    """Of a checkpoint's and an adapter's bytes a few; the tests of the plan have the real ones."""
    monkeypatch.setattr(bench, "SIZES", (1 << 10, 1 << 20))
    monkeypatch.setattr(bench, "REPETITIONS", 2)
    monkeypatch.setattr(bench, "MOST_COPIES", 1)
    cost = StepCost(1, active=100_000, head=1, weights=1, adapter=1 << 20, gradients=1, optimizer=1 << 20, **REST)
    monkeypatch.setattr(bench, "_cost", lambda *_: cost)


def test_a_pack_takes_the_measured_seconds_of_its_steps(monkeypatch):
    small(monkeypatch)
    times = {"throughput": [{"method": "lora", "members": k, "step_seconds": s} for k, s in ((1, 1.0), (4, 2.5), (16, 10.0))]}
    seconds = bench.step_seconds(times)
    assert seconds("lora", 4) == 2.5 and seconds("lora", 10) == 6.25 and seconds("bitfit", 1) == 1.0
    with pytest.raises(ValueError, match="no step of lora in a pack of 32 was measured"):
        seconds("lora", 32)
    (lora,) = [entry for entry in THOUSAND.methods if entry.label == "lora"]
    study = THOUSAND.model_copy(update={"methods": [lora], "tasks": ["glue/stsb"]})
    sweep, *_, final = bench.jobs(study, bench.Machine("here", 2.0, 4), seconds)
    # 5,749 rows of each member, 1,500 that are evaluated at a third, at 2.5 seconds for 32 rows of each; twice as fast.
    assert sweep.seconds == pytest.approx((5749 + 500) * 2.5 / 32 / 2)
    # Two epochs, evaluated after each; and the score split's 1,379 rows.
    assert final.seconds == pytest.approx((2 * 5749 + 2 * 500 + 1379 / 3) * 2.5 / 32 / 2)
    assert final.result_files == 4 * 8 and final.result_bytes == 4 * (57_000 + 4 * 100_001)
    assert sweep.checkpoint_bytes == final.checkpoint_bytes == 1 << 21


def test_the_bytes_of_a_checkpoint_are_those_of_its_file(tmp_path, monkeypatch):
    from rankwise.experiments import kinds
    from rankwise.experiments.plan import step

    from tests import small_world

    small_world.register(monkeypatch.setitem)
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    model = small_world.model(tmp_path / "model")
    for method in ("lora", "adalora"):
        pack = small_world.pack(model, method, seeds=(0, 1))
        trainer = small_world.trainer(pack, tmp_path / method)
        trainer.log.start()
        trainer.step = 1
        trainer.train_step()
        trainer.save()
        settings = pack.settings.model_dump(exclude_unset=True)
        shape = step.Shape(rows=1, length=8, members=2, targets=pack.targets)
        cost = step.cost(model, kinds.get(pack.task.kind), pack.task.num_labels, method, settings, shape)
        header = int.from_bytes(trainer.checkpoint.read_bytes()[:8], "little")
        assert cost.adapter + cost.optimizer == pytest.approx(trainer.checkpoint.stat().st_size - header, rel=0.05)


def test_the_writer_is_measured_in_whole_files(tmp_path, monkeypatch):
    small(monkeypatch)
    found = bench.measured_writer(tmp_path / "out")
    assert found["bytes_per_second"] > 0 and found["file_seconds"] >= 0 and len(found["seconds"]) == len(bench.SIZES)
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_writes_the_tables_and_the_numbers(tmp_path, monkeypatch, capsys):
    small(monkeypatch)
    assert rankwise("bench", "--fleet", TIMES, "--out", tmp_path, "--json", tmp_path / "other.json", "--threads", "1") == 0
    out = capsys.readouterr().out
    assert "10,000 runs" in out and "Where one writer is full" in out and "assumed: 25 times as fast" in out
    found = json.loads((tmp_path / "fleet.json").read_text())
    assert found == json.loads((tmp_path / "other.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"fleet.json", "fleet.md", "other.json"}
    rows = [row for row in found["rows"] if row["failure_hours"] is None]
    assert all(row["makespan"] >= max(row["work_bound"], row["chain_bound"], row["writer_bound"]) for row in rows)
    assert report.table(found).markdown() in (tmp_path / "fleet.md").read_text()


@pytest.mark.parametrize(
    "content, why",
    [("{", "not JSON"), ('{"machine": {}}', "no times of packs"), (None, "no such file"), ("[1]", "no times of packs")],
)
def test_a_file_without_times_is_refused(content, why, tmp_path, capsys):
    path = tmp_path / "times.json"
    if content is not None:
        path.write_text(content)
    assert rankwise("bench", "--fleet", path, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line and "--full --json" in line


def test_times_are_written_to_three_digits():
    assert [report.duration(x) for x in (1.234, 119, 121, 7201, 180_000)] == ["1.23 s", "119 s", "2.02 min", "2 h", "2.08 d"]


def test_the_committed_table_is_that_of_its_numbers():
    found = json.loads((REPOSITORY / "reports" / "bench" / "fleet" / "fleet.json").read_text())
    text = (REPOSITORY / "reports" / "bench" / "fleet" / "fleet.md").read_text()
    assert report.table(found).markdown() in text and report.growth(found).markdown() in text
