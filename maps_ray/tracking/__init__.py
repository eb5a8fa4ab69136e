"""MLflow without waiting for it and without losing a step.

A run writes records to a spool in its folder (`Tracker`); a separate process ships them (`shipper`), and `replay` ships
what is left. Importing this package does not import mlflow.
"""

from maps_ray.tracking.replay import ReplaySummary, RunReplay, replay
from maps_ray.tracking.spool import RunHistory, read_history
from maps_ray.tracking.store import artifact_location, resolve_uri, ui_command
from maps_ray.tracking.tracker import Tracker, flatten

__all__ = [
    "ReplaySummary",
    "RunHistory",
    "RunReplay",
    "Tracker",
    "artifact_location",
    "flatten",
    "read_history",
    "replay",
    "resolve_uri",
    "ui_command",
]
