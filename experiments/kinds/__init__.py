"""The kinds of task, one file a kind.  A new kind is its file and its line here."""

import functools
import pkgutil

from rankwise.experiments.kinds.interface import Kind, Undefined

__all__ = ["REGISTRY", "Kind", "Undefined", "check", "get", "names"]

# Name -> module:class, imported when it is first needed: study files are checked without torch.
REGISTRY = {
    "regression": "rankwise.experiments.kinds.rows:Regression",
    "classification": "rankwise.experiments.kinds.rows:Classification",
    "token-classification": "rankwise.experiments.kinds.words:Words",
    "span": "rankwise.experiments.kinds.spans:Spans",
    "generation": "rankwise.experiments.kinds.generation:Generation",
    "choice": "rankwise.experiments.kinds.choice:Choice",
    "language-modelling": "rankwise.experiments.kinds.language_modelling:LanguageModelling",
    "multi-label": "rankwise.experiments.kinds.multi_label:MultiLabel",
    "image-classification": "rankwise.experiments.kinds.image_classification:ImageClassification",
}


def names() -> list[str]:
    """The names of all kinds."""
    return list(REGISTRY)


def check(name: str) -> None:
    """Raises: ValueError: there is no kind of this name; says which there are."""
    if name not in REGISTRY:
        *others, last = REGISTRY
        raise ValueError(f'kind = "{name}": should be {", ".join(others)} or {last}')


def get(name: str) -> Kind:
    """The kind of this name. Raises: ValueError: there is none."""
    check(name)
    return _made(REGISTRY[name])


@functools.cache
def _made(where: str) -> Kind:
    return pkgutil.resolve_name(where)()
