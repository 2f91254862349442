"""A search over rank, scale, rate and targets: what it asks, what it may see, and how its result is tested."""

import json
import math
from types import SimpleNamespace

import pytest
from rankwise.experiments import cli, config, search_space
from rankwise.experiments.study import search
from rankwise.experiments.study.search import Choice, Search

from tests import small_world

pytest.importorskip("optuna")

TUNE = {"entry": "lora", "runs": 30, "ranks": [8, 2, 4], "scales": [0.5, 4.0], "learning_rates": [1e-4, 1e-2], "seeds": [100]}
LORA = {"method": "lora", "rank": 8, "alpha": 16, "learning_rate": 1e-3}
STUDY = {"model": "m", "tasks": ["glue/stsb"], "seeds": 3, "reference": "lora", "methods": [LORA]}


def study(tune=(), **others):
    return config.parse({**STUDY, "tune": {**TUNE, **dict(tune)}, **others}, "mine")


@pytest.mark.parametrize(
    ("tune", "others", "said"),
    [
        ({"entry": "loar"}, {}, '"loar" is no label of a method; did you mean "lora"?'),
        ({"seeds": [2, 3]}, {}, "tune.seeds = [2, 3]: [2] are final seeds too"),
        ({"runs": 8, "seeds": [100, 101, 102], "finalists": 3}, {}, "3 finalists with 2 more seeds leave 2 choices to search"),
        ({}, {"reference": None}, "reference is missing"),
        ({}, {"tasks": ["glue/stsb", "sarcasm"]}, "a search is on one task"),
        ({}, {"methods": [LORA, {**LORA, "label": "tuned", "rank": 2}]}, 'a method is called "tuned"'),
        ({}, {"training": {"evaluations_per_epoch": 0}}, "a search chooses by the selection score"),
        (
            {"entry": "head"},
            {"methods": [LORA, {"method": "head", "learning_rate": 1}]},
            "it has no ranks of its own to search",
        ),
    ],
)
def test_what_cannot_be_searched_or_tested_is_refused(tune, others, said):
    raw = {key: value for key, value in {**STUDY, **others}.items() if value is not None}
    faults = search_space.faults(config.parse({**raw, "tune": {**TUNE, **tune}}, "mine"))
    assert len(faults) == 1 and said in faults[0], faults


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        ({"learning_rates": [1e-2, 1e-4]}, "tune.learning_rates"),
        ({"ranks": [2, 2]}, "has one twice"),
        ({"runs": 0}, "tune.runs"),
        ({"rank": [2]}, "tune.rank"),
    ],
)
def test_a_space_that_is_none_is_refused(tune, said):
    with pytest.raises(ValueError, match=said):
        study(tune)


