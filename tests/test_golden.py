"""Ten training losses in full precision and the final ranks of every method, as the code gave them when they were written.

A change that says that it computes the same is held to it here: exactly on the processor and torch that made a line (the
nearest line above it that starts with "#" says which), to rounding elsewhere.  `python -m tests.test_golden METHOD` adds the
lines of a new method.  Without one it makes all lines anew, which only a commit that raises NUMERICS may do.
"""

import json
import math
import platform
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
import torch
from rankwise.variants.settings import METHODS

from tests import small_world

FILE = Path(__file__).parent / "golden.txt"
ROUNDING = 1e-4  # relative; other processors sum in another order, and ten steps of AdamW carry that on


def machine(model: bool = True) -> str:
    """What must agree for results to agree to the bit.

    Virtual processors share a name, so their model's number stands beside it: Xeons of one name and width of vectors differ in
    the last bits.  Lines from before that, made on an EPYC, name no model, and hold on every one that was tried.
    """
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name", platform.processor()) + (f" model {facts['model']}" if model and "model" in facts else "")
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__.partition('+')[0]}"


def values(method: str, model: str, folder: Path) -> list[str]:
    """For each member a line of its losses and one of its ranks."""
    seeds = (3, 5) if METHODS[method].load().packable else (3,)
    rates = [small_world.RATES.get(method, 1e-2) * (1 + 0.5 * k) for k in range(len(seeds))]
    pack = small_world.pack(model, method, seeds=seeds, learning_rates=rates, max_steps=10, log_every=1)
    _, outcomes = small_world.trained(pack, folder)
    lines = []
    for member, outcome in enumerate(outcomes):
        log = (folder / f"member-{member}" / "metrics.jsonl").read_text().splitlines()
        losses = [line["loss"] for line in map(json.loads, log) if line["kind"] == "train"]
        lines.append(f"{method} {member} losses {' '.join(map(repr, losses))}")
        lines.append(f"{method} {member} ranks {' '.join(map(str, outcome.facts['ranks'].values()))}".rstrip())
    return lines


def all_values(method: str) -> list[str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            model = small_world.model(Path(folder) / "model")
            return values(method, model, Path(folder) / "run")
    finally:
        torch.set_num_threads(threads)


def written() -> dict[str, tuple[str, list[str]]]:
    """method -> what made its lines, and the lines."""
    made_on, found = "", {}
    for line in FILE.read_text().splitlines():
        if line.startswith("# "):
            made_on = line.removeprefix("# ")
        else:
            found.setdefault(line.partition(" ")[0], (made_on, []))[1].append(line)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_ranks_are_those_written_down(method):
    known = written()
    assert method in known, f"{method} is new: add its lines by `python -m tests.test_golden {method}`"
    made_on, lines = known[method]
    for line, true in zip(all_values(method), lines, strict=True):
        if made_on in (machine(), machine(model=False)) or " ranks" in line:
            assert line == true
        else:
            numbers, expected = ([float(x) for x in one.split()[3:]] for one in (line, true))
            assert all(math.isclose(a, b, rel_tol=ROUNDING) for a, b in zip(numbers, expected, strict=True)), line


def recorded(text: str, methods: Sequence[str], known: Collection[str]) -> str:
    """The file with the lines of new methods behind the others, under the name of this machine where another made those.

    Raises:
        ValueError: a method that has its lines already.
    """
    if again := sorted(set(methods) & set(known)):
        raise ValueError(f"{again[0]} has its lines in {FILE.name}: a change of them starts by taking them out")
    last = [line for line in text.splitlines() if line.startswith("# ")][-1]
    header = [] if last == f"# {machine()}" else [f"# {machine()}"]
    return text + "".join(f"{line}\n" for line in header + [line for method in methods for line in all_values(method)])


def test_lines_of_a_new_method_go_behind_the_others_and_say_what_made_them(monkeypatch):
    monkeypatch.setattr(f"{__name__}.all_values", lambda method: [f"{method} 0 ranks 3"])
    text = f"# {machine()}\nlora 0 ranks 2\n"
    assert recorded(text, ["new"], {"lora"}) == text + "new 0 ranks 3\n"
    elsewhere = "# another\nlora 0 ranks 2\n"
    assert recorded(elsewhere, ["new"], {"lora"}) == elsewhere + f"# {machine()}\nnew 0 ranks 3\n"
    with pytest.raises(ValueError, match="lora has its lines"):
        recorded(text, ["lora"], {"lora"})


if __name__ == "__main__":  # pragma: no cover
    import sys

    if methods := sys.argv[1:]:
        FILE.write_text(recorded(FILE.read_text(), methods, written()))
    else:
        FILE.write_text(recorded(f"# {machine()}\n", list(METHODS), ()))
