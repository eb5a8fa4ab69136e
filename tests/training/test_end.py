"""How a run ends that MLflow has not got: said once, and kept in result.json."""

from __future__ import annotations

import json
import time

import pytest
from run_specs import MakeSpec

from maps_ray.training.train import TrainResult, _end, begin


def test_what_mlflow_has_not_got_is_said_and_kept(make_spec: MakeSpec, capfd: pytest.CaptureFixture[str]) -> None:
    spec = make_spec(name="untold", tracking={"uri": "http://127.0.0.1:1"})
    spec.run_dir.mkdir(parents=True)
    tracker = begin(spec)
    outcome = {"status": "finished", "step": 4, "start_step": 0, "metrics": {"train/loss": 1.0}}
    result = _end(spec, outcome, tracker, time.monotonic())
    assert tracker._shipper is not None
    tracker._shipper.kill()
    said = str(result.tracking)
    assert said.startswith("MLflow has got nothing of this run: ") and "refused" in said
    assert f"`maps-ray track replay {spec.run_dir}` sends the rest" in said
    assert capfd.readouterr().err.count(said) == 1
    assert TrainResult(**json.loads((spec.run_dir / "result.json").read_text())) == result
