"""Sweeps over the small policy of the training tests."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from sweep_trials import trials

from maps_ray.spec import RunSpec, dump
from maps_ray.spec.sweep_spec import load_sweep
from maps_ray.sweeps.folder import begin_folder
from maps_ray.sweeps.journal import Ended, Journal
from maps_ray.sweeps.plan import make_plan
from maps_ray.sweeps.schedules import Plan
from maps_ray.tracking import Tracker

_ROOT = Path(__file__).parents[2]


def _fixtures(room: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(f"{room}_fixtures", _ROOT / "tests" / room / "conftest.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


_training, _tracking = _fixtures("training"), _fixtures("tracking")
running_server, server, mlflow = _tracking.running_server, _tracking.server, _tracking.mlflow
base, demonstrations, frame_cache = _training.base, _training.demonstrations, _training.frame_cache
make_spec, ray_session = _training.make_spec, _training.ray_session

MakeSweep = Callable[..., Path]
OOD, HELD_OUT = "eval/ood/action_l1", "eval/held_out/action_l1"


@pytest.fixture
def make_sweep(make_spec: Callable[..., RunSpec], tmp_path: Path) -> MakeSweep:
    """Writes a sweep spec over the small policy and returns its path; fields are set in these defaults."""

    def make(run: dict[str, Any] | None = None, **fields: Any) -> Path:
        spec = make_spec(
            "base", **{"cluster": {"workers": 1, "storage": tmp_path / "runs", "start_timeout_s": 180}, **(run or {})}
        )
        (tmp_path / "base.yaml").write_text(dump(spec))
        raw = {
            "name": "swept",
            "base": "base.yaml",
            "space": [str(_ROOT / "tune_spaces" / "orders.yaml"), str(_ROOT / "tune_spaces" / "strengths.yaml")],
            "searcher": "random",
            **({} if "budget" in fields else {"num_samples": 4}),
            "known_strengths": [1.0],
            **fields,
        }
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return make


@pytest.fixture
def written_sweep(make_sweep: MakeSweep) -> Plan:
    """A sweep's folder as runs would have left it: a baseline and three orders, two seeds each, one stopped early."""
    fields = {"objectives": [OOD, HELD_OUT], "seeds": 2, "baselines": ["full_fine_tuning"], "known_strengths": []}
    plan = make_plan(load_sweep(make_sweep(**fields)))
    begin_folder(plan, resume=False)
    journal = Journal(plan.folder)
    Tracker.create(plan.folder, uri=plan.tracking_uri, experiment="e", run_name="swept", ship=False).finish(
        "FINISHED", 0
    )
    schedules = plan.known()
    for place, keys in enumerate([(0.1, 0.2, 0.3, 0.4), (0.4, 0.3, 0.2, 0.1), (0.3, 0.1, 0.2, 0.4)]):
        names = [dimension.name for dimension in plan.space.dimensions]
        point = dict(zip(names, (*keys, 1.0 + place), strict=True))
        schedules.append(plan.drawn(len(schedules), point))
    values = [(0.50, 0.30), (0.40, 0.34), (0.45, 0.25), (0.60, 0.60)]
    for schedule, (ood, held_out) in zip(schedules, values, strict=True):
        journal.decide(schedule)
        for index, trial in enumerate(trials(plan, schedule)):
            tracker = Tracker.create(
                trial.run_dir,
                uri=plan.tracking_uri,
                experiment="e",
                run_name=trial.name,
                params=plan.resolved(schedule.proximity).params(),
                parent=plan.folder,
            )
            tracker.metrics(6, {"drift/dinov2": 0.1 + index, "drift/siglip": 0.3})
            tracker.finish("FINISHED", 0)
            found = {OOD: ood + 0.02 * index, HELD_OUT: held_out}
            status = "stopped early" if ood == 0.60 else "finished"
            journal.end(Ended(trial.name, schedule.number, index, status, 6, found, 3600.0))
    lines = [{"time": t, "nodes": n, "running": n - 1, "pending": 2} for t, n in ((0, 1), (60, 3), (120, 1))]
    (plan.folder / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return plan
