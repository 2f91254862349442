"""How many parameters a method trains, computed from the shapes of the model that it is put into.

    LoRA r (I + O)    AdaLoRA r (I + O + 1)    DoRA r (I + O) + O    VeRA r + O    DVoRA r + 2 O       for each matrix (O, I)
    adapter 2 d b + b + d each: two a layer (Houlsby), one (Pfeiffer), one and its norm's 2 d (Lin)    prefix tokens  d t

Adapters and prefixes as LoRA sec. 5.1 writes them, with d the model's width and b the bottleneck; BitFit trains every
bias.  Task heads are never counted, as in the papers.  The shapes stand in shapes.toml.
"""

import tomllib
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rankwise.variants.settings import explain, nearest

FILE = Path(__file__).with_name("shapes.toml")

PositiveInt = Annotated[int, Field(gt=0)]
Size = Annotated[int, Field(ge=0)]

NEEDS = {  # method: the one size that it needs besides the model's shape, if any
    "full": None,
    "bitfit": None,
    "top-layers": "layers",
    "lora": "rank",
    "adalora": "rank",
    "dora": "rank",
    "vera": "rank",
    "dvora": "rank",
    "adapter-houlsby": "bottleneck",
    "adapter-pfeiffer": "bottleneck",
    "adapter-lin": "bottleneck",
    "prefix-embedding": "tokens",
    "prefix-layer": "tokens",
}


class ModelShape(BaseModel):
    """The sizes of one model; see shapes.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())
    model: str | None = None
    """Name on the hub; none where it was never released."""
    family: Literal["bert", "gpt2", "llama", "bart"]
    hidden: PositiveInt
    layers: PositiveInt
    intermediate: PositiveInt
    vocabulary: PositiveInt
    key_value: PositiveInt | None = None
    """Outputs of the key and of the value matrix; `hidden` where it is not given."""
    positions: Size = 0
    relative: Size = 0
    token_types: Size = 0
    convolution: Size = 0
    pooler: bool = False
    tied: bool = False
    """Whether llama's output layer is its embedding; the other families' always is."""

    @property
    def matrices(self) -> dict[str, list[tuple[int, int, int]]]:
        """Name of each kind of matrix -> its (inputs, outputs, number in the model), one entry a distinct shape."""
        d, wide, kv = self.hidden, self.intermediate, self.key_value or self.hidden
        stacks = 2 if self.family == "bart" else 1  # encoder and decoder
        attentions = (3 if self.family == "bart" else 1) * self.layers  # the decoder's cross-attention is the third
        sizes = {
            "query": [(d, d, attentions)],
            "key": [(d, kv, attentions)],
            "value": [(d, kv, attentions)],
            "output": [(d, d, attentions)],
        }
        if self.family == "llama":
            sizes["gate"] = [(d, wide, self.layers)]
        sizes["up"] = [(d, wide, stacks * self.layers)]
        sizes["down"] = [(wide, d, stacks * self.layers)]
        return sizes

    @property
    def weights(self) -> int:
        """Parameters of the layers' matrices, without biases."""
        return sum(i * o * n for sizes in self.matrices.values() for i, o, n in sizes)

    @property
    def norms(self) -> int:
        """Normalisations that have a weight (d,) and, in every family but llama, a bias (d,)."""
        inner = {"bert": 2, "gpt2": 2, "llama": 2, "bart": 5}[self.family] * self.layers
        outer = {"bert": 1, "gpt2": 1, "llama": 1, "bart": 2}[self.family]  # of the embeddings, or after the last layer
        return inner + outer + (self.relative > 0) + (self.convolution > 0)

    @property
    def biases(self) -> int:
        """Parameters of every bias, the pooler's excluded."""
        if self.family == "llama":
            return 0
        linear = sum(o * n for sizes in self.matrices.values() for _, o, n in sizes)
        return linear + self.norms * self.hidden + (self.hidden if self.convolution else 0)

    @property
    def embeddings(self) -> int:
        rows = self.vocabulary + self.relative + self.token_types
        rows += self.positions * (2 if self.family == "bart" else 1)
        if self.family == "llama" and not self.tied:
            rows += self.vocabulary  # the output layer
        return rows * self.hidden

    @property
    def total(self) -> int:
        """Every parameter of the pretrained model, task heads and masked-LM heads excluded."""
        d = self.hidden
        convolution = self.convolution * d * d
        pooler = d * d + d if self.pooler else 0
        return self.embeddings + self.weights + self.norms * d + self.biases + convolution + pooler

    @property
    def layer(self) -> int:
        """Parameters of one layer of a model whose layers are alike, its biases and norms included.

        Raises: ValueError: BART, whose encoder and decoder layers differ.
        """
        if self.family == "bart":
            raise ValueError("an encoder layer and a decoder layer of bart differ: name another model")
        per_layer = self.weights // self.layers + 2 * self.hidden
        if self.family != "llama":
            per_layer += sum(o * n for sizes in self.matrices.values() for _, o, n in sizes) // self.layers + 2 * self.hidden
        return per_layer


