"""Population-based training over strengths: poor trials go on from good ones' checkpoints, under other strengths."""

from __future__ import annotations

import json

import pytest

import maps_ray.sweeps
from maps_ray.spec import SpecError
from maps_ray.sweeps.driver import run_sweep
from maps_ray.sweeps.journal import Journal
from maps_ray.sweeps.plan import make_plan
from maps_ray.sweeps.report import write_sweep_report
from maps_ray.sweeps.spec import load_sweep
from maps_ray.tracking.history import read_history

STEPS = 12
RUN = {
    "evaluation": {"every": 2, "batch_size": 4, "max_samples": 4},
    "training": {"max_steps": STEPS, "checkpoint_every": 6, "schedule": "constant"},
}
PBT = {"scheduler": {"name": "pbt", "options": {"quantile_fraction": 0.5}}, "known_strengths": []}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 1}, r"scheduler.name = 'pbt': copies trials from one another, and there is 1"),
        ({"known_strengths": [1.0]}, r"known_strengths = .*set known_strengths to \[\]"),
        (
            {"scheduler": {"name": "pbt", "options": {"quantile": 0.5}}},
            r"scheduler.options.quantile = 0.5: pbt has no such option; did you mean 'quantile_fraction'",
        ),
        (
            {"scheduler": {"name": "pbt", "options": {"quantile_fraction": 0.9}}},
            r"scheduler.options = .*Ray Tune refuses them: .*quantile_fraction",
        ),
        ({"scheduler": "pb2"}, r"scheduler.name = 'pb2': .*is not installed: pip install GPy scikit-learn"),
        ({"searcher": "hebo"}, r"searcher.name = 'hebo': hebo is not installed: pip install HEBO"),
        ({"searcher": "optunna"}, r"searcher.name = 'optunna': unknown; did you mean 'optuna'"),
        (
            {"searcher": {"name": "optuna", "options": {"n_startup": 3}}},
            r"searcher.options.n_startup = 3: optuna has no such option; did you mean 'n_startup_trials'",
        ),
        ({"callbacks": ["json:JSONDecoder"]}, r"callbacks = 'json:JSONDecoder': is no ray.tune.Callback"),
        ({"callbacks": ["nowhere:Class"]}, r"callbacks = 'nowhere:Class': cannot be made"),
    ],
)
def test_searchers_and_schedulers_that_cannot_be(make_sweep, fields, message):
    with pytest.raises(SpecError, match=message):
        make_plan(load_sweep(make_sweep(run=RUN, **{**PBT, **fields})))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_four_trials_of_a_population(ray_session, make_sweep):
    plan = make_plan(load_sweep(make_sweep(run=RUN, baselines=["full_fine_tuning"], **PBT)))
    result = run_sweep(plan, show=False)
    journal = Journal(plan.folder)
    assert result.status == "finished" and len(journal.ended) == 5
    assert {ended.status for ended in journal.ended.values()} == {"finished"}
    assert {ended.step for ended in journal.ended.values()} == {STEPS}
    assert journal.changes
    for change in journal.changes:
        assert change.source != change.trial and change.trial != "full_fine_tuning" != change.source
        assert 0.25 <= change.proximity["lambda_max"] <= 4 and 0 < change.step < STEPS
        run_dir = plan.folder / "trials" / change.trial
        last = [c for c in journal.changes if c.trial == change.trial][-1]
        spec = (run_dir / "spec.yaml").read_text()
        assert f"lambda_max: {last.proximity['lambda_max']}" in spec
        steps = [step for step, _ in read_history(run_dir).metrics["train/loss"]]
        assert sorted(set(steps)) == list(range(1, STEPS + 1))
        # It took over the other's weights, so that its last run began there.
        assert json.loads((run_dir / "result.json").read_text())["start_step"] >= last.step
        assert not (run_dir / "kept").exists()
    grid = maps_ray.sweeps.results(str(plan.folder))
    assert len(grid) == 5 and grid.num_errors == 0
    assert {r.metrics["status"] for r in grid} == {"finished"}
    text = write_sweep_report(plan.folder).read_text()
    assert "Strengths in the course of training" in text
