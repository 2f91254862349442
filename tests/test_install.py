"""Rankwise as others install it: as a wheel and in editable mode, each used beside a researcher's own experiments/."""

import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from shutil import copytree, ignore_patterns

import pytest

from tests.synthetic_runs import write_study

ROOT = Path(__file__).parent.parent
FOLDERS = ("variants", "experiments", "reports")
COMMAND = "rankwise"  # the folder with __main__.py alone, for `python -m rankwise`
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
COMMITTED = ("studies", "bench", "results.csv")  # of reports/: results, which stay in the repository


def is_committed_result(path: PurePosixPath) -> bool:
    return path.parts[0] == "reports" and (path.parts[1] in COMMITTED or path.suffix == ".md")


def sources() -> Iterator[PurePosixPath]:
    """Every file that an installed Rankwise needs, relative to the repository."""
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            relative = PurePosixPath(path.relative_to(ROOT).as_posix())
            if path.is_file() and "__pycache__" not in relative.parts and not is_committed_result(relative):
                yield relative


# -- what pyproject.toml lists -------------------------------------------------------------------------------------------


def test_every_folder_of_modules_is_a_listed_package():
    folders = {".".join(("rankwise", *path.parent.parts)) for path in sources() if path.name == "__init__.py"}
    assert set(SETUPTOOLS["packages"]) == folders | {COMMAND}
    assert {path.parent for path in sources() if path.suffix == ".py"} == {
        path.parent for path in sources() if path.name == "__init__.py"
    }, "a folder with modules has no __init__.py"


def test_every_data_file_is_package_data_and_no_committed_result_is():
    """setuptools' own reading of [tool.setuptools.package-data]: globs from the folder of the package that names them."""
    listed = set()
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        listed |= {path.relative_to(ROOT).as_posix() for glob in patterns for path in folder.glob(glob) if path.is_file()}
    needed = {str(path) for path in sources() if path.suffix != ".py"}
    assert needed - listed == set(), "these files would be missing from a wheel"
    assert not [name for name in listed if is_committed_result(PurePosixPath(name))]


# -- installed -----------------------------------------------------------------------------------------------------------


def pip(*arguments: str | Path) -> None:
    """pip without the index: the build backend is the one that is installed here."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what is built, with one committed study, so that building leaves nothing in the repository."""
    copy = tmp_path_factory.mktemp("checkout") / "rankwise"
    for folder in FOLDERS:
        ignored = ignore_patterns("__pycache__", *(COMMITTED if folder == "reports" else ()))
        copytree(ROOT / folder, copy / folder, ignore=ignored)
    copytree(ROOT / COMMAND, copy / COMMAND, ignore=ignore_patterns("__pycache__"))
    study = copy / "reports" / "studies" / "fair" / "runs"
    study.mkdir(parents=True)
    for name in ("study.toml", "report.md", "__init__.py"):  # a package of that name must not travel either
        (study / name).write_text("")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, checkout)
    return next(out.glob("rankwise-*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_file_and_no_committed_result(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {f"rankwise/{path}" for path in sources()} | {f"{COMMAND}/__main__.py"}


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, tmp_path_factory) -> Path:
    """The bin folder of an environment with Rankwise in it, and everything else from the environment of these tests."""
    folder = tmp_path_factory.mktemp(request.param) / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site_packages,) = folder.glob("lib/*/site-packages")
    # The .pth files in those folders are not read, our own editable install's neither.
    (site_packages / "others.pth").write_text("\n".join(here) + "\n")
    python = folder / "bin" / "python"
    if request.param == "wheel":
        pip("--python", python, "install", "-q", "--no-deps", request.getfixturevalue("wheel"))
    else:
        checkout = request.getfixturevalue("checkout")
        pip("--python", python, "install", "-q", "--no-deps", "--no-build-isolation", "-e", checkout)
    return folder / "bin"


@pytest.fixture
def project(tmp_path) -> Path:
    """A researcher's folder, with packages that are named as ours are."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWNER = 'the researcher'\n")
        (tmp_path / name / "config.py").write_text("OWNER = 'the researcher'\n")
    return tmp_path


def run(bin_folder: Path, project: Path, *words: str) -> str:
    command = [str(bin_folder / words[0]), *words[1:]]
    environment = {"PATH": f"{bin_folder}:/usr/bin:/bin", "HOME": str(project), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_researchers_packages_and_ours_live_in_one_folder(installed, project):
    code = """
import experiments, experiments.config, reports, variants as theirs
from rankwise import variants
import rankwise.experiments.config, rankwise.reports
print(experiments.OWNER, experiments.config.OWNER, reports.OWNER, theirs.OWNER, sep="|")
print(sorted(variants.METHODS))
print(rankwise.experiments.config.__name__, "OWNER" in vars(rankwise.experiments.config))
"""
    first, methods, ours = run(installed, project, "python", "-c", code).splitlines()
    assert first == "|".join(["the researcher"] * 4)
    assert "'adalora'" in methods
    assert ours == "rankwise.experiments.config False"


@pytest.mark.slow
def test_the_command_runs_there_and_finds_its_studies_recipes_templates_and_c_file(installed, project):
    assert "adalora" in run(installed, project, "rankwise", "list")
    assert "adalora-1" in run(installed, project, "rankwise", "paper")
    code = """
from pathlib import Path
from rankwise.experiments import config
from rankwise import variants
print(config.read(Path("smoke")).name, *(path.name for path in Path(variants.__file__).parent.rglob("*.c")))
"""
    assert run(installed, project, "python", "-c", code).split() == ["smoke", "native.c"]
    write_study(project / "runs", methods=("lora", "adalora"), seeds=(0, 1))
    run(installed, project, "rankwise", "report", "runs", "--out", "written")
    assert "<html" in (project / "written" / "report.html").read_text(encoding="utf-8")[:2000]
