"""A sweep submitted as a job to a cluster that grows for it, loses a node in the middle, and shrinks afterwards."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from maps_ray.spec.sweep_spec import load_sweep
from maps_ray.sweeps.driver import run_sweep
from maps_ray.sweeps.journal import Journal
from maps_ray.sweeps.plan import make_plan
from maps_ray.sweeps.record import read_sweep
from maps_ray.training.progress import read_progress

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cluster"))
from cluster_scripts import Head, in_group, start_head  # noqa: E402

RUN = {
    "evaluation": {"every": 100, "batch_size": 4, "max_samples": 4},
    "training": {"max_steps": 300, "checkpoint_every": 20},
}
ALONE = """
import time
import ray

ray.init(log_to_driver=False)
began = time.monotonic()
while sum(node["Alive"] for node in ray.nodes()) > 1:
    assert time.monotonic() - began < 90, "nodes stay"
    time.sleep(0.5)
"""


@pytest.fixture
def autoscaling_head() -> Iterator[Head]:
    yield from start_head("autoscaling.sh")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_grows_loses_a_node_and_shrinks(
    autoscaling_head: Head, make_sweep: Callable[..., Path], ray_session: None, tmp_path: Path
) -> None:
    fields = {"budget": {"trials": 7}, "baselines": ["l2_sp"], "known_strengths": [1.0], "max_concurrent": 3}
    path = make_sweep(run=RUN, name="scaled", **fields)
    plan = make_plan(load_sweep(path))
    killed: list[int] = []
    killer = threading.Thread(target=lambda: killed.append(_kill_a_node(autoscaling_head, plan.folder)), daemon=True)
    killer.start()
    address = ["--address", autoscaling_head.dashboard]
    cache = json.dumps({"env_vars": {"MAPS_RAY_CACHE": os.environ["MAPS_RAY_CACHE"], "OMP_NUM_THREADS": "1"}})
    (tmp_path / "empty").mkdir()
    arguments = [*address, "--working-dir", str(tmp_path / "empty"), "--runtime-env-json", cache]
    script = ["--", sys.executable, str(ROOT / "jobs" / "sweep.py"), str(path)]
    job = autoscaling_head.ray("job", "submit", *arguments, *script, timeout=600)
    assert job.returncode == 0, job.stdout[-5000:] + job.stderr
    killer.join(1)
    assert killed
    record = read_sweep(plan.folder)
    nodes = [moment.nodes for moment in record.timeline]
    assert nodes[0] == 1 and max(nodes) == 3, nodes
    assert max(moment.running for moment in record.timeline) == 3

    (tmp_path / "alone.py").write_text(ALONE)
    alone = autoscaling_head.ray(
        "job", "submit", *address, "--working-dir", str(tmp_path / "empty"), "--", sys.executable,
        str(tmp_path / "alone.py"), timeout=150,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stdout + alone.stderr

    undisturbed = make_plan(load_sweep(make_sweep(run=RUN, name="undisturbed", **fields)))
    run_sweep(undisturbed, show=False)
    assert _values(plan.folder) == _values(undisturbed.folder)


def _values(folder: Path) -> dict[str, tuple]:
    return {e.trial: (e.status, e.step, e.values) for e in Journal(folder).ended.values()}


def _kill_a_node(head: Head, folder: Path) -> int:
    """Kills a node's raylet, with all its workers, while it runs a trial that has made a checkpoint."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        for run_dir in (folder / "trials").glob("*"):
            if 30 <= read_progress(run_dir).get("step", 0) <= 200:
                worker = _worker_off_the_head(head)
                if worker is not None:
                    raylet = worker.parent()
                    raylet.send_signal(signal.SIGKILL)
                    return raylet.pid
        time.sleep(0.1)
    raise AssertionError("no trial came to its middle")


def _worker_off_the_head(head: Head) -> psutil.Process | None:
    raylets = [p for p in in_group(head.pid) if "raylet/raylet" in " ".join(p.cmdline()[:1])]
    first = min(raylets, key=lambda p: p.create_time())
    for raylet in raylets:
        for child in raylet.children(recursive=True) if raylet.pid != first.pid else []:
            if "RayTrainWorker" in " ".join(child.cmdline()):
                return child
    return None
