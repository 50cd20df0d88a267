"""Imports between the packages point downwards, and each heavy library has one home."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "lmcore"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))

# From top to bottom: a package imports from packages below it only. A module without a package is a leaf.
LAYERS = (
    {"cli"},
    {"run"},
    {"plan", "saved"},
    {"engine"},
    {"model", "data", "report", "checkpoint", "config"},
    {"leaf"},
)


def name_of(path: Path) -> str:
    return ".".join(("lmcore", *path.relative_to(PACKAGE).with_suffix("").parts))


def package_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or (PACKAGE / parts[-1]).is_dir() else "leaf"


def imports(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too; imports that only types need are left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def level(package: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if package in layer)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_packages_import_downwards_only(path: Path) -> None:
    here = package_of(name_of(path))
    for module in imports(path) & {name_of(other) for other in MODULES}:
        if package_of(module) != here:
            assert level(package_of(module)) > level(here), f"{name_of(path)} imports {module}"


def test_no_import_cycles() -> None:
    names = {name_of(path) for path in MODULES}
    graph = {name_of(path): imports(path) & names for path in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the cycle


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_accelerate_and_deepspeed_are_imported_by_the_engine_only(path: Path) -> None:
    name = name_of(path)
    if not name.startswith("lmcore.engine.") and name != "lmcore.report.trackers":
        assert not {module.split(".")[0] for module in imports(path)} & {"accelerate", "deepspeed"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_reading_text_and_options_needs_no_torch(path: Path) -> None:
    name = name_of(path)
    if name.startswith(("lmcore.config.", "lmcore.data.text.", "lmcore.data.order", "lmcore.data.cursor")):
        assert "torch" not in {module.split(".")[0] for module in imports(path)}


def test_nothing_imports_the_script() -> None:
    assert not [path for path in MODULES if "train_lm" in imports(path)]
