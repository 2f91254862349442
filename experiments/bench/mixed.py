"""A bank's mixed batch beside a batch of one adapter, and beside PEFT's mixed batch, in evaluation.

rankwise bench --mixed --json reports/bench/mixed.json

An encoder of MiniLM's shape with random weights; adapters of rank 8 at every linear of its layers.  The rows of a mixed batch
have their adapters in turn, so that no two neighbours share one; "sorted" is the same batch with an adapter's rows together.
One token is what a generation computes at a time: there 16 forward passes follow each other.
"""

import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rankwise import variants
from rankwise.experiments.bench import timing
from rankwise.variants.adapter.probe import fill
from torch import Tensor, nn

CPU = torch.device("cpu")
RATIOS = (("mixed", "one"), ("peft", "mixed"), ("peft", "frozen"))
TARGETS = {"mixed/one": 1.25, "peft/mixed": 1.5}  # at most; at least


@dataclass(frozen=True)
class Size:
    """adapters x rows_each rows of so many tokens, in each of `tokens`; hidden, layers, heads: of the encoder."""

    adapters: int = 8
    rows_each: int = 4
    tokens: tuple[int, ...] = (1, 16, 64)
    hidden: int = 384
    layers: int = 6
    heads: int = 12
    rank: int = 8
    rounds: int = 15


def rows(size: Size | None = None) -> Iterator[dict[str, Any]]:
    """A row for each method and number of tokens, as soon as it is measured: the seconds of each arm (medians over rounds), and
    the median over the rounds of each ratio within a round, with its quartiles.

    Raises:
        RuntimeError: our mixed rows differ from PEFT's.
    """
    size = size or Size()
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method in ("lora", "dora"):
            folders = _saved(size, method, Path(scratch))
            for tokens in size.tokens:
                yield _row(method, tokens, _measured(size, method, folders, tokens))


def _encoder(size: Size) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden,
        vocab_size=1000,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return BertModel(config, add_pooling_layer=False).eval()


def _saved(size: Size, method: str, scratch: Path) -> list[Path]:
    model, folders = _encoder(size), []
    for seed in range(size.adapters):
        adapter = variants.create(method, rank=size.rank, alpha=2 * size.rank).attach(model, "all-linear", head=[])
        fill(adapter, 0.05, seed)
        folders.append(scratch / f"{method}-{seed}")
        variants.save_pretrained(adapter, folders[-1])
        adapter.detach()
    return folders


@torch.no_grad()
def _measured(size: Size, method: str, folders: list[Path], tokens: int) -> dict[str, list[float]]:
    """Seconds of each arm, in turn, round by round."""
    from peft import PeftModel

    names = [str(row % size.adapters) for row in range(size.adapters * size.rows_each)]
    ids = torch.randint(1000, (len(names), tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    frozen, one, many = (_encoder(size) for _ in range(3))
    variants.load_pretrained(one, folders[0]).eval()
    bank = variants.Bank(many)
    for name, folder in enumerate(folders):
        bank.load(str(name), folder)
    passes = 16 if tokens == 1 else 1

    def run(model: Any, **also: Any) -> Any:
        return [model(**batch, **also) for _ in range(passes)][-1]

    def run_mixed(owners: list[str]) -> Any:
        with bank.mixed(owners):
            return run(bank.model)

    arms: dict[str, Callable[[], Any]] = {
        "frozen": lambda: run(frozen),
        "one": lambda: run(one),
        "mixed": lambda: run_mixed(names),
        "sorted": lambda: run_mixed(sorted(names)),
    }
    if method == "lora":  # PEFT refuses the others in a mixed batch
        theirs = PeftModel.from_pretrained(_encoder(size), folders[0], adapter_name="0")
        for name, folder in enumerate(folders[1:], start=1):
            theirs.load_adapter(folder, adapter_name=str(name))
        theirs.eval()
        arms["peft"] = lambda: run(theirs, adapter_names=names)
        ours, expected = (arms[arm]().last_hidden_state for arm in ("mixed", "peft"))
        _check(ours, expected)
    return timing.interleave(arms, CPU, size.rounds, warmup=2)


def _check(ours: Tensor, expected: Tensor) -> None:
    worst = (ours - expected).abs().max().item()
    if worst > 1e-3:
        raise RuntimeError(f"mixed rows differ from PEFT's by {worst:.1e}")


def _row(method: str, tokens: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    row: dict[str, Any] = {"method": method, "tokens": tokens}
    row["seconds"] = {arm: statistics.median(taken) for arm, taken in seconds.items()}
    for over, under in RATIOS:
        if over in seconds:
            values = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
            name = f"{over}/{under}"
            row |= {name: statistics.median(values), f"{name}_spread": timing.quartiles(values)}
    return row


def head(size: Size | None = None) -> str:
    """What the lines are of."""
    size = size or Size()
    return f"{size.adapters} adapters x {size.rows_each} rows, {torch.get_num_threads()} threads; milliseconds, medians"


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""
    medians = "  ".join(f"{arm} {1000 * seconds:.1f}" for arm, seconds in row["seconds"].items())
    found = f"mixed / one {row['mixed/one']:.2f} (at most {TARGETS['mixed/one']})"
    if "peft/mixed" in row:
        found += f", PEFT / mixed {row['peft/mixed']:.2f} (at least {TARGETS['peft/mixed']})"
        found += f", PEFT / frozen {row['peft/frozen']:.2f}"
    return f"{row['method']:5} {row['tokens']:4} tokens   {medians}   {found}"
