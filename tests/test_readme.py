"""README's commands, run as they stand: the smoke study takes the default study's place, collection that of the tests."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from rankwise.experiments import checks, cli, config
from rankwise.experiments.sources import Unavailable, fetch
from safetensors.numpy import save_file

from tests import small_world
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


GATE = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
TIERS = {"quick": next(c for c in COMMANDS if c.startswith("pytest")), "slow": re.search(r"^pytest .* -m slow$", GATE, re.M)[0]}


def run(command: str, where: Path, *, limit: float = 300) -> subprocess.CompletedProcess:
    words = shlex.split(command)
    words[:1] = [sys.executable, "-m", {"rankwise": "rankwise.experiments.cli", "pytest": "pytest"}[words[0]]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    return subprocess.run(words, cwd=where, capture_output=True, text=True, timeout=limit, env=environment)


def test_set_up_is_two_lines_that_a_shell_takes_as_they_are():
    lines = [text.strip() for kind, text in BLOCKS if kind == "sh" and "pip install" in text]
    assert len(lines) == 2 and all("\n" not in line for line in lines)
    for line in lines:
        assert line.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install")
        assert "-c constraints.txt" in line
    assert "rankwise compare" in lines[0] and "pytest" in lines[1]
    assert ".[test]" in lines[1]


def test_the_two_commands_for_tests_divide_all_of_them_by_one_marker():
    """Neither names a file and one marker is all that they differ in, so that no test is in neither or in both."""
    quick, slow = (shlex.split(command) for command in TIERS.values())
    assert quick[-2:] == ["-m", "not slow"] and slow[-2:] == ["-m", "slow"]
    options = {"pytest", "-q", "-n", "auto", "--dist", "loadfile", "loadscope", "worksteal", "--durations=20"}
    assert set(quick[:-2]) | set(slow[:-2]) <= options
    assert 'eval "$command"' in GATE


@pytest.mark.slow
def test_every_test_is_collected_by_one_of_the_two_commands():
    def collected(command: str) -> set[str]:
        done = run(command + " --collect-only", ROOT)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return {line for line in done.stdout.splitlines() if "::" in line}

    quick, slow = (collected(command) for command in TIERS.values())
    assert quick and slow and not quick & slow
    assert quick | slow == collected("pytest -q")
    files = {line.split("::")[0] for line in quick | slow}
    assert files == {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")}


SHIPPED_COMMANDS = [c for c in COMMANDS if c.startswith("rankwise")]


def shortened(command: str, smoke: str, model: str = "sentence-transformers/all-MiniLM-L6-v2") -> str | None:
    """The command with the smoke study in the default study's place; None: hours on a CPU, so it is read and checked only.

    That on a file of the reader's own takes one method and this model.
    """
    if command.startswith("rankwise compare stsb-minilm"):
        checks.check(config.read(Path("stsb-minilm")))
        return None
    if "--data" in command:
        return re.sub(r"--model \S+", f"--model {shlex.quote(model)}", command) + " --methods lora --threads 1"
    command = "rankwise compare smoke" if command == "rankwise compare" else command
    return command.replace("compare smoke", f"compare {smoke}")


def write_own_data(folder: Path) -> None:
    """The file of the command on a reader's own data."""
    rows = [f"{'a b c' if i % 2 else 'x y z'} {i},{'early' if i % 2 else 'late'}\n" for i in range(40)]
    (folder / "my-texts.csv").write_text("text,label\n" + "".join(rows), encoding="utf-8")


def write_own_adapter(folder: Path) -> None:
    """That of the command on a reader's own adapter."""
    (folder / "my-adapter").mkdir()
    factors = {"A": np.ones((1, 3), np.float32), "B": np.ones((2, 1), np.float32)}
    tensors = {f"base_model.model.q.lora_{factor}.weight": values for factor, values in factors.items()}
    save_file(tensors, folder / "my-adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q"]}
    (folder / "my-adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def check_comparison(output: str, where: Path) -> None:
    assert "adalora+dora" in output and "no fair comparison" in output
    assert (where / Path(re.search(r"report: (\S+)", output)[1])).is_file()


def test_the_commands_are_there():
    assert SHIPPED_COMMANDS[0] == "rankwise compare"
    assert any(c.startswith("rankwise report runs/smoke") for c in SHIPPED_COMMANDS)


def test_the_commands_end_with_a_table_and_a_report_in_the_small_world(tmp_path, monkeypatch, capsys, figures_undrawn):
    """In this process, over a model and a task made from nothing: two of the smoke study's methods, as that file sets them."""
    small_world.register(monkeypatch.setitem)
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "experiments" / "studies" / "smoke.toml").read_text(encoding="utf-8")
    model = small_world.model(tmp_path / "model")
    text = re.sub(r"^model = .*$", f'model = "{model}"', text, flags=re.M)
    text = re.sub(r"^tasks = .*$", 'tasks = ["small/regression"]', text, flags=re.M)
    (tmp_path / "smoke.toml").write_text(text, encoding="utf-8")
    write_own_data(tmp_path)
    write_own_adapter(tmp_path)
    smoke = "smoke.toml --threads 1 --methods lora,adalora+dora"
    for command in filter(None, (shortened(c, smoke, model) for c in SHIPPED_COMMANDS)):
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        assert not ended.value.code, f"{command}\n{output.err[-3000:]}"
        if command.startswith("rankwise compare smoke"):
            check_comparison(output.out, tmp_path)


@pytest.mark.network
@pytest.mark.slow
def test_the_commands_end_with_a_table_and_a_report_on_the_real_model(tmp_path):
    try:
        fetch("sentence-transformers/all-MiniLM-L6-v2")
        fetch("glue/stsb")
    except Unavailable as error:
        pytest.skip(str(error))
    write_own_data(tmp_path)
    write_own_adapter(tmp_path)
    for command in filter(None, (shortened(c, "smoke") for c in SHIPPED_COMMANDS)):
        done = run(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        if command.startswith("rankwise compare smoke"):
            check_comparison(done.stdout, tmp_path)


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


def test_the_figures_are_there():
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
    folders, missing = {}, []  # the folder that each indent stands in
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip(" "))
        folders = {at: path for at, path in folders.items() if at < indent}
        parent = folders[max(folders)] if folders else ""
        names = re.findall(r"[a-z0-9_]+\.py|[a-z]+/(?= |\*|$)", line) if indent else [line.split()[0]]
        missing += [parent + name for name in names if not (ROOT / parent / name).exists()]
        if names and names[0].endswith("/"):
            folders[indent] = parent + names[0]
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
