"""Settings of the methods: what is wrong is refused with value, rule and remedy, before torch is imported."""

import subprocess
import sys

import pytest
from rankwise import variants
from rankwise.variants.settings import LowRankSettings, Settings, setting
from rankwise.variants.settings.base import Facts

GOOD = {"lora": {"rank": 4}, "dora": {"rank": 4}, "adalora": {"initial_rank": 6, "target_rank": 4}}


@pytest.mark.parametrize(
    "method, values, message",
    [
        ("lora", {}, r"lora\.rank: missing; give a value"),
        ("lora", {"rank": 0}, r"lora\.rank = 0: should be greater than 0"),
        ("lora", {"rank": -3}, r"lora\.rank = -3: should be greater than 0"),
        ("lora", {"rank": 2.5}, r"lora\.rank = 2\.5: .*valid integer"),
        ("lora", {"rank": 2.0}, r"lora\.rank = 2\.0: .*valid integer"),
        ("lora", {"rank": True}, r"lora\.rank = True: .*valid integer"),
        ("lora", {"rank": "8"}, r"lora\.rank = '8': .*valid integer"),
        ("lora", {"rank": [4, True]}, r"lora\.rank.* = True: .*valid integer"),
        ("lora", {"rank": [4, -1]}, r"lora\.rank.* = -1: should be greater than 0"),
        ("lora", {"rank": 4, "alpha": float("nan")}, r"lora\.alpha = nan: "),
        ("lora", {"rank": 4, "alpha": float("inf")}, r"lora\.alpha = inf: .*finite"),
        ("lora", {"rank": 4, "alpha": -1}, r"lora\.alpha = -1: should be greater than 0"),
        ("lora", {"rank": 4, "alpha": True}, r"lora\.alpha = True: .*valid number"),
        ("lora", {"rank": 4, "dropout": 1.0}, r"lora\.dropout = 1\.0: should be less than 1"),
        ("lora", {"rank": 4, "dropout": -0.1}, r"lora\.dropout = -0\.1: should be greater than or equal to 0"),
        ("lora", {"rank": 4, "scaling": "alpha/r2"}, r"lora\.scaling = 'alpha/r2': should be 'alpha/r' or 'alpha/sqrt\(r\)'"),
        (
            "lora",
            {"rank": 4, "rank_pattern": {"query": -1}},
            r"lora\.rank_pattern\.query = -1: should be greater than or equal",
        ),
        ("lora", {"rank": 4, "alpha_pattern": {"query": float("nan")}}, r"lora\.alpha_pattern\.query = nan: "),
        ("lora", {"rank": 4, "lr_ratio": 0}, r"lora\.lr_ratio = 0: should be greater than 0"),
        ("lora", {"rnk": 4}, r'lora\.rnk: unknown setting; did you mean "rank"\?'),
        ("lora", {"rank": 4, "target_rank": 2}, r"lora\.target_rank: unknown setting"),
        ("head", {"rank": 4}, r"head\.rank: unknown setting"),
        ("full", {"learning_rate": 1}, r"full\.learning_rate: unknown setting"),
        ("adalora", {"initial_rank": 4, "target_rank": 6}, r"target_rank = 6 is above initial_rank = 4: .*at least 6"),
        ("adalora", {"initial_rank": [6, 4], "target_rank": 5}, r"target_rank = 5 is above initial_rank = 4"),
        ("adalora", {"initial_rank": 4, "target_rank": [4, 5]}, r"target_rank = 5 is above initial_rank = 4"),
        ("adalora", {"initial_rank": 6, "target_rank": 4, "warmup_steps": -1}, r"adalora\.warmup_steps = -1: "),
        ("adalora", {"initial_rank": 6, "target_rank": 4, "interval": 0}, r"adalora\.interval = 0: should be greater than 0"),
        ("adalora", {"initial_rank": 6, "target_rank": 4, "beta1": 1}, r"adalora\.beta1 = 1: should be less than 1"),
        ("adalora", {"initial_rank": 6, "target_rank": 4, "orthogonality": -1}, r"adalora\.orthogonality = -1: "),
        ("adalora", {"initial_rank": 6, "target_rank": 4, "penalty_form": "mine"}, r"should be 'release' or 'paper'"),
        (
            "adalora+dora",
            {"initial_rank": 6, "target_ranks": 4},
            r'target_ranks: unknown setting; did you mean "target_rank"\?',
        ),
    ],
)
def test_a_wrong_setting_is_refused_with_value_and_rule(method, values, message):
    with pytest.raises(ValueError, match=message):
        variants.check(method, values)


def test_several_faults_are_one_line_each():
    with pytest.raises(ValueError) as refusal:
        variants.check("adalora", {"initial_rank": -1, "taget_rank": 3, "beta2": "x"})
    lines = str(refusal.value).splitlines()
    assert [line.partition(" ")[0].rstrip(":") for line in lines] == [
        "adalora.initial_rank",
        "adalora.target_rank",
        "adalora.beta2",
        "adalora.taget_rank",
    ]


