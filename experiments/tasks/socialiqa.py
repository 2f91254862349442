"""Social IQa: what will someone do, feel or want next, and which of three answers says so? (Sap et al. 2019)

One of the eight tasks of DoRA's Table 1.  The carrier has 2,224 labelled rows of it and does not say of which part they are, so
that nothing scored here may be held against a published score.
"""

import json
import re
from pathlib import Path

import numpy as np
from rankwise.experiments import sources
from rankwise.experiments.data import draws
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.data.reading import lines_of, malformed
from rankwise.experiments.tasks.task import Task
from rankwise.experiments.tasks.text_metrics import choice_accuracy

DISTINCT = 2198
FORM = re.compile(r"(.+) A: (.+); B: (.+); C: (.+)\.", re.DOTALL)


def parse(path: Path) -> Examples:
    """JSON lines: `input` is a list of messages whose last `content` has context, question and options; `ideal` is A, B or C.

    A question that comes again is dropped, and one with two equal options. Raises: ValueError: a line of another form; names
    file and line.
    """
    found: dict[str, tuple[tuple[str, ...], int]] = {}
    for number, line in enumerate(lines_of(path), start=1):
        try:
            record = json.loads(line)
            text, right = record["input"][-1]["content"], record["ideal"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise malformed(path, number, "expected a JSON object with input[-1].content and ideal") from None
        parts = FORM.fullmatch(text.strip()) if isinstance(text, str) else None
        if parts is None:
            raise malformed(path, number, 'expected a question and "A: ...; B: ...; C: ...."')
        if right not in ("A", "B", "C"):
            raise malformed(path, number, "the right answer (ideal) is none of A, B, C")
        question, *options = (part.strip() for part in parts.groups())
        if not question or not all(options):
            raise malformed(path, number, "the question or an option is empty")
        if len(set(options)) == len(options):
            found.setdefault(question, (tuple(options), "ABC".index(right)))
    labels = np.array([right for _, right in found.values()], dtype=np.int64)
    return Examples(list(found), None, labels, [options for options, _ in found.values()])


def parts(num_rows: int) -> dict[str, np.ndarray]:
    """70 / 10 / 20 %, drawn once with a fixed seed: the rows of each split."""
    tenth = num_rows // 10
    order = draws.shuffled(num_rows, draws.SPLIT_SEED, draws.SOCIALIQA_SPLIT)
    cut = {"test": order[: 2 * tenth], "validation": order[2 * tenth : 3 * tenth], "train": order[3 * tenth :]}
    return {split: np.sort(rows) for split, rows in cut.items()}


def read(split: str) -> Examples:
    examples = parse(sources.fetch("socialiqa") / "test.jsonl")
    return examples.select(parts(len(examples))[split])


ENTRY = sources.CATALOGUE["socialiqa"]
TASKS = (
    Task(
        name="socialiqa",
        kind="choice",
        num_labels=0,
        metric="accuracy",
        licence=ENTRY.licence,
        data="socialiqa",
        sizes={split: len(rows) for split, rows in parts(DISTINCT).items()},
        read=read,
        measure=choice_accuracy,
        identity=lambda: sources.content_hash("socialiqa"),
        caption=(
            f"Social IQa: {DISTINCT} distinct questions of a copy that does not say of which part they are, cut 70 / 10 / "
            "20 %, once, with a fixed seed; no score is comparable with a published one.",
        ),
    ),
)
