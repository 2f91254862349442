"""PEFT's public method comparison read again: which of its 63 results can be told apart from LoRA at all.

Each result is one run with one seed: GSM8K questions answered right, of 1,319.  Its error is at least the binomial one of the
questions; the spread over seeds and rates comes on top and was not measured there.  Each result is compared with the
comparison's own LoRA of rank 32 by Fisher's exact test of two proportions, with Holm's correction over all others.  The
questions were the same, so that a paired test would have more power; the answers were not published.

The numbers are those of huggingface/peft, method_comparison/MetaMathQA/results, at the commit in SOURCE.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

from rankwise.reports.statistics import ALPHA, LEVEL, holm

FILE = Path(__file__).parent / "data" / "peft-metamathqa.csv"
SOURCE = "huggingface/peft, method_comparison/MetaMathQA/results, commit 5d602fdbff04c33c1c4de55cda9d4ae1d7cb7e40"
REFERENCE = "lora/llama-3.2-3B-rank32"


@dataclass(frozen=True)
class ComparedResult:
    """One result: accuracy in percent with the binomial interval (Wilson), and its test against the reference."""

    experiment: str
    method: str
    correct: int
    questions: int
    parameters: int
    learning_rate: float
    accuracy: float
    low: float
    high: float
    difference: float  # to the reference, in points
    p: float | None  # Fisher's exact test, Holm-adjusted; None for the reference

    @property
    def verdict(self) -> str:
        if self.p is None:
            return "reference"
        if self.p > ALPHA:
            return "not told apart"
        return "better" if self.difference > 0 else "worse"


def entries(file: Path = FILE, reference: str = REFERENCE) -> list[ComparedResult]:
    """Every result, best first.

    Raises:
        ValueError: the reference is not among them.
    """
    from scipy.stats import binomtest, fisher_exact

    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    counts = {row["experiment"]: (int(row["correct"]), int(row["questions"])) for row in rows}
    if reference not in counts:
        raise ValueError(f'reference "{reference}" is not among the {len(rows)} results of {file.name}')
    right, asked = counts[reference]
    others = [name for name in counts if name != reference]
    tables = [[[k, n - k], [right, asked - right]] for k, n in (counts[name] for name in others)]
    adjusted = dict(zip(others, holm([float(fisher_exact(table).pvalue) for table in tables]), strict=True))
    made = []
    for row in rows:
        name = row["experiment"]
        correct, questions = counts[name]
        interval = binomtest(correct, questions).proportion_ci(LEVEL, method="wilson")
        made.append(
            ComparedResult(
                experiment=name,
                method=row["method"],
                correct=correct,
                questions=questions,
                parameters=int(row["trainable_parameters"]),
                learning_rate=float(row["learning_rate"]),
                accuracy=100 * correct / questions,
                low=100 * float(interval.low),
                high=100 * float(interval.high),
                difference=100 * (correct / questions - right / asked),
                p=float(adjusted[name]) if name in adjusted else None,
            )
        )
    return sorted(made, key=lambda entry: (-entry.correct, entry.experiment))


def text(made: list[ComparedResult]) -> str:
    """The table as Markdown, with what it says in words."""
    reference = next(entry for entry in made if entry.p is None)
    kinds = {kind: [e for e in made if e.verdict == kind] for kind in ("better", "worse", "not told apart")}
    open_ones = kinds["not told apart"]
    lines = [
        "# PEFT's method comparison, read with its errors",
        "",
        f"Source: {SOURCE}. Llama-3.2-3B, 5,000 steps on MetaMathQA, GSM8K test accuracy; **one run and one seed each**.",
        "",
        f"Of {len(made) - 1} results {len(open_ones)} cannot be told apart from `{reference.experiment}` "
        f"({reference.accuracy:.1f} %, {reference.low:.1f} to {reference.high:.1f}) by the {reference.questions:,} questions; "
        f"{len(kinds['better'])} {'is' if len(kinds['better']) == 1 else 'are'} better and {len(kinds['worse'])} worse "
        "(Fisher's exact test, Holm's correction over all). "
        f"Those not told apart lie between {min(e.difference for e in open_ones):+.1f} and "
        f"{max(e.difference for e in open_ones):+.1f} points.",
        "",
        "This counts the error of the questions alone. Seeds were not repeated and most rates were not tuned, so that a "
        "`better` or `worse` here is one of these runs, not of these methods.",
        "",
        "| result | accuracy, % | 95 % interval | difference | p (Holm) | parameters | rate | |",
        "| :-- | --: | :-: | --: | --: | --: | --: | :-- |",
    ]
    for e in made:
        p = "" if e.p is None else "< 0.001" if e.p < 0.001 else f"{e.p:.3f}"
        lines.append(
            f"| {e.experiment} | {e.accuracy:.1f} | {e.low:.1f} to {e.high:.1f} | {e.difference:+.1f} | {p} | "
            f"{e.parameters:,} | {e.learning_rate:g} | {e.verdict} |"
        )
    return "\n".join(lines) + "\n"
