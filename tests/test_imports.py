"""What imports what in variants/ and reports/: only down, and no circle."""

import ast
from pathlib import Path

import pytest
from rankwise import reports, variants

ROOT = Path(variants.__file__).parent
PREFIX = "rankwise.variants"


def modules_of(root: Path, prefix: str) -> dict[str, Path]:
    """Full name -> file of every module under a folder."""
    files = {file: file.relative_to(root).with_suffix("").parts for file in sorted(root.rglob("*.py"))}
    return {".".join([prefix, *(part for part in parts if part != "__init__")]): file for file, parts in files.items()}


MODULES = modules_of(ROOT, PREFIX)
REPORTS = modules_of(Path(reports.__file__).parent, "rankwise.reports")


def imported(node: ast.AST) -> set[str]:
    """The modules that one import statement names, by their full names."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    assert not node.level, "imports are absolute"
    inside = {f"{node.module}.{alias.name}" for alias in node.names}
    return {name if name in MODULES | REPORTS else node.module for name in inside}


def all_imports(file: Path) -> set[str]:
    return {name for node in ast.walk(ast.parse(file.read_text())) for name in imported(node)}


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, in order; empty where there is none."""
    finished: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return []
        for other in sorted(graph[name]):
            if circle := walk(other, [*path, name]):
                return circle
        finished.add(name)
        return []

    return next((circle for name in sorted(graph) if (circle := walk(name, []))), [])


def test_a_circle_is_seen():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_no_module_imports_itself_by_way_of_others():
    assert not find_circle({name: all_imports(file) & set(MODULES) for name, file in MODULES.items()})


@pytest.mark.parametrize("name", MODULES)
def test_nothing_above_is_imported(name):
    assert not [other for other in all_imports(MODULES[name]) if other.startswith(("rankwise.experiments", "rankwise.reports"))]


@pytest.mark.parametrize("name", MODULES)
def test_no_import_of_ours_hides_in_a_function(name):
    tree = ast.parse(MODULES[name].read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    late = {other for function in functions for node in ast.walk(function) for other in imported(node)}
    assert not [other for other in late if other.startswith("rankwise")]


@pytest.mark.parametrize("name", MODULES)
def test_methods_import_machinery_and_machinery_imports_no_method(name):
    """A package inside variants/ is machinery: of the files at the top it knows the settings alone."""
    if MODULES[name].parent == ROOT:
        return
    tops = {f"{PREFIX}.{file.stem}" for file in ROOT.glob("*.py")} - {f"{PREFIX}.settings", f"{PREFIX}.__init__"}
    assert not all_imports(MODULES[name]) & tops


COMMON_WORDS = {"head", "full"}  # methods whose names are also words of the field
PEFTS_OWN = f"{PREFIX}.files.peft"  # PEFT's format has LoRA, DoRA, AdaLoRA and EVA of its own


@pytest.mark.parametrize("name", [n for n in MODULES if n != f"{PREFIX}.settings.registry" and not n.startswith(PEFTS_OWN)])
def test_a_method_is_named_in_its_own_file_and_the_registry_alone(name):
    """So that a new one is its file, its settings and its line: no machinery asks which method it serves."""
    if MODULES[name].parent == ROOT:
        return
    named = {method.name for method in variants.METHODS.values()} - COMMON_WORDS
    classes = {method.location.partition(":")[2] for method in variants.METHODS.values()}
    tree = ast.parse(MODULES[name].read_text())
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    identifiers = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    identifiers |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not (words & named) | (identifiers & classes)


def test_no_module_of_reports_imports_itself_by_way_of_others():
    assert not find_circle({name: all_imports(file) & set(REPORTS) for name, file in REPORTS.items()})
