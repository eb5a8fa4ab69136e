"""Ray on this machine: closed to others, twice in one process, and gone without a trace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maps_ray.ray_connection import ConnectionFailed, require_answer
from maps_ray.spec import ClusterSpec
from maps_ray.training.cluster import Capacity, capacity, ray_cluster
from maps_ray.training.run_faults import TrainingError

TWICE = """
import os, sys, psutil
from maps_ray.ray_connection import ConnectionFailed, require_answer
from maps_ray.spec import ClusterSpec
from maps_ray.training.cluster import ray_cluster

for _ in range(2):
    with ray_cluster(ClusterSpec()):
        import ray
        assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
        assert ray.get(ray.remote(lambda: 7).remote()) == 7
        folder = ray._private.worker._global_node.get_temp_dir_path()
    assert not os.path.exists(folder) and "RAY_AUTH_TOKEN" not in os.environ and not ray.is_initialized()
print([process.name() for process in psutil.Process().children(recursive=True) if process.status() != "zombie"])
"""


@pytest.mark.slow
def test_a_local_cluster_starts_twice_and_leaves_nothing(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", TWICE], env={**environment, "HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert not (tmp_path / ".ray").exists()


def test_a_worker_takes_a_gpu_only_where_there_are_any(ray_session: None) -> None:
    assert capacity(ClusterSpec(workers=1)) == Capacity(1, 1, 0)
    with pytest.raises(
        TrainingError, match=r"they need 2 GPUs \(2 each\), and this cluster can never give more than 0"
    ):
        capacity(ClusterSpec(workers=1, gpus_per_worker=2))
    # A cluster that grows is asked, not refused.
    assert capacity(ClusterSpec(workers=1, gpus_per_worker=2, autoscaling=True)) == Capacity(1, 1, 2)


def test_a_cluster_that_is_connected_is_used_and_stays(ray_session: None) -> None:
    import ray

    with ray_cluster(ClusterSpec(address="10.255.255.1:1")):
        pass
    assert ray.is_initialized()


def test_a_cluster_answers_at_its_address_and_what_has_gone_does_not(ray_session: None) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    require_answer(address)
    with pytest.raises(ConnectionFailed, match="no Ray cluster can be joined at"):
        require_answer(f"{address.rpartition(':')[0]}:1", 1)
