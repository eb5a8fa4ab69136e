"""Ray for one run: start it here or join it, and see that it can ever hold the workers before waiting for them."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

from maps_ray.spec import ClusterSpec
from maps_ray.training.errors import TrainingError

# Nothing of a run passes through Ray's object store.
_OBJECT_STORE_BYTES = 100 * 2**20
# Of the processes of a cluster that was started here, after it was shut down.
_END_S = 10.0
_TOKEN = secrets.token_hex(32)


@dataclass(frozen=True)
class Capacity:
    """What one run takes of a cluster."""

    workers: int
    cpus_per_worker: float
    gpus_per_worker: float

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one worker in Ray's words."""
        gpu = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker, **gpu}


@contextmanager
def ray_cluster(cluster: ClusterSpec) -> Iterator[None]:
    """Ray, connected: the cluster this process has joined already, the one at `address`, the one of the submitted job,
    or one started on this machine, which ends with the context.

    A cluster started here keeps its files in a folder of its own, has no dashboard, and asks every client for a token
    that only this process and its children know.

    Raises:
        TrainingError: no cluster answers at the address, or Ray does not start here.
    """
    if _connected():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    with _joined(address) if address else _started():
        yield


def capacity(cluster: ClusterSpec) -> Capacity:
    """What the run takes of the connected cluster, `gpus_per_worker: auto` resolved.

    Raises:
        TrainingError: the cluster can never give so much, whatever ends; not with `cluster.autoscaling`.
    """
    import ray

    ceiling = ray.cluster_resources()
    gpus = cluster.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if ceiling.get("GPU", 0) > 0 else 0.0
    need = Capacity(cluster.workers, cluster.cpus_per_worker, gpus)
    for resource, each in need.bundle.items():
        if need.workers * each > ceiling.get(resource, 0) and not cluster.autoscaling:
            raise TrainingError(
                f"cluster.workers = {need.workers}: they need {need.workers * each:g} {resource}s "
                f"({each:g} each), and this cluster can never give more than {ceiling.get(resource, 0):g}; "
                "ask for fewer workers, for less per worker, or for a larger cluster; if it adds nodes on demand, set "
                "cluster.autoscaling=true"
            )
    return need


def most_groups(need: Capacity) -> int:
    """How many groups of workers the connected cluster can hold at once as it is now.

    Resources are counted over all nodes; nodes that a worker does not fill evenly may hold fewer.
    """
    import ray

    ceiling = ray.cluster_resources()
    return min(int(ceiling.get(resource, 0) / (need.workers * each)) for resource, each in need.bundle.items())


def wait_for_workers(need: Capacity, timeout_s: float, stopped: Callable[[], bool]) -> None:
    """Waits until the cluster has room for all workers at once, which also makes an autoscaler add nodes.

    Raises:
        TrainingError: no room within `timeout_s`.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([need.bundle] * need.workers, strategy="PACK")
    deadline = time.monotonic() + timeout_s
    try:
        while not group.wait(0.5):
            if stopped():
                return
            if time.monotonic() > deadline:
                free = ray.available_resources()
                shown = ", ".join(f"{free.get(resource, 0):g} {resource}s" for resource in need.bundle)
                raise TrainingError(
                    f"cluster.start_timeout_s = {timeout_s:g}: no room for {need.workers} workers of {need.bundle} "
                    f"came free in that time (free now: {shown}); wait for other jobs to end or raise the limit"
                )
    finally:
        remove_placement_group(group)


def _connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@contextmanager
def _joined(address: str) -> Iterator[None]:
    import ray

    try:
        ray.init(address=address, logging_level="warning")
    except Exception as error:
        raise TrainingError(f"cluster.address = {address!r}: no Ray cluster can be joined there: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _started() -> Iterator[None]:
    # A token of this process, unless the user has chosen how Ray authenticates.
    token = {} if "RAY_AUTH_MODE" in os.environ else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN}
    os.environ.update(token)
    # Ray runs workers at nice 15 so that its own processes stay responsive; here anything else would starve them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    # Ray has read its environment on import; a process that imported it earlier must read the token mode again.
    ray._raylet.Config.initialize("")
    # Paths of sockets below it may have 107 bytes in all.
    folder = tempfile.mkdtemp(prefix="maps-ray-", dir=None if len(tempfile.gettempdir()) < 24 else "/tmp")
    try:
        try:
            ray.init(
                address="local",
                num_cpus=len(os.sched_getaffinity(0)),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level="warning",
                _temp_dir=folder,
            )
        except Exception as error:
            raise TrainingError(f"Ray does not start on this machine: {error}") from error
        yield
    finally:
        own = _processes_of(folder)
        ray.shutdown()
        # They end a moment later, and write into the folder until then.
        for left in psutil.wait_procs(own, _END_S)[1]:
            left.kill()
        shutil.rmtree(folder, ignore_errors=True)
        for name in token:
            os.environ.pop(name, None)


def _processes_of(folder: str) -> list[psutil.Process]:
    """Processes of the Ray session that this process started with its files in `folder`, workers included."""
    found = []
    for child in psutil.Process().children():
        try:
            if any(folder in argument for argument in child.cmdline()):
                found += [child, *child.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    return found
