"""Sweeps in a shared folder whose new files other nodes see late: nothing rests on a look at one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lagging import LaggingFolder

from maps_ray.files import read_json, write_atomically, write_json
from maps_ray.spec import SpecError
from maps_ray.spec.sweep_spec import load_sweep
from maps_ray.sweeps.folder import begin_folder
from maps_ray.sweeps.objectives import known_values, newest_values
from maps_ray.sweeps.plan import make_plan
from maps_ray.sweeps.search import SweepSearch
from maps_ray.sweeps.trial import SweepTrial
from maps_ray.training.merge import finished_run
from maps_ray.training.run_folder import EvaluationRecord

OOD = "eval/ood/action_l1"
LAG_S = 2.0


@pytest.fixture
def lagging(tmp_path: Path) -> Iterator[LaggingFolder]:
    (tmp_path / "runs").mkdir()
    folder = LaggingFolder(tmp_path / "runs", tmp_path / "names", LAG_S, "driver")
    with folder.installed():
        yield folder


def test_the_folder_lags(lagging: LaggingFolder, tmp_path: Path) -> None:
    """What the other tests rest on."""
    path = tmp_path / "runs" / "deep" / "file.json"
    path.parent.mkdir()
    write_json(path, 1)
    assert read_json(path) == 1 and [p.name for p in path.parent.iterdir()] == ["file.json"]
    with lagging.on("other"):
        assert read_json(path) is None and not path.parent.exists() and not list((tmp_path / "runs").iterdir())
        with pytest.raises(FileNotFoundError):
            path.read_text()
        time.sleep(LAG_S)
        assert read_json(path) == 1 and list((tmp_path / "runs").glob("**/*.json")) == [path]
        # A name that is there stays one, whatever it holds.
        with lagging.on("driver"):
            write_json(path, 2)
        assert read_json(path) == 2


def test_a_trial_on_another_node_than_its_driver_and_its_workers(
    lagging: LaggingFolder, make_sweep: Callable[..., Path]
) -> None:
    plan = make_plan(load_sweep(make_sweep(num_samples=2)))
    sweep = begin_folder(plan, resume=False)
    config = SweepSearch(sweep).suggest("0")
    assert isinstance(config, dict)
    trial = SweepTrial.__new__(SweepTrial)
    with lagging.on("head"):
        trial.setup(config, str(plan.folder))
    assert lagging.hidden > 0 and trial._spec.name == config["trial"]["name"]
    run_dir = sweep.trial_dir(trial._spec.name)
    run_dir.mkdir(parents=True)
    time.sleep(LAG_S)
    with lagging.on("worker"):
        EvaluationRecord(run_dir).add(4, {"ood": {"action_l1": 0.5}})
    told = {4: {OOD: 0.5}}
    with lagging.on("head"):
        assert newest_values(run_dir) == {}
        trial._fetch_record(told)
        assert trial._finished(4)[OOD] == 0.5
    with lagging.on("worker"):
        (run_dir / "evaluation.json").unlink()
        EvaluationRecord(run_dir).add(8, {"ood": {"action_l1": 0.4}, "held_out": {"action_l1": 0.3}})
    # The driver does not wait: it has the trial's last result, with names of Tune's own beside the metrics.
    result = {"step": 8, "cost": 0.4, OOD: 0.4, "status": "finished", "time_total_s": 3.0}
    assert newest_values(run_dir) == {} and known_values(run_dir, result) == {OOD: 0.4}
    time.sleep(LAG_S)
    assert known_values(run_dir, result) == {OOD: 0.4, "eval/held_out/action_l1": 0.3}


def test_a_run_that_has_just_finished_is_merged(lagging: LaggingFolder, make_spec: Callable, tmp_path: Path) -> None:
    from maps_ray.spec import dump

    run = tmp_path / "runs" / "trained"
    (run / "final").mkdir(parents=True)
    write_atomically(run / "spec.yaml", dump(make_spec("trained")))
    write_json(run / "final" / "config.json", {})
    with lagging.on("other"):
        with pytest.raises(SpecError, match="no folder of a run"):
            finished_run(run)
        assert finished_run(run, wait_s=30).name == "trained"
