"""What files of others cannot do, a claim of experiments/threat_model.md each.

Elsewhere: a pickle is refused unopened (test_checkpoint, test_doctor, test_ranks, test_models), code beside a model is not run
(test_models), archives are taken by their hash alone and a carrier's code never runs (test_catalogue), HTML in a browser
(test_html), a changed archive of runs is refused (test_archive).
"""

import ast
import io
import json
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rankwise import variants
from rankwise.experiments import archive, config, files, records, sources
from rankwise.reports import page
from rankwise.reports.analysis import measured
from rankwise.variants.files import json_text
from rankwise.variants.files.peft.names import CONFIG, WEIGHTS
from safetensors.torch import save_file

from tests.command import rankwise
from tests.synthetic_runs import write_run, write_study
from tests.tiny import tiny

ROOT = Path(__file__).parent.parent
CODE = [path for folder in ("variants", "experiments", "reports") for path in sorted((ROOT / folder).rglob("*.py"))]
HOSTILE = "`<script>alert(1)</script><img src=x onerror=alert(1)> & \"'"


# -- no code out of data -----------------------------------------------------------------------------------------------------


def dangers(tree: ast.AST) -> set[str]:
    """Calls that run what a file says, and switches that allow it."""
    modules = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "yaml", "cloudpickle"}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found |= {name for name in names if name.partition(".")[0] in modules}
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen"):
                found.add(name)
            if name.endswith((".extractall", ".unpack_archive", "pd.read_pickle", ".load_module")):
                found.add(name)
            for keyword in node.keywords:
                allows = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and allows:
                    found.add(f"{keyword.arg}=True")
    return found


def test_no_line_of_ours_runs_what_a_file_says():
    assert len(CODE) > 200
    found = {str(path.relative_to(ROOT)): dangers(ast.parse(path.read_text(encoding="utf-8"))) for path in CODE}
    assert {path: names for path, names in found.items() if names} == {}
    planted = (
        "import pickle, subprocess\neval(x)\nnp.load(f, allow_pickle=True)\ntar.extractall()\nsubprocess.run(c, shell=True)"
    )
    assert dangers(ast.parse(planted)) == {"pickle", "eval", "allow_pickle=True", "tar.extractall", "shell=True"}


