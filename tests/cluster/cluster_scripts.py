"""Starting and stopping the scripts of cluster/local on free ports, and only what was started here."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
LOCAL = ROOT / "cluster" / "local"


def free_port(low: int = 0, high: int = 65536) -> int:
    """A port that nothing listens on; within `low` .. `high` if given."""
    for candidate in range(low, high) if low else [0]:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise AssertionError(f"no free port in {low} .. {high}")


def clean_environment() -> dict[str, str]:
    """The environment without what other Ray or MLflow sessions left in it."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "HEAD_", "MLFLOW_"))}


def status(url: str, **headers: str) -> int:
    """HTTP status of a GET."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def in_group(group: int) -> list[psutil.Process]:
    """Living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


@dataclass
class Head:
    """A head that a script of cluster/local started."""

    environment: dict[str, str]
    output: str
    pid: int
    dashboard: str
    token_path: Path

    def ray(self, *arguments: str, timeout: float = 150) -> subprocess.CompletedProcess[str]:
        """Runs `ray` with the token."""
        program = shutil.which("ray", path=str(ROOT / ".venv" / "bin")) or "ray"
        return self.run(program, *arguments, timeout=timeout)

    def run(self, *command: str, timeout: float = 150) -> subprocess.CompletedProcess[str]:
        """Runs a command with the token, in the project's folder."""
        environment = clean_environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_path)}
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False, env=environment
        )

    def stop(self) -> None:
        """As the script's last line says; waits until the whole group is gone."""
        assert f"kill -- -{self.pid}" in self.output
        os.killpg(self.pid, signal.SIGTERM)
        deadline = time.monotonic() + 60
        while left := in_group(self.pid):
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"still running 60 s after SIGTERM: {left}")
            time.sleep(0.2)


def start_head(script: str, *arguments: str) -> Iterator[Head]:
    """Runs head.sh or autoscaling.sh, yields the head, stops it."""
    # Ray's socket paths are limited to 107 bytes: pytest's folders are too deep.
    folder = Path(tempfile.mkdtemp(prefix="mr", dir="/tmp"))
    dashboard_port = free_port()
    environment = clean_environment() | {
        "HEAD_PORT": str(free_port()),
        "HEAD_DASHBOARD_PORT": str(dashboard_port),
        "HEAD_CLIENT_PORT": str(free_port(20100, 30000)),
        "HEAD_STATE": str(folder / "state"),
        "HEAD_TEMP": str(folder / "t"),
        "RAY_AUTH_TOKEN_PATH": str(folder / "token" / "auth_token"),
    }
    try:
        started = subprocess.run(
            [LOCAL / script, *arguments], capture_output=True, text=True, timeout=150, check=False, env=environment
        )
        assert started.returncode == 0, started.stdout + started.stderr
        head = Head(
            environment=environment,
            output=started.stdout,
            pid=int((folder / "state" / "head.pid").read_text()),
            dashboard=f"http://127.0.0.1:{dashboard_port}",
            token_path=Path(environment["RAY_AUTH_TOKEN_PATH"]),
        )
        try:
            yield head
        finally:
            head.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
