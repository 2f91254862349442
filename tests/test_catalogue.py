"""The catalogue: whatever happens to a download, the cache holds whole files or none. No test here needs a network."""

import errno
import hashlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rankwise.experiments import files, sources
from rankwise.experiments.sources import CATALOGUE, Carrier, Entry, Unavailable, carriers, conversion, entries, hub

REPOSITORY = Path(__file__).resolve().parents[1]
CONTENT = {"a.txt": b"alpha\n" * 1000, "b.bin": bytes(range(256)) * 50}
CODE = "import pathlib; pathlib.Path(__file__).with_name('was_run').touch(); raise RuntimeError('the carrier ran')\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own, and a pip that finds wheels in a folder and nowhere else."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path / "cache"


def make_wheel(folder: Path, name: str = "carrier_one", content: dict = CONTENT) -> tuple[Path, Carrier]:
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/__init__.py", CODE)
        for file, data in content.items():
            archive.writestr(f"{name}/data/{file}", data)
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    members = {file: f"{name}/data/{file}" for file in CONTENT}
    return wheel, Carrier(f"{name.replace('_', '-')}==1.0", wheel.name, sha256, wheel.stat().st_size, members)


def make_entry(*carriers: Carrier) -> Entry:
    files = {name: (hashlib.sha256(data).hexdigest(), len(data)) for name, data in CONTENT.items()}
    return Entry("owner/thing", "data", "CC0-1.0", "made up for a test", files, carriers)


def leftovers(cache: Path) -> list[str]:
    """Everything in the cache but the empty lock files."""
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")


def is_right(folder: Path) -> bool:
    return {path.name: path.read_bytes() for path in folder.iterdir()} == CONTENT


