"""Ray for one run: join it, and see that it can ever hold the workers before waiting for them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from maps_ray.ray_connection import RAY_CLIENT, ConnectionFailed, connected
from maps_ray.ray_internals import free_resources_by_node
from maps_ray.spec import ClusterSpec, Problem, RunSpec, SpecError
from maps_ray.tracking.store import database_file, resolve_uri
from maps_ray.training.run_faults import TrainingError


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
    """Ray, connected as `maps_ray.ray_connection.connected` does it.

    Raises:
        TrainingError: no cluster answers at the address, or Ray does not start here.
    """
    try:
        with connected(cluster.address, cluster.start_timeout_s):
            yield
    except ConnectionFailed as error:
        field = f"cluster.address = {cluster.address!r}: " if cluster.address else ""
        raise TrainingError(f"{field}{error}") from error.__cause__


def client_problems(cluster: ClusterSpec, what: str) -> list[Problem]:
    """Refuses a Ray client where the driver must be on a node.

    Args:
        cluster: of the run.
        what: needs it, with the reason.
    """
    address = cluster.address or os.environ.get("RAY_ADDRESS", "")
    if not address.startswith(RAY_CLIENT):
        return []
    message = (
        f"{what}, and a Ray client is on none: submit it to the cluster (python jobs/submit.py, which takes "
        "--address http://HEAD:8265), or start it on one of the nodes, with host:port here"
    )
    return [Problem("cluster.address", address, message)]


def capacity(cluster: ClusterSpec) -> Capacity:
    """What the run takes of the connected cluster, `gpus_per_worker: auto` resolved; at least, if it is elastic.

    Raises:
        TrainingError: the cluster can never give so much, whatever ends; not with `cluster.autoscaling`.
    """
    # In each function, not above: commands that need no Ray stay quick.
    import ray

    ceiling = ray.cluster_resources()
    gpus = cluster.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if ceiling.get("GPU", 0) > 0 else 0.0
    least = cluster.workers if isinstance(cluster.workers, int) else cluster.workers.min
    need = Capacity(least, cluster.cpus_per_worker, gpus)
    for resource, each in need.bundle.items():
        if need.workers * each > ceiling.get(resource, 0) and not cluster.autoscaling:
            raise TrainingError(
                f"cluster.workers = {need.workers}: they need {need.workers * each:g} {resource}s "
                f"({each:g} each), and this cluster can never give more than {ceiling.get(resource, 0):g}; "
                "ask for fewer workers, for less per worker, or for a larger cluster; if it adds nodes on demand, set "
                "cluster.autoscaling=true"
            )
    return need


def grown(need: Capacity, sizes: Sequence[int], held: int = 0) -> Capacity:
    """As many workers as the nodes have room for now.

    Args:
        need: of the smallest group.
        sizes: numbers of workers that there may be, ascending.
        held: workers whose room counts as free.
    """
    room = held
    for free in free_resources_by_node().values():
        # Ray counts in ten-thousandths: three times 0.1 of a CPU must have room in 0.3.
        room += min(int(free.get(name, 0.0) / each + 1e-6) for name, each in need.bundle.items())
    fitting = [size for size in sizes if size <= room]
    return replace(need, workers=max(fitting, default=need.workers))


def refuse_shared_sqlite(spec: RunSpec) -> None:
    """Looks at the connected cluster for `shared_sqlite`.

    Raises:
        SpecError: the run is recorded in a sqlite database that several machines share.
    """
    import ray

    # By address, not by node: several nodes of Ray may be on one machine, which keeps locks.
    fault = shared_sqlite(spec, len({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}))
    if fault is not None:
        raise SpecError([fault])


def shared_sqlite(spec: RunSpec, machines: int) -> Problem | None:
    """What is wrong with the run's database: a folder that several machines see is a network's, which does not keep
    sqlite's locks. None where it lies elsewhere, or there is one machine."""
    storage = spec.cluster.storage
    if not isinstance(storage, Path) or machines < 2:
        return None
    database = database_file(resolve_uri(spec.tracking.uri, storage))
    if database is None or not database.is_relative_to(storage.resolve()):
        return None
    message = (
        f"a sqlite database in {storage}, which {machines} machines share: network folders do not keep its locks. "
        "Start an MLflow server and set tracking.uri=http://HOST:5000, or name a database on the driver's own disk: "
        "tracking.uri=sqlite:////var/lib/maps_ray/mlflow.db"
    )
    return Problem("tracking.uri", spec.tracking.uri, message)


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

    # Held for no longer than it takes to come: Ray Train makes its own. Resources that are only read show no autoscaler
    # what is wanted, and may be spread so that no worker fits.
    group = placement_group([need.bundle] * need.workers, strategy="PACK")
    deadline = time.monotonic() + timeout_s
    try:
        # In short turns, so that a request to stop is heard.
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
