"""What can be known to be wrong with a study without torch and without a download."""

import contextlib
from collections.abc import Iterator

from experiments import catalogue
from experiments.config import Study, Training
from experiments.tasks import get as get_task


def phase_training(study: Study, phase: str) -> Training:
    """How runs of that phase train."""
    if phase == "final" or study.sweep is None:
        return study.training
    return study.training.model_copy(update={"epochs": study.sweep.epochs, "max_steps": study.sweep.max_steps})


def check(study: Study) -> None:
    """What can be known to be wrong without torch and without a download.

    Raises:
        ValueError: an unknown task, terms not accepted, phases longer than the run; one line for each fault.
    """
    faults = []
    for name in study.tasks:
        try:
            task = get_task(name)
            if task.data is not None:
                catalogue.require_acceptance(task.data, study.accept_licences)
            if task.sizes is None:
                continue
            rows = min(task.sizes["train"], study.training.train_examples or task.sizes["train"])
            check_phases(study, rows, faults)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))


def check_phases(study: Study, rows: int, faults: list[str]) -> None:
    """Adds every entry whose step counts do not fit into the runs it takes part in."""
    for phase in ("sweep", "final"):
        total = phase_training(study, phase).total_steps(rows)
        for entry in study.methods:
            if phase == "final" or len(entry.learning_rates) > 1:
                with collecting(faults):
                    entry.resolved(total)


@contextlib.contextmanager
def collecting(faults: list[str]) -> Iterator[None]:
    """Adds what the user can mend to `faults`, so that all of it is said at once."""
    try:
        yield
    except ValueError as error:
        faults.extend(str(error).splitlines())
