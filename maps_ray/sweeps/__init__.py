"""Sweeps over relaxation orders, shapes and strengths: many runs of one base, run by Ray Tune."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem
    from ray.tune import ResultGrid

TUNE_FOLDER = "tune"


def results(name: str) -> ResultGrid:
    """The trials of a sweep, running or ended, as Ray Tune has them.

    Args:
        name: of the sweep under `runs`, its folder, or its address on an object store.

    Raises:
        SpecError: no sweep is there, or none of its trials has begun.
    """
    from ray.tune import ExperimentAnalysis, ResultGrid

    from maps_ray.spec import Problem, SpecError
    from maps_ray.sweeps.folder import find_sweep

    path, files = tune_storage(name if "://" in name else str(find_sweep(name)))
    try:
        return ResultGrid(ExperimentAnalysis(f"{path}/{TUNE_FOLDER}", storage_filesystem=files))
    except (OSError, ValueError) as error:
        message = f"no trial has begun: {name}/{TUNE_FOLDER} holds no state of Ray Tune ({error})"
        raise SpecError([Problem("NAME", name, message)]) from None


def tune_storage(place: str) -> tuple[str, FileSystem | None]:
    """A sweep's folder or address as Ray Tune takes it: `storage_path` and `storage_filesystem`."""
    from maps_ray.run_storage import RunStorage

    return RunStorage(place).arrow() if "://" in place else (place, None)