def command(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    return ended.value.code, capsys.readouterr().err


def test_without_optuna_the_command_says_what_to_install(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.toml").write_text(TOML)
    find = search_space.importlib.util.find_spec
    monkeypatch.setattr(search_space.importlib.util, "find_spec", lambda name, *a: None if name == "optuna" else find(name, *a))
    code, error = command(capsys, "tune", tmp_path / "mine.toml", "--out", tmp_path / "runs")
    assert code == 2 and error.splitlines() == [
        "rankwise: a search needs optuna, which is not installed: pip install 'rankwise[tune]'"
    ]
    assert not (tmp_path / "runs").exists()


def test_compare_does_not_pass_over_a_search(tmp_path, capsys):
    (tmp_path / "mine.toml").write_text(TOML)
    code, error = command(capsys, "compare", tmp_path / "mine.toml")
    assert code == 2 and "[tune] has no effect on a comparison: rankwise tune" in error and len(error.splitlines()) == 1


TOML = """
model = "m"
task = "glue/stsb"
seeds = 3
reference = "lora"
[tune]
entry = "lora"
runs = 30
ranks = [2, 4]
scales = 2.0
learning_rates = [1e-4, 1e-2]
seeds = [100]
[[methods]]
method = "lora"
rank = 8
learning_rate = 1e-3
"""


class Scored(Search):
    """A search whose runs score what a function says; `asked` are its packs."""

    def __init__(self, tune, score, size=4):
        self.tune, self.size, self.score, self.asked = tune, size, score, []
        entries = search_space.entries(tune, study().methods[0])
        self.runner = SimpleNamespace(study=SimpleNamespace(methods=entries), out=None)

    def _pack(self, entry, choices, seed, rung):
        self.asked.append((entry.label, seed, list(choices)))
        return [self.score(choice, seed) for choice in choices]


def peak(choice, seed):
    """Best at rank 4, rate 1e-3, the second targets."""
    off = (choice.rank != 4) + abs(math.log10(choice.learning_rate) + 3) + (choice.targets != 1)
    return 80.0 - 10 * off + (seed % 7)


SPACE = search_space.Tune(**{**TUNE, "runs": 40, "seeds": [100, 101], "targets": ["all-linear", ["query"]]})


def found_of(one, tmp_path):
    one.runner.out = tmp_path
    return one.run()


def test_it_finds_the_peak_within_its_budget_and_in_packs(tmp_path):
    one = Scored(SPACE, peak)
    found = found_of(one, tmp_path)
    assert (found.rank, found.targets) == (4, 1) and 4e-4 < found.learning_rate < 2.5e-3
    assert sum(len(choices) for _, _, choices in one.asked) == SPACE.runs  # also the finalists' second seed
    assert max(len(choices) for _, _, choices in one.asked) == 4
    assert all({f"search {c.targets}" for c in choices} == {label} for label, _, choices in one.asked)
    record = json.loads((tmp_path / "search.json").read_text())
    assert len(record["tried"]) == 37 and record["found"]["rank"] == 4 and record["found"]["targets"] == ["query"]


def test_asked_again_it_takes_the_same_way(tmp_path):
    """So that a search that was cut off finds its finished runs: every choice follows from the seed and the scores."""
    first, second = Scored(SPACE, peak), Scored(SPACE, peak)
    assert found_of(first, tmp_path / "a") == found_of(second, tmp_path / "b") and first.asked == second.asked
    other = Scored(SPACE, lambda choice, seed: -peak(choice, seed))
    found_of(other, tmp_path / "c")
    assert other.asked != first.asked and other.asked[0] == first.asked[0]


def test_the_best_mean_over_all_its_seeds_is_kept_and_no_lucky_one(tmp_path):
    def lucky(choice, seed):
        return 100.0 if seed == 100 and choice.rank == 2 else peak(choice, seed)

    found = found_of(Scored(SPACE, lambda c, s: lucky(c, s) if s == 100 else (0.0 if c.rank == 2 else 99.0)), tmp_path)
    record = json.loads((tmp_path / "search.json").read_text())
    finalists = [one for one in record["tried"] if len(one["selection_scores"]) == 2]
    assert len(finalists) == 3
    best = max(finalists, key=lambda one: sum(one["selection_scores"].values()))
    assert (found.rank, found.learning_rate) == (best["rank"], best["learning_rate"])


def test_failed_runs_are_told_and_do_not_win(tmp_path):
    found = found_of(Scored(SPACE, lambda c, s: None if c.learning_rate > 1e-3 else peak(c, s)), tmp_path / "some")
    assert found.learning_rate <= 1e-3
    with pytest.raises(ValueError, match="all 37 runs of the search failed"):
        found_of(Scored(SPACE, lambda c, s: None), tmp_path / "all")


def test_what_was_found_is_tested_on_the_studys_own_seeds_against_its_reference():
    what = study({"targets": ["all-linear", ["query"]]}, methods=[{**LORA, "dropout": 0.1}])
    final = search.tested(what, Choice(4, 1.5, 2e-3, 1), 30)
    reference, tuned = final.methods
    assert (reference.label, tuned.label, final.seeds, final.tune) == ("lora", "tuned", [0, 1, 2], None)
    assert tuned.settings == {"rank": 4, "alpha": 6.0, "dropout": 0.1} and tuned.targets == ["query"]
    assert tuned.learning_rates == [2e-3] and reference.settings["rank"] == 8
    assert tuned.searched == search_space.Searched(entry="lora", runs=30, at_edge=False)
    assert search.tested(what, Choice(4, 1.5, 1.1e-4, 1), 30).methods[1].searched.at_edge


@pytest.mark.slow
def test_a_search_runs_and_its_scores_are_not_reported(tmp_path, monkeypatch):
    from rankwise.experiments.study import Runner
    from rankwise.experiments.training.trainer import Trainer
    from rankwise.reports import tables
    from rankwise.reports.results import load

    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    small_world.register(monkeypatch.setitem)
    training = small_world.training(epochs=1, max_steps=4, train_examples=24, evaluation_examples=12).model_dump()
    what = small_world.study(small_world.model(tmp_path / "model"), ["lora"], training=training, reference="lora", quick=True)
    label = what.methods[0].label
    tune = search_space.Tune(
        entry=label, runs=8, ranks=[1, 2], scales=[1.0, 4.0], learning_rates=[1e-3, 3e-2], seeds=[100, 101], finalists=2,
        max_steps=2, targets=["all-linear", ["query", "value"]],
    )  # fmt: skip
    what = what.model_copy(update={"tune": tune})
    assert not search_space.faults(what)

    def searched():
        runner = Runner(search.of_search(what), tmp_path / "runs" / search.FOLDER, device="cpu")
        runner.prepare()
        return Search(runner, tune).run()

    found = searched()
    results = [json.loads(path.read_text()) for path in (tmp_path / "runs" / search.FOLDER).glob("*/result.json")]
    assert len(results) == 8 and {one["seed"] for one in results} == {100, 101}
    assert all(
        one["score"] is None and set(one["metrics"]) == {one["selection_split"]} for one in results
    )  # never the test part
    (tmp_path / "runs" / search.FOLDER / results[0]["fingerprint"] / "result.json").unlink()
    steps = []
    plain = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: steps.append(len(self.pack.seeds)) or plain(self))
    assert searched() == found and steps == [1, 1]  # one run of two steps was missing
    runner = Runner(search.tested(what, found, tune.runs), tmp_path / "runs", device="cpu")
    runner.prepare()
    final = runner.run()
    assert {one["seed"] for one in final} == set(what.seeds) and {one["setting"] for one in final} == {label, "tuned"}
    part = load(tmp_path / "runs")
    assert part.searched["tuned"].runs == 8
    caption = " ".join(tables.comparison(part).caption)
    assert "found by a search of 8 runs on the validation split with other seeds; no score of the search is shown" in caption
