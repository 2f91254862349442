"""What rank is worth, by random allocations: planted effects are found, none errs more often than it says."""

import tomllib
from dataclasses import replace

import numpy as np
import pytest
from rankwise.experiments import config, records
from rankwise.experiments.cli.app import app
from rankwise.experiments.study import Runner, plan
from rankwise.reports import randomized, results
from rankwise.reports.analysis import randomized as page
from rankwise.reports.randomized import Runs
from typer.testing import CliRunner

from tests.synthetic_runs import BERT_SITES, write_anatomy, write_json, write_run
from tests.test_study import cache, model  # noqa: F401  (fixtures)

SMALL = tuple(f"encoder.layer.{layer}.{kind}" for layer in range(3) for kind in ("query", "value", "output.dense"))


def drawn(random: np.random.Generator, runs: int, sites: tuple[str, ...], budget: int, prices: np.ndarray) -> np.ndarray:
    """(runs, sites) ranks: units at sites drawn with equal chances until nothing fits into the budget."""
    ranks = np.zeros((runs, len(sites)), int)
    for row in ranks:
        left = budget
        while (fits := np.flatnonzero(prices <= left)).size:
            row[at := random.choice(fits)] += 1
            left -= prices[at]
    return ranks


def simulated(random, runs: int, worth: np.ndarray, noise: float = 1.0, sites=SMALL) -> Runs:
    """worth: points for 1 % of the budget at each site."""
    prices = np.array([4 if "dense" in site else 2 for site in sites])
    ranks = drawn(random, runs, sites, 60, prices)
    spent = (ranks * prices).astype(float)
    scores = 80 + (spent / 0.6) @ worth + noise * random.normal(size=runs)
    return Runs(sites, np.arange(runs), scores, spent, prices.astype(float))


WORTH = np.array([0.4, 0.1, 0, 0, 0.1, 0, 0, -0.1, -0.2])


def test_planted_effects_are_found_whole_and_by_layer_and_kind():
    runs = simulated(np.random.default_rng(0), 400, WORTH, noise=0.0)
    found = randomized.effects(runs)
    share = runs.spent.mean(0) / runs.spent.sum(1).mean()
    exact = (WORTH - share @ WORTH) * runs.budget / 60  # against the mean allocation; of the budget as it was spent
    assert found.values == pytest.approx(exact, abs=1e-9)
    noisy = simulated(np.random.default_rng(0), 400, WORTH)
    low, high = randomized.effects(noisy).intervals().T
    assert (low <= exact).all() and (exact <= high).all()
    first = randomized.effects(noisy, "layer")
    assert first.names == ("layer 0", "layer 1", "layer 2") and first.values.argmax() == 0
    assert randomized.effects(noisy, "kind").names == ("query", "value", "dense")
    share, p = randomized.permutation_p(noisy)
    assert share > 0.5 and p <= 0.001


def test_the_effects_are_those_of_plain_least_squares_with_the_constraint():
    runs = simulated(np.random.default_rng(4), 60, WORTH)
    share = runs.spent.mean(0) / runs.spent.mean(0).sum()
    heavy = np.concatenate([[0.0], 1e6 * share])[None]  # the constraint as one more row, counted a million times
    design = np.concatenate([np.concatenate([np.ones((60, 1)), runs.spent], 1), heavy])
    plain = np.linalg.lstsq(design, np.append(runs.scores, 0.0), rcond=None)[0][1:]
    assert randomized.effects(runs).values == pytest.approx(plain * 0.01 * runs.budget, rel=1e-4, abs=1e-6)


def test_intervals_are_clustered_by_seed():
    runs = simulated(np.random.default_rng(1), 80, WORTH)
    twice = Runs(runs.sites, *(np.concatenate([a, a]) for a in (runs.seeds, runs.scores, runs.spent)), runs.prices)
    assert randomized.effects(twice).errors == pytest.approx(randomized.effects(runs).errors)


