"""The simulated methods are what the docstring says, and the table tells a design that errs from one that does not."""

import numpy as np
import pytest
from rankwise.reports import simulation
from rankwise.reports.simulation import DESIGNS, World, family, holds, simulate, text


def scores(world: World, draws: int = 4_000) -> tuple[np.ndarray, np.ndarray]:
    """(draws, K, S) reported scores of the reference and of the other method."""
    random = np.random.default_rng(0)
    pairs = [family(random, world, 4, 1) for _ in range(draws)]
    return np.stack([r.reported for r, _ in pairs]), np.stack([o[0].reported for _, o in pairs])


def test_a_run_has_sd_1_and_paired_runs_share_half_of_it():
    reference, other = scores(World("", steepness=0.0))
    assert reference.std() == pytest.approx(1.0, abs=0.02) and other.std() == pytest.approx(1.0, abs=0.02)
    assert np.corrcoef(reference[:, 1].ravel(), other[:, 1].ravel())[0, 1] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("world", [World("", heavy_tails=True), World("", collapses=0.05)], ids=["tails", "collapses"])
@pytest.mark.slow
def test_tails_and_collapses_leave_the_mean_as_it_is(world):
    reference, other = scores(world, 20_000)
    difference = other[:, 1] - reference[:, 1]
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(difference.size)


def test_one_step_costs_the_steepness_and_an_offset_moves_the_optimum():
    reference, other = scores(World("", steepness=2.0, offset=0.5))
    assert reference.mean((0, 2)) == pytest.approx([-2.0, 0.0, -2.0], abs=0.06)
    assert other.mean((0, 2)) == pytest.approx([-4.5, -0.5, -0.5], abs=0.06)
    assert not World("", offset=0.5).is_null and not World("", shift=1.0).is_null and World("", collapses=0.1).is_null


def test_the_design_that_forgets_the_choice_of_the_rate_errs_and_the_others_do_not():
    found = simulate([World("steep", 1.0)], families=300, comparisons=5, seeds=8)
    rows = {row["design"]: row for row in found["rows"]}
    assert not holds(rows["chosen-rate, 1 sweep seed"], 300)
    assert holds(rows["shared-rate"], 300) and holds(rows["whole-curve"], 300)
    said = text(found)
    assert (
        "every world without a difference: " in said and "chosen-rate, 1 sweep seed" in said.rpartition("in at least one:")[2]
    )


def test_power_is_told_apart_from_error():
    found = simulate([World("none"), World("there", shift=3.0)], families=20, comparisons=1, seeds=8)
    power = {row["design"]: row["comparisons"] for row in found["rows"] if not row["null"]}
    assert set(power) == set(DESIGNS) and min(power.values()) > 0.9
    assert text(found).index("| none |") < text(found).index("Methods differ") < text(found).index("| there |")


def test_the_same_seed_gives_the_same_table():
    options = {"worlds": simulation.WORLDS[:1], "families": 3, "comparisons": 2}
    assert simulate(**options) == simulate(**options) != simulate(**options, seed=1)
