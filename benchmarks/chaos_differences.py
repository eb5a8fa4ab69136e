"""What a run or sweep of `chaos.py` leaves otherwise than an undisturbed one: weights, evaluations, records, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from chaos_machine import BUCKET, Machine

if TYPE_CHECKING:
    from chaos import Course


def differences(machine: Machine, calm: Course, course: Course) -> list[str]:
    """What a course left otherwise than the undisturbed one did."""
    folders = [machine.folder / "runs" / c.name for c in (calm, course)]
    left = []
    if course.case.is_on_s3:
        folders[1], left = from_s3(machine, course)
    if not course.case.is_sweep:
        return compare_runs(machine, *folders, course.name, course.case.steps) + left
    names = [sorted(path.name for path in (folder / "trials").iterdir()) for folder in folders]
    if names[0] != names[1]:
        return [f"its trials are {names[1]}, undisturbed {names[0]}"]
    pairs = ((*(folder / "trials" / name for folder in folders), name) for name in names[0])
    return [
        fault
        for one, other, name in pairs
        for fault in compare_runs(machine, one, other, name, course.case.steps, course.name)
    ]


def from_s3(machine: Machine, course: Course) -> tuple[Path, list[str]]:
    """A copy of a run on the object store, and what killed attempts have left beside its checkpoints there."""
    from maps_ray.run_copies import fetched
    from maps_ray.run_storage import RunStorage

    address = f"s3://{BUCKET}/runs/{course.name}"
    storage = RunStorage(address)
    names = set(storage.files("checkpoints"))
    for manifest in [name for name in names if name.endswith("/manifest.json")]:
        used = json.loads(storage.read(f"checkpoints/{manifest}"))["files"]
        names -= {manifest, *(f"{manifest.partition('/')[0]}/{file}" for file in used)}
    left = [f"{course.name}: checkpoints/{name} is left" for name in sorted(names)]
    return fetched(address, machine.folder / "looked-at"), left


def compare_runs(
    machine: Machine, calm: Path, hit: Path, name: str, steps: int, parent: str | None = None
) -> list[str]:
    faults = []
    weights = sorted((calm / "final").glob("*.safetensors"))
    assert weights, calm
    for path in weights:
        other = hit / "final" / path.name
        if not other.exists() or other.read_bytes() != path.read_bytes():
            faults.append(f"{name}: {path.name} is not that of the undisturbed run")
    # Where the run was continued at its very end nothing but evaluations stands here.
    evaluations = [json.loads((folder / "evaluation.json").read_text()) for folder in (calm, hit)]
    if evaluations[0] != evaluations[1]:
        faults.append(f"{name}: evaluation.json is not that of the undisturbed run")
    faults += [f"{name}: {fault}" for fault in machine.recorded(name, parent, steps)]
    faults += [f"{name}: {path.relative_to(hit)} is left" for path in hit.rglob("*.partial")]
    return faults