# -- paths that lead outside -------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path) -> Path:
    variants.save_pretrained(variants.create("lora", rank=2).attach(tiny("bert")), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", 7, None])
def test_a_model_s_index_names_files_beside_it_alone(tmp_path, name):
    (tmp_path / "model").mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "outside.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    assert sources.weights(tmp_path / "model") == []
    save_file({"w": torch.ones(1)}, tmp_path / "model" / "inside.safetensors")
    index.write_text(json.dumps({"weight_map": {"w": "inside.safetensors"}}))
    assert len(sources.weights(tmp_path / "model")) == 1


def test_every_file_of_the_catalogue_lands_in_its_own_folder():
    names = [name for entry in sources.CATALOGUE.values() for name in entry.files]
    assert names and all(Path(name).name == name and name not in (".", "..") for name in names)


@pytest.mark.parametrize("name", ["../../elsewhere", "/tmp/elsewhere", "..", "a/b"])
def test_a_study_s_name_cannot_name_a_folder_elsewhere(name):
    with pytest.raises(ValueError, match="cannot name the folder of the runs"):
        config.parse({"name": name, "model": "m", "tasks": ["glue/stsb"], "methods": []}, default_name="x")


def test_names_in_runs_of_others_do_not_lead_out_of_the_report_s_folder(tmp_path, figures_undrawn):
    inside = tmp_path / "a" / "b"
    for name in ("../../one", "../../two"):
        for method in ("full", "lora"):
            for task in ("../x", "../y"):
                write_run(inside / "runs", method=method, study=name, task=task, seed=0, setting=f"../../{method}")
    before = {path for path in tmp_path.rglob("*") if (inside / "runs") not in path.parents}
    page.write(inside / "runs", inside / "report")
    made = {path for path in tmp_path.rglob("*") if (inside / "runs") not in path.parents} - before
    assert made and all(path == inside / "report" or (inside / "report") in path.parents for path in made)


def test_arrays_of_an_analysis_lie_beside_it(tmp_path):
    text = (ROOT / "reports/studies/analyses/subspace.json").read_text()
    written = json.loads(text)
    written["files_sha256"] = {"../secret.npz": "0" * 64}
    (tmp_path / "subspace.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r'names "../secret.npz", which is no file beside it'):
        measured.read(tmp_path)


# -- bombs -------------------------------------------------------------------------------------------------------------------


def test_json_has_bounds(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nested too deep"):
        json_text.parse("[" * 200_000 + "]" * 200_000)
    monkeypatch.setattr(json_text, "MOST_BYTES", 1000)
    (tmp_path / "large.json").write_text(json.dumps("x" * 1000))
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(ValueError, match="1,002 bytes, more than the 1,000"):
        json_text.read(tmp_path / "large.json")


@pytest.mark.parametrize("words", [["ranks"], ["doctor"], ["export", "--to", "lora", "--out", "out"]])
def test_a_deep_configuration_of_an_adapter_is_one_line(adapter, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (adapter / CONFIG).write_text('{"peft_type": ' + "[" * 200_000)
    assert rankwise(words[0], adapter, *words[1:]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and CONFIG in said and ("nested too deep" in said or "no JSON" in said)


def test_deep_metadata_of_an_adapter_is_one_line(adapter, capsys):
    tensors = {"base_model.model.l.lora_A.weight": torch.ones(1, 3), "base_model.model.l.lora_B.weight": torch.ones(3, 1)}
    save_file(tensors, adapter / WEIGHTS, metadata={"rankwise": "[" * 200_000})
    for word in ("ranks", "doctor"):
        assert rankwise(word, adapter) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(ValueError, match="nested too deep"):
        variants.load_pretrained(tiny("bert"), adapter)


@pytest.mark.parametrize("size", [1 << 62, 200 << 20], ids=["impossible", "200 MB"])
def test_a_header_that_says_it_is_huge_is_refused(adapter, size, capsys):
    with (adapter / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", size) + b"{")
        if size < 1 << 40:
            file.truncate(8 + size)  # a file with a hole: it takes no space
    for word in ("ranks", "doctor"):
        assert rankwise(word, adapter) == 2
        assert "not a whole safetensors file" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no safetensors file"):
        variants.load_pretrained(tiny("bert"), adapter)


def test_a_study_s_file_has_a_bound(tmp_path, capsys, monkeypatch):
    path = tmp_path / "large.toml"
    with path.open("wb") as file:
        file.truncate(config.MOST_BYTES + 1)
    assert rankwise("compare", path) == 2
    assert "large.toml: 4,194,305 bytes, and a study's file has at most 4,194,304" in capsys.readouterr().err


def test_an_archive_of_runs_is_not_unpacked_beyond_its_bound(tmp_path, monkeypatch):
    text = pa.array(["0" * (1 << 20)])
    table = pa.table({"fingerprint": pa.array(["f"]), records.CONFIG: text, records.RESULT: text})
    pq.write_table(table, tmp_path / archive.NAME, compression="zstd", use_dictionary=False)
    assert (tmp_path / archive.NAME).stat().st_size < 10_000
    monkeypatch.setattr(archive, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr(pq, "read_table", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match=r"bytes when it is unpacked, more than the 1,048,576 that are read"):
        archive.read(tmp_path / archive.NAME)


@pytest.mark.parametrize("kind", ["bomb", "no zip", "pickle", "shape"])
def test_arrays_of_an_analysis_have_a_bound(kind, monkeypatch):
    content = io.BytesIO()
    if kind == "bomb":
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a.npy", b"\0" * (1 << 20))
        monkeypatch.setattr(measured, "MOST_BYTES", 1 << 19)
        monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    elif kind == "pickle":
        np.savez(content, a=np.array([object()], dtype=object))
    elif kind == "shape":  # an array whose header says that it has 2^60 numbers
        header = str({"descr": "<f8", "fortran_order": False, "shape": (1 << 60,)}).encode()
        with zipfile.ZipFile(content, "w") as file:
            file.writestr("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(ValueError, match="no arrays of an analysis"):
        measured._arrays(Path("a.npz"), content.getvalue(), "make it again")


SLOW = [r"(\w+\.?)+!", "(a|a)*$", "((a*)*)*b", r"(?:.*\.)*x", "(a+){1,99}", ".*" * 13 + "x", "x" * 10_001]


@pytest.mark.parametrize("pattern", SLOW, ids=[text[:12] for text in SLOW])
@pytest.mark.parametrize("key", ["target_modules", "rank_pattern"])
def test_a_pattern_that_could_match_for_ever_is_refused(adapter, key, pattern, capsys):
    values = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(values | {key: pattern if key == "target_modules" else {pattern: 2}}))
    for word in ("ranks", "doctor"):
        assert rankwise(word, adapter) == 2
        assert "could take for ever to match" in capsys.readouterr().err
    with pytest.raises(ValueError, match="could take for ever"):
        variants.load_pretrained(tiny("bert"), adapter)


def test_patterns_that_others_write_are_read():
    """PEFT's expressions for a list of modules, and those of programs that choose the layers of a vision-language model."""
    from rankwise.variants.files.peft.config import check_kinds

    honest = [
        r".*\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o)_proj",
        r"(?:.*?(?:vision|text).*?(?:attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:attn)\.(?:(?:q_proj)))",
        r"^(?!.*vision).*(?:q_proj|v_proj)$",
        r"layers\.(?:1[0-9]|2[0-3])\.[()*+|]{0}q_proj",
    ]
    for text in honest:
        check_kinds({"peft_type": "LORA", "target_modules": text, "rank_pattern": {text: 4}})


# -- names that are markup, or commands to a terminal ----------------------------------------------------------------------


def test_reports_show_names_as_they_are(tmp_path):
    """Study, method, site, task, model, device, caption and error of runs: nothing of a page reads them as markup."""
    sites = [f"a.{HOSTILE}.{i}.{HOSTILE}" for i in (0, 1)]
    for method in ("full", "lora"):
        write_run(
            tmp_path / "runs",
            method=method,
            setting=f"{method} {HOSTILE}",
            study=HOSTILE,
            task=HOSTILE,
            model=HOSTILE,
            sites=sites,
            device_name=HOSTILE,
            caption=[HOSTILE],
            error=HOSTILE if method == "full" else None,
        )
    page.write(tmp_path / "runs", tmp_path / "report")
    made = [path for path in (tmp_path / "report").rglob("*") if path.suffix in (".html", ".md", ".svg")]
    assert {path.suffix for path in made} == {".html", ".md", ".svg"}
    for path in made:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".md":  # what stands in a span of code is shown as it is
            text = re.sub(r"(?<!`)(?<!\\)(`+)(?!`)[^\n]*?(?<!`)\1(?!`)", "", text)
        assert "<script>alert" not in text and "<img src=x" not in text, path
    assert "&lt;script&gt;" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_names_out_of_files_command_no_terminal(tmp_path, capsys):
    escape = "\x1b]0;owned\x07\x1b[2J"
    names = {f"base_model.model.l{escape}.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    (tmp_path / "adapter").mkdir()
    save_file(names, tmp_path / "adapter" / WEIGHTS)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": escape}
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(settings))
    for word in ("ranks", "doctor"):
        assert rankwise(word, tmp_path / "adapter") in (0, 1)
        assert "\x1b" not in (said := capsys.readouterr()).out + said.err and "\\x1b" in said.out
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(settings | {"peft_type": escape}))
    for word in ("ranks", "doctor"):
        assert rankwise(word, tmp_path / "adapter") == 2
        assert "\x1b" not in capsys.readouterr().err
    write_study(tmp_path / "runs", methods=("full",), seeds=(0,), sweep=False)
    files.write_file(tmp_path / "runs" / f"x{escape}" / "config.json", "{")
    assert rankwise("report", tmp_path / "runs") == 2
    assert "\x1b" not in (said := capsys.readouterr().err) and "\\x1b" in said
