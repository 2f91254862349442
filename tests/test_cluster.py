"""Packs on several machines, without Ray: what is decided, what travels, and what is written whoever dies.

The workers are the real ones, in this process: each trains its pack while it is asked for news.  tests/test_ray.py has Ray.
"""

import json
import shutil
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import rankwise.experiments.study.runner as study_runner
from rankwise.experiments.cli.options import with_values
from rankwise.experiments.cluster import driver, places, pool
from rankwise.experiments.cluster.bundle import Bundle, Damaged
from rankwise.experiments.cluster.driver import MOST_LOST, Driver
from rankwise.experiments.cluster.places import Need, Node, WorkerLost
from rankwise.experiments.cluster.worker import News, Outbox, Worker, _own_folder
from rankwise.experiments.study import Runner
from rankwise.experiments.study.order import Order, Step
from rankwise.experiments.training.trainer import Trainer

from tests import small_world
from tests.command import rankwise
from tests.test_study import contents

NODES = [Node("a" * 8, "one", 2, 0), Node("b" * 8, "two", 2, 0)]
NEED = Need("cpu", 1)
TRAINING = small_world.training(epochs=1, max_steps=6, train_examples=24, evaluation_examples=12, log_every=1).model_dump()


# -- which pack may train ----------------------------------------------------------------------------------------------


def test_one_pack_at_a_time_comes_in_the_order_of_the_steps_and_many_at_once_wait_for_what_they_need():
    def sweep():
        yield ["grid 0", "grid 1"]
        yield ["wider"]

    def steps():
        first = Step(sweep())
        other = Step(iter([["other"]]))
        return [first, other, Step(iter([[], ["final 0", "final 1"]]), [first]), Step(iter([["taker"]]), [first, other])]

    alone, order = Order(steps()), ["grid 0", "grid 1", "wider", "other", "final 0", "final 1", "taker"]
    for expected in order:
        assert not alone.is_finished and alone.next() == expected
        alone.finish(expected)
    assert alone.next() is None and alone.is_finished and alone.packs == order

    many = Order(steps())
    assert [many.next() for _ in range(4)] == ["grid 0", "grid 1", "other", None]
    many.finish("grid 1")
    assert many.next() is None
    many.finish("grid 0")
    assert [many.next(), many.next()] == ["wider", None]
    many.finish("wider")
    assert [many.next() for _ in range(3)] == ["final 0", "final 1", None]  # the taker needs "other" too
    many.finish("other")
    assert many.next() == "taker" and many.next() is None and not many.is_finished
    for pack in ("taker", "final 0", "final 1"):
        many.finish(pack)
    assert many.next() is None and many.is_finished and many.packs == order


# -- which machine gets a worker ---------------------------------------------------------------------------------------


def test_a_worker_goes_where_most_room_is_left_and_one_at_a_time_starts_on_a_node():
    small, large, gpus = Node("s", "s", 2, 0), Node("l", "l", 9, 0), Node("g", "g", 8, 2)
    need = Need("cpu", 2)
    assert [need.room(node) for node in (small, large, gpus)] == [1, 4, 4]
    nodes = [small, large]
    assert places.next_node(nodes, need, {}, [], []) == large
    assert places.next_node(nodes, need, {"l": 1}, ["l"], []) == small
    assert places.next_node(nodes, need, {"l": 3, "s": 1}, [], []) == large
    assert places.next_node(nodes, need, {"l": 4, "s": 1}, [], []) is None
    assert places.next_node(nodes, need, {}, [], ["l"]) == small
    cuda = Need("cuda", 2)
    assert [cuda.room(node) for node in (small, large, gpus)] == [0, 0, 2]
    assert places.next_node([*nodes, gpus], cuda, {"g": 1}, [], []) == gpus
    assert places.next_node([*nodes, gpus], cuda, {"g": 2}, [], []) is None


