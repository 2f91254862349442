"""The packs of a study, before anything runs: by hand, and without torch."""

import subprocess
import sys

import pytest
from rankwise.experiments import config
from rankwise.experiments.study import plan, sweep
from rankwise.experiments.study.plan import PackPlan

RATES = [1e-3, 2e-3, 4e-3]


def study(methods: list[dict] | None = None, **changes) -> config.Study:
    methods = methods or [{"method": "lora", "rank": 2, "learning_rates": RATES}]
    raw = {"model": "a-model", "tasks": ["glue/stsb"], "seeds": 3, "methods": methods, "sweep": {"seeds": [7, 8]}} | changes
    if raw["sweep"] is not None:  # most tests here are about sweeps
        raw["sweep"] = {"design": "chosen-rate", **raw["sweep"]}
    return config.parse({key: value for key, value in raw.items() if value is not None}, default_name="planned")


def packable(name: str) -> bool:
    return name != "full"


def facts(packs: list[PackPlan]) -> list[tuple]:
    return [(pack.name, pack.members) for pack in packs]


def test_a_study_is_planned_without_torch():
    script = (
        "import sys; from rankwise.experiments import config; from rankwise.experiments.study import NUMERICS, plan;"
        "packs = plan.groups(config.read(config.DEFAULT_STUDY), 4, packable=lambda name: name != 'full');"
        "assert len(packs) > 4 and 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_sweeps_come_before_finals_and_members_are_cut_rate_by_rate():
    one = study([{"method": "lora", "label": "my/own one", "rank": 2, "learning_rates": RATES}])
    assert facts(plan.groups(one, 4, packable)) == [
        ("sweep-my_own_one-glue_stsb-0", ((7, 1e-3), (8, 1e-3), (7, 2e-3), (8, 2e-3))),
        ("sweep-my_own_one-glue_stsb-1", ((7, 4e-3), (8, 4e-3))),
        ("final-my_own_one-glue_stsb-0", ((0, None), (1, None), (2, None))),
    ]


def test_what_cannot_be_packed_runs_alone_and_a_single_rate_is_known_at_once():
    both = [{"method": "full", "learning_rate": 1e-4}, {"method": "lora", "rank": 2, "learning_rate": 1e-3}]
    assert facts(plan.groups(study(both, seeds=[5, 3], sweep=None), 4, packable)) == [
        ("final-full-glue_stsb-0", ((5, 1e-4),)),
        ("final-full-glue_stsb-1", ((3, 1e-4),)),
        ("final-lora-glue_stsb-0", ((5, 1e-3), (3, 1e-3))),
    ]


def test_a_whole_curve_has_no_sweep_and_more_seeds_leave_its_packs_as_they_are():
    curve = {"sweep": {"design": "whole-curve"}}
    packs = facts(plan.groups(study(seeds=[0, 1], **curve), 4, packable))
    assert packs == [
        ("final-lora-glue_stsb-0", ((0, 1e-3), (0, 2e-3), (0, 4e-3), (1, 1e-3))),
        ("final-lora-glue_stsb-1", ((1, 2e-3), (1, 4e-3))),
    ]
    more = facts(plan.groups(study(seeds=[0, 1, 2, 3], **curve), 4, packable))
    assert more[0] == packs[0] and more[1][1][:2] == packs[1][1]


PAIR = [
    {"method": "lora", "rank": 2, "learning_rates": RATES},
    {"method": "dora", "rank": 2, "learning_rates": RATES, "shared_with": "lora"},
]
TAKER = {"method": "lora", "label": "taker", "ranks_of": "lora", "learning_rates": RATES}
UNEVEN = {"method": "dora", "rank": 2, "learning_rates": [1e-3, 3e-3, 9e-3]}


@pytest.mark.parametrize(
    ("sweep_section", "changes", "fault"),
    [
        (
            {"design": "whole-curve", "seeds": [100, 2]},
            {},
            r"sweep.seeds = \[100, 2\]: \[2\] are final seeds too, .*: give",
        ),
        (
            {"design": "whole-curve", "epochs": 1},
            {},
            'sweep.epochs has no effect with sweep.design = "whole-curve": take',
        ),
        ({"design": "whole-curve", "halving": 2, "rungs": 2}, {}, "sweep.rungs has no effect with"),
        ({"design": "whole-curve"}, {"training": {"evaluations_per_epoch": 0}}, "evaluations_per_epoch = 0: .* at least 1"),
        ({"design": "whole-curve"}, {"protocol": "best-dev-epoch"}, "chooses on what it reports: take protocol"),
        ({"design": "whole-curve"}, {"methods": [PAIR[0], TAKER]}, 'taker: ranks_of = "lora", which has a final run at each'),
        (
            {"design": "whole-curve"},
            {"methods": [PAIR[0], UNEVEN]},
            r"unequal factors \(lora 2, dora 3\): give all methods",
        ),
        ({"design": "shared-rate", "seeds": [100, 101]}, {}, "no method shares its rate: name shared_with at one"),
        ({"design": "shared-rate"}, {"methods": PAIR}, r"sweep.seeds = \[0, 1, 2\]: \[0, 1, 2\] are final seeds too"),
        ({"design": "whole curve"}, {}, "sweep.design"),
    ],
)
def test_what_contradicts_a_design_is_refused_with_the_remedy(sweep_section, changes, fault):
    with pytest.raises(ValueError, match=fault):
        study(sweep=sweep_section, **changes)


def test_designs_that_hold_are_taken():
    assert study().sweep.design == "chosen-rate"
    assert study(PAIR, sweep={"design": "shared-rate", "seeds": [100, 101]}).sweep.design == "shared-rate"
    rounded = {"method": "dora", "rank": 2, "learning_rates": [2.5e-4, 5e-4, 1e-3]}
    for methods in (PAIR, [PAIR[0], rounded]):
        one = study(methods, sweep={"design": "whole-curve", "seeds": [100]})
        assert not any(one.sweeps(entry) for entry in one.methods)


def test_a_study_that_claims_something_has_a_design_whose_test_counts_the_choice():
    def design(methods=PAIR, sweep=None, **changes):
        raw = {"model": "a-model", "tasks": ["glue/stsb"], "seeds": 3, "methods": methods, "sweep": sweep or {}, **changes}
        return config.parse(raw, default_name="planned").sweep.design

    assert design([PAIR[0]]) == "whole-curve" and design([PAIR[0]], quick=True) == "chosen-rate"
    assert design(sweep={"seeds": [100]}) == "shared-rate" and design([PAIR[0]], protocol="best-dev-epoch") == "chosen-rate"
    said = "the default of a study that is not quick.* or write design = .chosen-rate. for a sweep"
    with pytest.raises(ValueError, match='sweep.epochs has no effect with sweep.design = "whole-curve", ' + said):
        design([PAIR[0]], sweep={"epochs": 1})
    with pytest.raises(ValueError, match="are final seeds too, and sweep.design = .shared-rate., " + said):
        design()


def run_sweep(one: config.Study, score_of, pack: int = 4) -> list[list[PackPlan]]:
    """The packs that are added while (label, rate, rung) scores as `score_of` says."""
    labels = [entry.label for entry in one.methods]
    done = [p for p in plan.groups(one, pack, packable) if p.phase == "sweep"]

    def scores(rung: int) -> sweep.Scores:
        at = [p for p in done if p.rung == rung]
        return sweep.by_rate((rate, score_of(p.entry.label, rate, rung)) for p in at for _, rate in p.members)

    assert labels == list(dict.fromkeys(p.entry.label for p in done))
    added = []
    for packs in plan.added_packs(one, pack, one.methods, "glue/stsb", len(done), scores, packable):
        done += packs
        added.append(packs)
    return added


def test_a_grid_is_widened_pack_by_pack_until_its_best_is_inside():
    added = run_sweep(study(), lambda label, rate, rung: -abs(rate - 9e-3))
    assert [facts(packs) for packs in added] == [
        [("sweep-lora-glue_stsb-2", ((7, 8e-3), (8, 8e-3)))],
        [("sweep-lora-glue_stsb-3", ((7, 1.6e-2), (8, 1.6e-2)))],
    ]
    assert run_sweep(study(), lambda label, rate, rung: -abs(rate - 2e-3)) == []


def test_entries_that_share_a_rate_are_widened_together_by_the_scores_of_both():
    pair = [{"method": "lora", "rank": 2, "learning_rates": RATES}]
    pair += [{"method": "dora", "rank": 2, "learning_rates": RATES, "shared_with": "lora"}]
    best = {"lora": 1e-3, "dora": 6e-3}  # on average the upper edge, once widened the middle
    added = run_sweep(study(pair), lambda label, rate, rung: -1000 * abs(rate - best[label]) * (1 + 9 * (label == "dora")))
    assert [facts(packs) for packs in added] == [
        [("sweep-lora-glue_stsb-4", ((7, 8e-3), (8, 8e-3))), ("sweep-dora-glue_stsb-4", ((7, 8e-3), (8, 8e-3)))]
    ]


def test_successive_halving_adds_a_rung_of_the_best_by_the_rung_before():
    one = study(sweep={"seeds": [7], "trials": 3, "halving": 2, "rungs": 3})
    added = run_sweep(one, lambda label, rate, rung: {1e-3: 1.0, 2e-3: 3.0, 4e-3: 2.0}[rate] + rung)
    assert [facts(packs) for packs in added] == [
        [("sweep-lora-glue_stsb-rung1-0", ((7, 2e-3),))],
        [("sweep-lora-glue_stsb-rung2-0", ((7, 2e-3),))],
    ]
    assert plan.last_rung(one) == 2 and plan.last_rung(study()) == 0


def test_work_counts_an_evaluated_row_a_third():
    """2 epochs of 12 rows, evaluated twice an epoch: 3 times on 6 rows before the end, then on 6 and on 9."""
    training = config.Training(epochs=2, batch_size=3, evaluations_per_epoch=2)
    (pack,) = plan.groups(study([{"method": "lora", "rank": 2, "learning_rate": 1e-3}], sweep=None), 4, packable)
    rows = {"train": 12, "validation": 6, "test": 9}
    assert plan.work(pack, training, rows, ("validation", "test")) == pytest.approx(3 * (24 + (3 * 6 + 6 + 9) / 3))


def test_the_reference_is_the_study_s_own_else_full_fine_tuning_else_the_first():
    three = [{"method": m, "learning_rate": 1e-3, **({"rank": 2} if m != "full" else {})} for m in ("dora", "full", "lora")]
    assert plan.reference(study(three, sweep=None, reference="lora")) == "lora"
    assert plan.reference(study(three, sweep=None)) == "full"
    assert plan.reference(study(three[::2], sweep=None)) == "dora"
