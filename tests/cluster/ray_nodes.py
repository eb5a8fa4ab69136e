"""Ray nodes of a cluster on this machine, each as on a machine of its own: home, scratch, working directory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from cluster_scripts import ROOT, clean_environment, free_port, in_group

_START_S = 120


@dataclass
class RayNode:
    """What `ray start` began, in a process group of its own."""

    name: str
    folder: Path
    """Holds `home`, `work`, `tmp` and `ray.log`."""
    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """As power that fails: every process at once, also those that Ray puts into groups of their own."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        os.killpg(self.process.pid, signal.SIGKILL)
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@dataclass
class RayNodes:
    """A cluster whose nodes come one by one."""

    folder: Path
    environment: Mapping[str, str]
    address: str = ""
    nodes: list[RayNode] = field(default_factory=list)

    def start(self, name: str, *arguments: str, inside: Sequence[str] = (), **variables: str) -> RayNode:
        """Starts a node, the head first, and waits until `ray start` says that it runs.

        Args:
            name: of its folder.
            arguments: of `ray start`.
            inside: a command that runs it, such as one that gives it another view of the disks.
            variables: of its environment, beside a home, a scratch and a working directory of its own.
        """
        folder = self.folder / name
        for part in ("home", "work", "tmp"):
            (folder / part).mkdir(parents=True)
        environment = clean_environment() | {
            **self.environment,
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "tmp"),
            "RAY_DISABLE_IMPORT_WARNING": "1",
            **variables,
        }
        if self.nodes:
            place = ["--address", self.address]
        else:
            self.address = f"127.0.0.1:{free_port()}"
            client = str(free_port(20100, 30000))
            place = ["--head", "--port", self.address.split(":")[1], "--ray-client-server-port", client]
            place += ["--include-dashboard", "false"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *place, "--node-ip-address", "127.0.0.1"]
        command += ["--block", "--disable-usage-stats", "--object-store-memory", str(100 * 2**20), *arguments]
        if not self.nodes:
            # Of a node that joins, Ray takes the name of the session's folder from the head.
            command += ["--temp-dir", str(folder / "tmp" / "ray")]
        with (folder / "ray.log").open("wb") as log:
            process = subprocess.Popen(
                [*inside, *command],
                cwd=folder / "work",
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        node = RayNode(name, folder, environment, process)
        self.nodes.append(node)
        deadline = time.monotonic() + _START_S
        while "--block" not in (text := (folder / "ray.log").read_text()):
            assert process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.2)
        return node

    def driver(self, node: RayNode, *command: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
        """Runs a command as on a node, with the cluster's address."""
        return subprocess.run(
            command,
            cwd=node.folder / "work",
            env={**node.environment, "RAY_ADDRESS": self.address, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def close(self) -> None:
        for node in self.nodes:
            if node.process.poll() is None:
                os.killpg(node.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + 20
        for node in reversed(self.nodes):
            while (left := in_group(node.process.pid)) and time.monotonic() < deadline:
                time.sleep(0.2)
            if left:
                os.killpg(node.process.pid, signal.SIGKILL)
            node.process.wait()


@contextmanager
def ray_nodes(**variables: str) -> Iterator[RayNodes]:
    """A cluster without nodes yet; all of its processes and files go at the end."""
    # Ray's socket paths are limited to 107 bytes: pytest's folders are too deep.
    folder = Path(tempfile.mkdtemp(prefix="mr", dir="/tmp"))
    nodes = RayNodes(folder, {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1", **variables})
    try:
        yield nodes
    finally:
        nodes.close()
        shutil.rmtree(folder, ignore_errors=True)
