"""Action error of a finished run on demonstrations that it never saw: other positions, words or tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from maps_ray.data import Demonstrations
from maps_ray.data.statistics import DatasetStatistics
from maps_ray.models import load_policy, load_processor
from maps_ray.spec import SplitSpec, SplitsSpec, load_spec
from maps_ray.training.policy import DTYPES
from maps_ray.training.validation import action_error_of


def error_on(run_dir: Path, demonstrations: Path, split: SplitSpec | None = None) -> dict[str, Any]:
    """Evaluates the trained weights of a run, on the CPU.

    Args:
        run_dir: of a finished run, with `spec.yaml` and `final`.
        demonstrations: folder of a LeRobotDataset v3 with the cameras, state and actions of the training data.
        split: which of its episodes; none means all.

    Returns:
        As `maps_ray.training.validation.action_error`; actions are normalised by the statistics of the training data.

    Raises:
        DatasetError, SpecError, maps_ray.models.CheckpointError: data or weights cannot be used.
    """
    spec = load_spec(run_dir / "spec.yaml")
    final = run_dir / "final"
    (raw,) = json.loads((final / "dataset_statistics.json").read_text()).values()
    data = spec.data.model_copy(
        update={"path": demonstrations.absolute(), "splits": SplitsSpec(train=split or SplitSpec())}
    )
    loaded = Demonstrations(
        data, use_proprio=spec.model.use_proprio, statistics=DatasetStatistics.from_dict(raw, str(final))
    )
    policy: Any = load_policy(final, dtype=DTYPES[spec.training.precision])
    sizes = {"chunk": policy.config.chunk, "action_dim": policy.config.action_dim}
    processor = load_processor(final, **sizes)
    return action_error_of(policy, loaded.samples("train"), processor, spec.evaluation)
