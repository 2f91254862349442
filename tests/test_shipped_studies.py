"""Every study file that ships follows the protocol of a fair comparison, or says that it is a quick look."""

import itertools
from math import exp, log

import pytest
from rankwise.experiments import config
from rankwise.reports.statistics import seeds_needed

SHIPPED = sorted(config.STUDIES.glob("*.toml"))
STUDIES = {path.stem: config.read(path) for path in SHIPPED}
# Nor is a study of a method's parts a comparison of methods: its rates are a part, and were tuned elsewhere.
COMPARED = {name: study for name, study in STUDIES.items() if not any(entry.cell for entry in study.methods)}
FAIR = {name: study for name, study in COMPARED.items() if not study.quick and study.kind == "comparison"}


def centre(rates):
    return exp(sum(map(log, rates)) / len(rates))


def test_the_default_is_a_quick_look_and_a_fair_study_of_its_model_and_task_ships():
    default = config.read(config.DEFAULT_STUDY)
    assert default.quick
    assert any(s.model == default.model and default.tasks[0] in s.tasks for s in FAIR.values())


@pytest.mark.parametrize("study", FAIR.values(), ids=FAIR)
def test_it_tunes_repeats_and_has_its_baselines(study):
    rates = {entry.label: entry.learning_rates for entry in study.methods}
    sizes = {len(grid) for grid in rates.values()}
    assert len(sizes) == 1 and sizes.pop() >= 3  # a sweep of equal size for every method
    grid = len(next(iter(rates.values())))
    assert study.sweep.most_trials(grid, study.quick) >= grid + 2  # room to widen on both sides
    # fair is cut to two cores, and its report warns of it; where arms share a rate, its choice favours none of them.
    assert len(study.sweep.seeds) >= 3 or study.name == "fair" or any(e.shared_with for e in study.methods)
    assert study.protocol == "held-out" and study.reference == "lora" and study.margin > 0
    assert len(study.seeds) >= max(10, seeds_needed(len(study.methods) - 1))
    assert not any(e.shared_with for e in study.methods) or not set(study.sweep.seeds) & set(study.seeds)
    methods = {entry.method for entry in study.methods}
    assert {"full", "lora", "random-rank"} <= methods  # LoRA is the uniform allocation
    steps = {label: [round(b / a, 1) for a, b in itertools.pairwise(grid)] for label, grid in rates.items()}
    assert all(max(step) / min(step) < 1.6 for step in steps.values())  # geometric: the same kind of grid
    ratio = centre(rates["lora"]) / centre(rates["full"])
    assert 5 <= ratio <= 25  # full fine-tuning about a tenth of LoRA's