def test_every_worker_has_the_same_threads_its_share_of_the_smallest_node():
    cpus = lambda *numbers: [Node(str(n), "h", n, 0) for n in numbers]  # noqa: E731
    assert places.need(cpus(2), "auto", None) == Need("cpu", 1)
    assert places.need(cpus(1), "cpu", None) == Need("cpu", 1)
    assert places.need(cpus(64, 6, 0), "auto", None) == Need("cpu", 3)
    assert places.need(cpus(64), "auto", None) == Need("cpu", places.MOST_THREADS)
    assert places.need(cpus(64, 2), "cpu", 8) == Need("cpu", 8)
    assert places.need([*cpus(2), Node("g", "g", 16, 8)], "auto", None) == Need("cuda", 2)


@pytest.mark.parametrize(
    ("nodes", "device", "threads", "said"),
    [
        (NODES, "cuda", None, "--device cuda: the cluster has 2 nodes, none with a GPU: join one that has"),
        (NODES[:1], "cpu", 3, "the cluster has 1 node, and a worker needs 3 CPUs; the most that one has is 2: give fewer"),
        ([Node("h", "h", 0, 0)], "auto", None, "needs 1 CPUs; the most that one has is 0: join a machine with more"),
        ([Node("g", "g", 1, 1)], "cuda", 2, "a worker needs 2 CPUs beside its GPU; the most that one has is 1"),
        (NODES, "cuda:1", None, "--device cuda:1: with --ray each worker takes the GPU that Ray gives it: give cuda"),
    ],
)
def test_what_no_node_has_is_said_in_one_line(nodes, device, threads, said):
    with pytest.raises(ValueError) as fault:
        places.need(nodes, device, threads)
    assert said in str(fault.value) and "\n" not in str(fault.value)


# -- what travels ------------------------------------------------------------------------------------------------------


def test_a_bundle_that_was_changed_or_names_other_files_is_not_opened():
    whole = Bundle.of({"run/a": b"12", "run/b": b""})
    assert whole.checked(lambda name: name.startswith("run/")) == {"run/a": b"12", "run/b": b""}
    for files in (
        {"run/a": b"12"},
        {"run/a": b"13", "run/b": b""},
        {"run/a": b"1", "run/b": b"2"},
        {"run/c": b"12", "run/b": b""},
    ):
        with pytest.raises(Damaged, match="not those that were sent"):
            replace(whole, files=files).checked()
    with pytest.raises(Damaged, match=r"none of the pack's: '\.\./a'"):
        Bundle.of({"../a": b""}).checked(lambda name: ".." not in name)


# -- the command -------------------------------------------------------------------------------------------------------


