"""A sweep by success rate, in LIBERO itself: from its spec over training and rollouts to the report."""

from __future__ import annotations

import json

import pytest

from maps_ray.spec.sweep_spec import load_sweep
from maps_ray.sweeps.driver import run_sweep
from maps_ray.sweeps.journal import Journal
from maps_ray.sweeps.plan import make_plan
from maps_ray.sweeps.sweep_report import write_sweep_report
from maps_ray.tracking.spool import read_history

pytestmark = [pytest.mark.sim, pytest.mark.slow]

SUCCESS = "rollout/libero_object/success"


def test_a_sweep_by_success_rate(ray_session, make_sweep):
    # So few actions reach no goal: that is known without a trained policy.
    rollouts = {"suites": ["libero_object"], "tasks": [3], "episodes": 1, "max_steps": 8, "workers": 1}
    run = {"evaluation": {"every": 3, "batch_size": 4, "max_samples": 4, "rollouts": rollouts}}
    fields = {"objectives": [SUCCESS, "eval/ood/action_l1"], "budget": {"trials": 1}, "max_concurrent": 1}
    plan = make_plan(load_sweep(make_sweep(run=run, **fields)))
    assert run_sweep(plan, show=False).status == "finished"
    (ended,) = Journal(plan.folder).ended.values()
    assert ended.status == "finished" and ended.values[SUCCESS] == 0.0 and ended.values["rollout/id/success"] == 0.0
    trial = plan.folder / "trials" / ended.trial
    assert read_history(trial).metrics[SUCCESS] == [(6, 0.0)]
    found = json.loads((trial / "rollouts" / "step-00000006" / "evaluation.json").read_text())
    (task,) = found["suites"]["libero_object"]["tasks"]
    assert task["sentence"] == "pick up the bbq sauce and place it in the basket" and task["mean_steps"] == 8
    assert list(task["sub_goals"]) == ["grasp", "carry", "place"]
    assert len(list((trial / "rollouts").glob("*/videos/libero_object/*.mp4"))) == 1
    text = write_sweep_report(plan.folder).read_text()
    assert SUCCESS in text and "0.0000" in text
