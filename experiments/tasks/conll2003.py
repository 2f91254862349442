"""CoNLL-2003: named entities in English newswire, scored by whole entities (Tjong Kim Sang and De Meulder 2003).

Tags are BIO: B-X starts an entity of type X, I-X goes on with it, O is outside. An entity counts where its type, its
first and its last word are right: F1 = 2 TP / (2 TP + FP + FN), over all sentences together, as the shared task's
script conlleval does. As there, an I-X with no entity of type X just before it starts one.
"""

from pathlib import Path

import numpy as np
from rankwise.experiments import catalogue
from rankwise.experiments.tasks.common import (
    Examples,
    Task,
    Undefined,
    accuracy,
    check_pinned,
    hub_columns,
    lines_of,
    malformed,
    ratio,
)

ENTRY = catalogue.CATALOGUE["conll2003"]
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
            raise malformed(path, number, f"{len(columns)} columns where 4 are the rule")
        if columns[-1] not in known:
            raise malformed(path, number, f"the tag is none of {', '.join(TAGS)}")
        words.append(columns[0])
        tags.append(known[columns[-1]])
    if not sentences:
        raise ValueError(f"{path.name}: no sentence in it; at least one is needed")
    return Examples(sentences, None, labels)


def read(split: str) -> Examples:
    try:
        folder = catalogue.fetch("conll2003")
    except catalogue.Unavailable as missing:
        return from_hub(split, missing.tried)
    return parse(folder / FILES[split])


def from_hub(split: str, tried: list[str]) -> Examples:
    hub = ENTRY.hub
    columns = hub_columns("conll2003", hub, None, split, tried, revision="refs/convert/parquet")  # main holds a script
    labels = [np.array(tags, dtype=np.int64) for tags in columns["ner_tags"]]
    examples = Examples([list(words) for words in columns["tokens"]], None, labels)
    return check_pinned("conll2003", examples, CONTENT[split], hub, tried)


def entities(tags: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The entities in a run of tags: (entities, 3) first word, last word, type (1 PER, 2 ORG, 3 LOC, 4 MISC).

    tags: (words,) indices into TAGS. rows: (words,) the sentence of each word; no entity reaches over its end.
    """
    kind = (tags + 1) // 2  # 0 outside
    begins = tags % 2 == 1
    new_row = np.concatenate([[True], rows[1:] != rows[:-1]])
    changed = np.concatenate([[True], kind[1:] != kind[:-1]])
    cut = new_row | changed | begins  # a border before this word
    first = np.flatnonzero(cut & (kind > 0))
    borders = np.append(np.flatnonzero(cut), len(tags))
    last = borders[np.searchsorted(borders, first, side="right")] - 1
    return np.stack([first, last, kind[first]], axis=1)


def entity_f1(predicted: np.ndarray, true: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """F1, precision, recall by whole entities (0 where nothing was predicted), and accuracy by words, in points."""
    found = {tuple(entity) for entity in entities(predicted, rows).tolist()}
    wanted = {tuple(entity) for entity in entities(true, rows).tolist()}
    if not found and not wanted:
        raise Undefined("collapsed", "neither labels nor predictions hold an entity, so that F1 has no value")
    right = len(found & wanted)
    return {
        "f1": 200 * right / (len(found) + len(wanted)),
        "precision": 100 * right / len(found) if found else 0.0,
        "recall": 100 * right / len(wanted) if wanted else 0.0,
        "accuracy": accuracy(predicted, true),
    }


def resampled_f1(predicted: np.ndarray, true: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B,) F1 by whole entities on each resample of the sentences. weights: (B, sentences)."""
    found, wanted = ({tuple(entity) for entity in entities(tags, rows).tolist()} for tags in (predicted, true))

    def drawn(these: set[tuple[int, ...]]) -> np.ndarray:
        firsts = np.array([first for first, *_ in these], dtype=np.int64)
        return weights @ np.bincount(rows[firsts], minlength=weights.shape[1])

    return 200 * ratio(drawn(found & wanted), drawn(found) + drawn(wanted))


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
        resampled=resampled_f1,
        identity=lambda: catalogue.content_hash("conll2003"),
        caption=("CoNLL-2003 scores whole entities; words cut off by the length limit are not scored.",),
    ),
)
