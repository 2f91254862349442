"""Which packs of a study may train now.

A step is a number of packs that follow from each other: a sweep, to which scores add packs, or the final runs of one entry on
one task.  It begins once the steps that it needs are finished: final runs need the rate that their sweep has chosen, an entry
that takes ranks needs the runs that it takes them of.  All packs that a step gives at once may train at the same time.

No torch, and nothing of who trains them: one process one pack after the other, or many machines at once.
"""

from collections import deque
from collections.abc import Iterator, Sequence

from rankwise.experiments.study.plan import PackPlan


class Step:
    """
    Args:
        packs: gives lists of packs; the next list is asked for once all of the one before are finished.
        after: the steps that must be finished before anything is asked for.
    """

    def __init__(self, packs: Iterator[list[PackPlan]], after: Sequence["Step"] = ()):
        self._packs, self.after = packs, list(after)
        self.given: list[PackPlan] = []  # every pack that was asked for, in order
        self._open = 0  # of these, not finished
        self.is_finished = False

    def next(self) -> list[PackPlan]:
        """The packs that may train from now on; none while others must be finished first, or where there are no more."""
        while not self.is_finished and not self._open and all(step.is_finished for step in self.after):
            packs = next(self._packs, None)
            if packs is None:
                self.is_finished = True
                break
            self.given += packs
            self._open = len(packs)
            if packs:
                return packs
        return []

    def finish(self) -> None:
        """One of its packs is finished."""
        self._open -= 1


class Order:
    """The packs of all steps.

    Args:
        steps: each after all that it needs, so that who takes one pack at a time takes them in this order.
    """

    def __init__(self, steps: Sequence[Step]):
        self.steps = list(steps)
        self._waiting: deque[tuple[Step, PackPlan]] = deque()
        self._training: list[tuple[Step, PackPlan]] = []

    def next(self) -> PackPlan | None:
        """The first pack that may train now; None where all that are left need one that is training."""
        if not self._waiting:
            for step in self.steps:
                self._waiting.extend((step, pack) for pack in step.next())
                if self._waiting:
                    break
        if not self._waiting:
            return None
        self._training.append(self._waiting.popleft())
        return self._training[-1][1]

    def finish(self, pack: PackPlan) -> None:
        """A pack that `next` gave is finished."""
        at = next(i for i, (_, one) in enumerate(self._training) if one is pack)
        step, _ = self._training.pop(at)
        step.finish()

    @property
    def is_finished(self) -> bool:
        """Whether every pack of every step is finished."""
        return not self._training and not self._waiting and all(step.is_finished for step in self.steps)

    @property
    def packs(self) -> list[PackPlan]:
        """All that were given, in the order of the steps."""
        return [pack for step in self.steps for pack in step.given]
