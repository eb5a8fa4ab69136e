"""What a sweep can go by: which metrics a run logs and when, what a trial measured of them, and which way it is better.

The only place that knows it; no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from maps_ray.data import data_sizes
from maps_ray.evaluation.simulators.suites import SUITES
from maps_ray.files import read_json
from maps_ray.metrics import EVALUATION, ROLLOUT, action_error, success
from maps_ray.spec import RunSpec
from maps_ray.training.run_folder import EvaluationEntry

_MAXIMISED = "/success"
# What the error of an arm's action has beside the whole.
_PARTS = ("position", "rotation", "gripper")
_ARM_DIMENSIONS = 7


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
    entries: list[EvaluationEntry] = read_json(run_dir / "evaluation.json") or []
    return [
        (
            entry["step"],
            {
                action_error(split, name): float(value)
                for split, result in entry["splits"].items()
                for name, value in result.items()
                if name.endswith("_l1") and isinstance(value, int | float)
            }
            | entry.get("rollouts", {}),
        )
        for entry in entries
    ]


def newest_values(run_dir: Path) -> dict[str, float]:
    """Each metric's value at the last evaluation that has it; empty when there was none."""
    values: dict[str, float] = {}
    for _, measured in evaluations(run_dir):
        values |= measured
    return values


def known_values(run_dir: Path, result: Mapping[str, object]) -> dict[str, float]:
    """The same, and what a trial's last result says where the record that this node sees is older than that: another
    node wrote it, and look-ups on shared storage may lag.

    Args:
        run_dir: of the trial.
        result: as `SweepTrial` gives it to Ray Tune; empty where there was none.
    """
    values, step = newest_values(run_dir), result.get("step", 0)
    assert isinstance(step, int)
    if any(at >= step for at, _ in evaluations(run_dir)):
        return values
    said = {name: value for name, value in result.items() if name.startswith((EVALUATION, ROLLOUT))}
    return values | {name: float(value) for name, value in said.items() if isinstance(value, int | float)}


def logged_metrics(base: RunSpec) -> Iterator[str]:
    """Metrics that the evaluation of a run logs, rollouts included."""
    whole = ["action"]
    if data_sizes(base.data, use_proprio=False)["action_dim"] == _ARM_DIMENSIONS:
        whole += _PARTS
    for split in ("held_out", "ood"):
        if getattr(base.data.splits, split) is not None:
            yield from (action_error(split, f"{part}_l1") for part in whole)
    if base.evaluation.rollouts is not None:
        suites = [SUITES[name] for name in base.evaluation.rollouts.suites if name in SUITES]
        sides = dict.fromkeys("id" if suite.change == "none" else "ood" for suite in suites)
        sides |= dict.fromkeys(f"ood/{suite.change}" for suite in suites if suite.change != "none")
        yield from (success(name) for name in (*(suite.name for suite in suites), *sides))


def decision_steps(objective: str, base: RunSpec) -> tuple[str, int]:
    """The field that says how often an objective is measured, and its value: optimizer steps, 0 at the end alone."""
    rollouts = base.evaluation.rollouts
    if rollouts is not None and objective.startswith(ROLLOUT):
        return "evaluation.rollouts.every", rollouts.every
    return "evaluation.every", base.evaluation.every
