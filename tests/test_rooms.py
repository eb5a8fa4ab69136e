"""Imports between the rooms of the package run downward only, as docs/how-it-works.md draws them."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "maps_ray"
EXAMPLES = {path.name for path in (PACKAGE.parent / "examples").iterdir() if path.is_dir()}
BESIDE = ("benchmarks", "jobs", "tests")
# From the ground up; a room may import those before it.
ROOMS = (
    "exit_codes", "files", "metrics", "machine", "devices", "spec",
    "ray_internals", "ray_connection", "proximity", "models", "data", "run_storage", "run_copies",
    "tracking", "serving", "evaluation", "training", "reports", "sweeps", "cli",
)  # fmt: skip


def test_imports_run_downward_only():
    upward = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in _imported(node):
                if own != "__init__" and ROOMS.index(name) > ROOMS.index(own):
                    upward.append(f"{path.relative_to(PACKAGE.parent)}:{node.lineno} imports {name}")
    assert not upward, "\n".join(upward)


def test_the_package_imports_nothing_of_the_examples():
    assert "tiny_base" in EXAMPLES
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found += [
                f"{path.relative_to(PACKAGE.parent)}:{node.lineno}"
                for name in _modules(node)
                if name.split(".")[0] in EXAMPLES
            ]
    assert not found, "\n".join(found)


def test_programs_beside_the_package_name_what_it_has():
    """Imports within functions too: no other test reaches those of a benchmark that takes hours."""
    missing = []
    for path in sorted(path for folder in BESIDE for path in (PACKAGE.parent / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "maps_ray":
                where = f"{path.relative_to(PACKAGE.parent)}:{node.lineno}"
                has = _names(node.module)
                missing += [f"{where}: {node.module} has no {a.name}" for a in node.names if a.name not in has]
    assert not missing, "\n".join(missing)


@functools.cache
def _names(module: str) -> set[str]:
    """What a module binds, and the modules in it; read, not imported, for some need what is not installed."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    inside = {entry.stem for entry in path.iterdir()} if path.is_dir() else set()
    names = ast.walk(ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()))
    for node in names:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inside.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            inside.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            inside |= {alias.asname or alias.name for alias in node.names}
    return inside


def _imported(node: ast.AST) -> list[str]:
    """Rooms that an import statement names."""
    return [module.split(".")[1] for module in _modules(node) if module.startswith("maps_ray.")]


def _modules(node: ast.AST) -> list[str]:
    """Modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module == "maps_ray":
        return [f"maps_ray.{alias.name}" for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []
