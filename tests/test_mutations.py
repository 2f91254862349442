"""Whatever became of a study's file or of an adapter's folder, the command answers: exit 0, or exit 2 and clear lines.

Shipped studies, a study of data of one's own, papers' recipes, and adapters (PEFT's and ours) are changed byte by byte
(flipped, cut, taken out, put in, doubled) and key by key (a value of another type or size, a key taken out or put in), one to
three changes at a time.  Never a traceback, a hang or a crash.  tests/test_study_files.py reads each line that is said.
"""

import contextlib
import importlib
import io
import json
import shutil
import signal
import struct
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rankwise import variants
from rankwise.experiments import config, recipes
from rankwise.variants.files.peft.names import CONFIG

from tests.command import rankwise
from tests.test_doctor import kohya_file
from tests.test_study_files import VALUES, changed, places
from tests.tiny import tiny

LONGEST = 20  # seconds for one answer; a tenth of one is usual
OWN_DATA = """
name = "own"
model = "some/model"
quick = true
[[data]]
name = "mine"
train = "mine.csv"
kind = "classification"
[[methods]]
method = "lora"
rank = 4
learning_rate = 1e-3
"""
ROWS = "text,label\n" + "".join(f"row {i},{'ab'[i % 2]}\n" for i in range(40))
SOURCES = {**config.shipped(), **{f"papers/{path.stem}": path for path in sorted(config.PAPERS.glob("*.toml"))}}
TEXTS = {name: path.read_bytes() for name, path in SOURCES.items()} | {"own": OWN_DATA.encode()}
SUFFIX, KOHYA, DIFFUSERS = ".safetensors", "kohya", "diffusers"
FACTS = "facts"  # our metadata in an adapter's file, JSON in the JSON of its header