def errors(draws: int, runs: int) -> tuple[float, float, float, float]:
    """How often nothing is found to be something: a site's interval, the permutation test, the predicted gain's interval, and
    what the page says of the smaller p of scores and ranks."""
    random = np.random.default_rng(7)
    wrong = np.zeros(4)
    for _ in range(draws):
        one = simulated(random, runs, np.zeros(len(SMALL)))
        one.scores[:] = np.where(random.random(runs) < 0.05, one.scores - 8, one.scores)  # a run in twenty collapses
        low, high = randomized.effects(one).intervals().T
        first, second = randomized.halves(one)
        best = randomized.best_allocation(first, randomized.effects(first.ranked))
        _, least, most = randomized.predicted_gain(second, randomized.effects(second), best)
        p, p_ranked = randomized.permutation_p(one)[1], randomized.permutation_p(one.ranked)[1]
        matters = page.found(min(p, p_ranked)) == "the allocation matters"
        wrong += [np.mean((low > 0) | (high < 0)), p <= 0.05, least > 0 or most < 0, matters]
    return tuple(wrong / draws)


@pytest.fixture
def few_permutations(monkeypatch):
    monkeypatch.setattr(randomized, "PERMUTATIONS", 199)
    monkeypatch.setattr(randomized, "RESAMPLES", 50)


def test_no_effect_gives_about_nominal_errors(few_permutations):
    site, whole, gain, said = errors(60, 60)
    assert site < 0.08 and whole <= 0.15 and gain <= 0.15 and said <= 0.15


@pytest.mark.slow
def test_no_effect_gives_nominal_errors(few_permutations):
    site, whole, gain, said = errors(500, 100)  # the jackknife errs on the safe side: 3.1, 4.9 and 1.8 % in 1,000 draws
    assert 0.02 <= site <= 0.055 and 0.03 <= whole <= 0.075 and gain <= 0.055 and 0.02 <= said <= 0.075


def with_collapses(runs: Runs, collapsed: np.ndarray) -> Runs:
    return runs.scored(np.where(collapsed, 5.0, runs.scores))


def test_runs_that_collapse_do_not_hide_an_effect_from_the_ranks_or_from_the_others():
    random = np.random.default_rng(5)
    runs = simulated(random, 200, WORTH)
    collapsed = random.random(200) < 0.1
    seen = with_collapses(runs, collapsed)
    assert (seen.collapsed == collapsed).all() and 5 < seen.floor < runs.scores.min()
    assert not runs.collapsed.any()
    one, ranked, kept = (randomized.permutation_p(r) for r in (seen, seen.ranked, seen.take(~seen.collapsed)))
    assert one[1] > 0.05 and ranked[1] <= 0.001 and kept[1] <= 0.001 and kept[0] > 0.4 > one[0]
    by_ranks = randomized.best_allocation(seen, randomized.effects(seen.ranked))
    assert by_ranks[SMALL[0]] == max(by_ranks.values()) and by_ranks[SMALL[8]] == 0
    chance = randomized.permutation_p(seen.scored(collapsed))
    assert chance[1] > 0.05
    caused = seen.scored(runs.spent[:, 0] > np.quantile(runs.spent[:, 0], 0.8))
    assert randomized.permutation_p(caused)[1] <= 0.001


def test_ranks_run_from_0_to_100_and_ties_share_theirs():
    runs = simulated(np.random.default_rng(0), 5, WORTH)
    assert runs.scored([7, 9, 7, -80, 8]).ranked.scores.tolist() == [37.5, 100, 37.5, 0, 75]
    assert not runs.scored([80.0, 80, 80, 80, 5]).take(np.arange(4)).collapsed.any()


def spreads(draws: int, of_allocation: float) -> float:
    """How often the interval of the allocation's standard deviation holds the true one."""
    random, held = np.random.default_rng(2), 0
    for _ in range(draws):
        scores = random.normal(0, np.hypot(1, of_allocation), 200), random.normal(0, 1, 20)
        one = randomized.spread(*scores)
        held += one.low <= of_allocation <= one.high
    return held / draws


