"""Ten training losses in full precision and the final ranks of every method, as the code gave them when they were written.

A change that says that it computes the same is held to it here: exactly on the processor and torch that made the file,
to rounding elsewhere.  Made by `python -m tests.test_golden`; only a commit that says why may change tests/golden.txt.
"""

import json
import math
import platform
import tempfile
from pathlib import Path

import pytest
import torch
from rankwise.variants.settings import METHODS

from tests import small_world

FILE = Path(__file__).parent / "golden.txt"
ROUNDING = 1e-4  # relative; other processors sum in another order, and ten steps of AdamW carry that on


def machine() -> str:
    """What must agree for results to agree to the bit."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    # Virtual processors share a name; the width of their vectors decides the order of a sum.
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


@pytest.fixture(scope="module")
def golden() -> tuple[str, dict[str, list[str]]]:
    first, *lines = FILE.read_text().splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        found.setdefault(line.partition(" ")[0], []).append(line)
    return first.removeprefix("# "), found


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_ranks_are_those_written_down(method, golden):
    made_on, known = golden
    assert method in known, f"{method} is new: add its lines by `python -m tests.test_golden {method}`"
    for line, true in zip(all_values(method), known[method], strict=True):
        if made_on == machine() or " ranks" in line:
            assert line == true
        else:
            numbers, expected = ([float(x) for x in one.split()[3:]] for one in (line, true))
            assert all(math.isclose(a, b, rel_tol=ROUNDING) for a, b in zip(numbers, expected, strict=True)), line


if __name__ == "__main__":  # pragma: no cover
    import sys

    if len(sys.argv) > 1:
        FILE.write_text(FILE.read_text() + "".join(f"{line}\n" for method in sys.argv[1:] for line in all_values(method)))
    else:
        FILE.write_text("\n".join([f"# {machine()}", *(line for method in METHODS for line in all_values(method))]) + "\n")