def tried(number: int) -> Callable:
    """So many cases, the same in every process; no example is stored and none made smaller, which takes minutes."""
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise AssertionError(f"no answer within {LONGEST} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def answered(*words: object) -> int:
    """The command's exit code, which is 0, or 2 with lines of its own; `doctor` says by 1 that it found errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(), in_time():
        warnings.simplefilter("ignore")
        code = rankwise(*words)
    said = err.getvalue()
    assert code in (0, 2) or (code == 1 and words[0] == "doctor"), (code, said)
    assert "Traceback" not in said + out.getvalue(), said
    assert all(line.isprintable() for line in out.getvalue().split("\n")), out.getvalue()
    if code == 2:
        assert said.strip() and all(line.startswith("rankwise: ") for line in said.split("\n")[:-1]), said
        assert all(line.isprintable() for line in said.split("\n")), said
    return code


# -- changes ---------------------------------------------------------------------------------------------------------------


SIGNS = st.sampled_from([b'"', b"[", b"{", b"\n", b"=", b"\\", b"9", b"-", b"\x00", b"[" * 100_000])


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with one to three faults."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        to = min(len(content), at + draw(st.sampled_from([1, 1, 1, 2, 8, 64, 4096])))
        before, inner, after = content[:at], content[at:to], content[to:]
        match draw(st.sampled_from(["flipped", "flipped", "cut", "out", "in", "sign", "twice"])):
            case "flipped":
                content = before + bytes(byte ^ draw(st.integers(1, 255)) for byte in inner[:1]) + inner[1:] + after
            case "cut":
                content = before
            case "out":
                content = before + after
            case "in":
                content = before + draw(st.binary(min_size=1, max_size=12)) + inner + after
            case "sign":
                content = before + draw(SIGNS) + after
            case "twice":
                content = before + inner + inner + after
    return content


JSON = [value for name, value in VALUES.items() if name != "date"]
DEEP = json.loads("[" * 200 + "]" * 200)
PATTERNS = ["(a+)+$", "((?:.*)*)*x", "[", "(?P<n>", "(.|..)*$", "\\", ".*", "(?i)", "^", "\ud800", "x" * 100_000]
WORDS = ["lora", "auto", "/etc/passwd", "../..", "\x1b[31m"]
ODD = st.sampled_from([*JSON, *PATTERNS, *WORDS, DEEP, None, 2, 4, 7, -7, 1 << 40, 0.1])
NAMES = st.sampled_from(["r", "lora_alpha", "rank_pattern", "name", "label", "method", "<script>", "..", "", *PATTERNS])


@st.composite
def altered(draw: st.DrawFn, raw: dict[str, Any], values: st.SearchStrategy = ODD) -> dict[str, Any]:
    """The content with one to three values changed, taken out, put in or moved into another place."""
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(raw))
        if not paths:
            return raw
        path = draw(st.sampled_from(paths))
        inner: Any = raw
        for key in path:
            inner = inner[key]
        how = draw(st.sampled_from(["value", "value", "value", "out", "list", "put in", "moved"]))
        if how == "value":
            raw = changed_deep(raw, path, draw(values))
        elif how == "out":
            raw = changed(raw, path, None)
        elif how == "list":
            raw = changed_deep(raw, path, [inner])
        elif how == "put in" and isinstance(inner, dict):
            raw = changed_deep(raw, (*path, draw(NAMES)), draw(values))
        else:
            other = draw(st.sampled_from(paths))
            if other[: len(path)] != path and path[: len(other)] != other:
                raw = changed_deep(raw, other, inner)
    return raw


def changed_deep(raw: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """As `changed`, None a value like any other."""
    marked = changed(raw, path, marker := object())

    def place(of: Any) -> Any:
        if of is marker:
            return value
        if isinstance(of, dict):
            return {key: place(inner) for key, inner in of.items()}
        return [place(inner) for inner in of] if isinstance(of, list) else of

    return place(marked)


# -- studies ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Iterator[Path]:
    """A folder with the user's data; `compare` ends where it would import torch."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "mine.csv").write_text(ROWS, encoding="utf-8")

    def reached(*_: Any) -> None:
        raise SystemExit(0)

    patch = pytest.MonkeyPatch()
    patch.setattr(importlib.import_module("rankwise.experiments.cli.compare"), "start_torch", reached)
    patch.setenv("RANKWISE_CACHE", str(folder / "cache"))
    yield folder
    patch.undo()


def compared(desk: Path, name: str, content: bytes) -> int:
    """What becomes of a study's file with this content, or of a recipe's."""
    path = desk / "study.toml"
    if not name.startswith("papers/"):
        path.write_bytes(content)
        code = answered("compare", path, "--out", desk / "runs")
        assert not (desk / "runs").exists()
        return code
    path = desk / SOURCES[name].name
    path.write_bytes(content)
    try:
        with in_time():
            recipes.read(path)
    except ValueError as error:
        assert type(error) is ValueError and str(error)
        return 2
    return 0


def toml(raw: dict[str, Any]) -> bytes | None:
    """None where TOML cannot say it (a None in it, half a character)."""
    try:
        return tomlkit.dumps(raw).encode("utf-8")
    except (ValueError, TypeError, UnicodeEncodeError, RecursionError, AttributeError):
        return None


@st.composite
def studies(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(TEXTS)))
    if draw(st.booleans()):
        return name, draw(damaged(TEXTS[name]))
    content = toml(draw(altered(tomllib.loads(TEXTS[name].decode()))))
    return name, TEXTS[name] if content is None else content


def check_studies(desk: Path, number: int) -> None:
    codes, names = [], set()

    @tried(number)
    @given(studies())
    def check(case: tuple[str, bytes]) -> None:
        names.add(case[0])
        codes.append(compared(desk, *case))

    check()
    assert len(codes) >= number and {0, 2} == set(codes)
    assert number < 20 * len(TEXTS) or names == set(TEXTS)


def test_a_study_s_file_with_any_fault_is_read_or_refused(desk):
    check_studies(desk, 60)


