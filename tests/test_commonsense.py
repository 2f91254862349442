"""The eight tests of common sense of DoRA's tables: files of a repository on GitHub, of which a copy stands in here."""

import functools
import http.server
import json
import subprocess
import threading
from dataclasses import replace

import datasets
import numpy as np
import pytest
from rankwise.experiments import recipes, sources, tasks
from rankwise.experiments.sources import github
from rankwise.experiments.tasks import commonsense
from rankwise.reports import papers

from tests import language_models, paper_cells

ANSWERS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "siqa": ("answer1", "answer3"),
    "hellaswag": ("ending4", "ending2"),
    "winogrande": ("option2", "option1"),
    "arc_e": ("answer4", "answer5"),
    "arc_c": ("answer2", "answer2"),
    "obqa": ("answer1", "answer3"),
}


def row(question: str, answer: str, further: str = "") -> dict[str, str]:
    return {"instruction": question, "input": further, "output": f"the correct answer is {answer}", "answer": answer}


@pytest.fixture(autouse=True)
def repository(tmp_path, monkeypatch):
    """The nine files with a few rows each, named by git as the real ones are, under the address of the repository's commit."""
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    real = commonsense.REPOSITORY
    root = tmp_path / "served" / real.name / real.commit
    of_training = [row(f"question {i}", ANSWERS[name][i % 2]) for i in range(20) for name in ANSWERS]
    rows = {commonsense.TRAIN: of_training}
    for name, (folder, _) in commonsense.TESTS.items():
        rows[f"dataset/{folder}/test.json"] = [row(f"{name} {i}", answer) for i, answer in enumerate(ANSWERS[name])]
    names = {}
    for path, some in rows.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(some))
        names[path] = github.blob_name(root / path)
    assert names.keys() == real.files.keys()
    monkeypatch.setattr(commonsense, "REPOSITORY", replace(real, files=names))
    commonsense.read.cache_clear()
    yield root
    commonsense.read.cache_clear()


@pytest.fixture
def clone(repository):
    """The files where a user's clone of the repository would lie."""
    folder = commonsense.REPOSITORY.folder
    folder.parent.mkdir(parents=True)
    folder.symlink_to(repository, target_is_directory=True)
    return folder


