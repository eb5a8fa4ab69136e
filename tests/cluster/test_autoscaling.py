"""autoscaling.sh, for real: one node becomes three for waiting tasks and one again when they are done."""

import json
import subprocess
from pathlib import Path

import pytest
from cluster_scripts import LOCAL, Head, clean_environment

WORKLOAD = """
import json, time
import ray

ray.init(log_to_driver=False)

def alive():
    return sum(node["Alive"] for node in ray.nodes())

@ray.remote(num_cpus=1)
def hold(seconds):
    time.sleep(seconds)

start = time.monotonic()
counts = [alive()]
tasks = [hold.remote(15) for _ in range(3)]
while time.monotonic() - start < 200:
    if alive() != counts[-1]:
        counts.append(alive())
    if len(counts) > 1 and counts[-1] == 1:
        break
    time.sleep(0.2)
ray.get(tasks)
print(json.dumps({"counts": counts, "seconds": round(time.monotonic() - start)}))
"""


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_grows_to_three_nodes_and_shrinks_to_one(autoscaling_head: Head, tmp_path: Path) -> None:
    (tmp_path / "workload.py").write_text(WORKLOAD)
    arguments = ["--address", autoscaling_head.dashboard, "--working-dir", str(tmp_path)]
    job = autoscaling_head.ray("job", "submit", *arguments, "--", "python", "workload.py", timeout=280)
    assert job.returncode == 0, job.stdout + job.stderr
    seen = json.loads(next(line for line in job.stdout.splitlines() if line.startswith('{"counts"')))
    assert seen["counts"][0] == 1 and max(seen["counts"]) == 3 and seen["counts"][-1] == 1, seen


def test_a_config_that_ray_refuses_is_named(tmp_path: Path) -> None:
    config = tmp_path / "autoscaling.yaml"
    text = (LOCAL / "autoscaling.yaml").read_text().replace("    min_workers: 0\n", "    min_worker: 0\n")
    config.write_text(text)
    environment = clean_environment() | {"AUTOSCALING_CONFIG": str(config), "HEAD_STATE": str(tmp_path / "state")}
    result = subprocess.run(
        [LOCAL / "autoscaling.sh"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert "min_worker" in result.stderr and str(config) in result.stderr
    assert not (tmp_path / "state" / "head.pid").exists()
