"""The purposes of draws: one number each, but for the two that stood twice before they were written down."""

from collections import Counter

from rankwise.experiments.data import draws


def purposes() -> dict[str, int]:
    """Every constant of draws.py that is annotated as a purpose by being made as one."""
    others = {"SPLIT_SEED"}
    return {
        name: value for name, value in vars(draws).items() if name.isupper() and isinstance(value, int) and name not in others
    }


def test_a_new_purpose_has_a_number_of_its_own():
    repeated = {key for key, count in Counter(purposes().values()).items() if count > 1}
    assert repeated == draws.SHARED, f"{repeated - draws.SHARED} is taken: give the new purpose the next free number"


def test_no_purpose_changes_its_number():
    """Splits, batches and subsets of every committed run are drawn by these."""
    assert purposes() == {
        "SHELF_ROWS": 1,
        "STEP_ORDER": 2,
        "CARVED_CLASS": 3,
        "SUBSET": 3,
        "SARCASM_SPLIT": 4,
        "KNOCKOUT_ROWS": 4,
        "SQUAD_ARTICLES": 5,
        "EPOCH_ROWS": 6,
        "AUGMENTATION": 7,
        "SOCIALIQA_SPLIT": 8,
    }


def test_every_purpose_is_a_draw_of_its_own():
    orders = {key: tuple(draws.shuffled(50, 0, key)) for key in set(purposes().values())}
    assert len(set(orders.values())) == len(orders) == 8
