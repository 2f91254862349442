"""Numbers that papers give of weights, shown beside our own measurements: quoted.toml, with the place of each."""

import tomllib
from functools import cache
from pathlib import Path

from rankwise.reports.papers.published import Data, Number, PositiveInt, Text

FILE = Path(__file__).with_name("quoted.toml")


class Subspaces(Data):
    """Overlap of learned subspaces."""

    source: Text
    shared_above: Number
    """The normalized similarity, 0 to 1, above which the paper calls a dimension shared."""


class AmplificationAtRank(Data):
    """How much of W lies in three pairs of subspaces of one rank; Frobenius norms."""

    rank: PositiveInt
    of_update: Number
    of_weight: Number
    of_random: Number
    weight_norm: Number
    update_norm: Number
    factor: Number
    """update_norm / of_update, as printed."""

    @property
    def over_random(self) -> float:
        """What W holds in dW's directions over what it holds in random ones."""
        return self.of_update / self.of_random


class Amplification(Data):
    source: Text
    table: Text
    weight: Text
    rows: list[AmplificationAtRank]


class Directions(Data):
    """Correlation of the change of direction (dD) with the change of magnitude (dM), by method."""

    source: Text
    weights: Text
    correlations: dict[str, Number]


class Quoted(Data):
    subspaces: Subspaces
    amplification: Amplification
    directions: Directions


@cache
def quoted() -> Quoted:
    """Every quoted number."""
    return Quoted(**tomllib.loads(FILE.read_text(encoding="utf-8")))
