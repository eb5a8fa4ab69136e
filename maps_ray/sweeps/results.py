"""What a trial's folder says of its evaluations; no torch."""

from __future__ import annotations

from pathlib import Path

from maps_ray.training.run_folder import read_json


def evaluations(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """(optimizer step, metric -> value) of every evaluation so far, ascending in step.

    Rollouts may run at fewer steps than the offline evaluation, and end minutes after it: a step's metrics then lack
    theirs, or get them later.
    """
    return [
        (
            int(entry["step"]),
            {
                f"eval/{split}/{name}": float(value)
                for split, result in entry["splits"].items()
                for name, value in result.items()
                if name.endswith("_l1")
            }
            | entry.get("rollouts", {}),
        )
        for entry in read_json(run_dir / "evaluation.json") or []
    ]


def newest_values(run_dir: Path) -> dict[str, float]:
    """Each metric's value at the last evaluation that has it; empty when there was none."""
    values: dict[str, float] = {}
    for _, found in evaluations(run_dir):
        values |= found
    return values
