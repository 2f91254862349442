"""Metrics of generated texts, of choices and of modelled texts, in points; higher is better.

ROUGE is rouge-score's, BLEU and chrF are sacrebleu's, NIST is nltk's, with their defaults.  Exact match and the numeric answer
are written here: a comparison of two strings needs no library.
`of_texts(names)` gives what a task of kind = generation measures by.

Of the official five of E2E NLG (BLEU, NIST, METEOR, ROUGE-L, CIDEr) two are missing, and others differ from the official
script, most where a row has several right texts:
    BLEU     sacrebleu's, the same counts; the script lowers the case of all texts first
    NIST     nltk's takes for each order the right text that fits best, the script (mteval-v13a) all of them together
    ROUGE-L  rouge-score's F of precision and recall alike; the script's (coco-caption's) weighs recall by 1.2
    METEOR, CIDEr   missing, for the reasons in `MISSING`
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rankwise.experiments.tasks.metrics import ratio
from rankwise.variants.settings import nearest

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
References = Sequence[tuple[str, ...]]

# ------------------------------------------------------------------------------------------------------------------------ texts


def exact_match(texts: Sequence[str], references: References) -> np.ndarray:
    """(n,) 0 or 1: the text is one of the right ones, but for blanks at the ends and in runs."""
    return np.array([_plain(text) in map(_plain, right) for text, right in zip(texts, references, strict=True)], dtype=float)


def numeric_answer(texts: Sequence[str], references: References) -> np.ndarray:
    """(n,) 0 or 1: the last number of the text is the last number of a right one, as GSM8K is scored."""
    return np.array(
        [
            (number := last_number(text)) is not None and number in map(last_number, right)
            for text, right in zip(texts, references, strict=True)
        ],
        dtype=float,
    )


def last_number(text: str) -> float | None:
    """The last number in a text, commas between its digits left out."""
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def rouge(name: str, texts: Sequence[str], references: References) -> np.ndarray:
    """(n,) F of ROUGE-1, -2 or -L (rouge1, rouge2, rougeL), 0..1, against the best of the right texts."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name], use_stemmer=False)
    pairs = zip(texts, references, strict=True)
    return np.array([max(scorer.score(one, text)[name].fmeasure for one in right) for text, right in pairs])


def _corpus_metric(name: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return {"bleu": BLEU, "chrf": CHRF}[name]()


def corpus_score(name: str, texts: Sequence[str], references: References) -> float:
    """BLEU or chrF of all texts together, in points."""
    return _corpus_metric(name).corpus_score(list(texts), _streams(references)).score


def nist(texts: Sequence[str], references: References) -> float:
    """NIST of all texts together, of runs of up to 5 words, split as mteval-v13a does, in lower case; 0 and up, no points."""
    from nltk.translate.nist_score import corpus_nist
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    split = Tokenizer13a()
    words = [split(text.lower()).split() for text in texts]
    right = [[split(text.lower()).split() for text in some] for some in references]
    longest = min(5, max(map(len, words), default=0))  # of longer runs there are none, and nltk would divide by their number
    return float(corpus_nist(right, words, longest)) if longest else 0.0


def _streams(references: References) -> list[list[str | None]]:
    """As sacrebleu takes them: the first right text of every row, then the second ones, None where a row has fewer."""
    return [[right[i] if i < len(right) else None for right in references] for i in range(max(map(len, references)))]


BY_TEXT: dict[str, Callable[[Sequence[str], References], np.ndarray]] = {
    "exact_match": exact_match,
    "numeric_answer": numeric_answer,
    **{name: functools.partial(rouge, name) for name in ("rouge1", "rouge2", "rougeL")},
}
OF_CORPUS = ("bleu", "chrf")
NAMES = (*BY_TEXT, *OF_CORPUS)  # by which methods can be compared
MISSING = {
    "meteor": "its script needs Java and tables of paraphrases, nltk's version the files of WordNet, which no package has",
    "cider": "pycocoevalcap 1.2, 104 MB, has not been kept up since 2020, and its words are split by a Java program",
}
BESIDE = ("nist",)  # shown beside these: no points, and without an end


def check(names: Sequence[str]) -> None:
    """Raises: ValueError: no name, or one that is not known; says which there are."""
    if not names:
        raise ValueError(f"metrics = []: name at least one of {', '.join(NAMES)}")
    known = (*NAMES, *BESIDE)
    for name in names:
        if name not in known:
            raise ValueError(f'metrics: "{name}" is not known{nearest(name, known)}; there are: {", ".join(known)}')


def of_texts(names: Sequence[str]) -> Callable[[Sequence[str], References], dict[str, float]]:
    """What `Task.measure` is for these metrics."""
    check(names)

    def one(name: str, texts: Sequence[str], references: References) -> float:
        if name in BY_TEXT:
            return 100 * float(BY_TEXT[name](texts, references).mean())
        return nist(texts, references) if name in BESIDE else corpus_score(name, texts, references)

    def measure(texts: Sequence[str], references: References) -> dict[str, float]:
        return {name: one(name, texts, references) for name in names}

    return measure


def resampled(name: str) -> Callable[[Sequence[str], References, np.ndarray], np.ndarray]:
    """What `Task.resampled` is where this is the primary metric: (B,) points on each resample of the texts."""
    check([name])

    def by_text(texts: Sequence[str], references: References, weights: np.ndarray) -> np.ndarray:
        return 100 * (weights @ BY_TEXT[name](texts, references)) / weights.sum(1)

    def of_corpus(texts: Sequence[str], references: References, weights: np.ndarray) -> np.ndarray:
        # Sums of each text's counts, as sacrebleu's own bootstrap makes them; 200 calls of corpus_score would take minutes.
        metric = _corpus_metric(name)
        counts = np.array(metric._extract_corpus_statistics(list(texts), _streams(references)))  # (n, numbers)
        return np.array([metric._compute_score_from_stats(drawn.tolist()).score for drawn in weights @ counts])

    return of_corpus if name in OF_CORPUS else by_text


def _plain(text: str) -> str:
    return " ".join(text.split())


# ---------------------------------------------------------------------------------------------------------------------- choices


def choice_accuracy(chosen: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Accuracy by each normalisation of the likelihood (kinds/choice.py); "accuracy" is the one per byte."""
    per_byte, per_token, by_sum = (100 * (chosen == right[:, None]).mean(0)).tolist()
    return {"accuracy": per_byte, "accuracy_per_token": per_token, "accuracy_sum": by_sum}


# ---------------------------------------------------------------------------------------------------------------- modelled text


def modelled(losses: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Of blocks with losses (n,) in nats, and counts (n, 2) of tokens and bytes: what is saved of 8 bits a byte, and how.

    compression: 100 (1 - bits per byte / 8), in points, so that more is better. bits_per_byte, perplexity (of a token).
    """
    total, (num_tokens, num_bytes) = losses.sum(), counts.sum(0)
    bits = total / math.log(2) / num_bytes
    return {
        "compression": 100 * (1 - bits / 8),
        "bits_per_byte": bits,
        "perplexity": math.exp(total / num_tokens) if total / num_tokens < 700 else math.inf,
    }


def resampled_compression(losses: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(B,) points on each resample of the blocks."""
    return 100 * (1 - ratio(weights @ losses, weights @ counts[:, 1]) / math.log(2) / 8)
