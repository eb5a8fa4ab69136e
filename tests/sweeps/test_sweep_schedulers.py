"""Schedulers by name in Tune itself, over trials whose training is a curve; and what is refused."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from ray import cloudpickle

import maps_ray.sweeps
import maps_ray.sweeps.trial
from maps_ray.files import write_json
from maps_ray.spec import SpecError
from maps_ray.spec.sweep_spec import load_sweep
from maps_ray.sweeps.driver import run_sweep
from maps_ray.sweeps.journal import Journal
from maps_ray.sweeps.objectives import newest_values
from maps_ray.sweeps.plan import make_plan
from maps_ray.sweeps.trial import SweepTrial
from maps_ray.training.run_folder import EvaluationRecord
from maps_ray.training.train import TrainResult

STEPS, EVERY = 12, 2
RUN = {
    "evaluation": {"every": EVERY, "batch_size": 4, "max_samples": 4},
    "training": {"max_steps": STEPS, "checkpoint_every": 6},
}


class Curve(SweepTrial):
    """A trial without workers: its error falls with the steps, toward its strength."""

    def _train(self):
        self._at_work = True
        # So that trials run beside one another.
        time.sleep(0.3)
        record = EvaluationRecord(self._spec.run_dir)
        for step in range(self._seen + EVERY, STEPS + 1, EVERY):
            record.add(step, {"ood": {"action_l1": self._spec.proximity.lambda_max + 1 / step}})
            values = newest_values(self._spec.run_dir)
            if self._counts(step, values):
                return self._seen_now(step, values)
        result = TrainResult("finished", STEPS, 0, str(self._spec.run_dir), {}, None, 0.0)
        write_json(self._spec.run_dir / "result.json", asdict(result))
        return self._finished(STEPS)

    def _save(self, workers):
        return Path()

    def _leave(self):
        self._at_work = False


@pytest.mark.parametrize("name", [pytest.param("hyperband", marks=pytest.mark.slow), "median"])
def test_a_scheduler_ends_poor_trials(ray_session, make_sweep, monkeypatch, name):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(maps_ray.sweeps.trial, "SweepTrial", Curve)
    # Hyperband's first bracket trains its three, or four as places become free, to the end. The second takes five, and
    # after step 4 its best two go on: with fewer than three trials in it, it would end none.
    options, samples = {"hyperband": ({"reduction_factor": 3}, 9), "median": ({"min_samples_required": 2}, 6)}[name]
    fields = {"scheduler": {"name": name, "options": options}, "known_strengths": [], "num_samples": samples}
    plan = make_plan(load_sweep(make_sweep(run=RUN, baselines=["uniform_spd"], max_concurrent=2, **fields)))
    result = run_sweep(plan, show=False)
    ended = Journal(plan.folder).ended
    assert result.status == "finished" and len(ended) == samples + 1
    statuses = [e.status for e in ended.values()]
    assert set(statuses) == {"finished", "stopped early"}
    assert ended["uniform_spd"].status == "finished"
    early = [e for e in ended.values() if e.status == "stopped early"]
    assert all(0 < e.step < STEPS and e.step % EVERY == 0 for e in early)
    finished = [e for e in ended.values() if e.status == "finished" and e.trial != "uniform_spd"]
    assert finished and all(e.step == STEPS for e in finished)
    # The least error of all is not among those that were ended.
    best = min((e for e in ended.values() if e.trial != "uniform_spd"), key=lambda e: e.values["eval/ood/action_l1"])
    assert best.status == "finished"
    grid = maps_ray.sweeps.results(str(plan.folder))
    assert len(grid) == samples + 1 and grid.num_errors == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"searcher": "hyperopt"}, "hyperopt is not installed: pip install hyperopt"),
        ({"searcher": "ax"}, "ax.* is not installed: pip install ax-platform sqlalchemy"),
        ({"searcher": "bohb", "scheduler": "bohb"}, "pip install hpbandster ConfigSpace"),
        ({"searcher": "nevergrad"}, "pip install nevergrad"),
        ({"searcher": "zoopt"}, "pip install zoopt"),
        ({"searcher": "bayesopt"}, r"pip install 'bayesian-optimization<2'"),
        ({"scheduler": "hyperbandd"}, "scheduler.name = 'hyperbandd': unknown; did you mean 'hyperband'"),
        (
            {"scheduler": {"name": "hyperband", "options": {"reduction": 2}}},
            "hyperband has no such option; did you mean 'reduction_factor'",
        ),
        (
            {"scheduler": {"name": "median", "options": {"min_samples": 2}}},
            "median has no such option; did you mean 'min_samples_required'",
        ),
        ({"searcher": {"name": "random", "options": {"seed": 2}}}, "searcher.options.seed = 2: random has no"),
        (
            {"searcher": {"name": "optuna", "options": {"sampler": "TPESampl"}}},
            "searcher.options.sampler = 'TPESampl': unknown; did you mean 'TPESampler'",
        ),
    ],
)
def test_what_is_not_there_is_named_with_what_would_help(make_sweep, fields, message):
    with pytest.raises(SpecError, match=message):
        make_plan(load_sweep(make_sweep(run=RUN, **fields)))
