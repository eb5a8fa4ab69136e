"""`maps-ray check --cluster`, for real: two nodes of which one is not like the other."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from ray_nodes import ray_nodes

from maps_ray.spec import SpecError, apply_overrides
from maps_ray.training.cluster_check import PACKAGES, Node, default_sections, faults

# One driver for all looks: connecting costs the most.
_LOOKS = """
import json, sys
import ray
from typer.testing import CliRunner
from maps_ray.cli import app
from maps_ray.spec import SpecError
from maps_ray.training import cluster_check
ray.init(address=sys.argv[1], log_to_driver=False)
answers = []
for look in json.loads(sys.argv[2]):
    cluster_check.SEE_S = look.pop("wait", 60)
    done = CliRunner().invoke(app, ["check", "--cluster", *look["arguments"]])
    refused = isinstance(done.exception, SpecError)
    assert refused or done.exception is None, done.exception
    answers.append({"output": done.stdout, "refused": str(done.exception) if refused else None})
print(json.dumps(answers))
"""


def look(address: str, nodes: Any, node: Any, *looks: dict[str, Any]) -> list[dict[str, Any]]:
    done = nodes.driver(node, sys.executable, "-c", _LOOKS, address, json.dumps(looks))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_nodes_that_differ_are_named(tmp_path: Path) -> None:
    shared = tmp_path / "runs"
    other = tmp_path / "other" / "timm-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.0.1\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with ray_nodes(RAY_AUTH_MODE="disabled") as nodes:
            head = nodes.start("head", "--num-cpus=1")
            nodes.start("other", "--num-cpus=1", PYTHONPATH=str(tmp_path / "other"))
            tracking = ["--set", f"tracking.uri=http://127.0.0.1:{port}"]
            good = {"arguments": ["--json", "--set", f"cluster.storage={shared}", *tracking]}
            # Each process has its own: a folder that looks the same from everywhere and is shared by nobody.
            private = ["--set", "cluster.storage=/proc/self/cwd/runs", "--set", "cluster.workers=3"]
            bad = {"arguments": private, "wait": 1}
            first, second = look(nodes.address, nodes, head, good, bad)
    found = json.loads(first["output"])
    assert not found["ok"] and len(found["nodes"]) == 2 and found["seconds"] < 60
    versions = [node["facts"]["versions"]["timm"] for node in found["nodes"]]
    assert versions[1] == "0.0.1" != versions[0]
    assert all(node["storage"] is None and abs(node["skew_s"]) < 1 for node in found["nodes"])
    assert "timm is 0.0.1 there" in first["refused"] and "install the same on all nodes" in first["refused"]
    assert f"http://127.0.0.1:{port}" in first["refused"] and "cannot be reached from" in first["refused"]
    assert "renamed there are not seen" not in first["refused"]
    # Nothing stays behind, not even the folder that was not there before.
    assert not shared.exists()
    assert "2 nodes, looked at in" in second["output"]
    assert "renamed there are not seen after 1 s" in second["refused"]
    assert "cluster.workers = 3: they need 3 CPUs" in second["refused"]


def node(name: str, **facts: Any) -> Node:
    usual = {
        "host": name,
        "python": "3.11.7",
        "versions": dict.fromkeys(PACKAGES, "1"),
        "code": "0123abcd",
        "scratch": {"folder": "/tmp", "free": 50 * 2**30, "total": 100 * 2**30},
        "memory": {"free": 50 * 2**30, "total": 100 * 2**30},
        "gpus": [{"name": "NVIDIA H100 80GB HBM3", "memory_mib": 81559, "driver": "580.1"}],
    }
    return Node(name, name, False, {"CPU": 8, "GPU": 1}, {**usual, **facts}, skew_s=0.0)


def test_what_is_wrong_with_a_node_is_said_with_a_remedy(tmp_path: Path) -> None:
    cluster, _ = default_sections({"cluster": {"storage": str(tmp_path)}})

    def said(*nodes: Node) -> str:
        return "\n".join(str(problem) for problem in faults(nodes, cluster, "http://mlflow:5000"))

    a, b = node("a"), node("b")
    assert said(a, b) == ""
    a100 = {"name": "NVIDIA A100-SXM4-80GB", "memory_mib": 81920, "driver": "580.1"}
    assert "81559 MiB on a; NVIDIA A100-SXM4-80GB, 81920 MiB on b" in said(a, node("b", gpus=[a100]))
    assert "gpus = 'b': Ray counts 1 GPUs there, and nvidia-smi shows none" in said(a, node("b", gpus=[]))
    b.skew_s, b.skew_error_s = -30.0, 0.1
    assert "clock = 'b': -30.0 s off this machine's: set it by NTP" in said(a, b)
    full = {"folder": "/scratch", "free": 2**30, "total": 100 * 2**30}
    assert "scratch = 'b': 1.0 GiB of 100 GiB are free of /scratch" in said(a, node("b", scratch=full))
    assert "memory = 'b'" in said(a, node("b", memory={"free": 2**30, "total": 100 * 2**30}))
    assert "versions = 'b': the code of maps_ray is ffff there and 0123abcd on 2 others" in said(
        a, node("b", code="ffff"), node("c")
    )
    assert "python is 3.12.1 there" in said(a, node("b", python="3.12.1"))
    shared = "\n".join(str(problem) for problem in faults([a, node("b")], cluster, f"sqlite:///{tmp_path}/mlflow.db"))
    assert "a sqlite file in a folder that 2 machines share" in shared and "start an MLflow server" in shared
    assert faults([a, node("b")], cluster, "sqlite:////var/lib/mlflow.db") == []
    silent = Node("c", "10.0.0.3", False, {"CPU": 8, "GPU": 1}, silent="it did not answer within 60 s")
    assert "nodes = '10.0.0.3': it did not answer within 60 s" in said(a, silent)


def test_without_a_spec_only_the_cluster_can_be_described() -> None:
    with pytest.raises(SpecError, match="only fields of cluster and tracking"):
        default_sections(apply_overrides({}, ["training.max_steps=3"]))
    with pytest.raises(SpecError, match=r"cluster.storage = '\$NO_SUCH_VARIABLE/runs': the variable .* is not set"):
        default_sections(apply_overrides({}, ["cluster.storage=$NO_SUCH_VARIABLE/runs"]))
    cluster, tracking = default_sections(apply_overrides({}, ["cluster.storage=runs"]))
    assert cluster.storage == Path.cwd() / "runs" and tracking.uri is None