@pytest.fixture
def server(repository, monkeypatch):
    """GitHub, on this machine; the paths that it was asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    folder = repository.parents[2]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder)) as serving:
        monkeypatch.setattr(github, "ADDRESS", f"http://127.0.0.1:{serving.server_port}")
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield asked
        serving.shutdown()


# -- files --------------------------------------------------------------------------------------------------------------------


def test_a_file_is_named_as_git_names_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"a line\r\n\0" * 300_000)
    found = subprocess.run(["git", "hash-object", "--no-filters", path], capture_output=True, text=True, check=True)
    assert github.blob_name(path) == found.stdout.strip()
    path.write_bytes(b"")
    assert github.blob_name(path) == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


def test_a_file_is_downloaded_once_and_checked(repository, server, capsys):
    of = commonsense.REPOSITORY
    path = of.file("dataset/piqa/test.json")
    assert (
        path == of.folder / "dataset/piqa/test.json"
        and path.read_bytes() == (repository / "dataset/piqa/test.json").read_bytes()
    )
    assert of.file("dataset/piqa/test.json") == path
    assert server == [f"/{of.name}/{of.commit}/dataset/piqa/test.json"]
    said = capsys.readouterr().err
    assert said.count("downloading from GitHub") == 1 and "Apache-2.0" in said


def test_another_file_is_not_taken(repository, server):
    (repository / "dataset/piqa/test.json").write_text("[]")
    with pytest.raises(sources.Unavailable, match=r"what it gave as dataset/piqa/test.json is another file"):
        commonsense.REPOSITORY.file("dataset/piqa/test.json")
    assert not (commonsense.REPOSITORY.folder / "dataset/piqa/test.json").exists()


def test_a_damaged_file_in_the_cache_is_fetched_anew(repository, server):
    own = commonsense.REPOSITORY.folder / "dataset/piqa/test.json"
    own.parent.mkdir(parents=True)
    own.write_text("[")
    assert (
        commonsense.REPOSITORY.file("dataset/piqa/test.json").read_bytes()
        == (repository / "dataset/piqa/test.json").read_bytes()
    )


def test_a_cache_that_cannot_be_written_is_said(tmp_path, server):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(sources.Unavailable, match=r"the cache cannot be written: .*; set RANKWISE_CACHE$"):
        commonsense.REPOSITORY.file("dataset/piqa/test.json")


def test_what_github_does_not_have_is_one_line(repository, server):
    (repository / "dataset/piqa/test.json").unlink()
    with pytest.raises(sources.Unavailable) as error:
        commonsense.read("test")
    assert "GitHub: " in str(error.value) and "\n" not in str(error.value)


def test_without_a_network_it_says_where_a_clone_can_lie(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        sources.Unavailable,
        match=r"cache: no .*/commonsense_170k.json, where a clone of the repository serves too; GitHub: not asked",
    ) as error:
        tasks.get("commonsense").load(["train"])
    assert "\n" not in str(error.value)


def test_the_files_are_those_of_the_release():
    """Rows of the papers' tests; git's name of the one that all are trained on."""
    assert {name: rows for name, (_, rows) in commonsense.TESTS.items()} == {
        "boolq": 3270, "piqa": 1838, "siqa": 1954, "hellaswag": 10042,
        "winogrande": 1267, "arc_e": 2376, "arc_c": 1172, "obqa": 500,
    }  # fmt: skip
    task = tasks.get("commonsense")
    assert (task.rows_of("train"), task.rows_of("validation"), task.rows_of("test")) == (170_300, 120, 22_419)
    assert list(commonsense.TESTS) == [name for name in papers.load("dora-1").columns if name != "average"]


# -- rows ---------------------------------------------------------------------------------------------------------------------


def test_questions_are_asked_as_instructions(clone):
    test = commonsense.read("test")
    assert len(test) == 16
    assert test.first[0] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nboolq 0\n\n### Response:\n"
    )
    assert test.labels[:3] == [f"the correct answer is {one}" for one in ("true", "false", "solution1")]
    assert test.answers[2] == ("the correct answer is solution1", "piqa") and test.answers[-1][1] == "obqa"


def test_the_rows_to_validate_on_are_those_that_the_release_draws(clone):
    train, validation = commonsense.read("train"), commonsense.read("validation")
    rows = json.loads((clone / commonsense.TRAIN).read_text())
    drawn = datasets.Dataset.from_list(rows).train_test_split(test_size=120, shuffle=True, seed=42)
    for found, wanted in ((train, drawn["train"]), (validation, drawn["test"])):
        assert [one.split("\n")[3] for one in found.first] == wanted["instruction"] and found.labels == wanted["output"]
    assert len(train) == 40 and train.answers is None
    assert tasks.get("commonsense").metrics(validation.labels, validation.answers) == {"average": 100.0}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"instruction": " "}, "row 2: its instruction or its output is empty or no text"),
        ({"output": None}, "row 2: its instruction or its output is empty or no text"),
        ({"output": "the correct answer is C"}, "row 2: its output names none of the answers that it could"),
    ],
)
def test_a_row_of_another_form_is_named(repository, clone, monkeypatch, fault, words):
    path = "dataset/boolq/test.json"
    (repository / path).write_text(json.dumps([row("a", "true"), {**row("b", "true"), **fault}]))
    files = {**commonsense.REPOSITORY.files, path: github.blob_name(repository / path)}
    monkeypatch.setattr(commonsense, "REPOSITORY", replace(commonsense.REPOSITORY, files=files))
    with pytest.raises(ValueError, match=f"^commonsense: {path}, {words}$"):
        commonsense.read("test")


def test_an_input_stands_below_its_instruction(repository, clone, monkeypatch):
    path = "dataset/boolq/test.json"
    (repository / path).write_text(json.dumps([row("a", "true", "b")]))
    files = {**commonsense.REPOSITORY.files, path: github.blob_name(repository / path)}
    monkeypatch.setattr(commonsense, "REPOSITORY", replace(commonsense.REPOSITORY, files=files))
    assert commonsense.read("test").first[0].endswith("### Instruction:\na\n\nb\n\n### Response:\n")


# -- scores -------------------------------------------------------------------------------------------------------------------


def as_released(test: str, text: str) -> str:
    """What the release takes for the answer: the first word of the test's kind that a text has."""
    words = {"boolq": "true false", "piqa": "solution1 solution2", "winogrande": "option1 option2"}
    words["hellaswag"] = "ending1 ending2 ending3 ending4"
    wanted = words.get(test, "answer1 answer2 answer3 answer4 answer5").split()
    places = sorted((text.find(word), word) for word in wanted if word in text)
    return places[0][1] if places else ""


