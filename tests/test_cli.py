"""The command as a user meets it: exit codes, one line for each fault, nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rankwise import variants

from tests import command, small_world
from tests.tiny import tiny

ROOT = Path(__file__).parent.parent
STUDY = """
model = "sentence-transformers/all-MiniLM-L6-v2"
tasks = ["glue/stsb"]
quick = true
[training]
epochs = 1
[[methods]]
method = "lora"
rank = 4
learning_rate = 1e-3
[[methods]]
method = "adalora"
initial_rank = 6
target_rank = 4
learning_rate = 1e-3
"""


def rankwise(*words: object, where: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    call = [sys.executable, "-m", "rankwise.experiments.cli", *map(str, words)]
    everything = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(call, cwd=where, capture_output=True, text=True, timeout=120, env=everything)


def in_process(capsys: pytest.CaptureFixture, *words: object) -> subprocess.CompletedProcess:
    """The same without a new interpreter: a second quicker."""
    capsys.readouterr()
    return subprocess.CompletedProcess(words, command.rankwise(*words), *capsys.readouterr())


def refused(done: subprocess.CompletedProcess, *words: str, lines: int = 1) -> None:
    """Exit code 2 and so many lines, which hold the words; no traceback, nothing on standard output."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    said = done.stderr.strip().splitlines()
    assert len(said) == lines, done.stderr
    assert all(line.startswith("rankwise: ") for line in said)
    for word in words:
        assert word in done.stderr


def study(tmp_path: Path, *changes: tuple[str, str]) -> Path:
    text = STUDY
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


