"""Credentials never get into a spec, nor into what is said of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maps_ray.spec import RunSpec, SpecError, dump, load_spec, parse
from maps_ray.spec.credentials import has_credentials, read_credentials, redact

SECRET = "hunter2-Secret"
MINIMAL = "name: run\nmodel: {checkpoint: base}\ndata: {path: demos}\n"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        # Set and unset, so that what a test leaves is taken away again.
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    file = tmp_path / "spec.yaml"
    file.write_text(MINIMAL)
    return file


def user_and_password() -> tuple[str | None, str | None]:
    return os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")


@pytest.mark.parametrize(
    ("uri", "left", "user", "password"),
    [
        (f"http://robot:{SECRET}@mlflow:5000", "http://mlflow:5000", "robot", SECRET),
        (f"https://robot:{SECRET}@mlflow/path", "https://mlflow/path", "robot", SECRET),
        ("http://a%40b:p%2F%25@mlflow", "http://mlflow", "a@b", "p/%"),
        (f"http://robot:{SECRET}@{SECRET}@mlflow", "http://mlflow", "robot", f"{SECRET}@{SECRET}"),
        ("http://robot:pa$$word$1@mlflow", "http://mlflow", "robot", "pa$$word$1"),
        ("http://robot:two words@mlflow", "http://mlflow", "robot", "two words"),
        ("http://robot@mlflow", "http://mlflow", "robot", None),
    ],
)
def test_a_password_of_mlflow_goes_where_mlflow_looks(
    spec_file: Path, uri: str, left: str, user: str, password: str | None
) -> None:
    for given in ("file", "override"):
        spec_file.write_text(MINIMAL + (f"tracking: {{uri: '{uri}'}}\n" if given == "file" else ""))
        spec = load_spec(spec_file, [f"tracking.uri='{uri}'"] if given == "override" else [])
        assert spec.tracking.uri == left and user_and_password() == (user, password)
        assert SECRET not in dump(spec)


def test_variables_stand_for_credentials(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_USER", "robot")
    monkeypatch.setenv("LAB_PASSWORD", SECRET)
    spec = load_spec(spec_file, ["tracking.uri=http://$LAB_USER:${LAB_PASSWORD}@mlflow"])
    assert spec.tracking.uri == "http://mlflow" and user_and_password() == ("robot", SECRET)


def test_variables_that_are_set_stay(spec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another")
    load_spec(spec_file, [f"tracking.uri=http://robot:{SECRET}@mlflow"])
    assert user_and_password() == ("robot", "another")


@pytest.mark.parametrize(
    "override",
    [
        f"tracking.uri=http://mlflow:5000?token={SECRET}",
        f"tracking.uri=http://mlflow:5000/?x=1&api_key={SECRET}",
        f"tracking.uri=http://robot:a/{SECRET}@mlflow",
        f"tracking.uri=postgresql://robot:{SECRET}@db/mlflow",
        f"tracking.experiment=http://robot:{SECRET}@mlflow",
        f"cluster.address=ray://robot:{SECRET}@head:10001",
        f"cluster.address=robot:{SECRET}@head:6379",
        f"cluster.address=:{SECRET}@head:6379",
        f"cluster.address=ray://head:10001?token={SECRET}",
        f"cluster.storage=s3://key:{SECRET}@bucket/runs",
        f"data.path=https://robot:{SECRET}@hub/data",
        f"data.path=https://hub/data?X-Amz-Signature={SECRET}",
        f"model.checkpoint=https://robot:{SECRET}@hub/model",
        f"data.cameras=['http://robot:{SECRET}@camera']",
        f"data.splits.train.tasks=['rtsp://robot:{SECRET}@camera']",
        f"name=http://robot:{SECRET}@x",
        f"nothing.uri=http://robot:{SECRET}@x",
        f"training.max_steps=http://robot:{SECRET}@x",
        f"http://robot:{SECRET}@x",
        f"tracking.uri=[http://robot:{SECRET}@x",
    ],
)
def test_other_credentials_are_refused_and_not_shown(spec_file: Path, override: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(spec_file, [override])
    assert SECRET not in str(caught.value) and user_and_password()[1] is None


def test_a_spec_never_holds_them_however_it_is_made() -> None:
    raw = {"name": "x", "model": {"checkpoint": "b"}, "data": {"path": "d"}}
    with pytest.raises(SpecError) as caught:
        parse(RunSpec, {**raw, "tracking": {"uri": f"http://robot:{SECRET}@mlflow"}})
    assert caught.value.problems[0].field == "tracking.uri" and SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("http://mlflow:5000/a/b?x=1", "sqlite:////data/a b/mlflow.db", "s3://bucket/key", "ray://head:10001"),
        *("10.0.0.1:6379", "[::1]:6379", "put the mug: left @ the plate", "/data/user@host/x", "auto"),
    ],
)
def test_plain_addresses_stay_as_they_are(text: str) -> None:
    assert not has_credentials(text) and redact(text) == text


@pytest.mark.parametrize("address", ["auto", "local", "10.0.0.1:6379", "ray://head.lab:10001", "[fe80::1]:6379"])
def test_addresses_of_clusters(spec_file: Path, address: str) -> None:
    assert load_spec(spec_file, [f"cluster.address='{address}'"]).cluster.address == address


@pytest.mark.parametrize("address", ["head", "http://head:6379", "head:", "head:port", "a b:1", ""])
def test_addresses_that_are_none(spec_file: Path, address: str) -> None:
    with pytest.raises(SpecError, match=r"cluster\.address = .*an address is auto, host:port or ray://host:port"):
        load_spec(spec_file, [f"cluster.address='{address}'"])


def test_a_job_is_not_submitted_with_them() -> None:
    command = [sys.executable, "jobs/submit.py", "train", "jobs/tiny.yaml", "--set"]
    command.append(f"tracking.uri=http://robot:{SECRET}@mlflow")
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "tracking.uri=http://***@mlflow: the cluster keeps the command" in done.stderr
    assert SECRET not in done.stdout + done.stderr


def test_a_file_of_credentials(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.env"
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_credentials(file)
    file.write_text(f"# of the lab\n\nMLFLOW_TRACKING_USERNAME = robot\nMLFLOW_TRACKING_PASSWORD={SECRET}=x\n")
    file.chmod(0o640)
    with pytest.raises(ValueError, match=r"others may read it \(mode 640\): chmod 600"):
        read_credentials(file)
    file.chmod(0o600)
    found = {"MLFLOW_TRACKING_USERNAME": "robot", "MLFLOW_TRACKING_PASSWORD": f"{SECRET}=x"}
    assert read_credentials(file) == found
    for line in (SECRET, f"PATH={SECRET}"):
        file.write_text(line)
        with pytest.raises(ValueError, match="line 1: write NAME=value") as caught:
            read_credentials(file)
        assert SECRET not in str(caught.value)
