"""Offline action error during training: how far predicted chunks are from the demonstrated ones.

Errors are absolute differences in normalised actions, averaged over the chunk; each sample counts once, whatever the
number of workers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from maps_ray.data import Processor, Samples, evaluation_batches
from maps_ray.spec import EvaluationSpec
from maps_ray.training.run_folder import read_json, write_json

# Dimensions of an end-effector action: translation, axis-angle rotation, gripper.
_PARTS = {"position": slice(0, 3), "rotation": slice(3, 6), "gripper": slice(6, 7)}


def action_error(
    engine: Any, samples: Samples, processor: Processor, spec: EvaluationSpec, device: torch.device
) -> dict[str, Any]:
    """The action error on one split; every rank calls it and gets the whole result.

    Returns:
        `samples`, `action_l1` and, for actions of 7 dimensions, `position_l1`, `rotation_l1` and `gripper_l1`; the
        error of each task (`tasks`: sentence -> `action_l1`), and all of these values for each episode (`episodes`:
        index -> values).
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    engine.module.eval()
    mine = _sample_errors(engine, samples, processor, spec, device, rank, world_size)
    engine.module.train()
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, mine)
    # In sample order, so that the sums do not depend on the number of workers.
    return _summary(samples, sorted(row for rows in gathered for row in rows))


def action_error_of(policy: Any, samples: Samples, processor: Processor, spec: EvaluationSpec) -> dict[str, Any]:
    """As `action_error`, of a whole policy in this process alone."""
    policy.eval()
    device = next(policy.parameters()).device
    return _summary(samples, _sample_errors(policy, samples, processor, spec, device, 0, 1))


def metrics(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`eval/<split>/action_l1` and so on, from split -> result."""
    return {
        f"eval/{split}/{name}": value
        for split, result in results.items()
        for name, value in result.items()
        if name.endswith("_l1")
    }


class EvaluationRecord:
    """`evaluation.json`: a list of `{"step", "splits": {split: result}, "rollouts": {metric: value}}`, ascending in
    step; `rollouts` is missing where there were none."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "evaluation.json"

    def at(self, step: int) -> dict[str, Any] | None:
        """The results of one step, split -> result; None when there are none."""
        return next((entry["splits"] for entry in self._entries() if entry["step"] == step), None)

    def add(self, step: int, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds the results of one step, in place of all that was known of it."""
        entries = [entry for entry in self._entries() if entry["step"] != step]
        entries.append({"step": step, "splits": dict(results)})
        write_json(self._path, sorted(entries, key=lambda entry: int(entry["step"])))

    def rollouts_at(self, step: int) -> dict[str, float] | None:
        """The metrics of one step's rollouts; None when there are none."""
        return next((entry.get("rollouts") for entry in self._entries() if entry["step"] == step), None)

    def add_rollouts(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the metrics of rollouts to what is known of a step."""
        if self.at(step) is None:
            self.add(step, {})
        found = [entry | {"rollouts": dict(values)} if entry["step"] == step else entry for entry in self._entries()]
        write_json(self._path, found)

    def _entries(self) -> list[dict[str, Any]]:
        return read_json(self._path) or []


def _sample_errors(
    forward: Any,
    samples: Samples,
    processor: Processor,
    spec: EvaluationSpec,
    device: torch.device,
    rank: int,
    world_size: int,
) -> list[tuple[int, list[float]]]:
    """(sample, error of each action dimension) of this rank's share."""
    found: list[tuple[int, list[float]]] = []
    with torch.no_grad():
        for part in evaluation_batches(
            samples,
            processor,
            batch_size=spec.batch_size,
            max_samples=spec.max_samples,
            rank=rank,
            world_size=world_size,
        ):
            inputs = {name: tensor.to(device) for name, tensor in part.batch.items()}
            predicted = forward(**inputs).actions
            errors = (predicted.double() - inputs["actions"].double()).abs().mean(dim=1).tolist()
            found += [
                (index, row)
                for index, row, weight in zip(part.indices, errors, part.weights.tolist(), strict=True)
                if weight
            ]
    return found


def _summary(samples: Samples, rows: list[tuple[int, list[float]]]) -> dict[str, Any]:
    tasks: dict[str, list[list[float]]] = defaultdict(list)
    episodes: dict[str, list[list[float]]] = defaultdict(list)
    for index, errors in rows:
        tasks[samples.task(index)].append(errors)
        episodes[str(samples.locate(index)[0])].append(errors)
    return {
        **_means([errors for _, errors in rows]),
        "tasks": {task: _means(errors)["action_l1"] for task, errors in tasks.items()},
        "episodes": {episode: _means(errors) for episode, errors in episodes.items()},
    }


def _means(rows: list[list[float]]) -> dict[str, Any]:
    errors = np.array(rows)
    result: dict[str, Any] = {"samples": len(rows), "action_l1": float(errors.mean())}
    if errors.shape[1] == 7:
        result |= {f"{name}_l1": float(errors[:, part].mean()) for name, part in _PARTS.items()}
    return result
