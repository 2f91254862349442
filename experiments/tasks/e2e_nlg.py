"""E2E NLG: a restaurant's attributes as one or two English sentences (Novikova et al. 2017), read from the hub.

A row of training is one right text.  In the other parts a row is a meaning representation, and every text that people wrote
for it is right, as in the challenge.  "name[Blue Spice], area[riverside]" is asked as "name : Blue Spice | area : riverside",
which is how LoRA's release writes it.  What differs from the official script, and that METEOR and CIDEr are missing, says
tasks/text_metrics.py.
"""

import functools
import hashlib
import re

from rankwise.experiments.data.examples import Examples
from rankwise.experiments.data.reading import hub_columns
from rankwise.experiments.tasks import text_metrics
from rankwise.experiments.tasks.task import Task

HUB = "tuetschek/e2e_nlg"
PARTS = {"train": (42_061, 42_061), "validation": (4_672, 547), "test": (4_693, 630)}  # texts, and rows here
COLUMNS = ("meaning_representation", "human_reference")
ATTRIBUTE = re.compile(r"\s*([^\[\],\s][^\[\],]*)\[([^\]]*)\]\s*(?:,|$)")
METRICS = ("bleu", "rougeL", "nist")


def asked(meaning: str) -> str | None:
    """The prompt of a meaning representation; None where it has another form."""
    found, end = [], 0
    while end < len(meaning):
        attribute = ATTRIBUTE.match(meaning, end)
        if attribute is None:
            return None
        found.append(f"{attribute[1].strip()} : {attribute[2].strip()}")
        end = attribute.end()
    return " | ".join(found) or None


@functools.lru_cache(maxsize=4)
def read(split: str) -> Examples:
    """
    Raises:
        Unavailable: the hub did not give it.
        ValueError: it has another form, or another number of texts than the challenge's.
    """
    where = f"e2e-nlg, {split}"
    columns = hub_columns("e2e-nlg", HUB, None, split, ["pinned package: none holds it"], revision="refs/convert/parquet")
    if lacking := [name for name in COLUMNS if name not in columns]:
        raise ValueError(f"{where}: no column {lacking[0]} in the hub's copy; expected {', '.join(COLUMNS)}")
    meanings, texts = (columns[name] for name in COLUMNS)
    if len(texts) != PARTS[split][0]:
        raise ValueError(f"{where}: {len(texts):,} texts in the hub's copy, where the challenge has {PARTS[split][0]:,}")
    prompts = []
    for number, (meaning, text) in enumerate(zip(meanings, texts, strict=True), start=1):
        prompt = asked(meaning) if isinstance(meaning, str) else None
        if prompt is None:
            raise ValueError(f"{where}, row {number}: the meaning representation is not of the form name[value], ...")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}, row {number}: the text is empty or none")
        prompts.append(prompt)
    if split == "train":
        return Examples(prompts, None, [text.strip() for text in texts])
    right: dict[str, list[str]] = {}
    for prompt, text in zip(prompts, texts, strict=True):
        right.setdefault(prompt, []).append(text.strip())
    return Examples(list(right), None, [answers[0] for answers in right.values()], [tuple(one) for one in right.values()])


def identity() -> str:
    """sha256 over the three parts."""
    return hashlib.sha256("".join(read(split).content_hash() for split in PARTS).encode()).hexdigest()


TASKS = (
    Task(
        name="e2e-nlg",
        kind="generation",
        num_labels=0,
        metric="bleu",
        licence="CC BY-SA 4.0",
        sizes={split: rows for split, (_, rows) in PARTS.items()},
        read=read,
        measure=text_metrics.of_texts(METRICS),
        resampled=text_metrics.resampled("bleu"),
        identity=identity,
        caption=(
            "E2E NLG: greedy texts; BLEU is sacrebleu's, with its own splitting of words and with capitals, ROUGE-L weighs "
            "precision and recall alike, NIST takes the best right text of each order; METEOR and CIDEr are missing.",
        ),
    ),
)