@pytest.mark.slow
def test_a_study_s_file_with_any_fault_is_read_or_refused_1200_times(desk):
    check_studies(desk, 1200)


# -- adapters --------------------------------------------------------------------------------------------------------------


def of_rankwise(folder: Path) -> None:
    """A method of each form that a file can have (PEFT's forms; our own, which full fine-tuning and BitFit have)."""
    for method, given_ in {
        "lora": {"rank": 3, "alpha": 5, "rank_pattern": {"query": 2}},
        "dora": {"rank": 2},
        "adalora": {"initial_rank": 3, "target_rank": 2},
        "adalora+dora": {"initial_rank": 3, "target_rank": 2},
        "vera": {"rank": 3},
        "ia3": {},
        "houlsby": {"bottleneck": 3},
        "bitfit": {},
    }.items():
        adapter = variants.create(method, **given_).attach(tiny("bert"))
        variants.save_pretrained(adapter, folder / method)
    for method in ("prompt-tuning", "prefix-tuning"):
        adapter = variants.create(method, tokens=3).attach(tiny("bert"))
        variants.save_pretrained(adapter, folder / method)


def of_peft(folder: Path) -> None:
    import peft

    classifier = {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    kinds = {
        "peft-lora": peft.LoraConfig(r=3, target_modules=["query", "value"], **classifier),
        "peft-dora": peft.LoraConfig(r=3, use_dora=True, target_modules=r".*\.(query|dense)", rank_pattern={"query": 2}),
        "peft-adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=100, tinit=10, tfinal=10, target_modules=["query"]),
        "peft-vera": peft.VeraConfig(r=3, target_modules=["query", "value"]),
        "peft-ia3": peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[]),
        "peft-prompt-tuning": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    }
    for name, one in kinds.items():
        peft.get_peft_model(tiny("bert"), one).save_pretrained(folder / name)


def of_images(folder: Path) -> None:
    """The files of programs that make images: one of Kohya's, and one of diffusers of the tiny model as a component."""
    for name in (KOHYA, DIFFUSERS):
        (folder / name).mkdir(parents=True)
    kohya_file(folder / KOHYA / "one.safetensors")
    adapter = variants.create("lora", rank=3, alpha=5).attach(tiny("bert"), head=())
    variants.save_diffusers(adapter, folder / DIFFUSERS)