def test_an_answer_is_read_as_the_release_reads_it():
    words = ["true", "false", *(f"{kind}{i}" for kind in ("solution", "answer", "ending", "option") for i in range(1, 6))]
    rng = np.random.default_rng(0)
    for test, answers in ANSWERS.items():
        for _ in range(200):
            text = " ".join(rng.choice([*words, "the", "is", "Answer1", "untrue"], size=rng.integers(0, 6)))
            for answer in answers:
                (hit,) = commonsense.right([text], [(f"the correct answer is {answer}", test)])
                assert hit == (as_released(test, text) == answer), (test, text, answer)


def test_tests_count_alike_whatever_their_size():
    references = [("the correct answer is true", "boolq")] * 6 + [("the correct answer is ending2", "hellaswag")] * 2
    texts = ["true"] * 3 + ["no answer"] * 3 + ["it is ending2", "ending1"]
    scores = commonsense.measure(texts, references)
    assert scores == {"average": 50.0, "boolq": 50.0, "hellaswag": 50.0}
    texts[6] = ""
    assert commonsense.measure(texts, references) == {"average": 25.0, "boolq": 50.0, "hellaswag": 0.0}


def test_resamples_are_scored_as_the_rows_they_have():
    rng = np.random.default_rng(1)
    tests = rng.choice(["boolq", "obqa", "arc_c"], size=30, p=[0.2, 0.5, 0.3])
    references = [(f"the correct answer is {ANSWERS[test][i % 2]}", str(test)) for i, test in enumerate(tests)]
    texts = [rng.choice(ANSWERS[test]) for test in tests]
    weights = rng.multinomial(30, np.full(30, 1 / 30), size=20).astype(float)
    found = commonsense.resampled(texts, references, weights)
    for value, counts in zip(found, weights.astype(int), strict=True):
        rows = np.repeat(np.arange(30), counts)
        of_tests = commonsense.measure([texts[i] for i in rows], [references[i] for i in rows])
        missing = 3 - (len(of_tests) - 1)
        assert value == pytest.approx(of_tests["average"] * (3 - missing) / 3)
    task = tasks.get("commonsense")
    assert 0 < task.standard_error(texts, references) < 30


# -- a cell -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "label"),
    [("dora-1", "LLaMA-7B DoRA (half rank), 0.43 %"), pytest.param("dora-15", "LoRA, r = 4", marks=pytest.mark.slow)],
)
def test_a_cell_trains_once_and_stands_beside_eight_columns(tmp_path, clone, table, label):
    """On a tiny model and a few rows: every step of a real run but its length."""
    folder = language_models.saved("llama", tmp_path / "llama")
    plan = recipes.plan(recipes.load(table), label, "commonsense", model=folder, scale=1e-4, seeds=1)
    result = paper_cells.run(plan, tmp_path / "runs", max_length=48, precision="fp32")
    assert set(result["metrics"]["test"]) >= {"average", *commonsense.TESTS}
    made = paper_cells.lines(plan, result)
    assert [line.column for line in made] == list(commonsense.TESTS)
    assert {"model", "scaled", "decoding"} <= {reason.tag for reason in made[0].reasons}