def test_import_needs_neither_torch_nor_numpy_nor_a_hub_client():
    code = "import sys, rankwise.experiments.sources; print([m for m in sys.modules if m in sys.argv[1:]])"
    heavy = ["torch", "numpy", "transformers", "datasets", "huggingface_hub", "pip"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_package_is_fetched_once_and_licence_and_carrier_are_said_before(tmp_path, capfd):
    _, carrier = make_wheel(tmp_path / "wheels")
    folder = sources.fetch(make_entry(carrier))
    said = capfd.readouterr()
    assert is_right(folder) and leftovers(tmp_path / "cache") == sorted(CONTENT)
    assert "CC0-1.0" in said.err and "carrier-one==1.0" in said.err and said.err.count("\n") == 1 and not said.out
    shutil.rmtree(tmp_path / "wheels")  # the second time no download is needed
    assert sources.fetch(make_entry(carrier)) == folder
    assert capfd.readouterr() == ("", "")


def test_carrier_is_neither_imported_nor_installed(tmp_path):
    _, carrier = make_wheel(tmp_path / "wheels")
    sources.fetch(make_entry(carrier))
    assert "carrier_one" not in sys.modules and not list(tmp_path.rglob("was_run"))
    with pytest.raises(ImportError):
        __import__("carrier_one")


def test_wrong_hash_of_the_archive_leaves_nothing(tmp_path):
    wheel, carrier = make_wheel(tmp_path / "wheels")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("one_more.txt", "a file that the pinned wheel does not have")
    with pytest.raises(Unavailable, match=f"wrong hash of {wheel.name}.*pinned {carrier.sha256}") as error:
        sources.fetch(make_entry(carrier))
    assert leftovers(tmp_path / "cache") == [] and "\n" not in str(error.value)


def test_wrong_hash_of_one_file_leaves_nothing(tmp_path):
    _, carrier = make_wheel(tmp_path / "wheels", content={**CONTENT, "b.bin": bytes(len(CONTENT["b.bin"]))})
    with pytest.raises(Unavailable, match=r"wrong hash of b\.bin"):
        sources.fetch(make_entry(carrier))
    assert leftovers(tmp_path / "cache") == []


def test_archive_without_the_file_leaves_nothing(tmp_path):
    _, carrier = make_wheel(tmp_path / "wheels", content={"a.txt": CONTENT["a.txt"]})
    with pytest.raises(Unavailable, match=r"b\.bin"):
        sources.fetch(make_entry(carrier))
    assert leftovers(tmp_path / "cache") == []


def test_second_carrier_helps_where_the_first_fails(tmp_path):
    _, wrong = make_wheel(tmp_path / "wheels", "carrier_one", {**CONTENT, "a.txt": b"other"})
    _, right = make_wheel(tmp_path / "wheels", "carrier_two")
    assert is_right(sources.fetch(make_entry(wrong, right)))


def test_every_source_that_was_tried_is_named_in_one_line(tmp_path):
    _, wrong = make_wheel(tmp_path / "wheels", "carrier_one", {**CONTENT, "a.txt": b"other"})
    gone, lost = make_wheel(tmp_path / "wheels", "carrier_two")
    gone.unlink()
    with pytest.raises(Unavailable) as error:
        sources.fetch(make_entry(wrong, lost))
    message = str(error.value)
    assert "\n" not in message and [part in message for part in ("carrier-one==1.0", "carrier-two==1.0", "hub")] == [True] * 3


def test_index_out_of_reach_is_said_as_such(tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    gone, carrier = make_wheel(tmp_path / "wheels")
    gone.unlink()
    with pytest.raises(Unavailable, match="no connection to the package index"):
        sources.fetch(make_entry(carrier))
    assert leftovers(tmp_path / "cache") == []


def test_python_without_pip_is_said_as_such(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "python: No module named pip" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(Unavailable, match="has no pip; install it"):
        sources.fetch(make_entry(make_wheel(tmp_path / "wheels")[1]))


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    _, carrier = make_wheel(tmp_path / "wheels")

    def full(source, target, *_):
        target.write(source.read(10))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(carriers.shutil, "copyfileobj", full)
    with pytest.raises(Unavailable, match="No space left on device") as error:
        sources.fetch(make_entry(carrier))
    assert leftovers(tmp_path / "cache") == [] and "\n" not in str(error.value)


def test_cache_that_cannot_be_written_names_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(Unavailable, match="set RANKWISE_CACHE"):
        sources.fetch(make_entry(make_wheel(tmp_path / "wheels")[1]))


def test_damaged_file_in_the_cache_is_fetched_anew(tmp_path):
    _, carrier = make_wheel(tmp_path / "wheels")
    folder = sources.fetch(make_entry(carrier))
    data = bytearray(CONTENT["a.txt"])
    data[17] ^= 1  # the same size: only the hash can tell
    time.sleep(0.01)
    (folder / "a.txt").write_bytes(bytes(data))
    assert is_right(sources.fetch(make_entry(carrier)))


CHILD = """
    import sys
    from pathlib import Path
    sys.path[:0] = {paths!r}
    import test_catalogue as here
    from rankwise.experiments import sources
    wheels = Path({wheels!r})
    carrier = here.Carrier("carrier-one==1.0", "carrier_one-1.0-py3-none-any.whl", {sha256!r}, 1,
                           {{name: "carrier_one/data/" + name for name in here.CONTENT}})
    {before}
    print("READY", flush=True)
    sources.fetch(here.make_entry(carrier))
    print("DONE", flush=True)
"""


def child(tmp_path: Path, carrier: Carrier, before: str = "") -> subprocess.Popen:
    paths = [str(REPOSITORY), str(REPOSITORY / "tests")]
    code = textwrap.dedent(CHILD).format(paths=paths, wheels=str(tmp_path / "wheels"), sha256=carrier.sha256, before=before)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_download_does_no_harm_and_is_cleaned_up(tmp_path, cache):
    _, carrier = make_wheel(tmp_path / "wheels")
    before = (
        "import time; from rankwise.experiments.sources import carriers; "
        "carriers.shutil.copyfileobj = lambda source, target, *_: "
        "(target.write(source.read(5)), target.flush(), print('HALF', flush=True), time.sleep(60))"
    )
    process = child(tmp_path, carrier, before)
    assert process.stdout.readline() == "READY\n"
    assert process.stdout.readline() == "HALF\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert leftovers(cache)  # the temporary folder of the killed process
    assert is_right(sources.fetch(make_entry(carrier)))
    assert leftovers(cache) == sorted(CONTENT)


def test_two_processes_at_once_do_no_harm(tmp_path, cache):
    _, carrier = make_wheel(tmp_path / "wheels")
    processes = [child(tmp_path, carrier) for _ in range(2)]
    ends = [process.communicate(timeout=60) for process in processes]
    assert [out for out, _ in ends] == ["READY\nDONE\n"] * 2, ends
    assert leftovers(cache) == sorted(CONTENT)
    assert sum("downloading" in err for _, err in ends) == 1  # the other one waited, and took what was there


# ------------------------------------------------------------------------------------------------------------- the hub


def test_hub_out_of_reach_is_one_line_within_seconds(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(Unavailable, match="Hugging Face cache: not there; hub: no connection") as error:
        sources.fetch("someone/some-model")
    assert time.monotonic() - start < 5 and "\n" not in str(error.value)


def test_hub_that_never_answers_is_given_up(monkeypatch):
    import huggingface_hub.constants

    class Silent:
        def head(self, *_, **__):
            time.sleep(30)

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.1)
    monkeypatch.setattr(huggingface_hub, "get_session", Silent)
    assert sources.hub_out_of_reach() == "no answer within 0 seconds"


def test_near_name_of_the_catalogue_is_offered():
    with pytest.raises(Unavailable, match="closest: sentence-transformers/all-MiniLM-L6-v2"):
        sources.fetch("sentence-transformers/all-MiniLM-L6-v3")
    with pytest.raises(ValueError, match='model "a b/c/d" is neither a folder nor a hub id'):
        sources.fetch("a b/c/d")


def fill_hub_cache(tmp_path: Path, name: str, files: dict, ref: str = "main") -> Path:
    commit = "0" * 39 + "1"
    root = tmp_path / "huggingface" / "hub" / f"models--{name.replace('/', '--')}"
    (root / "snapshots" / commit).mkdir(parents=True)
    (root / "refs" / ref).parent.mkdir(parents=True)
    (root / "refs" / ref).write_text(commit)
    for file, data in files.items():
        (root / "snapshots" / commit / file).write_bytes(data)
    return root / "snapshots" / commit


@pytest.mark.parametrize("ref", ["main", "refs/pr/7"])
def test_model_in_the_hugging_face_cache_needs_no_hub(tmp_path, monkeypatch, ref):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "huggingface" / "hub"))
    folder = fill_hub_cache(tmp_path, "someone/some-model", {"config.json": b"{}", "model.safetensors": b"x"}, ref)
    assert sources.fetch("someone/some-model") == folder


def test_pickled_weights_in_the_hugging_face_cache_are_passed_over(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "huggingface" / "hub"))
    fill_hub_cache(tmp_path, "someone/some-model", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(Unavailable):
        sources.fetch("someone/some-model")


def test_other_version_in_the_hugging_face_cache_is_not_taken_for_the_pinned_one(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "huggingface" / "hub"))
    entry = replace(make_entry(), kind="model", hub="someone/some-model", files=dict(make_entry().files))
    other = {"config.json": b"{}", "model.safetensors": b"x", **CONTENT, "a.txt": b"another"}
    folder = fill_hub_cache(tmp_path, "someone/some-model", other)
    with pytest.raises(Unavailable, match=r"another version of a\.txt"):
        sources.fetch(entry)
    (folder / "a.txt").write_bytes(CONTENT["a.txt"])
    assert sources.fetch(entry) == folder


