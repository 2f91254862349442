"""The calibration's own arithmetic, on a pool of written runs; the committed figures are those of the committed runs."""

import json
from pathlib import Path

import numpy as np
import pytest
from rankwise.reports.calibration import Design, calibrate, family, pool_of, share
from rankwise.reports.results import load
from rankwise.reports.verdicts import verdicts

from tests.command import rankwise
from tests.synthetic_runs import write_json, write_run

COMMITTED = Path(__file__).parent.parent / "reports" / "studies" / "calibration"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Normal scores, 3 rates x 20 seeds; every sweep finds the best rate."""
    return pool(tmp_path_factory.mktemp("pool"), noise=0.2)


@pytest.fixture(scope="module")
def unsettled(tmp_path_factory):
    """The same, but one seed of a sweep tells little of which rate is best."""
    return pool(tmp_path_factory.mktemp("unsettled"), noise=1.0)


def pool(folder, noise):
    draw = np.random.default_rng(3)
    for i, rate in enumerate((1e-3, 3e-3, 9e-3)):
        for seed in range(20):
            write_run(folder, method="lora", setting=f"lora {rate:g}", seed=seed, rate=rate, quick=True, steps=2,
                      selection_score=float(80 - i + noise * draw.normal()), score=float(70 - i + draw.normal()))  # fmt: skip
    settings = [f"lora {rate:g}" for rate in (1e-3, 3e-3, 9e-3)]
    write_json(folder / "study.json", {"schema": 1, "study": "stsb-minilm", "quick": True, "title": "t", "captions": [],
               "reference": None, "methods": settings, "complete": True})  # fmt: skip
    return load(folder)


def test_arms_have_disjoint_seeds_choose_on_one_part_and_report_the_other(study):
    pool = pool_of(study)
    made = family(pool, study, [[4, 5, 6], [7, 8, 9]], Design(seeds=3, sweep_seeds=1), shift=2.0)
    for arm, seeds, shift in zip(made.arms, ([4, 5, 6], [7, 8, 9]), (0.0, 2.0), strict=True):
        chosen = {rate: pool[rate][seeds[0]].result.selection_score for rate in pool}
        assert arm.rate == max(chosen, key=chosen.get)
        wanted = [pool[arm.rate][seed].result.score + shift for seed in seeds]
        assert list(arm.scores.values()) == pytest.approx(wanted) and list(arm.scores) == [0, 1, 2]
    assert [v.setting for v in verdicts(made)] == ["arm 1"]


@pytest.mark.slow
def test_errors_are_rare_a_planted_shift_is_found_and_no_correction_fails(study):
    found = calibrate(study, Design(families=300, comparisons=3, seeds=5, sweep_seeds=1))
    assert found["families with an error"]["share"] == 0  # five seeds cannot claim in a family of three
    assert found["planted shift of one sd found"]["power for normal differences"] == 0
    strong = calibrate(study, Design(families=300, comparisons=1, seeds=8, sweep_seeds=1))
    assert strong["passes"] and strong["families with an error"]["of"] == 300
    planted = strong["planted shift of one sd found"]
    assert planted["share"] == pytest.approx(planted["power for the pool's differences"], abs=0.12)
    assert planted["power for the pool's differences"] == pytest.approx(planted["power for normal differences"], abs=0.12)


@pytest.mark.slow
def test_a_sweep_of_one_seed_that_cannot_tell_the_rates_apart_makes_errors_and_more_seeds_mend_it(unsettled):
    """Arms of one method then end at different rates, which is a difference, though none of the method's."""
    shares = [
        calibrate(unsettled, Design(families=200, comparisons=1, seeds=8, sweep_seeds=k))["families with an error"]["share"]
        for k in (1, 8)
    ]
    assert shares[0] > 0.1 > shares[1]


def test_bounds_are_clopper_and_pearsons_and_bad_designs_are_refused(study):
    from scipy.stats import beta

    assert share(7, 100)["low"] == pytest.approx(beta.ppf(0.05, 7, 94))
    with pytest.raises(ValueError, match="a family takes 32 seeds, and the pool has 20"):
        calibrate(study, Design(families=1))


def test_the_command_writes_what_it_prints(study, tmp_path, capsys):
    assert rankwise("calibration", study.folder, "--families", 20, "--seeds", 4, "--out", tmp_path) == 0
    assert capsys.readouterr().out == (tmp_path / "calibration.md").read_text()
    assert json.loads((tmp_path / "calibration.json").read_text())["design"]["families"] == 20
    assert rankwise("calibration", tmp_path / "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.slow
def test_the_committed_figures_are_those_of_the_committed_runs_and_pass():
    written = json.loads((COMMITTED / "calibration.json").read_text())
    assert written["design"]["families"] * written["design"]["comparisons"] >= 2000 and written["design"]["families"] >= 2000
    assert written["families with an error"]["low"] <= 0.05 and written["passes"]
    assert not written["uncorrected passes"] and written["smallest p uncorrected, families with an error"]["low"] > 0.05
    planted = written["planted shift of one sd found"]
    assert planted["share"] == pytest.approx(planted["power for the pool's differences"], abs=0.04)
    assert planted["share"] == pytest.approx(planted["power for normal differences"], abs=0.1)  # the pool's is not normal
    one = json.loads((COMMITTED / "one-seed" / "calibration.json").read_text())
    assert one["design"]["sweep_seeds"] == 1 and not one["passes"]  # why a sweep has three seeds
    again = calibrate(load(COMMITTED), Design(**{**written["design"], "families": 100}))
    few = [again[key]["share"] - written[key]["share"] for key in ("planted shift of one sd found",)]
    assert max(map(abs, few)) < 0.16  # three standard errors of a hundred families