WRONG = {
    "unknown-key": (("quick = true", "quikc = true"), ["quikc", 'did you mean "quick"?']),
    "unknown-training-key": (("epochs = 1", "epoch = 1"), ["training.epoch", 'did you mean "epochs"?']),
    "unknown-method-key": (("rank = 4", "rank = 4\nalhpa = 8"), ["alhpa", 'did you mean "alpha"?']),
    "unknown-method": (('"lora"', '"loar"'), ['"loar"', 'did you mean "lora"?']),
    "unknown-task": (("glue/stsb", "glue/stbs"), ["glue/stbs", "glue/stsb"]),
    "wrong-type": (("rank = 4", 'rank = "4"'), ["rank = '4'", "valid integer"]),
    "bool-is-no-number": (("rank = 4", "rank = true"), ["rank = True", "valid integer"]),
    "negative-rank": (("rank = 4", "rank = -4"), ["rank = -4", "greater than 0"]),
    "zero-rank": (("rank = 4", "rank = 0"), ["rank = 0", "greater than 0"]),
    "negative-rate": (("1e-3", "-1e-3"), ["learning_rate", "-0.001", "greater than 0"]),
    "nan-rate": (("1e-3", "nan"), ["learning_rate", "nan"]),
    "infinite-alpha": (("rank = 4", "rank = 4\nalpha = inf"), ["alpha = inf", "finite"]),
    "nan-decay": (("epochs = 1", "epochs = 1\nweight_decay = nan"), ["weight_decay = nan"]),
    "dropout-of-one": (("rank = 4", "rank = 4\ndropout = 1.0"), ["dropout = 1.0", "less than 1"]),
    "negative-epochs": (("epochs = 1", "epochs = -1"), ["epochs = -1", "greater than 0"]),
    "no-task": (('tasks = ["glue/stsb"]', ""), ["tasks", "at least one task"]),
    "target-above-initial": (("target_rank = 4", "target_rank = 9"), ["target_rank = 9", "initial_rank = 6"]),
    "phases-too-long": (
        ("target_rank = 4", "target_rank = 4\nwarmup_steps = 100\nfinal_steps = 100"),
        ["warmup_steps = 100", "final_steps = 100", "180"],
    ),
    "phases-of-the-whole-run": (
        ("target_rank = 4", 'target_rank = 4\nwarmup_steps = "60%"\nfinal_steps = "50%"'),
        ["60%", "50%", "180"],
    ),
    "share-that-is-none": (("target_rank = 4", 'target_rank = 4\ninterval = "often"'), ["often", "10%"]),
    "targets-of-a-method-without": (('"lora"\nrank = 4', '"head"\ntargets = "mlp"'), ["targets", "no effect"]),
    "default-nobody-reads": (("[training]", "[defaults]\nbeta3 = 0.1\n[training]"), ["beta3", "no method"]),
    "rates-without-sweep": (("learning_rate = 1e-3", "learning_rates = [1e-3, 2e-3]"), ["learning rates", "[sweep]"]),
    "same-label-twice": (('"adalora"\ninitial_rank = 6\ntarget_rank = 4', '"lora"\nrank = 2'), ['"lora"', "label"]),
    "licence-not-accepted": (("glue/stsb", "conll2003"), ["conll2003", "accept"]),
    "not-toml": (("[training]", "[training"), ["not a TOML file"]),
    "list-that-is-none": (('tasks = ["glue/stsb"]', "tasks = true"), ["tasks = True", "valid list"]),
    "endless-seeds": (('tasks = ["glue/stsb"]', 'tasks = ["glue/stsb"]\nseeds = 1000000000000'), ["seeds", "from 1 to 10,000"]),
    "fault-beside-taken-ranks": (
        ('"adalora"\ninitial_rank = 6\ntarget_rank = 4', '"dora"\nranks_of = "lora"\npermuted = 3'),
        ["permuted = 3", "boolean"],
    ),
    "long-label": (("rank = 4", f'rank = 4\nlabel = "{"x" * 300}"'), ["300 bytes", "at most 100", "folders of the runs"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_study_is_refused_with_value_rule_and_remedy(tmp_path, case, capsys):
    change, words = WRONG[case]
    refused(in_process(capsys, "compare", study(tmp_path, change), "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_study_without_methods_is_refused(tmp_path):
    path = tmp_path / "none.toml"
    path.write_text(STUDY.partition("[[methods]]")[0])
    refused(rankwise("compare", path), "at least one method")


def test_several_faults_are_said_at_once(tmp_path):
    path = study(tmp_path, ("rank = 4", "rank = -4"), ("epochs = 1", "epochs = 0"), ("quick", "quikc"))
    refused(rankwise("compare", path), "rank = -4", "epochs = 0", "quikc", lines=3)


WITHOUT_TORCH = """
import contextlib, io, json, sys, time
from rankwise.experiments import cli
for words in json.loads(sys.argv.pop(1)):
    sys.argv[1:] = words
    begun, said, code = time.perf_counter(), io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    print(json.dumps([words, code, "torch" in sys.modules, time.perf_counter() - begun, said.getvalue()]))
"""


def test_refusal_and_help_of_every_command_need_no_torch(tmp_path):
    wrong = study(tmp_path, ("rank = 4", "rank = -4"))
    commands = [
        "compare",
        "report",
        "paper",
        "ranks",
        "doctor",
        "export",
        "generate",
        "bench",
        "list",
        "analysis",
        "calibration",
    ]
    helped = [["--help"], *([command, "--help"] for command in commands), ["list"]]
    helped += [["analysis", command, "--help"] for command in ("subspace", "magnitude", "report", "peft-comparison")]
    refused = [
        ["compare", str(wrong)],
        ["compare", "smoke", "--device", "gpu"],
        ["report", str(tmp_path)],
        ["ranks", str(tmp_path)],
        ["doctor", str(tmp_path)],
        ["paper", "adalora-1", "--variant", "papre"],
        ["export", str(tmp_path), "--to", "lora", "--out", str(tmp_path / "out")],
        ["generate", str(tmp_path), "--prompt", "once"],
        ["bench", "--ablation", "--full"],
        ["bench", "--ablation", "--cases", "linear/*"],
        ["bench", "--tried", "--repetitions", "2"],
        ["analysis"],
        ["analysis", "subspace", "--out", str(tmp_path), "--steps", "3"],
        ["analysis", "magnitude", "--out", str(tmp_path), "--seeds", "0"],
        ["analysis", "report", str(tmp_path)],
        ["calibration", str(tmp_path)],
        ["calibration", str(tmp_path), "--seeds", "1"],
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(helped + refused)], capture_output=True, text=True, env=environment
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(helped) + len(refused), done.stderr
    for words, code, has_torch, seconds, said in found:
        assert code == (0 if words in helped else 2) and not has_torch, (words, said)
        assert seconds < 5, words  # a second on an idle machine, the start of Python included; the margin is for a busy one


@pytest.mark.parametrize("module", ["rankwise", "rankwise.experiments", "rankwise.experiments.cli"])
@pytest.mark.slow
def test_python_m_is_the_command(module):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", module, "compare", "smok"], capture_output=True, text=True, env=environment)
    refused(done, 'did you mean "smoke"?')


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "no-such.toml"], ["no-such.toml", "no such study"]),
        (["compare", "smok"], ['did you mean "smoke"?']),
        (["compare", "smoke", "--methods", "lroa"], ['"lroa"', 'did you mean "lora"?']),
        (["compare", "smoke", "--seeds", "0"], ["--seeds 0"]),
        (["compare", "smoke", "--pack", "-1"], ["--pack -1"]),
        (["compare", "smoke", "--devcie", "cpu"], ["--devcie"]),
        (["comapre"], ["comapre"]),
        (["report", "no-such-folder"], ["no-such-folder"]),
        (["ranks", "no-such-folder"], ["no-such-folder"]),
        (["compare", "smoke", "--threads", "x"], ["--threads x", "valid integer"]),
        (["compare", "smoke", "--threads", "0"], ["--threads 0", "at least 1"]),
        (["compare", "smoke", "--device", "gpu"], ["--device gpu", "cpu, cuda, cuda:N, or auto"]),
        (["compare", "smoke", "--tasks", ""], ["--tasks is empty", "glue/stsb"]),
        (["compare", "smoke", "--out", "README.md/runs"], ["--out README.md/runs", "README.md is a file"]),
        (["compare", "experiments"], ["experiments is a folder", ".toml"]),
        (["report", "README.md"], ["README.md is a file"]),
        (["report", "tests", "--out", "README.md"], ["--out README.md", "this is a file"]),
        (["ranks", "README.md"], ["README.md is a file"]),
        (["ranks", "tests", "--csv", "tests"], ["--csv tests", "this is a folder"]),
        (["ranks", "tests", "--figures", "README.md/x"], ["--figures README.md/x", "README.md is a file"]),
        (["export", "tests", "--to", "loar", "--out", "no-such"], ["--to loar", "lora, merged, kohya or gguf"]),
        (["export", "tests", "--to", "lora", "--out", "no-such", "--total-rank", "0"], ["--total-rank 0", "at least 1"]),
        (["paper", "adalora-1", "--variant", "papre"], ["--variant papre", "paper, script"]),
        (["paper", "--variant", "papre"], ["--variant papre", "paper, script"]),
        (["paper", "adalora-1", "--cells", ","], ["--cells is empty", "stsb"]),
        (["paper", "adalora-1", "--cells", "stsb", "--scale", "nan"], ["--scale nan", "at most 1"]),
        (["bench", "--ablation", "--tried"], ["--ablation and --tried", "give one"]),
        (["bench", "--ablation", "--out", "x"], ["--out has no effect with --ablation"]),
        (["bench", "--tried", "--json", "x"], ["--json has no effect with --tried"]),
        (["bench", "--ablation", "--cases", "train/adalora/k1"], ["matches no case", "train/lora/k1"]),
        (["analysis", "report", "README.md"], ["README.md", "neither subspace.json nor magnitude.json"]),
        (["analysis", "subspace", "--out", "README.md"], ["--out README.md", "this is a file"]),
        (["analysis", "peft-comparison", "--out", "README.md"], ["--out README.md", "this is a file"]),
        (["calibration"], ["--designs"]),
        (["calibration", "--designs", "--sweep-seeds", "2"], ["--sweep-seeds has no effect with --designs"]),
        (["calibration", "README.md"], ["README.md is a file"]),
        (["calibration", "tests", "--seeds", "2"], ["--sweep-seeds 3", "more --seeds"]),
    ],
)
def test_wrong_words_are_refused(words, said, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    refused(in_process(capsys, *words), *said)


def test_a_byte_order_mark_is_no_fault_and_another_encoding_is_one(tmp_path, capsys):
    path = study(tmp_path, ("quick = true", "quikc = true"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert command.rankwise("compare", path) == 2 and "quikc" in capsys.readouterr().err  # it was read
    path.write_bytes("name = 'größer'".encode("latin-1"))
    assert command.rankwise("compare", path) == 2
    assert "not a TOML file" in (said := capsys.readouterr().err) and "UTF-8" in said and str(path) in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_missing_gpu_is_refused(tmp_path):
    refused(rankwise("compare", "smoke", "--device", "cuda", "--out", tmp_path / "out"), "cuda", "cpu")


def test_folder_without_runs_is_refused(tmp_path):
    refused(rankwise("report", tmp_path), str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(rankwise("compare", "smoke", "--out", tmp_path / "file"), "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.network
@pytest.mark.slow
def test_target_that_matches_nothing_offers_the_nearest(tmp_path):
    path = study(tmp_path, ("rank = 4", 'rank = 4\ntargets = ["qurey"]'))
    done = rankwise("compare", path, "--out", tmp_path / "out")
    if "cannot be had" in done.stderr or "Unavailable" in done.stderr:
        pytest.skip(done.stderr.strip())
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and 'target "qurey" matches no module; closest: query' in last
    assert "Traceback" not in done.stderr


@pytest.fixture
def adapter_folder(tmp_path):
    adapter = variants.create("lora", rank=3, alpha=6, rank_pattern={"query": 5})
    adapter.attach(tiny("bert"))
    variants.save_pretrained(adapter, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_ranks_of_an_adapter_folder(adapter_folder):
    done = rankwise("ranks", adapter_folder)
    assert done.returncode == 0 and "query" in done.stdout
    facts = json.loads(rankwise("ranks", adapter_folder, "--json").stdout)
    assert {site["active"] for site in facts["sites"] if site["site"].endswith("query")} == {5}
    assert {site["active"] for site in facts["sites"] if not site["site"].endswith("query")} == {3}


@pytest.mark.slow
def test_ranks_writes_csv_and_figures_and_warns_of_faults(adapter_folder, tmp_path):
    done = rankwise("ranks", adapter_folder, "--csv", tmp_path / "sites.csv", "--figures", tmp_path / "figures")
    assert done.returncode == 0 and "Warning: " in done.stdout and "dW is zero (B is all zero)" in done.stdout
    head, *lines = (tmp_path / "sites.csv").read_text().splitlines()
    assert head.startswith("method,site,layer") and len(lines) == 12
    assert (tmp_path / "figures" / "rank-map.svg").is_file() and (tmp_path / "figures" / "rank-map.png").is_file()
    refused(rankwise("ranks", adapter_folder, "--knock-out"), "--knock-out", "is not a run")
    refused(rankwise("ranks", adapter_folder, "--rows", 3), "--rows", "--knock-out")
    refused(rankwise("ranks", adapter_folder, "--beside", adapter_folder), "--beside", "--figures")


def test_cut_off_adapter_is_refused(adapter_folder):
    path = adapter_folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    refused(rankwise("ranks", adapter_folder), "adapter_model.safetensors")


def test_pickled_adapter_is_refused(adapter_folder):
    (adapter_folder / "adapter_model.safetensors").rename(adapter_folder / "adapter_model.bin")
    refused(rankwise("ranks", adapter_folder), "adapter_model.bin")


@pytest.mark.parametrize("content", [b"", b'{"r": ', b"[1]", b"\xff\xfe"])
def test_adapter_whose_settings_are_no_json_is_refused(adapter_folder, tmp_path, content, capsys):
    (adapter_folder / "adapter_config.json").write_bytes(content)
    for words in (["ranks", adapter_folder], ["export", adapter_folder, "--to", "lora", "--out", tmp_path / "out"]):
        refused(in_process(capsys, *words), "adapter_config.json", "JSON", "save the adapter again")


def test_byte_order_marks_in_a_runs_files_are_no_fault(tmp_path, capsys):
    from tests.synthetic_runs import write_study

    folder = write_study(tmp_path / "runs", seeds=range(1), collapse=False)
    assert command.rankwise("ranks", folder, "--json") == 0
    plain = capsys.readouterr().out
    for path in folder.rglob("*.json*"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert command.rankwise("ranks", folder, "--json") == 0
    assert capsys.readouterr().out == plain


def test_list_is_json_on_request():
    found = json.loads(rankwise("list", "--json").stdout)
    assert set(found) == {"methods", "placements", "abilities", "models", "tasks", "kinds", "studies", "papers"}
    assert set(found["methods"]) == set(variants.METHODS)


SMALL = """
from pathlib import Path
import sys
from tests import small_world
from rankwise.experiments import cli
small_world.register()
folder = Path(sys.argv.pop(1))
model = folder / "model"
if not model.exists():
    small_world.model(model)
sys.argv[1:] = [word.replace("MODEL", str(model)) for word in sys.argv[1:]]
cli.main()
"""


def small_study(tmp_path: Path, **training: object) -> Path:
    """A study that runs in a second, on made-up data."""
    lines = "".join(f"{key} = {value}\n" for key, value in training.items())
    path = tmp_path / "small.toml"
    path.write_text(
        f'model = "{tmp_path / "model"}"\ntasks = ["small/regression"]\nquick = true\n[training]\nmax_length = 24\n{lines}'
        '[[methods]]\nmethod = "head"\nlearning_rate = 1e-2\n'
        '[[methods]]\nmethod = "lora"\nrank = 2\nlearning_rate = 1e38\n'
    )
    return path


def small(tmp_path: Path, *words: object) -> list[str]:
    return [sys.executable, "-c", SMALL, str(tmp_path), *map(str, words)]


def test_a_failed_run_is_a_row_and_exit_code_1(tmp_path, monkeypatch, capsys, figures_undrawn):
    small_world.register(monkeypatch.setitem)
    small_world.model(tmp_path / "model")
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    path = small_study(tmp_path, epochs=1, max_steps=4, max_skipped_steps=0)
    call = ("compare", path, "--out", tmp_path / "runs", "--threads", 1)
    done = in_process(capsys, *call)
    assert done.returncode == 1, done.stderr
    assert "failed (1 of 1)" in done.stdout and "completed" in done.stdout and "Traceback" not in done.stderr
    assert in_process(capsys, *call, "--methods", "head").returncode == 0


@pytest.mark.slow
def test_an_interrupt_says_how_to_go_on_and_exits_with_130(tmp_path):
    path = small_study(tmp_path, epochs=2000)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANKWISE_CACHE": str(tmp_path / "cache")}
    call = small(tmp_path, "compare", path, "--out", tmp_path / "runs")
    # A shell starts what runs in its background with interrupts ignored; the child of such a test must heed them.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(call, cwd=tmp_path, env=environment, preexec_fn=heed, **pipes)
    deadline = time.monotonic() + 90
    while not list((tmp_path / "runs").glob("*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    # Python drops an interrupt that falls into a destructor; a user presses the keys again.
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=10)
            break
        except subprocess.TimeoutExpired:
            continue
    else:
        process.kill()
        pytest.fail("five interrupts did not end it")
    assert process.returncode == 130
    assert "Traceback" not in said or "Exception ignored" in said
    assert said.strip().splitlines()[-1] == "rankwise: interrupted; the same command goes on where this one stopped"


def test_a_report_ends_with_a_verdict_a_setting_in_words_and_as_json(tmp_path, capsys, figures_undrawn):
    from tests.synthetic_runs import write_study

    folder = write_study(tmp_path / "runs", seeds=range(8), collapse=False)
    text = in_process(capsys, "report", folder).stdout
    assert "head: worse than full (difference -" in text and "lora: undecided against full (difference" in text
    found = json.loads(in_process(capsys, "report", folder, "--json").stdout)["verdicts"]
    assert [v["setting"] for v in found] == ["head", "lora", "adalora", "dora", "adalora+dora"]
    assert found[0]["kind"] == "worse" and found[0]["n"] == 8 and f"head: {found[0]['text']}" in text
