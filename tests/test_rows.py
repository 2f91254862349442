"""Intervals over seeds and test rows: against the definition, and how often they hold the truth."""

import itertools

import numpy as np
import pytest
from rankwise.experiments import labels, records
from rankwise.experiments.labels import Labels
from rankwise.experiments.tasks.metrics import resample_weights, resampled_correlations
from rankwise.reports import figures, page, results, rows, tables

from tests.synthetic_runs import write_json, write_run, write_study

HASH = "a" * 64


def test_the_interval_is_obuchowskis_and_rockettes_with_hillis_degrees_of_freedom():
    random = np.random.default_rng(3)
    scores = random.normal(80, 1, 5)
    resampled = scores[:, None] + random.normal(0, 2, 40) + random.normal(0, 0.5, (5, 40))
    pairs = list(itertools.combinations(range(5), 2))
    shared = np.mean([np.mean((resampled[i] - resampled[i].mean()) * (resampled[j] - resampled[j].mean())) * 40 / 39
                      for i, j in pairs])  # fmt: skip
    square = np.sum((scores - scores.mean()) ** 2) / 4
    variance = square / 5 + shared
    freedom = (square + 5 * shared) ** 2 / (square**2 / 4)
    from scipy.stats import t

    half = t.ppf(0.975, freedom) * np.sqrt(variance)
    assert rows.crossed_interval(scores, resampled) == pytest.approx((scores.mean() - half, scores.mean() + half))


def test_seeds_that_share_nothing_of_the_rows_have_students_interval():
    scores, resampled = np.array([1.0, 2.0, 4.0]), np.array([[1.0, -1, 0, 0], [-1.0, 1, 0, 0], [0.0, 0, 1, -1]])
    seen = rows.summary(scores)  # the pairs of seeds have a covariance below zero, which counts as none
    assert rows.crossed_interval(scores, resampled) == pytest.approx((seen.low, seen.high))
    low, high = rows.crossed_interval(np.array([2.0, 2.0]), np.array([[1.0, -1, 0], [1.0, -1, 0]]))
    assert high - low == pytest.approx(2 * 1.959964 * 1.0, rel=1e-5)  # no spread of seeds: the rows alone


def coverage(draws: int, num_seeds: int, num_rows: int, spread: tuple[float, float, float]) -> float:
    """How often the interval holds the true mean: a score is the mean over rows of row + seed + their interaction."""
    random = np.random.default_rng(11)
    seed_sd, row_sd, both_sd = spread
    weights, held = resample_weights(num_rows) / num_rows, 0
    for _ in range(draws):
        values = random.normal(0, row_sd, num_rows) + random.normal(0, both_sd, (num_seeds, num_rows))
        values += random.normal(0, seed_sd, (num_seeds, 1))
        low, high = rows.crossed_interval(values.mean(1), values @ weights.T)
        held += low <= 0 <= high
    return held / draws


def test_it_holds_the_truth_where_the_interval_over_seeds_does_not():
    assert 0.9 < coverage(300, 4, 60, (0.1, 3.0, 1.0)) < 0.99


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [3, 8])
@pytest.mark.parametrize("spread", [(1.0, 0.0, 1.0), (0.3, 5.0, 3.0), (0.05, 5.0, 0.5), (0.2, 2.0, 5.0)])
def test_it_covers_95_percent_whatever_the_shares_of_seeds_and_rows(num_seeds, spread):
    assert 0.93 <= coverage(3_000, num_seeds, 200, spread) <= 0.985  # above: where the rows' share is estimated as none


@pytest.mark.slow
def test_it_covers_the_correlation_of_a_population_of_rows_and_seeds():
    random = np.random.default_rng(5)

    def predictions(true: np.ndarray, hard: np.ndarray, seeds: int) -> np.ndarray:
        skill = random.normal(0.8, 0.05, (seeds, 1))  # differs between seeds; `hard` rows are missed by all of them
        return true + skill * hard + 0.5 * random.normal(size=(seeds, len(true)))

    many = random.normal(size=(2, 200_000))
    every = [np.corrcoef(row, many[0])[0, 1] for row in predictions(many[0], many[1], 40)]
    from scipy.stats import rankdata

    ranked = [np.corrcoef(rankdata(row), rankdata(many[0]))[0, 1] for row in predictions(many[0], many[1], 40)]
    truth, held, draws = 50 * (np.mean(every) + np.mean(ranked)), 0, 400
    weights = resample_weights(300)
    one = np.ones((1, 300), int)
    for _ in range(draws):
        true, hard = random.normal(size=(2, 300))
        predicted = predictions(true, hard, 6)
        scores = np.array([resampled_correlations(row, true, one)[0] for row in predicted])
        low, high = rows.crossed_interval(scores, np.stack([resampled_correlations(row, true, weights) for row in predicted]))
        held += low <= truth <= high
    assert 0.925 <= held / draws <= 0.985


@pytest.fixture
def part(tmp_path) -> results.Study:
    """LoRA and DoRA with four seeds, each with its predictions of 60 rows; a third setting whose runs kept none."""
    random = np.random.default_rng(0)
    true = random.normal(size=60).astype(np.float32)
    of_rows = Labels("regression", true)
    write_study(tmp_path, methods=("lora", "dora", "head"), seeds=range(4), sweep=False)
    for method, noise in (("lora", 0.5), ("dora", 0.4), ("head", 1.0)):
        for seed in range(4):
            predicted = true + noise * random.normal(size=60)
            score = of_rows.score(predicted, "pearson_spearman")
            folder = write_run(tmp_path, method=method, seed=seed, rate={"head": 5e-3}.get(method, 1e-3), score=score,
                               metric="pearson_spearman", pack_size=4)  # fmt: skip
            config = records.read_json(folder / "config.json")
            write_json(folder / "config.json", config | {"data_hash": HASH})
            if method != "head":
                records.write_predictions(folder, "test", predicted)
    labels.write(tmp_path, {(HASH, "test"): of_rows})
    return results.load(tmp_path).parts()[0]


def test_a_report_has_both_intervals_and_says_where_it_cannot(part):
    table = tables.rows_table(part)
    assert [row[0] for row in table.rows] == ["lora", "dora"]
    assert table.rows[0][1:3] == (4, 60)
    seeds, both = (tuple(map(float, table.rows[0][i].split(" to "))) for i in (4, 5))
    assert both[0] < seeds[0] and seeds[1] < both[1]
    assert any("No interval over test rows (head): a run holds no predictions" in line for line in table.caption)


@pytest.mark.slow
def test_both_pages_show_them(part, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw_all", lambda study: [])
    written = page.write(part.folder, tmp_path / "report")
    assert "## Seeds and test rows" in written.read_text() and "over seeds and rows" in written.read_text()
    assert "Intervals over seeds and test rows" in written.with_suffix(".html").read_text()
    assert (tmp_path / "report" / "tables" / "rows.csv").is_file()


def test_predictions_of_another_score_are_not_taken(part):
    arm = part.arms[0]
    records.write_predictions(arm.final[2].folder, "test", np.arange(60.0))
    again = results.load(part.folder).parts()[0]
    with pytest.raises(rows.NoRows, match="the predictions of seed 2 score"):
        rows.scored(again, again.arms[0])


def test_labels_of_other_data_are_not_taken(part, tmp_path):
    labels.write(part.folder, {("b" * 64, "test"): part.labels[HASH, "test"]})
    again = results.load(part.folder).parts()[0]
    table = tables.rows_table(again)
    assert not table.rows and any("the labels of glue/stsb are not kept here" in line for line in table.caption)