def test_an_unknown_method_offers_the_nearest():
    with pytest.raises(ValueError, match=r'method "adlora" is unknown; did you mean "adalora".*there are: full, head'):
        variants.check("adlora", {})
    with pytest.raises(ValueError, match='method "qqq" is unknown; there are'):
        variants.create("qqq")


@pytest.mark.parametrize("values", [{"rank": [4, 2]}, {"rank": 4, "alpha": [1.0, 2.0, 3.0, 4.0]}, {"rank": []}])
def test_a_list_of_another_length_than_the_members_is_refused_at_once(values):
    with pytest.raises(
        ValueError, match=r"(rank|alpha) = \[.*\] has \d values for 3 members: give one for each, or one number"
    ):
        variants.create("lora", members=3, **values)


def test_members_and_seeds_are_checked():
    with pytest.raises(ValueError, match="members = 0: an adapter has at least one member"):
        variants.create("lora", members=0, rank=2)
    with pytest.raises(ValueError, match=r"seeds = \[1\] has 1 values for 2 members"):
        variants.create("lora", members=2, seeds=[1], rank=2)
    assert variants.create("lora", members=3, rank=2).seeds == [0, 1, 2]


def test_settings_are_frozen():
    settings = variants.check("lora", {"rank": 4})
    with pytest.raises(ValueError):
        settings.rank = 5


def test_a_member_has_its_own_value_of_every_list():
    settings = variants.check("adalora", {"initial_rank": [6, 4], "target_rank": 3, "alpha": [1.0, 2.0]})
    one = settings.for_member(1)
    assert (one.initial_rank, one.target_rank, one.alpha) == (4, 3, 2.0)
    assert settings.initial_rank == [6, 4]


def test_every_setting_says_in_a_line_what_it_is():
    for method in variants.METHODS.values():
        assert method.summary and method.source
        for name, field in method.settings.model_fields.items():
            assert field.description and field.description.strip().endswith("."), (method.name, name)


def test_integers_serve_as_numbers():
    assert variants.check("lora", {"rank": 4, "alpha": 8}).alpha == 8.0


def test_checking_settings_does_not_import_torch():
    code = (
        "import sys; from rankwise import variants\n"
        "variants.check('adalora+dora', {'initial_rank': 6, 'target_rank': 4})\n"
        "try:\n    variants.check('lora', {'rnk': 4})\n"
        "except ValueError as error:\n    assert 'did you mean' in str(error)\n"
        "assert variants.METHODS['lora'].takes_targets\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules), 'imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LoRa'"):
        _ = variants.LoRa


@pytest.mark.parametrize("method, values", [("dora", {"rank": 4}), ("adalora+dora", {"initial_rank": 6, "target_rank": 4})])
def test_a_dora_without_magnitudes_is_refused(method, values):
    assert variants.check(method, values).magnitude is variants.check(method, {**values, "magnitude": True}).magnitude is True
    with pytest.raises(ValueError, match=r"magnitude = False: this method always has magnitudes.* take it out, or name"):
        variants.create(method, **values, magnitude=False)


def test_a_field_declared_again_keeps_its_facts():
    class Parent(Settings):
        rise: int = setting(1, role="steps", added_later=True)
        plain: int = 0

    class Child(Parent):
        rise: int = 2

    assert Child.with_role("steps") == ["rise"] and Child.facts["plain"] == Facts()
    assert Child().identity() == {"plain": 0} and Child(rise=1).identity() == {"rise": 1, "plain": 0}


def test_every_setting_of_a_rank_has_a_role():
    """A pack, a study and a budget know a setting by its role alone, so that one without would be passed over in silence."""
    ranks = {"rank", "initial_rank", "target_rank"}
    totals = {"target_total", "target_parameters", "total_rank", "total_parameters"}
    for one in variants.METHODS.values():
        fields = set(one.settings.model_fields)
        assert set(one.settings.with_role("rank")) == fields & ranks
        assert set(one.settings.with_role("total")) == fields & totals
        assert set(one.settings.with_role("member")) == fields & {"orthogonality", "kept_sites", "bottleneck"}
        assert set(one.settings.with_role("steps")) == fields & {
            *("warmup_steps", "final_steps", "interval", "rise_steps", "truncate_after", "plateau_patience"),
        }


def test_a_method_without_a_rule_for_a_budget_is_refused():
    class VeRASettings(LowRankSettings):
        rank: int

    with pytest.raises(ValueError, match="VeRASettings has no rule for a budget of parameters: give the method's ranks"):
        VeRASettings.for_budget({}, {"query": 3}, 100, 2.0)
    for one in variants.METHODS.values():
        assert one.takes_targets == (one.settings.for_budget.__func__ is not Settings.for_budget.__func__), one.name
