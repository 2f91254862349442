"""What a study sets out to test, written into its file before its runs: `[[hypothesis]]` and `looks`.

    looks = [8, 12]

    [[hypothesis]]
    name = "H1"
    arms = ["adalora", "within sites"]     # ours, and what it is held against
    task = "glue/stsb"
    margin = 0.3                           # points within which the two count as equivalent
    order = 1                              # tested only if all before it were decided or equivalent
    why = "the same triplets and schedule; only one of them moves rank from site to site"

`rankwise.reports.hypotheses` tests them.  No torch here.
"""

from collections.abc import Collection, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from rankwise.variants.settings import Positive, PositiveInt, nearest, quoted

# Levels of two looks, by seeds: 6 of 2^8 and 108 of 2^12 permutations.  Their sum is below 5 %, so that both together err no
# more often, whatever the two share.
LOOKS = {8: 0.0235, 12: 0.0264}


class Hypothesis(BaseModel):
    """A comparison that was planned: two settings on one task."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
    name: Annotated[str, Field(min_length=1, max_length=40)]
    """What the report calls it, "H1"."""
    arms: Annotated[list[str], Field(min_length=2, max_length=2)]
    """Labels of two methods; the difference is the first's score minus the second's."""
    task: str | None = None
    """Name of the task; not needed where the study has one."""
    margin: Positive
    """Points within which the two are equivalent."""
    order: PositiveInt
    """Place in the sequence: a hypothesis is tested if every one before it was decided or equivalent."""
    why: str = ""
    """What the answer would say."""


def contradictions(
    hypotheses: Sequence[Hypothesis], looks: Sequence[int], labels: Collection[str], tasks: Collection[str], seeds: int
) -> list[str]:
    """The faults of a study's hypotheses and looks that no field alone can show.

    labels, tasks, seeds: of the study's methods, its tasks, and how many final seeds it has.
    """
    faults = []
    for one in hypotheses:
        place = f"hypothesis {quoted(one.name)}"
        for arm in one.arms:
            if arm not in labels:
                known = f"{nearest(arm, labels)}; there are: {', '.join(labels)}"
                faults.append(f"{place}: arms = {one.arms}: {quoted(arm)} is no label of a method{known}")
        if one.arms[0] == one.arms[1]:
            faults.append(f"{place}: arms = {one.arms} are one method: name two")
        if one.task is None and len(tasks) > 1:
            faults.append(f"{place}: task: missing, and the study has {len(tasks)}: name one of {', '.join(tasks)}")
        elif one.task is not None and one.task not in tasks:
            known = f"{nearest(one.task, tasks)}; there are: {', '.join(tasks)}"
            faults.append(f"{place}: task = {quoted(one.task)} is no task of the study{known}")
    for what in ("name", "order"):
        values = [getattr(one, what) for one in hypotheses]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            faults.append(f"two hypotheses have {what} = {twice}: give each its own")
    if looks and not hypotheses:
        faults.append(f"looks = {list(looks)} has no effect without a [[hypothesis]]: take it out")
    if looks and list(looks) != list(LOOKS):
        faults.append(f"looks = {list(looks)}: levels were computed for looks = {list(LOOKS)}: take these, or no looks")
    elif looks and seeds != looks[-1]:
        faults.append(f"looks = {list(looks)} and {seeds} seeds: the last look is at all of them, so set seeds = {looks[-1]}")
    return faults


def in_order(hypotheses: Sequence[Hypothesis]) -> list[Hypothesis]:
    return sorted(hypotheses, key=lambda one: one.order)
