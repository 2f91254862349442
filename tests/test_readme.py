"""README's commands, run as they stand: the smoke study takes the default study's place, collection that of the tests."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from rankwise.experiments import checks, config
from rankwise.experiments.catalogue import Unavailable, fetch
from rankwise.reports import tables
from rankwise.reports.results import load

from tests.tiny import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    part.strip()
    for kind, text in BLOCKS
    if kind == "sh"
    for line in text.splitlines()
    for part in line.partition("#")[0].split("&&")
    if part.strip()
]


def run(command: str, where: Path, *, limit: float = 300) -> subprocess.CompletedProcess:
    words = shlex.split(command)
    words[:1] = [sys.executable, "-m", {"rankwise": "rankwise.experiments.cli", "pytest": "pytest"}[words[0]]]
    return subprocess.run(words, cwd=where, capture_output=True, text=True, timeout=limit, env=_environment())


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}


def test_set_up_is_two_lines_that_a_shell_takes_as_they_are():
    lines = [text.strip() for kind, text in BLOCKS if kind == "sh" and "pip install" in text]
    assert len(lines) == 2 and all("\n" not in line for line in lines)
    for line in lines:
        assert line.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install")
        assert "-c constraints.txt" in line
    assert "rankwise compare" in lines[0] and "pytest" in lines[1]
    assert ".[test]" in lines[1]


def test_the_test_command_collects_every_test():
    command = next(c for c in COMMANDS if c.startswith("pytest"))
    done = run(command + " --collect-only", ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")} == found


@pytest.mark.network
@pytest.mark.slow
def test_main_command_and_the_others_end_with_a_table_and_a_report(tmp_path):
    try:
        fetch("sentence-transformers/all-MiniLM-L6-v2")
        fetch("glue/stsb")
    except Unavailable as error:
        pytest.skip(str(error))
    commands = [c for c in COMMANDS if c.startswith("rankwise")]
    assert commands[0] == "rankwise compare"
    assert any(c.startswith("rankwise report runs/smoke") for c in commands)
    for command in commands:
        if command == "rankwise compare":
            command += " smoke"
        if command.startswith("rankwise compare stsb-minilm"):
            checks.check(config.read(Path("stsb-minilm")))  # hours on a CPU: it is read and checked only
            continue
        done = run(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        if command.startswith("rankwise compare smoke"):
            assert "adalora+dora" in done.stdout and "no fair comparison" in done.stdout
            path = Path(re.search(r"report: (\S+)", done.stdout)[1])
            assert (tmp_path / path).is_file()


def test_python_examples_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loop, in_trainer = (text for kind, text in BLOCKS if kind == "python")
    row = {"input_ids": torch.randint(64, (7,), generator=torch.Generator().manual_seed(0)), "labels": torch.tensor(1)}
    batches = [{key: torch.stack([value] * 4) for key, value in row.items()}] * 404
    scope = {"model": tiny("bert"), "batches": batches}
    exec(loop, scope)
    ranks = scope["adapter"].ranks()
    assert (tmp_path / "folder" / "adapter_model.safetensors").is_file()
    assert sum(int(rank) for rank in ranks.values()) == 8 * len(ranks)
    assert len(loop[loop.index("for ") : loop.index("\n\nadapter.ranks")].splitlines()) <= 10

    args = transformers.TrainingArguments("out", max_steps=44, per_device_train_batch_size=4, report_to=[], use_cpu=True)
    scope |= {"model": tiny("bert"), "args": args, "data": [row] * 176}
    exec(in_trainer, scope)
    ranks = scope["adapter"].ranks()
    assert sum(int(rank) for rank in ranks.values()) == 8 * len(ranks)


def test_the_verdict_table_at_the_top_is_that_of_the_committed_study():
    parts = load(ROOT / "reports" / "studies" / "fair").parts()
    assert tables.verdicts_over_tasks(parts).markdown() in README.partition("## Run it")[0]
    for figure in re.findall(r"\]\((reports/[^)]*)\)", README):
        assert (ROOT / figure).is_file(), figure


def test_study_example_is_a_study():
    import tomllib

    text = next(text for kind, text in BLOCKS if kind == "toml" and "model" in tomllib.loads(text))
    study = config.parse(tomllib.loads(text), "my-study")
    checks.check(study)
    assert [entry.method for entry in study.methods] == ["lora", "dora"]


def test_printed_tree_names_what_is_there():
    tree = next(text for kind, text in BLOCKS if kind == "" and "variants/" in text)
    folder, missing = "", []
    for line in tree.splitlines():
        if not line.startswith(" "):
            folder = line.split()[0]
            missing += [] if (ROOT / folder).is_dir() else [folder]
            continue
        for name in re.findall(r"[a-z_]+\.py|[a-z]+/(?= |\*|$)", line):
            missing += [] if (ROOT / folder / name).exists() else [folder + name]
    assert missing == []


def test_the_entry_of_an_allocator_is_one_and_attaches():
    import tomllib

    from rankwise import variants
    from rankwise.experiments import config

    from tests.tiny import tiny

    text = next(text for kind, text in BLOCKS if kind == "toml" and "allocated" in text)
    frame = {"model": "m", "tasks": ["glue/stsb"], "quick": True}
    (entry,) = config.parse({**frame, **tomllib.loads(text)}, "my-study").methods
    adapter = variants.create(entry.method, **entry.settings).attach(tiny("bert"))
    assert all(hasattr(site, "magnitude") for _, site in adapter.named_sites()) and len(adapter.ranks()) == 12