def test_conversion_to_safetensors_is_found_where_the_repository_has_none(tmp_path, monkeypatch):
    import huggingface_hub.constants

    asked = []

    class Api:
        def list_repo_files(self, name):
            return ["config.json", "pytorch_model.bin"]

        def get_repo_discussions(self, name, author, discussion_type):
            assert (author, discussion_type) == ("SFconvertbot", "pull_request")
            return [type("Proposal", (), {"num": 12})()]

    def snapshot_download(name, revision, allow_patterns, local_files_only):
        asked.append(revision)
        assert not any(
            "bin" in pattern or pattern.endswith((".py", "*")) for pattern in set(allow_patterns) - {"tokenizer*", "vocab*"}
        )
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_text("x")
        return str(tmp_path)

    monkeypatch.setattr(hub, "hub_out_of_reach", lambda: None)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert sources.fetch("someone/some-model") == tmp_path
    assert asked == ["refs/pr/12"]


# ------------------------------------------------------------------------------------------------- names and licences


def test_every_entry_pins_every_file_of_every_carrier():
    for entry in CATALOGUE.values():
        assert entry.licence and entry.source and entry.carriers
        hashes = [carrier.sha256 for carrier in entry.carriers] + [sha256 for sha256, _ in entry.files.values()]
        assert all(len(sha256) == 64 and set(sha256) <= set("0123456789abcdef") for sha256 in hashes)
        for carrier in entry.carriers:
            assert set(carrier.members) == set(entry.files)
            if carrier.is_debian:
                assert carrier.archive == f"{carrier.package.replace('=', '_')}_all.deb"
                continue
            name, version = carrier.package.split("==")
            assert carrier.archive.startswith(f"{name.lower().replace('-', '_')}-{version}-py")
            assert carrier.archive.endswith("-none-any.whl")  # the same file for every Python and machine


