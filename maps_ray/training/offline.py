"""Offline action error: how far predicted chunks are from the demonstrated ones.

Errors are absolute differences in normalised actions, averaged over the chunk; each sample counts once, whatever the
number of workers. Training measures them on the splits that it does not see (`loop`), `error_on` on demonstrations that
a finished run never saw: other positions, words or tasks.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from maps_ray.data import Demonstrations, EvaluationBatches, Loader, Mixture, Processor
from maps_ray.data.statistics import DatasetStatistics
from maps_ray.models import load_policy, load_processor
from maps_ray.spec import EvaluationSpec, SplitSpec, SplitsSpec, load_spec
from maps_ray.training.run_folder import SplitErrors

if TYPE_CHECKING:
    from maps_ray.proximity.zero.deepspeed_engine import Output

# A process forks in a tenth of a second, and reads its part of the index.
_BATCHES_WORTH_A_PROCESS = 4
# Dimensions of an end-effector action: translation, axis-angle rotation, gripper.
_PARTS = {"position": slice(0, 3), "rotation": slice(3, 6), "gripper": slice(6, 7)}


def error_on(run_dir: Path, demonstrations: str | Path, split: SplitSpec | None = None) -> SplitErrors:
    """Evaluates the trained weights of a run, on the CPU.

    Args:
        run_dir: of a finished run, with `spec.yaml` and `final`.
        demonstrations: folder of a LeRobotDataset v3 with the cameras, state and actions of the training data.
        split: which of its episodes; none means all.

    Returns:
        As `summary`; actions are normalised by the statistics of the training data.

    Raises:
        DatasetError, SpecError, maps_ray.models.CheckpointError: data or weights cannot be used.
    """
    spec = load_spec(run_dir / "spec.yaml")
    final = run_dir / "final"
    # Of a mixture, the statistics of the first source hold for data that have no name in it.
    first = spec.data.resolved()[0]
    raw = json.loads((final / "dataset_statistics.json").read_text())[first.key]
    source = first.model_copy(
        update={"path": str(Path(demonstrations).absolute()), "splits": SplitsSpec(train=split or SplitSpec())}
    )
    loaded = Demonstrations(
        spec.data.model_copy(update={"path": None, "sources": [source]}),
        use_proprio=spec.model.use_proprio,
        statistics={first.key: DatasetStatistics.from_dict(raw, str(final))},
    )
    policy = load_policy(final, dtype=torch.bfloat16 if spec.training.precision == "bf16" else torch.float32)
    sizes = {"chunk": policy.config.chunk, "action_dim": policy.config.action_dim}
    processor = load_processor(final, **sizes)
    policy.eval()
    samples = loaded.samples("train")
    return summary(samples, sample_errors(policy, samples, processor, spec.evaluation, torch.device("cpu")))


def sample_errors(
    forward: Callable[..., Output],
    samples: Mixture,
    processor: Processor,
    spec: EvaluationSpec,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    processes: int = 0,
) -> list[tuple[int, list[float]]]:
    """(sample, error of each action dimension) of one rank's share; `forward` is the policy or its engine.

    `processes` make the batches, where these are enough to be worth their start.
    """
    rows: list[tuple[int, list[float]]] = []
    size, most = spec.batch_size, spec.max_samples
    parts = EvaluationBatches(samples, processor, batch_size=size, max_samples=most, rank=rank, world_size=world_size)
    if len(parts) < _BATCHES_WORTH_A_PROCESS * processes:
        processes = 0
    with torch.no_grad(), Loader(parts, 0, len(parts), device=device, processes=processes) as batches:
        for inputs, (indices, weights) in zip(batches, parts.rows, strict=True):
            predicted = forward(**inputs).actions
            errors = (predicted.double() - inputs["actions"].double()).abs().mean(dim=1).tolist()
            # Rows of weight 0 only fill a batch: all ranks make equally many passes, for ZeRO-3 gathers in each.
            rows += [(index, row) for index, row, weight in zip(indices, errors, weights, strict=True) if weight]
    return rows


def summary(samples: Mixture, rows: list[tuple[int, list[float]]]) -> SplitErrors:
    """The action error on one split, from the rows of all ranks in the order of samples."""
    tasks: dict[str, list[list[float]]] = defaultdict(list)
    episodes: dict[str, list[list[float]]] = defaultdict(list)
    for index, errors in rows:
        tasks[samples.task(index)].append(errors)
        episodes[samples.episode(index)].append(errors)
    result = SplitErrors(samples=len(rows))
    for name, value in _means([errors for _, errors in rows]).items():
        result[name] = value  # type: ignore[literal-required]
    return result | {
        "tasks": {task: _means(errors)["action_l1"] for task, errors in tasks.items()},
        "episodes": {episode: {"samples": len(errors), **_means(errors)} for episode, errors in episodes.items()},
    }


def _means(rows: list[list[float]]) -> dict[str, float]:
    errors = np.array(rows)
    result = {"action_l1": float(errors.mean())}
    if errors.shape[1] == 7:
        result |= {f"{name}_l1": float(errors[:, part].mean()) for name, part in _PARTS.items()}
    return result
