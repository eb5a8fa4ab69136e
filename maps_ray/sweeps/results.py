"""What a trial's folder says of its evaluations; no torch."""

from __future__ import annotations

from pathlib import Path

from maps_ray.training.run_folder import read_json


def evaluations(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """(optimizer step, metric -> value) of every evaluation so far, ascending in step."""
    return [
        (
            int(entry["step"]),
            {
                f"eval/{split}/{name}": float(value)
                for split, result in entry["splits"].items()
                for name, value in result.items()
                if name.endswith("_l1")
            },
        )
        for entry in read_json(run_dir / "evaluation.json") or []
    ]