def header(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's JSON and its numbers; our own metadata, JSON in a text, as JSON."""
    (size,) = struct.unpack("<Q", content[:8])
    parsed = json.loads(content[8 : 8 + size])
    metadata = parsed.get("__metadata__", {})
    if "rankwise" in metadata:
        parsed[FACTS] = json.loads(metadata.pop("rankwise"))
    return parsed, content[8 + size :]


def with_header(parsed: dict[str, Any], numbers: bytes) -> bytes:
    parsed = dict(parsed)
    if (facts := parsed.pop(FACTS, None)) is not None and isinstance(parsed.get("__metadata__"), dict):
        parsed["__metadata__"] = {**parsed["__metadata__"], "rankwise": json.dumps(facts)}
    text = json.dumps(parsed).encode()
    return struct.pack("<Q", len(text)) + text + numbers


@st.composite
def adapters(draw: st.DrawFn, whole: dict[str, dict[str, bytes]]) -> tuple[str, dict[str, bytes]]:
    """Its name, and its files with faults in one of them."""
    name = draw(st.sampled_from(sorted(whole)))
    files = dict(whole[name])
    which = draw(st.sampled_from(sorted(files)))
    how = draw(st.sampled_from(["bytes", "keys", "keys", "keys"]))
    if how == "bytes":
        early = draw(st.booleans())  # in the header rather than anywhere
        content = files[which]
        end = min(len(content), 8 + int.from_bytes(content[:8], "little")) if early and which != CONFIG else len(content)
        files[which] = draw(damaged(content[:end])) + content[end:]
    elif which == CONFIG:
        files[which] = json.dumps(draw(altered(json.loads(files[which])))).encode()
    else:
        parsed, numbers = header(files[which])
        files[which] = with_header(draw(altered(parsed)), numbers)
    return name, files


# Each was a traceback of one of the readers once.
WRONG_KINDS = {
    "rank_pattern = 'a text'": ("lora", {"rank_pattern": "all"}),
    "a rank that is an object": ("lora", {"rank_pattern": {"query": {"r": 2}}}),
    "a rank that is a mask": ("lora", {"rank_pattern": {"query": [True]}}),
    "a mask that is a truth value": ("adalora", {"rank_pattern": {"query.lora_E": True}}),
    "target_parameters = 7": ("lora", {"target_parameters": 7}),
    "modules_to_save = 0.5": ("lora", {"modules_to_save": 0.5}),
    "layers_to_transform = a text": ("lora", {"layers_to_transform": ["x"]}),
    "layers_pattern = 7": ("lora", {"layers_pattern": 7}),
    "init_r = 1e400": ("adalora", {"init_r": float("inf")}),
    "r = 2^70": ("lora", {"r": 1 << 70}),
    "lora_alpha = 10^400": ("lora", {"lora_alpha": 10**400}),
    "lora_alpha = nan": ("lora", {"lora_alpha": float("nan")}),
    "a deep text": ("lora", {"base_model_name_or_path": DEEP}),
}


@pytest.mark.parametrize("name", WRONG_KINDS)
def test_a_value_of_another_kind_is_refused_by_every_reader(name, tmp_path):
    method, change = WRONG_KINDS[name]
    sizes = {"rank": 2} if method == "lora" else {"initial_rank": 3, "target_rank": 2}
    model = tiny("bert")
    adapter = variants.create(method, **sizes).attach(model)
    variants.save_pretrained(adapter, tmp_path / "adapter")
    adapter.detach()
    path = tmp_path / "adapter" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert answered("ranks", tmp_path / "adapter") == answered("doctor", tmp_path / "adapter") == 2
    with pytest.raises(ValueError, match=rf"{next(iter(change))}.*(is no|not supported)"):
        variants.load_pretrained(model, tmp_path / "adapter")


def check_adapters(folder: Path, number: int) -> None:
    whole = {
        one.name: {path.name: path.read_bytes() for path in one.iterdir() if path.name == CONFIG or path.suffix == SUFFIX}
        for one in sorted(folder.iterdir())
    }
    codes, names, spot, model = [], set(), folder.parent / "changed", tiny("bert")

    @tried(number)
    @given(adapters(whole), st.sampled_from(["ranks", "doctor", "load"]))
    def check(case: tuple[str, dict[str, bytes]], command: str) -> None:
        form, files = case
        names.add(form)
        shutil.rmtree(spot, ignore_errors=True)
        spot.mkdir()
        for name, content in files.items():
            (spot / name).write_bytes(content)
        if command != "load" or form == KOHYA:
            alone = spot / next(iter(files)) if form in (KOHYA, DIFFUSERS) else spot
            codes.append(answered("doctor" if form == KOHYA else command, alone))
            return
        with in_time(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load = variants.load_diffusers if form == DIFFUSERS else variants.load_pretrained
            try:
                load(model, spot).detach()
                codes.append(0)
            except ValueError as error:
                assert type(error) is ValueError and str(error)
                codes.append(2)

    check()
    assert len(codes) >= number and {0, 2} <= set(codes)
    assert number < 40 * len(whole) or names == set(whole)


def test_an_adapter_s_folder_with_any_fault_is_read_or_refused(tmp_path):
    of_rankwise(tmp_path / "whole")
    check_adapters(tmp_path / "whole", 40)


@pytest.mark.slow
def test_an_adapter_s_folder_with_any_fault_is_read_or_refused_1200_times(tmp_path):
    of_rankwise(tmp_path / "whole")
    of_peft(tmp_path / "whole")
    of_images(tmp_path / "whole")
    check_adapters(tmp_path / "whole", 1200)
