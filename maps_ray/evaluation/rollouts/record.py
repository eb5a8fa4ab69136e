"""An evaluation in MLflow: a run of its own, beside the training run that it evaluates.

It is not written into the training run, where a metric keeps the first value of a step: an evaluation that is made
again with more episodes could not correct it. Tags name the training run instead.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

from maps_ray.evaluation.rollouts import tables
from maps_ray.evaluation.rollouts.statistics import Paired
from maps_ray.evaluation.rollouts.summary import Evaluation, paired_as_json
from maps_ray.evaluation.rollouts.videos import Videos
from maps_ray.tracking import Tracker, resolve_uri
from maps_ray.tracking.spool import Identity, Spool

_WAIT_S = 10.0
_EXPERIMENT = "maps_ray"


def record(
    evaluation: Evaluation, uri: str | None = None, pairs: Mapping[str, Paired] | None = None, wait_s: float = _WAIT_S
) -> None:
    """Records rates, tables and videos; a store that cannot be reached costs `wait_s` seconds and a warning.

    The step of a metric is the number of episodes behind it, so an evaluation that grows keeps its earlier values.

    Args:
        evaluation: its `out` becomes the run folder, which `maps-ray track replay` ships later.
        uri: MLflow's; none means the store of the training run, or `mlflow.db` beside `out`.
        pairs: of `Evaluation.against`.
        wait_s: for MLflow.
    """
    try:
        training = _training_run(Path(evaluation.checkpoint))
        if uri is None and training is not None:
            uri = training.uri
        tags = {"maps_ray.kind": "rollouts", "maps_ray.checkpoint": evaluation.checkpoint}
        if training is not None:
            tags["maps_ray.training_run"] = training.run_name
            run_id = Spool(Path(evaluation.checkpoint).parent).cursor().run_id
            if run_id is not None:
                tags["maps_ray.training_run_id"] = run_id
        tracker = Tracker.create(
            evaluation.out,
            uri=resolve_uri(uri, evaluation.out.parent),
            experiment=training.experiment if training is not None else _EXPERIMENT,
            run_name=f"{training.run_name if training is not None else Path(evaluation.checkpoint).name} rollouts",
            params={"rollouts": {**evaluation.identity, "suites": list(evaluation.suites)}},
            tags=tags,
            credentials=training.credentials if training is not None else None,
        )
        tracker.metrics(len(evaluation.results), evaluation.metrics())
        tracker.text(tables.as_text(evaluation), "rollouts/table.txt")
        tracker.text(json.dumps(evaluation.as_json(), indent=1), "rollouts/evaluation.json")
        if pairs:
            tracker.text(json.dumps(paired_as_json(pairs), indent=1), "rollouts/comparison.json")
        for path in Videos(evaluation.out).all():
            tracker.artifact(path, f"rollouts/videos/{path.parent.name}")
        tracker.finish("FINISHED", wait_s)
    except Exception as error:  # whatever a store does, the rates are there
        warnings.warn(f"the evaluation was not recorded in MLflow: {error}", RuntimeWarning, stacklevel=2)


def _training_run(checkpoint: Path) -> Identity | None:
    """The record of the run whose trained weights the checkpoint is."""
    spool = Spool(checkpoint.parent)
    return spool.identity() if checkpoint.name == "final" and spool.exists else None
