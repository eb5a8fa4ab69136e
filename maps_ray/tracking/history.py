"""Reads a run back from its spool, without MLflow."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from maps_ray.tracking.spool import Identity, Spool


@dataclass
class RunHistory:
    """All that a run has recorded so far."""

    identity: Identity
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Per name the (step, value) pairs by rising step; a step that was recorded twice has its first value."""
    artifacts: dict[str, Path] = field(default_factory=dict)
    """Artifact path to the file in the spool; the newest where one was recorded twice."""
    status: str = "RUNNING"
    end_time: int | None = None
    """Milliseconds since 1970; None while it runs."""


def read_history(run_dir: str | Path) -> RunHistory:
    """Raises FileNotFoundError when no run was begun in `run_dir`."""
    spool = Spool(run_dir)
    history = RunHistory(spool.identity())
    values: dict[str, dict[int, float]] = {}
    newest = 0
    for _, _, record in spool.read():
        if isinstance(record, str) or "kind" not in record:
            continue
        if record["kind"] == "metrics":
            for key, value in record["values"].items():
                values.setdefault(key, {}).setdefault(record["step"], value)
        elif record["kind"] == "params":
            history.params = {**record["values"], **history.params}
        elif record["kind"] == "tags":
            history.tags.update(record["values"])
        elif record["kind"] == "artifact":
            file = Path(record["file"])
            history.artifacts[str(Path(record["folder"]) / file.name)] = spool.folder / file
        elif record["kind"] == "status" and record["time"] >= newest:
            newest, history.status = record["time"], record["status"]
    history.metrics = {key: sorted(steps.items()) for key, steps in values.items()}
    history.end_time = newest if history.status != "RUNNING" else None
    return history
