"""A real MLflow server on a free port, which tests may kill and start again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from maps_ray.tracking.store import free_port


class Server:
    """`mlflow server` on a sqlite database of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port(20000 + os.getpid() % 20000)
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._process is not None:
            return
        arguments = ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db", "--host", "127.0.0.1"]
        arguments += ["--artifacts-destination", f"{self._folder}/artifacts", "--port", str(self._port)]
        with open(self._folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--workers", "1", *arguments],
                stdout=log,
                stderr=log,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                start_new_session=True,
            )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError((self._folder / "server.log").read_text()[-3000:])

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def server(running_server: Server) -> Server:
    running_server.start()
    return running_server


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sqlite store; MLflow's migration of a fresh one takes seconds, so the tests share it."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


class Mlflow:
    """What MLflow holds, asked through its own client."""

    @staticmethod
    def client(uri: str) -> Any:
        from mlflow.tracking import MlflowClient

        return MlflowClient(tracking_uri=uri)

    def points(self, uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
        """(step, value) pairs as MLflow returns them: doubled where it holds a step twice."""
        return sorted((metric.step, metric.value) for metric in self.client(uri).get_metric_history(run_id, key))

    @staticmethod
    def wait_until(condition: Callable[[], Any], timeout_s: float = 40.0) -> Any:
        deadline = time.monotonic() + timeout_s
        while not (result := condition()):
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.1)
        return result


@pytest.fixture
def mlflow() -> Mlflow:
    return Mlflow()
