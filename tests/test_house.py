"""The shape of the two packages: short files and functions, few files a folder, imports in one direction."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("hooked_models", "writesae_lens", "writesae_lens_cli")
FILES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))
LONGEST_FILE, LONGEST_BODY, MOST_FILES = 450, 60, 15


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def body_length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function below its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return 0 if not body else (body[-1].end_lineno or 0) - body[0].lineno + 1


def imported(tree: ast.AST) -> set[str]:
    """Modules of the packages that a module imports when it is loaded (in functions or for types: not)."""
    found: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inside or ({node.module} & MODULES.keys())
        pending += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def test_functions_are_short() -> None:
    long = {
        f"{name}.{function.name}": body_length(function)
        for name, tree in TREES.items()
        for function in functions(tree)
        if body_length(function) > LONGEST_BODY
    }
    assert not long


def test_folders_have_few_files() -> None:
    """Modules that declare an experiment do not count: there is one for each."""
    declares = {
        name
        for name, tree in TREES.items()
        for function in functions(tree)
        for decorator in function.decorator_list
        if ast.unparse(decorator).startswith("experiment(")
    }
    counts = Counter(path.parent for name, path in MODULES.items() if name not in declares)
    assert {str(folder): n for folder, n in counts.items() if n > MOST_FILES} == {}


def test_no_import_circle() -> None:
    tuple(TopologicalSorter({name: imported(tree) - {name} for name, tree in TREES.items()}).static_order())


def test_hooked_models_does_not_know_writesae_lens() -> None:
    assert not [
        name
        for name in MODULES
        if name.startswith("hooked_models") and "writesae_lens" in MODULES[name].read_text(encoding="utf-8")
    ]


def test_no_private_attribute_is_set_from_outside() -> None:
    """``x._name = ...`` is for the class that owns the name: x is self or cls."""
    outside = [
        f"{name}:{node.lineno} {ast.unparse(target)}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AugAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute)
        and target.attr.startswith("_")
        and not target.attr.startswith("__")
        and not (isinstance(target.value, ast.Name) and target.value.id in ("self", "cls"))
    ]
    assert not outside