def test_ray_s_address_may_be_left_out():
    assert with_values(["compare", "smoke", "--ray"]) == ["compare", "smoke", "--ray=local"]
    assert with_values(["compare", "--ray", "--seeds", "2"]) == ["compare", "--ray=local", "--seeds", "2"]
    assert with_values(["compare", "--ray", "host:1", "--json"]) == ["compare", "--ray", "host:1", "--json"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ray", "smoke.toml"], "--ray smoke.toml: this is no address: give HOST:PORT"),
        (["--ray", "host:99999"], "--ray host:99999: this is no address"),
        (["--ray", "ray://host:10001"], "Ray's client is not supported"),
        (["--ray", "127.0.0.1:9"], "--ray 127.0.0.1:9: nothing answers there (Connection refused)"),
    ],
)
def test_an_address_that_is_none_or_does_not_answer_is_refused(words, said, capsys, monkeypatch):
    monkeypatch.setattr(pool, "missing", lambda: None)
    assert rankwise("compare", "smoke", *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_without_ray_the_package_to_install_is_named(capsys, monkeypatch):
    monkeypatch.setattr(pool.importlib.util, "find_spec", lambda name: None)
    assert rankwise("compare", "smoke", "--ray") == 2
    assert capsys.readouterr().err == "rankwise: --ray needs ray, which is not installed: pip install 'rankwise[ray]'\n"


def test_beside_torchrun_it_is_refused(monkeypatch):
    from rankwise.experiments.cli.options import check_ray

    with pytest.raises(ValueError, match="--ray and torchrun do not go together"):
        check_ray("local", SimpleNamespace(size=2))


# -- a study -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The end of a worker in the middle of its pack."""


@dataclass(eq=False)
class Ticket:
    number: int
    worker: Worker
    name: str
    arguments: tuple


class Workers:
    """A cluster in this process.

    fates: node -> what becomes of its workers in turn: None, or "dies" (after its third checkpoint), "hangs up" (before its
        first), "lies" (what it sends is changed), "disk" (its disk is full).
    """

    def __init__(self, nodes, fates=None, joins=None):
        self.alive, self.fates, self.joins = list(nodes), fates or {}, joins
        self.made, self.calls = [], 0

    def nodes(self):
        if self.joins is not None and any(worker.out is not None for worker in self.made):
            self.alive.append(self.joins)
            self.joins = None
        return list(self.alive)

    def start(self, node, need, errand):
        assert need.room(node) > sum(one.node == node and one.lives for one in self.made)
        fates = self.fates.get(node.host, [])
        worker = InProcess(errand, node, fates.pop(0) if fates else None)
        self.made.append(worker)
        return worker

    def call(self, worker, name, *arguments):
        self.calls += 1
        return Ticket(self.calls, worker, name, arguments)

    def answered(self, tickets, seconds):
        if not tickets:  # a node rests
            time.sleep(0.01)
            return []
        return [min(tickets, key=lambda ticket: ticket.number)]  # who was asked first

    def answer(self, ticket):
        return getattr(ticket.worker, ticket.name)(*ticket.arguments)

    def stop(self, workers):
        for worker in workers:
            if worker.lives:  # one that is dead removes nothing
                worker.lives = False
                worker.close()


class InProcess(Worker):
    """A worker that trains while it is asked for news, up to its next checkpoint; dying is an exception."""

    def __init__(self, errand, node, fate):
        super().__init__(errand)
        self.node, self.fate, self.saved = node, fate, 0
        self.packs_done, self.lives = [], True

    def begin(self, job, files):
        self.outbox, self.saved = Outbox(), 0
        self.packs_done.append(job.plan.name)
        self.job = job, files
        return News()

    def news(self, seconds):
        if self.job is not None:
            (job, files), self.job = self.job, None
            self._train(job, files)
        if self.saved < 0 and not self.outbox._files:
            self.lives = False
            self._lock.close()  # as the end of its process would
            raise WorkerLost("its node has died")
        news = super().news(0)
        if self.fate == "lies" and news.files is not None:
            news.files = replace(news.files, files={name: content + b" " for name, content in news.files.files.items()})
        if self.saved < 0:
            news.ended, news.error = False, None
        return news

    def _send(self):
        if self.fate == "disk":
            raise OSError(28, "No space left on device")
        if self.fate == "hangs up":
            self.saved = -1
            raise Killed
        super()._send()
        self.saved += 1
        if self.fate == "dies" and self.saved == 3:
            self.saved = -1
            raise Killed

    def close(self):
        if self.out is not None:
            self._lock.close()
            super().close()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A study with a sweep, packs, and an entry that takes ranks; its folder as one machine leaves it."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("cluster")
    patch.setenv("RANKWISE_CACHE", str(folder / "cache"))
    patch.setattr(study_runner, "COMMITTED", folder / "committed")
    patch.setattr(driver, "REST", 0.05)
    small_world.register(patch.setitem)
    swept = {"method": "lora", "learning_rates": [1e-2, 3e-3], **small_world.settings("lora")}
    adalora = {"method": "adalora", "label": "adalora", "learning_rate": 1e-2, **small_world.settings("adalora")}
    adalora |= {"warmup_steps": 1, "final_steps": 2}
    taker = {"method": "lora", "label": "taken", "ranks_of": "adalora", "learning_rate": 1e-2, "dropout": 0.1}
    what = small_world.study(
        small_world.model(folder / "model"),
        [swept, adalora, taker],
        training=TRAINING,
        quick=True,
        anatomy=False,
        sweep={"seeds": [5], "max_steps": 3},
    )
    run(what, folder / "alone")
    yield what, contents(folder / "alone"), folder
    patch.undo()


def run(what, out, cluster=None, say=lambda line: None, **options):
    trains = {} if cluster is None else {"train": Driver(cluster, NEED, say)}
    done, total, was_begun = [], [], out.exists()
    runner = Runner(what, out, "cpu", say, lambda what, rows: done.append(rows), more=total.append, **trains, **options)
    runner.prepare()
    results = runner.run()
    if cluster is None or not cluster.fates:  # of a pack that goes on, evaluations before are not counted again
        is_whole = all(result["status"] == "completed" for result in results) and not options and not was_begun
        assert not is_whole or sum(done) == pytest.approx(runner.work() + sum(total))  # the bar ends where it should
    if cluster is not None:
        lock, folder = _own_folder()  # as the next worker on this machine, which removes what dead ones left
        shutil.rmtree(folder)
        lock.close()
        assert not [worker for worker in cluster.made if worker.out is not None and worker.out.exists()]
    return results


def test_a_study_on_two_machines_of_which_one_dies_ends_with_the_bytes_of_one_machine(world, tmp_path):
    """A worker dies after its third checkpoint, another before its first, one sends what was changed on its way."""
    what, alone, _ = world
    cluster, said = Workers(NODES, {"one": ["dies", "hangs up"], "two": ["lies"]}), []
    trained = []
    results = run(what, tmp_path / "runs", cluster, said.append)
    assert contents(tmp_path / "runs") == alone
    assert len(results) == len(list((tmp_path / "runs").glob("*/result.json"))) == len({r["fingerprint"] for r in results})
    lost = [line for line in said if "goes on from its last checkpoint" in line]
    assert len(lost) == 3 and any("not those that were sent" in line for line in lost)
    trained = [name for worker in cluster.made for name in worker.packs_done]
    assert len(trained) == len(set(trained)) + 3  # only what was lost was given twice
    assert len({worker.node.id for worker in cluster.made}) == 2


def test_a_pack_goes_on_from_its_last_checkpoint(world, tmp_path, monkeypatch):
    what, _, _ = world
    what = what.model_copy(update={"methods": what.methods[1:2]})
    steps, step = [], Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: (steps.append(self.step), step(self))[1])
    run(what, tmp_path / "runs", Workers(NODES[:1], {"one": ["dies"]}))
    assert len(steps) > 3 and steps == [*range(1, len(steps) + 1)]


