"""What a trial measured, and which way it is better: the only place that knows it; no torch."""

from __future__ import annotations

from pathlib import Path

from maps_ray.files import read_json
from maps_ray.metrics import action_error

_MAXIMISED = "/success"


def maximised(name: str) -> bool:
    """Whether more of a metric is better: success rates; all other metrics are errors."""
    return name.endswith(_MAXIMISED)


def cost(name: str, value: float) -> float:
    """A metric's value as something of which less is better."""
    return -value if maximised(name) else value


def best_word(name: str) -> str:
    """What the best value of a metric is called."""
    return "most" if maximised(name) else "least"


def aims(names: tuple[str, ...]) -> str:
    """In words: `minimising a, b, maximising c`."""
    groups = {"minimising": [n for n in names if not maximised(n)], "maximising": [n for n in names if maximised(n)]}
    return ", ".join(f"{word} {', '.join(group)}" for word, group in groups.items() if group)


def evaluations(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """(optimizer step, metric -> value) of every evaluation on record, ascending in step.

    Rollouts may run at fewer steps than the offline evaluation, and end minutes after it: a step's metrics then lack
    theirs, or get them later.
    """
    return [
        (
            int(entry["step"]),
            {
                action_error(split, name): float(value)
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
    for _, measured in evaluations(run_dir):
        values |= measured
    return values
