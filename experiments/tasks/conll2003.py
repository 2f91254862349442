"""CoNLL-2003: named entities in English newswire, scored by whole entities (metrics.py; Tjong Kim Sang and De Meulder 2003).

Tags are BIO: B-X starts an entity of type X, I-X goes on with it, O is outside. An entity counts where its type, its
first and its last word are right: F1 = 2 TP / (2 TP + FP + FN), over all sentences together, as the shared task's
script conlleval does. As there, an I-X with no entity of type X just before it starts one.
"""

from pathlib import Path

import numpy as np
from rankwise.experiments import sources
from rankwise.experiments.data.examples import Examples
from rankwise.experiments.data.reading import check_pinned, hub_columns, lines_of, malformed
from rankwise.experiments.tasks.metrics import entity_f1, resampled_entity_f1
from rankwise.experiments.tasks.task import Task

ENTRY = sources.CATALOGUE["conll2003"]
# The hub's order of the tags.
TAGS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
FILES = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
CONTENT = {  # Examples.content_hash() of the pinned files
    "train": "ea25f1b359bdbd5b0a51d59d21c970dc7869620277e39efadb0308d4640747c6",
    "validation": "479c7d01d47a05f9c2cfd175f08eab35c8381adbe290f267409283732d26e4dd",
    "test": "6eb29ef0c07fc8bb09de1afe4e382011671ab6c7eacaa81e0b584d7a71d00995",
}


def parse(path: Path) -> Examples:
    """One word a line, its tag in the last of four columns; an empty line ends a sentence.

    Raises: ValueError: a line of another form, or a tag that is none of the nine; names file and line.
    """
    known = {tag: index for index, tag in enumerate(TAGS)}
    sentences, labels, words, tags = [], [], [], []
    for number, line in enumerate([*lines_of(path), ""], start=1):
        columns = line.split()
        if not columns or columns[0] == "-DOCSTART-":
            if words:
                sentences.append(words)
                labels.append(np.array(tags, dtype=np.int64))
                words, tags = [], []
            continue
        if len(columns) != 4:
            raise malformed(path, number, f"expected 4 columns, found {len(columns)}")
        if columns[-1] not in known:
            raise malformed(path, number, f"the tag is none of {', '.join(TAGS)}")
        words.append(columns[0])
        tags.append(known[columns[-1]])
    if not sentences:
        raise ValueError(f"{path.name}: no sentence in it; at least one is needed")
    return Examples(sentences, None, labels)


def read(split: str) -> Examples:
    try:
        folder = sources.fetch("conll2003")
    except sources.Unavailable as missing:
        return from_hub(split, missing.tried)
    return parse(folder / FILES[split])


def from_hub(split: str, tried: list[str]) -> Examples:
    hub = ENTRY.hub
    columns = hub_columns("conll2003", hub, None, split, tried, revision="refs/convert/parquet")  # main holds a script
    labels = [np.array(tags, dtype=np.int64) for tags in columns["ner_tags"]]
    examples = Examples([list(words) for words in columns["tokens"]], None, labels)
    return check_pinned("conll2003", examples, CONTENT[split], hub, tried)


TASKS = (
    Task(
        name="conll2003",
        kind="token-classification",
        num_labels=len(TAGS),
        label_names=TAGS,
        metric="f1",
        licence=ENTRY.licence,
        data="conll2003",
        sizes={"train": 14041, "validation": 3250, "test": 3453},
        read=read,
        measure=entity_f1,
        resampled=resampled_entity_f1,
        identity=lambda: sources.content_hash("conll2003"),
        caption=("CoNLL-2003 scores whole entities; words cut off by the length limit are not scored.",),
    ),
)
