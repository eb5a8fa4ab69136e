"""What other launchers left in the environment never reaches torch or DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maps_ray.training.worker import forget_launchers

OF_ANOTHER_RANK = {
    "mpirun": {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_LOCAL_RANK": "3",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
        "PMIX_RANK": "3",
    },
    "mpiexec": {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "3", "PMI_FD": "9", "HYDI_CONTROL_FD": "8"},
    "srun": {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "3",
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_NODELIST": "node[1-8]",
        "PMI2_RANK": "3",
    },
    "torchrun": {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "3",
        "LOCAL_WORLD_SIZE": "8",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "10.255.255.1",
        "MASTER_PORT": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "none",
    },
    "azureml": {"AZUREML_EXPERIMENT_ID": "x", "AZ_BATCH_MASTER_NODE": "10.0.0.4:6000"},
}

# Two workers, each with a process group and DeepSpeed's look at its ranks.
GROUP = """
import json, sys
from pathlib import Path
from maps_ray.spec import ClusterSpec
from maps_ray.training.cluster import Capacity, ray_cluster
from maps_ray.training.fit import Fit
from maps_ray.training.mailbox import open_mailbox

def worker(config):
    import os
    from maps_ray.training.engine import prepare_process
    prepare_process(False)
    import deepspeed
    import torch.distributed as dist
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank = dist.get_rank()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {"group": [rank, dist.get_world_size()], "environment": [os.environ[name] for name in names]}
    found["left"] = [name for name in config["given"] if name in os.environ and name not in (*names, *config["set"])]
    Path(config["out"], str(rank)).write_text(json.dumps(found))

out, given = sys.argv[1], json.loads(sys.argv[2])
config = {"out": out, "given": given, "set": ["LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"]}
with ray_cluster(ClusterSpec()):
    limits = {"max_failures": 0, "start_timeout_s": 60, "collective_timeout_s": 60}
    fit = Fit(worker, config, Capacity(2, 0.5, 0), Path(out), **limits, mailbox=open_mailbox())
    fit.start()
    fit.join(240)
    assert not fit.is_alive() and fit.error is None, fit.error
"""


@pytest.mark.parametrize("launcher", OF_ANOTHER_RANK)
def test_a_launchers_variables_are_forgotten_and_others_stay(launcher: str) -> None:
    kept = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", "NCCL_SOCKET_IFNAME": "eth0", "RAY_ADDRESS": "auto"}
    environment = {**OF_ANOTHER_RANK[launcher], **kept}
    forget_launchers(environment)
    assert environment == kept


@pytest.mark.slow
def test_workers_have_rays_ranks(tmp_path: Path) -> None:
    given = {name: value for variables in OF_ANOTHER_RANK.values() for name, value in variables.items()}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", GROUP, str(tmp_path), json.dumps(list(given))],
        env={**environment, **given},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        found = json.loads((tmp_path / str(rank)).read_text())
        assert found == {"group": [rank, 2], "environment": [str(rank), "2", str(rank)], "left": []}