class Trained(BaseModel):
    """What was trained: a method, on which matrices of which model, how large."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    shape: str
    """A name in shapes.toml."""
    method: Literal[tuple(NEEDS)]
    targets: list[str] | Literal["all"] | None = None
    """Kinds of matrices, or "all"; for methods that go into matrices."""
    rank: PositiveInt | None = None
    """Of each matrix; AdaLoRA's mean rank, every matrix having the same."""
    bottleneck: PositiveInt | None = None
    tokens: PositiveInt | None = None
    layers: PositiveInt | None = None

    @model_validator(mode="after")
    def _sizes_fit(self) -> "Trained":
        known = shape(self.shape)
        wanted = NEEDS[self.method]
        for name in ("rank", "bottleneck", "tokens", "layers"):
            given = getattr(self, name) is not None
            if given and name != wanted:
                raise ValueError(f'{name} = {getattr(self, name)} has no effect on "{self.method}": leave it out')
            if not given and name == wanted:
                raise ValueError(f'"{self.method}" needs {name}: give a whole number')
        if (wanted == "rank") != (self.targets is not None):
            rule = "needs targets" if wanted == "rank" else "takes no targets"
            raise ValueError(f'"{self.method}" {rule}; targets are "all" or names of {", ".join(known.matrices)}')
        for name in self.targets if isinstance(self.targets, list) else ():
            if name not in known.matrices:
                close, there = nearest(name, known.matrices), ", ".join(known.matrices)
                raise ValueError(f'target "{name}" is no matrix of {self.shape}{close}; there are: {there}')
        if isinstance(self.targets, list) and (not self.targets or len(set(self.targets)) < len(self.targets)):
            raise ValueError(f"targets = {self.targets}: name at least one matrix, and each once")
        if self.layers is not None and self.layers > known.layers:
            raise ValueError(f"layers = {self.layers}: {self.shape} has {known.layers}")
        return self

    def count(self) -> int:
        """Trained parameters, the task head excluded."""
        model = shape(self.shape)
        d = model.hidden
        if self.method == "full":
            return model.total
        if self.method == "bitfit":
            return model.biases
        if self.method == "top-layers":
            return self.layers * model.layer
        if self.bottleneck is not None:
            adapter = 2 * d * self.bottleneck + self.bottleneck + d
            number = 2 * model.layers if self.method == "adapter-houlsby" else model.layers
            return number * adapter + (2 * d * model.layers if self.method == "adapter-lin" else 0)
        if self.tokens is not None:
            return self.tokens * d * (model.layers if self.method == "prefix-layer" else 1)
        names = model.matrices if self.targets == "all" else self.targets
        each = {
            "lora": lambda i, o, r: r * (i + o),
            "adalora": lambda i, o, r: r * (i + o + 1),
            "dora": lambda i, o, r: r * (i + o) + o,
            "vera": lambda i, o, r: r + o,
            "dvora": lambda i, o, r: r + 2 * o,
        }[self.method]
        return sum(n * each(i, o, self.rank) for name in names for i, o, n in model.matrices[name])

    def percent(self, of: Literal["pretrained", "all"]) -> float:
        """The count in percent of the pretrained parameters, or of these and the trained ones (as PEFT prints it)."""
        count = self.count()
        return 100 * count / (shape(self.shape).total + (count if of == "all" else 0))


@cache
def shapes() -> dict[str, ModelShape]:
    """Every shape by its name.

    Raises: ValueError: shapes.toml names an unknown key or a size that is none; one line for each fault.
    """
    return read(FILE.read_text(encoding="utf-8"))


def read(text: str) -> dict[str, ModelShape]:
    """The shapes that a TOML text describes. Raises: ValueError: as `shapes`."""
    by_name = {}
    for name, values in tomllib.loads(text).items():
        try:
            by_name[name] = ModelShape(**values)
        except ValidationError as error:
            raise ValueError("\n".join(explain(error, ModelShape, where=f"shapes.toml: {name}"))) from None
    return by_name


def shape(name: str) -> ModelShape:
    """One model's shape. Raises: ValueError: there is none of that name; offers the nearest."""
    known = shapes()
    if name not in known:
        raise ValueError(f'no shape "{name}"{nearest(name, known)}; there are: {", ".join(known)}')
    return known[name]
