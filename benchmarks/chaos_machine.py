"""The cluster, the MLflow server and the driver that `chaos.py` kills, and what it sees of them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

# As Ray names the processes of actors.
_NAMES = {
    "worker": ("RayTrainWorker",),
    "trial actor": ("SweepTrial", "ResourceTrainable"),
    "controller": ("TrainController",),
    "mailbox": ("Mailbox",),
}
_GROUPS = {"node": "node", "MLflow server": "mlflow", "driver": "driver"}
_BEFORE_WORK = ("starting", "waiting", "indexing", "loading", "restoring")
_START_S = 600.0
_END_S = 60.0


class Machine:
    """Everything that may be killed. Only what was started here is ever touched, by its process id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._port, self._mlflow_port = _free_ports(2)
        (folder / "mlflow-port").write_text(str(self._mlflow_port))
        self._groups: dict[str, subprocess.Popen[bytes]] = {}
        """Head, nodes, MLflow server and driver, each in a session of its own."""
        self._seen: set[psutil.Process] = set()
        self._restart: list[tuple[float, str]] = []
        self._nodes = 0
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        (folder / "tmp").mkdir(exist_ok=True)
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            del os.environ[name]
        os.environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ADDRESS": f"127.0.0.1:{self._port}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "TMPDIR": str(folder / "tmp"),
        }

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        ray = sys.modules.get("ray")
        if ray is not None:
            ray.shutdown()
        for process in self._groups.values():
            _kill_group(process)
        for process in self._seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def start(self) -> None:
        """Head without CPUs, two nodes with one each, and the MLflow server; this process joins to look on."""
        head = ["--head", "--port", str(self._port), "--num-cpus", "0", "--include-dashboard", "true"]
        dashboard, client = _free_ports(2)
        head += ["--dashboard-port", str(dashboard), "--ray-client-server-port", str(client)]
        self._ray("head", *head, "--temp-dir", str(self.folder / "tmp" / "ray"))
        _wait(lambda: "--block" in (self.folder / "head.log").read_text(), "Ray's head")
        for _ in range(2):
            self._start_node()
        self._start_server()
        import ray

        ray.init(logging_level="error", log_to_driver=False)
        _wait(lambda: self.look() or ray.cluster_resources().get("CPU", 0) == 2, "the nodes")
        _wait(lambda: _listens(self._mlflow_port), "the MLflow server")

    def look(self) -> None:
        """Notes the processes that there are, and starts again what an operator would by now."""
        # One that has ended may have left its number to a stranger.
        self._seen = {process for process in self._seen if process.is_running()}
        for process in self._groups.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._seen.update(psutil.Process(process.pid).children(recursive=True))
        for name, process in list(self._groups.items()):
            if name not in ("driver", "head") and process.poll() is not None:
                # On a busy machine a node may give up while it starts.
                del self._groups[name]
                self._restart.append((0.0, "node" if name.startswith("node") else "MLflow server"))
        for due, what in list(self._restart):
            if time.monotonic() > due:
                self._restart.remove((due, what))
                self._start_node() if what == "node" else self._start_server()

    def drive(self, arguments: list[str]) -> None:
        """Starts a driver, as a user would."""
        code = "from maps_ray.cli import main; main()"
        self._start("driver", [sys.executable, "-c", code, *arguments], "ab")

    def driver_ended(self) -> int | None:
        return self._groups["driver"].poll()

    def kill_driver(self) -> None:
        self._groups["driver"].kill()
        self._groups["driver"].wait()

    def last_words(self) -> str:
        """The end of what the driver said."""
        return " / ".join((self.folder / "driver.log").read_text(errors="replace").splitlines()[-3:])[-600:]

    def step(self, name: str) -> int:
        """Optimizer steps of a run, or of the trial that is furthest."""
        run = self.folder / "runs" / name
        steps = [0]
        for path in (run / "progress.json", *run.glob("trials/*/progress.json")):
            with contextlib.suppress(OSError, ValueError):
                steps.append(int(json.loads(path.read_text()).get("step", 0)))
        return max(steps)

    def victims(self, kind: str) -> list[psutil.Process]:
        """Living processes of a kind; a node or the server stands for all of its group."""
        if kind in _GROUPS:
            groups = [process for name, process in self._groups.items() if name.startswith(_GROUPS[kind])]
            with contextlib.suppress(psutil.NoSuchProcess):
                return [psutil.Process(process.pid) for process in groups if process.poll() is None]
            return []
        names = _NAMES["worker" if kind == "starting worker" else kind]
        found = []
        for process in self._seen:
            with contextlib.suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if title.startswith("ray::") and any(name in title for name in names):
                    young = time.time() - process.create_time() < 3.0
                    if kind != "starting worker" or young:
                        found.append(process)
        return found

    def kill(self, kind: str, source: random.Random) -> dict[str, Any] | None:
        """Kills one of a kind; returns what it was and when, None where it has just ended by itself."""
        # Where no group of workers has made its first step since it came, it is starting.
        when = "at work" if self._works() else "while starting"
        victim = source.choice(sorted(self.victims(kind), key=lambda process: process.pid))
        group = next((name for name, process in self._groups.items() if process.pid == victim.pid), None)
        if kind in ("node", "MLflow server") and group is not None:
            _kill_group(self._groups.pop(group))
            self._restart.append((time.monotonic() + source.uniform(1, 5), kind))
            return {"victim": kind, "when": when}
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            return None
        if kind == "driver":
            self._groups["driver"].wait()
        return {"victim": kind, "when": when}

    def settle(self) -> None:
        """Waits until all that was killed runs again and nothing of a run does."""
        while self._restart:
            self.look()
            time.sleep(0.2)
        kinds = ("worker", "trial actor", "controller", "mailbox")
        deadline = time.monotonic() + _END_S
        while any(self.victims(kind) for kind in kinds) and time.monotonic() < deadline:
            self.look()
            time.sleep(0.2)

    def recorded(self, name: str, parent: str | None, steps: int) -> list[str]:
        """What is wrong with the record of a run in MLflow, which may still be on its way."""
        from mlflow import MlflowClient

        client = MlflowClient(f"http://127.0.0.1:{self._mlflow_port}")
        deadline = time.monotonic() + _END_S
        while True:
            try:
                fault = _fault_of_record(client, name, parent, steps)
            except Exception as error:
                fault = f"MLflow: {error}"
            if fault is None or time.monotonic() > deadline:
                return [fault] if fault else []
            time.sleep(1)

    def left_over(self) -> list[str]:
        """Processes, placement groups, reserved CPUs and temporary files that no run needs any more."""
        import ray
        from ray.util import placement_group_table

        found = []
        kinds = ("worker", "trial actor", "controller", "mailbox")
        deadline = time.monotonic() + _END_S
        while time.monotonic() < deadline:
            self.look()
            groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
            reserved = ray.cluster_resources().get("CPU", 0) - ray.available_resources().get("CPU", 0)
            processes = [f"{kind} {process.pid}" for kind in kinds for process in self.victims(kind)]
            processes += [f"{name} {process.pid}" for process, name in self._shippers()]
            found = [f"placement group {g['placement_group_id'][:8]} is left" for g in groups]
            found += [f"{reserved:g} CPUs are still reserved"] if reserved else []
            found += [f"process {process} is left" for process in processes]
            if not found:
                break
            time.sleep(1)
        known = ("ray", "pymp-")
        left = [path.name for path in (self.folder / "tmp").iterdir() if not path.name.startswith(known)]
        return found + [f"temporary file {name} is left" for name in left]

    def _works(self) -> bool:
        """Whether there are workers, and their first has said of late that it has begun."""
        progress = sorted((self.folder / "runs").glob("**/progress.json"), key=lambda path: path.stat().st_mtime)
        if not progress or not self.victims("worker"):
            return False
        with contextlib.suppress(OSError, ValueError):
            return not json.loads(progress[-1].read_text()).get("phase", "").startswith(_BEFORE_WORK)
        return False

    def _shippers(self) -> list[tuple[psutil.Process, str]]:
        found = []
        for process in self._seen:
            with contextlib.suppress(psutil.Error):
                arguments = process.cmdline()
                if "maps_ray.tracking.shipper" in arguments and str(self.folder) in arguments[-1]:
                    found.append((process, f"shipper of {Path(arguments[-1]).name},"))
        return found

    def _start_node(self) -> None:
        self._nodes += 1
        self._ray(f"node-{self._nodes}", "--address", f"127.0.0.1:{self._port}", "--num-cpus", "1")

    def _start_server(self) -> None:
        store = f"sqlite:///{self.folder}/mlflow.db"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--host", "127.0.0.1"]
        self._start("mlflow", [*command, "--port", str(self._mlflow_port)], "ab")

    def _ray(self, name: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address", "127.0.0.1"]
        command += ["--disable-usage-stats", "--object-store-memory", str(100 * 2**20), *arguments]
        self._start(name, command)

    def _start(self, name: str, command: list[str], mode: str = "wb") -> None:
        with (self.folder / f"{name}.log").open(mode) as log:
            self._groups[name] = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        with contextlib.suppress(psutil.NoSuchProcess):
            self._seen.add(psutil.Process(self._groups[name].pid))


def _fault_of_record(client: Any, name: str, parent: str | None, steps: int) -> str | None:
    experiment = client.get_experiment_by_name("chaos")
    if experiment is None:
        return "MLflow has no experiment of this name"
    runs = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'", max_results=1000)
    if parent is not None:
        known = {run.info.run_id: run.info.run_name for run in client.search_runs([experiment.experiment_id])}
        runs = [run for run in runs if known.get(run.data.tags.get("mlflow.parentRunId", "")) == parent]
    if len(runs) != 1:
        return f"MLflow has {len(runs)} runs of this name"
    if runs[0].info.status != "FINISHED":
        return f"MLflow calls it {runs[0].info.status}"
    found = [point.step for point in client.get_metric_history(runs[0].info.run_id, "train/loss")]
    return None if sorted(found) == list(range(1, steps + 1)) else f"MLflow has the steps {sorted(found)}"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """All processes of a session, also those that Ray has put into groups of their own."""
    below = []
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(condition: Any, what: str) -> None:
    deadline = time.monotonic() + _START_S
    while not condition():
        if time.monotonic() > deadline:
            sys.exit(f"{what} did not come up within {_START_S:.0f} s")
        time.sleep(0.2)
