"""Weights that come from elsewhere run no code: a `.pt` file is read as tensors and plain containers, or not at all."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_no_weights_are_unpickled() -> None:
    loads, faults = 0, []
    for path in sorted(
        path for room in ("maps_ray", "jobs", "benchmarks", "tune_spaces") for path in (ROOT / room).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            if (owner, node.func.attr) == ("torch", "load"):
                loads += 1
                if given.get("weights_only") is not True:
                    faults.append(where)
            if (owner, node.func.attr) == ("np", "load") and given.get("allow_pickle"):
                faults.append(where)
    assert loads and not faults, faults