def test_the_spread_of_allocations_alone_is_found():
    assert 0.88 <= spreads(60, 1.0) <= 1
    one = randomized.spread(np.tile([1.0, 3.0], 100), np.tile([1.9, 2.1], 10))
    assert one.allocation == pytest.approx(np.sqrt(200 / 199 - 0.01 * 20 / 19), rel=1e-9)
    assert one.gain(100)[0] == pytest.approx(2.5076 * one.allocation, rel=1e-4)  # a table of normal order statistics


@pytest.mark.slow
@pytest.mark.parametrize("of_allocation", [0.0, 0.5, 1.0])
def test_its_interval_covers(of_allocation, monkeypatch):
    monkeypatch.setattr(randomized, "DRAWS", 20_000)
    assert 0.93 <= spreads(1_000, of_allocation) <= 0.99


def test_the_predicted_allocation_fills_the_best_sites_within_budget_and_range():
    runs = simulated(np.random.default_rng(0), 400, WORTH, noise=0.0)
    worth = randomized.effects(runs)
    ranks = randomized.best_allocation(runs, worth)
    most = max(ranks.values())
    assert most <= np.quantile(runs.spent / runs.prices, 0.95)
    assert sum(ranks[site] * price for site, price in zip(runs.sites, runs.prices, strict=True)) <= runs.budget
    assert ranks[SMALL[0]] == most and ranks[SMALL[8]] == 0
    gain, low, high = randomized.predicted_gain(runs, worth, ranks)
    assert gain > 0 and low == pytest.approx(gain) and high == pytest.approx(gain)