def test_an_entry_is_a_table_of_its_own():
    text = """
["owner/thing"]
kind = "data"
licence = "CC0-1.0"
source = "made up"

["owner/thing".files]
"a.txt" = ["aa", 5]

[["owner/thing".carriers]]
package = "Some-Carrier==1.0"
tags = "py3-none-any"
sha256 = "bb"
size = 7
folder = "some_carrier/data"
"""
    carrier = Carrier("Some-Carrier==1.0", "some_carrier-1.0-py3-none-any.whl", "bb", 7, {"a.txt": "some_carrier/data/a.txt"})
    assert entries.read(text) == {
        "owner/thing": Entry("owner/thing", "data", "CC0-1.0", "made up", {"a.txt": ("aa", 5)}, (carrier,))
    }
    with pytest.raises(TypeError, match="licnce"):
        entries.read(text.replace("licence", "licnce"))


def test_research_only_data_wants_acceptance():
    with pytest.raises(ValueError, match=r'accept_licences = \["conll2003"\].*--accept-licence conll2003'):
        sources.require_acceptance("conll2003", [])
    sources.require_acceptance("conll2003", ["conll2003"])
    sources.require_acceptance("glue/stsb", ["conll2003"])
    sources.require_acceptance("glue/stsb", ())
    with pytest.raises(ValueError, match="closest: conll2003"):
        sources.require_acceptance("glue/stsb", ["conll-2003"])


def test_content_hash_of_the_catalogue_needs_no_download(monkeypatch):
    monkeypatch.setattr(sources, "fetch", None)
    hashes = {sources.content_hash(name) for name in CATALOGUE}
    assert len(hashes) == len(CATALOGUE)


def test_content_hash_of_a_folder_changes_with_one_byte(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    before = sources.content_hash(str(folder))
    assert sources.content_hash(str(folder)) == before
    (folder / "README.md").write_bytes(b"says nothing about the model")
    assert sources.content_hash(str(folder)) == before
    time.sleep(0.01)
    (folder / "model.safetensors").write_bytes(b"weightz")
    assert sources.content_hash(str(folder)) != before


def test_cache_is_where_the_user_says(monkeypatch, tmp_path):
    assert sources.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("RANKWISE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert sources.cache_folder() == tmp_path / "xdg" / "rankwise"


def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    files.write_file(tmp_path / "folder" / "file", b"first")

    def broken(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", broken)
    with pytest.raises(OSError, match="No space left"):
        files.write_file(tmp_path / "folder" / "file", b"second")
    assert [path.read_bytes() for path in (tmp_path / "folder").iterdir()] == [b"first"]


# -- conversion ----------------------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_converted_once_and_its_package_is_asked_for(tmp_path, monkeypatch, capfd):
    _, carrier = make_wheel(tmp_path / "wheels")
    entry, found = replace(make_entry(carrier), kind="model", gguf="b.bin"), []

    def convert(folder, file, out):
        found.append((folder / file).read_bytes())
        (out / "config.json").write_text("{}")
        if len(found) == 1:
            raise RuntimeError("killed")

    monkeypatch.setattr(conversion, "_from_gguf", convert)
    monkeypatch.setattr(conversion, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"pip install 'rankwise\[gguf\]'"):
        sources.fetch(entry)
    monkeypatch.setattr(conversion, "find_spec", lambda name: name)
    with pytest.raises(RuntimeError, match="killed"):
        sources.fetch(entry)
    assert leftovers(tmp_path / "cache") == sorted(CONTENT)  # nothing of what was cut off
    folder = sources.fetch(entry)
    assert [path.name for path in folder.iterdir()] == ["config.json"] and found == [CONTENT["b.bin"]] * 2
    assert "converting b.bin" in capfd.readouterr().err
    assert sources.fetch(entry) == folder and len(found) == 2 and capfd.readouterr() == ("", "")


@pytest.mark.network
def test_smollm2_is_fetched_converted_and_speaks(monkeypatch):
    """A 4-bit release, dequantised: perplexity near 9 on plain prose, and an answer to a question."""
    torch, models = pytest.importorskip("torch"), pytest.importorskip("rankwise.experiments.models")
    for name in ("RANKWISE_CACHE", "PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    pytest.importorskip("gguf")
    try:
        model, tokenizer, info = models.load("SmolLM2-135M-Instruct-Q4_1", SimpleNamespace(kind="generation", num_labels=0))
    except Unavailable as error:
        pytest.skip(str(error))
    assert info.num_parameters == 134_515_008 and info.heads == () and tokenizer.eos_token == "<|im_end|>"
    text = "The sun rises in the east and sets in the west. Plants need light and water to grow, and most animals eat plants."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert 2 < 2.718**loss < 20
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**asked, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(made[0, asked["input_ids"].shape[1] :])
