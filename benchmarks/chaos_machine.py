"""The cluster, the servers of MLflow and S3 and the driver that `chaos.py` kills, and what it sees of them."""

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
_GROUPS = {"node": "node", "MLflow server": "mlflow", "S3 server": "s3", "driver": "driver"}
# Of Ray itself, while its cluster is up.
_RAYS_OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_AutoscalingCoordinatorActor")
_BEFORE_WORK = ("starting", "waiting", "indexing", "loading", "restoring")
_START_S = 600.0
_LOOK_S = 0.5
_END_S = 60.0
BUCKET = "chaos"


class Machine:
    """Everything that may be killed. Only what was started here is ever touched, by its process id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._port, self._mlflow_port, self._s3_port = _free_ports(3)
        (folder / "mlflow-port").write_text(str(self._mlflow_port))
        self._groups: dict[str, subprocess.Popen[bytes]] = {}
        """Head, nodes, servers and driver, each in a session of its own."""
        self._seen: dict[psutil.Process, str] = {}
        """All that was started here and lives, and what it calls itself, as of the last look."""
        self._restart: list[tuple[float, str]] = []
        self._nodes = 0
        self._looked = 0.0
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
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._s3_port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
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
        """Head without CPUs, two nodes with one each, and the servers; this process joins to look on."""
        head = ["--head", "--port", str(self._port), "--num-cpus", "0", "--include-dashboard", "true"]
        dashboard, client = _free_ports(2)
        head += ["--dashboard-port", str(dashboard), "--ray-client-server-port", str(client)]
        self._ray("head", *head, "--temp-dir", str(self.folder / "tmp" / "ray"))
        _wait(lambda: "--block" in (self.folder / "head.log").read_text(), "Ray's head")
        for _ in range(2):
            self._start_node()
            _wait(self._nodes_are_up, "a node")
        self._start_again("MLflow server")
        self._start_again("S3 server")
        import ray

        ray.init(logging_level="error", log_to_driver=False)
        _wait(lambda: self.look() or ray.cluster_resources().get("CPU", 0) == 2, "the nodes")
        _wait(lambda: _listens(self._mlflow_port), "the MLflow server")
        _wait(lambda: _listens(self._s3_port), "the S3 server")

    def look(self) -> None:
        """Notes the processes that there are, and starts again what an operator would by now."""
        if time.monotonic() - self._looked < _LOOK_S:
            return
        # One that has ended may have left its number to a stranger.
        seen = {process for process in self._seen if process.is_running()}
        for process in self._groups.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                seen.update([psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)])
        self._seen = {}
        for process in seen:
            with contextlib.suppress(psutil.Error):
                self._seen[process] = " ".join(process.cmdline()).strip()
        for name, process in list(self._groups.items()):
            if name not in ("driver", "head") and process.poll() is not None:
                # On a busy machine a node may give up while it starts.
                del self._groups[name]
                kind = next(kind for kind, prefix in _GROUPS.items() if name.startswith(prefix))
                self._restart.append((0.0, kind))
        for due, kind in list(self._restart):
            # Ray nodes of one machine that start at the same moment choose the same socket.
            if time.monotonic() > due and (kind != "node" or self._nodes_are_up()):
                self._restart.remove((due, kind))
                self._start_again(kind)
        self._looked = time.monotonic()

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

    def steps(self, run: Path) -> list[int]:
        """Optimizer steps of a run by its folder, or of each trial of a sweep that has begun."""
        return [int(state.get("step", 0)) for _, state in _progress(run)] or [0]

    def works(self, run: Path) -> bool:
        """Whether its workers have said that they have begun to work since they came."""
        came = []
        for worker in self.victims("worker"):
            with contextlib.suppress(psutil.Error):
                came.append(worker.create_time())
        said = [state for when, state in _progress(run) if came and when > min(came)]
        return any(not state.get("phase", "starting").startswith(_BEFORE_WORK) for state in said)

    def saves(self, run: Path) -> bool:
        """Whether a checkpoint of it is being written, waiting a moment for one."""
        partial = "checkpoints/.step-*.partial"
        places = ((run, partial), (run, f"trials/*/{partial}"), (self.folder / "scratch/work", "*/put-*"))
        # It takes a few thousandths of a second.
        until = time.monotonic() + _LOOK_S
        while time.monotonic() < until:
            for path in (path for folder, pattern in places for path in folder.glob(pattern)):
                with contextlib.suppress(OSError):
                    # What is older may be what a killed worker has left.
                    if time.time() - path.stat().st_mtime < _LOOK_S:
                        return True
            time.sleep(0.001)
        return False

    def victims(self, kind: str) -> list[psutil.Process]:
        """Living processes of a kind; a node or the server stands for all of its group."""
        if kind in _GROUPS:
            groups = [process for name, process in self._groups.items() if name.startswith(_GROUPS[kind])]
            with contextlib.suppress(psutil.NoSuchProcess):
                return [psutil.Process(process.pid) for process in groups if process.poll() is None]
            return []
        found = [p for p, title in self._actors() if any(name in title for name in _NAMES[kind])]
        return sorted(found, key=lambda process: process.pid)

    def kill(self, kind: str, source: random.Random) -> bool:
        """Kills one of a kind; returns whether there was one."""
        victims = self.victims(kind)
        if not victims:
            return False
        victim = source.choice(victims)
        group = next((name for name, process in self._groups.items() if process.pid == victim.pid), None)
        if group is not None and kind != "driver":
            _kill_group(self._groups.pop(group))
            self._restart.append((time.monotonic() + source.uniform(1, 5), kind))
            return True
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            return False
        if kind == "driver":
            self._groups["driver"].wait()
        return True

    def settle(self) -> None:
        """Waits until all that was killed runs again and nothing of a run does."""
        while self._restart:
            self.look()
            time.sleep(0.2)
        deadline = time.monotonic() + _END_S
        while self._actors() and time.monotonic() < deadline:
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
        deadline = time.monotonic() + _END_S
        while time.monotonic() < deadline:
            self.look()
            groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
            reserved = ray.cluster_resources().get("CPU", 0) - ray.available_resources().get("CPU", 0)
            processes = [f"{title} {process.pid}" for process, title in self._actors()]
            processes += [f"{name} {process.pid}" for process, name in self._shippers()]
            found = [f"placement group {g['placement_group_id'][:8]} is left" for g in groups]
            found += [f"{reserved:g} CPUs are still reserved"] if reserved else []
            found += [f"process {process} is left" for process in processes]
            if not found:
                break
            time.sleep(1)
        # Ray's own: its sessions, and the locks of checkpoints that it copies (`ray/air/_internal/filelock.py`).
        known = ("ray", "_ray_lockfiles", "pymp-")
        left = [path.name for path in (self.folder / "tmp").iterdir() if not path.name.startswith(known)]
        # What was on its way to the object store, and this machine's copies of runs that are there.
        scratch = [*self.folder.glob("scratch/work/*"), *self.folder.glob(f"scratch/s3/{BUCKET}/runs/*")]
        left += [str(path.relative_to(self.folder)) for path in scratch]
        return found + [f"temporary file {name} is left" for name in left]

    def _actors(self) -> list[tuple[psutil.Process, str]]:
        """Processes that Ray has started for somebody, with their titles."""
        titles = self._seen.items()
        return [(p, title) for p, title in titles if title.startswith("ray::") and not title.startswith(_RAYS_OWN)]

    def _shippers(self) -> list[tuple[psutil.Process, str]]:
        found = []
        for process, title in self._seen.items():
            place = title.rpartition(" ")[2]
            if "maps_ray.tracking.shipper" in title and place.startswith(str(self.folder)):
                found.append((process, f"shipper of {Path(place).name},"))
        return found

    def _nodes_are_up(self) -> bool:
        nodes = [name for name, process in self._groups.items() if name.startswith("node") and process.poll() is None]
        return all("--block" in (self.folder / f"{name}.log").read_text() for name in nodes)

    def _start_node(self) -> None:
        self._nodes += 1
        self._ray(f"node-{self._nodes}", "--address", f"127.0.0.1:{self._port}", "--num-cpus", "1")

    def _start_again(self, kind: str) -> None:
        if kind == "node":
            self._start_node()
            return
        server = [sys.executable, str(Path(__file__).parent / "chaos_s3.py"), "--port", str(self._s3_port)]
        server += ["--folder", str(self.folder / "s3"), "--bucket", BUCKET]
        if kind == "MLflow server":
            store = f"sqlite:///{self.folder}/mlflow.db"
            server = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
            server += ["--artifacts-destination", str(self.folder / "artifacts"), "--host", "127.0.0.1"]
            server += ["--port", str(self._mlflow_port)]
        self._start(_GROUPS[kind], server, "ab")

    def _ray(self, name: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address", "127.0.0.1"]
        command += ["--disable-usage-stats", "--object-store-memory", str(100 * 2**20), *arguments]
        self._start(name, command)

    def _start(self, name: str, command: list[str], mode: str = "wb") -> None:
        with (self.folder / f"{name}.log").open(mode) as log:
            self._groups[name] = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._looked = 0.0


def _progress(run: Path) -> list[tuple[float, dict[str, Any]]]:
    """When a run, or each trial of a sweep, last said where it stands, and what."""
    found = []
    for path in (run / "progress.json", *run.glob("trials/*/progress.json")):
        with contextlib.suppress(OSError, ValueError):
            found.append((path.stat().st_mtime, json.loads(path.read_text())))
    return found


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
