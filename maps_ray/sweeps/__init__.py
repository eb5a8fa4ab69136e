"""Sweeps over relaxation orders, shapes and strengths: many runs of one base, run by Ray Tune."""

from __future__ import annotations

from typing import Any


def results(name: str) -> Any:
    """The trials of a sweep, running or ended, as Ray Tune's `ResultGrid`.

    Args:
        name: of the sweep under `runs`, or its folder.

    Raises:
        SpecError: no sweep is there, or none of its trials has begun.
    """
    from ray.tune import ExperimentAnalysis, ResultGrid

    from maps_ray.spec import Problem, SpecError
    from maps_ray.sweeps.driver import TUNE_FOLDER
    from maps_ray.sweeps.folder import find_sweep

    folder = find_sweep(name) / TUNE_FOLDER
    if not any(folder.glob("experiment_state-*.json")):
        raise SpecError([Problem("NAME", name, f"no trial has begun: {folder} holds no state of Ray Tune")])
    return ResultGrid(ExperimentAnalysis(str(folder)))