def test_a_machine_that_joins_gets_packs(world, tmp_path):
    what, alone, _ = world
    cluster, said = Workers([replace(NODES[0], cpus=1)], joins=NODES[1]), []
    run(what, tmp_path / "runs", cluster, said.append)
    assert contents(tmp_path / "runs") == alone
    assert [line for line in said if "node two (bbbbbbbb) has joined" in line]
    assert sum(len(worker.packs_done) for worker in cluster.made if worker.node == NODES[1]) > 0


def test_it_is_ended_and_goes_on_here_and_the_other_way_round(world, tmp_path):
    what, alone, _ = world

    class Interrupted(Workers):
        def answer(self, ticket):
            answer = super().answer(ticket)
            if ticket.name == "news" and len(list(tmp_path.glob("runs/*/result.json"))) >= 2:
                raise KeyboardInterrupt
            return answer

    with pytest.raises(KeyboardInterrupt):
        run(what, tmp_path / "runs", Interrupted(NODES))
    between = contents(tmp_path / "runs")
    assert between != alone
    run(what, tmp_path / "runs")
    assert contents(tmp_path / "runs") == alone

    out, step = tmp_path / "back", Trainer.train_step

    def ends(self):
        if self.step == 4 and self.pack.method == "adalora":
            raise KeyboardInterrupt
        step(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", ends)
        run(what, out)
    assert list(out.glob("packs/*/checkpoint.safetensors"))
    run(what, out, Workers(NODES))
    assert contents(out) == alone


def test_a_node_whose_disk_is_full_or_whose_data_are_others_is_left_out(world, tmp_path):
    what, alone, _ = world
    cluster, said = Workers(NODES, {"one": ["disk"]}), []
    run(what, tmp_path / "runs", cluster, said.append)
    assert contents(tmp_path / "runs") == alone
    assert "note: node one (aaaaaaaa) is left out: No space left on device" in said
    assert len([worker for worker in cluster.made if worker.node == NODES[0]]) == 1

    class Foreign(Workers):
        def start(self, node, need, errand):
            inputs = {name: "other" if name.startswith("data") else value for name, value in errand.inputs.items()}
            return super().start(node, need, replace(errand, inputs=inputs))

    with pytest.raises(ValueError, match=r"^no node can train this study: node one") as fault:
        run(what, tmp_path / "foreign", Foreign(NODES[:1]))
    assert "its data of small/regression differs from the driver's: give all machines the same" in str(fault.value)
    assert "\n" not in str(fault.value) and not list((tmp_path / "foreign").glob("*/result.json"))


def test_a_pack_that_kills_every_worker_is_left_for_the_end(world, tmp_path):
    what, _, _ = world
    what = what.model_copy(update={"methods": what.methods[1:2], "tasks": what.tasks})
    cluster = Workers(NODES[:1], {"one": ["hangs up"] * MOST_LOST})
    with pytest.raises(ValueError, match=rf"adalora .*: {MOST_LOST} workers in a row were lost before it reached a checkpoint"):
        run(what, tmp_path / "runs", cluster)
    assert len(cluster.made) == MOST_LOST


def test_what_fails_on_one_machine_fails_alike(world, tmp_path, monkeypatch):
    """Losses that are no numbers, memory that is full, a pack that is split: the same results, and tried again when asked."""
    import torch

    what, _, _ = world
    what = what.model_copy(update={"methods": what.methods[1:2]})
    step = Trainer.train_step

    def fails(self):
        if self.pack.members > 1:
            raise torch.OutOfMemoryError("full")
        if self.pack.seeds == (0,):
            raise torch.OutOfMemoryError("full")
        with torch.no_grad():
            next(p for p in self.adapter.parameters()).fill_(torch.nan)
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", fails)
        run(what, tmp_path / "alone")
        run(what, tmp_path / "runs", Workers(NODES))
    alone, found = contents(tmp_path / "alone"), contents(tmp_path / "runs")
    errors = sorted(one["error"] for name, one in alone.items() if name.endswith("result.json"))
    assert errors == ["diverged", "out of memory"]
    for whole in (alone, found):
        for name, value in whole.items():
            if name.endswith("result.json"):
                value["traceback"] = value["traceback"] and value["traceback"].splitlines()[-1]
    assert found == alone
    results = run(what, tmp_path / "runs", Workers(NODES), retry_failed=True)
    assert {result["status"] for result in results} == {"completed"}


def test_what_is_equal_in_time_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pool, "check", lambda address: None)
    study = {"model": "m", "tasks": ["glue/stsb"], "quick": True, "budget": {"equal": "time"}}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in study.items() if key != "budget")
    text += '[budget]\nequal = "time"\n[[methods]]\nmethod = "lora"\nrank = 2\nalpha = 2\nlearning_rate = 1e-3\n'
    (tmp_path / "s.toml").write_text(text)
    assert rankwise("compare", tmp_path / "s.toml", "--ray") == 2
    assert 'budget.equal = "time" is measured where one pack trains after the other' in capsys.readouterr().err
