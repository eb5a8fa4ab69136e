"""Imports between the rooms of the package run downward only, as docs/how-it-works.md draws them."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "maps_ray"
EXAMPLES = {path.name for path in (PACKAGE.parent / "examples").iterdir() if path.is_dir()}
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