def test_a_measure_that_knows_agrees_and_one_that_does_not_does_not():
    runs = simulated(np.random.default_rng(3), 300, WORTH)
    knows = dict(zip(SMALL, WORTH + 1, strict=True))
    one, constant = randomized.agreements(runs, {"knows": knows, "says nothing": dict.fromkeys(SMALL, 1.0)})
    assert one.correlation > 0.6 and one.low > 0 and one.num_sites == len(SMALL)
    assert constant.correlation is None
    assert randomized.reliability(runs) > 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of a study as a Runner leaves them: 150 random allocations on 36 sites, in which rank at the values is worth much,
    four of the uniform allocation, and one AdaLoRA with importances and a knock-out."""
    folder, random = tmp_path_factory.mktemp("randomized"), np.random.default_rng(0)
    prices = np.array([1920 if s.split(".", 4)[4] in ("intermediate.dense", "output.dense") else 768 for s in BERT_SITES])
    shared = {"study": "randomized", "steps": 20, "rate": 1e-3}
    for seed, row in enumerate(drawn(random, 150, BERT_SITES, 82_944, prices)):
        ranks = dict(zip(BERT_SITES, row.tolist(), strict=True))
        gained = 0.5 * sum(rank for site, rank in ranks.items() if "value" in site)
        run = write_run(folder, method="random-rank", seed=seed, ranks=ranks, active_parameters=int(row @ prices),
                  score=70 + gained + float(random.normal(0, 0.5)), scale=dict.fromkeys(BERT_SITES, 2.0), **shared)  # fmt: skip
        described = records.read_json(run / "config.json")
        write_json(run / "config.json", described | {"training": {"epochs": 1, "batch_size": 32}, "precision": "fp32"})
    for seed in range(4):
        write_run(folder, method="lora", seed=seed, ranks=dict.fromkeys(BERT_SITES, 2), active_parameters=82_944,
                  score=76 + float(random.normal(0, 0.5)), **shared)  # fmt: skip
    write_anatomy(write_run(folder, method="adalora", seed=0, **shared))
    described = {"schema": 1, "study": "randomized", "kind": "randomized", "quick": False, "title": "Drawn", "complete": True}
    described |= {"methods": ["lora", "random-rank", "adalora"], "reference": "lora", "margin": 0.3}
    write_json(folder / "study.json", described | {"shared_with": {"random-rank": "lora"}})
    return folder


@pytest.mark.slow
def test_the_page_says_what_was_planted_and_its_study_is_sound(folder, tmp_path):
    one = page.analysed(results.load(folder).parts()[0])
    worth = one.all.by["kind"]
    assert worth.names[worth.values.argmax()] == "value" and worth.intervals()[worth.values.argmax()][0] > 0
    assert one.all.explained["site"][1] <= 0.001 and one.spread.low > 0.5 and one.gain[1] > 0
    assert [a.measure for a in one.agreements] == [
        "adalora: ranks kept (1 run)", "adalora: importance (1 run)", "adalora: loss that its removal costs (1 run)",
    ]  # fmt: skip
    path = page.write(folder, tmp_path)
    text = path.read_text()
    assert "the allocation matters" in text and "How much could any placement gain?" in text
    assert (tmp_path / "figures" / "worth-map.svg").is_file() and (tmp_path / "tables" / "worth-by-site.csv").is_file()
    fresh = config.read(tmp_path / "best.toml")
    assert [entry.label for entry in fresh.methods] == ["uniform", "predicted"] and fresh.seeds == [*range(150, 162)]
    assert fresh.sweep.seeds == [162, 163] and fresh.methods[0].learning_rates == [5e-4, 1e-3, 2e-3]
    predicted = fresh.methods[1].settings
    assert sum(predicted["rank_pattern"].values()) + predicted["rank"] * (36 - len(predicted["rank_pattern"])) == sum(
        one.best.values()
    )


def changed(part, method: str, seeds, **changes):
    """The study, with other results of these runs."""
    runs = [
        replace(run, result=run.result.model_copy(update=changes))
        if run.config.setting == method and run.config.seed in seeds else run
        for run in part.runs
    ]  # fmt: skip
    return results.replace(part, runs=tuple(runs))


def test_failed_runs_score_as_a_constant_predictor_and_collapses_are_told_apart(folder, few_permutations):
    part = results.load(folder).parts()[0]
    plain = page.analysed(part)
    assert plain.kept is plain.collapses is plain.spread_kept is None and "collapse" not in " ".join(page.sentences(plain))
    failed = {"status": "failed", "error": "collapsed", "score": None, "metric": "pearson_spearman"}
    one = page.analysed(changed(changed(part, "random-rank", (3, 40, 77), **failed), "lora", (1,), **failed))
    assert one.runs.scores[[3, 40, 77]].tolist() == [0, 0, 0] and one.runs.collapsed.sum() == 3 and one.unplaced == 0
    assert len(one.uniform_scores) == 4 and one.uniform_collapsed.tolist() == [False, True, False, False]
    text = " ".join(page.sentences(one))
    assert "3 of the 150 collapsed" in text and "1 of 4 of the uniform allocation" in text
    assert "Of the scores of the 147 others: " in text and "Among runs that did not collapse, scores have" in text
    assert one.kept.explained["site"][1] <= 0.005 and one.ranked.explained["site"][1] <= 0.005
    assert one.spread.drawn > 2 * one.spread_kept.drawn and one.spread_kept.numbers == (147, 3)
    assert "not complete" not in text
    fewer = results.replace(part, complete=False, runs=tuple(run for run in part.runs if run.config.seed < 80))
    few = page.analysed(changed(fewer, "random-rank", range(12), **failed))  # too few are left for effects, not for a spread
    assert few.kept is None and few.spread_kept.numbers == (68, 4) and few.gain is None
    begins, *rest = page.sentences(few)
    assert begins.startswith("The study is not complete") and "Among runs that did not collapse" in " ".join(rest)
    names = [row[0] for row in page.spread_table(one).rows]
    assert "random, not collapsed" in names and "best of 100 random allocations, not collapsed" in names
    assert [row[1] for row in page.views_table(one).rows] == [150, 150, 147, 150]
    effects = page.effects_table(one, "kind")
    assert effects.columns[-3:] == ("effect, not collapsed", "its 95 % interval", "its p (Holm)")
    assert all(len(row) == len(effects.columns) for row in effects.rows)
    chose = randomized.halves(one.runs)[0]
    by_ranks, by_scores = (randomized.best_allocation(r, randomized.effects(r)) for r in (chose.ranked, chose))
    assert one.best == by_ranks != by_scores
    fresh = config.parse(tomllib.loads(page.fresh_test(one, one.best)), "fresh")
    assert fresh.sweep.seeds == [162, 163, 164, 165] and fresh.methods[0].learning_rates == [2.5e-4, 5e-4, 1e-3]


def test_a_run_that_failed_before_it_had_an_allocation_is_left_out_and_said(folder, few_permutations):
    part = results.load(folder).parts()[0]
    one = page.analysed(changed(part, "random-rank", (3,), status="failed", error="out of memory", score=None, ranks={}))
    assert one.unplaced == 1 and len(one.runs.scores) == 149 and 3 not in one.runs.seeds
    assert "Left out: 1 run that failed before it had an allocation." in page.sentences(one)


def test_too_few_runs_are_refused(folder, tmp_path):
    part = results.load(folder).parts()[0]
    few = [run for run in part.runs if run.config.seed < 20]
    with pytest.raises(ValueError, match="random-rank has 20 finished runs: a regression on 36 sites takes at least 72"):
        page.analysed(results.replace(part, runs=tuple(few)))


# -- the study --------------------------------------------------------------------------------------------------------------


def small(**changes) -> dict:
    raw = {
        "model": "-", "tasks": ["small/regression"], "kind": "randomized", "seeds": 24, "reference": "lora",
        "training": {"epochs": 1, "max_steps": 2, "batch_size": 4, "max_length": 32, "train_examples": 8,
                     "evaluation_examples": 8, "precision": "fp32"},
        "budget": {"equal": "parameters", "parameters": 1500},
        "methods": [
            {"method": "lora", "seeds": 3, "learning_rate": 1e-2},
            {"method": "random-rank", "cost": "parameters", "most_rank": 6, "shared_with": "lora", "learning_rate": 1e-2},
        ],
    }  # fmt: skip
    return raw | changes


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"kind": "comparison"}, "lora: seeds has no effect without kind"),
        ({"budget": {}, "methods": [one | {"rank": 2, "alpha": 4} for one in small()["methods"]]}, "set budget.equal = "),
        ({"methods": small()["methods"][:1]}, "0 entries of random-rank: give one"),
        ({"methods": [{"method": "random-rank", "cost": "parameters", "learning_rate": 1e-2}]}, "no entry of lora shares"),
        ({"methods": [small()["methods"][0], small()["methods"][1] | {"cost": "rank"}]}, 'set cost = "parameters"'),
        ({"methods": [small()["methods"][0] | {"seeds": 30}, small()["methods"][1]]}, "has 24: give at most as many"),
        ({"methods": [small()["methods"][0], small()["methods"][1] | {"seeds": 5}]}, "for each of the study's: take it out"),
        ({"kind": "random"}, "kind"),
    ],
)  # fmt: skip
def test_what_is_no_randomized_study_is_refused(change, fault):
    with pytest.raises(ValueError, match="(?s)" + fault.replace("(", r"\(")):
        config.parse(small(**change), "drawn")


def test_every_seed_draws_an_allocation_and_the_uniform_one_has_fewer_seeds():
    study = config.parse(small(), "drawn")
    packs = plan.groups(study, 8, lambda name: True)
    members = {label: sum(len(one.members) for one in packs if one.entry.label == label) for label in ("lora", "random-rank")}
    assert members == {"lora": 3, "random-rank": 24}


def test_it_runs_on_a_tiny_model_and_is_analysed(model, tmp_path):  # noqa: F811
    study = config.parse(small(model=model), "drawn")
    runner = Runner(study, tmp_path / "runs")
    runner.prepare()
    runner.run()
    loaded = results.load(tmp_path / "runs")
    assert loaded.kind == "randomized"
    arm, uniform = randomized.arms_of(loaded.parts()[0])
    assert len(arm.scores) == 24 and len(uniform.scores) == 3
    runs = randomized.runs_of(loaded.parts()[0], arm)
    assert len({tuple(row) for row in runs.spent}) > 12 and runs.spent.sum(1).max() <= 1500
    done = CliRunner().invoke(app, ["analysis", "randomized", str(tmp_path / "runs")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "runs" / "randomized" / "randomized.md").is_file()
