"""A password in the tracking URI signs in, and stands nowhere afterwards: in no file, not in MLflow, on no screen."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest

from maps_ray.spec import SpecError, load_spec
from maps_ray.training.preflight import check
from maps_ray.training.train import _end, begin

ROOT = Path(__file__).parents[2]
SECRET = "hunter2-Secret"


def holders(folder: Path) -> list[str]:
    """Files below a folder that hold the secret, databases and logs too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if SECRET.encode() in path.read_bytes()]


def test_nothing_that_a_run_leaves_holds_a_password(
    tmp_path: Path,
    server: Any,
    mlflow: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("USERNAME", "PASSWORD"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")
    uri = server.uri.replace("//", f"//robot:{SECRET}@")
    overrides = [f"tracking.uri={uri}", "name=secret", f"cluster.storage={tmp_path / 'runs'}", "cluster.workers=1"]
    spec = load_spec(ROOT / "jobs/tiny.yaml", overrides)
    check(spec)
    spec.run_dir.mkdir(parents=True)
    tracker = begin(spec)
    tracker.metrics(1, {"train/loss": 1.0})
    outcome = {"status": "finished", "step": 1, "start_step": 0, "metrics": {}}
    result = _end(spec, outcome, tracker, time.monotonic())
    mlflow.wait_until(lambda: tracker.shipped)
    run = mlflow.client(server.uri).get_run(str(tracker.cursor.run_id))
    assert run.data.params["tracking.uri"] == server.uri
    assert SECRET not in str(run) and SECRET not in str(result)
    assert holders(tmp_path) == [] and holders(server._folder) == []
    shown = capfd.readouterr()
    assert SECRET not in shown.out + shown.err + caplog.text


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.env"
    file.write_text(f"MLFLOW_TRACKING_TOKEN={SECRET}\n")
    file.chmod(0o644)
    overrides = [f"tracking.credentials={file}", f"cluster.storage={tmp_path / 'runs'}", "cluster.workers=1"]
    with pytest.raises(SpecError, match=r"tracking\.credentials = .*others may read it \(mode 644\)") as caught:
        check(load_spec(ROOT / "jobs/tiny.yaml", overrides))
    assert SECRET not in str(caught.value)
    file.chmod(0o600)
    check(load_spec(ROOT / "jobs/tiny.yaml", overrides))
