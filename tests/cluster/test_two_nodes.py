"""Two nodes that share no folder, spoken to by token and TLS alone, and an S3 server: train, lose a node and get
another, stop, resume, export. Then a sweep, which needs a folder that nodes share."""

from __future__ import annotations

import datetime
import importlib.util
import ipaddress
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import ray
import yaml
from cluster_scripts import ROOT
from ray_nodes import RayNode, RayNodes, ray_nodes
from s3_gate import s3_server

from maps_ray.run_copies import fetched
from maps_ray.run_storage import RunStorage
from maps_ray.tracking.spool import read_history

MAPS_RAY = (sys.executable, "-c", "from maps_ray.cli import main; main()")
# The run is stopped before: how many steps pass while a node starts depends on the machine.
MANY = 100_000


def _training_fixtures() -> ModuleType:
    found = importlib.util.spec_from_file_location("training_fixtures", ROOT / "tests" / "training" / "conftest.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


_training = _training_fixtures()
base, demonstrations = _training.base, _training.demonstrations


@pytest.fixture
def tls(tmp_path: Path) -> dict[str, str]:
    """A token and a certificate for this machine, which is its own authority; the variables by which Ray takes them."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "maps-ray test")])
    now = datetime.datetime.now(datetime.UTC)
    # Ray calls the head by the machine's own address, whatever `--node-ip-address` says.
    addresses = {"127.0.0.1", ray.util.get_node_ip_address()}
    places = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), *(x509.IPAddress(ipaddress.ip_address(address)) for address in addresses)]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(places, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = {
        "token": secrets.token_hex(32).encode(),
        "node.key": key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        "node.crt": certificate.public_bytes(serialization.Encoding.PEM),
    }
    for file, content in files.items():
        (tmp_path / file).touch(mode=0o600)
        (tmp_path / file).write_bytes(content)
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(tmp_path / "node.crt"),
        "RAY_TLS_SERVER_KEY": str(tmp_path / "node.key"),
        "RAY_TLS_CA_CERT": str(tmp_path / "node.crt"),
    }


def run(base: Path, demonstrations: Path, storage: str, workers: object, name: str) -> dict[str, object]:
    splits = {"train": {"exclude_tasks": ["open*"]}, "ood": {"tasks": ["open*"]}}
    return {
        "name": name,
        "model": {"checkpoint": str(base)},
        "data": {"path": str(demonstrations), "splits": splits},
        "training": {
            **{
                "learning_rate": 1e-3,
                "schedule": "constant",
                "max_steps": MANY,
                "batch_size": 2,
                "precision": "fp32",
                "zero_stage": 3,
            },
            **{"checkpoint_every": 5, "log_every": 5, "keep_checkpoints": 1000},
        },
        "evaluation": {"batch_size": 4, "max_samples": 4},
        "cluster": {"workers": workers, "storage": storage, "gpus_per_worker": 0, "start_timeout_s": 240},
    }


def group_sizes(run: RunStorage) -> list[int]:
    """Numbers of workers that made the checkpoints, by step."""
    names = [name for name in run.files("checkpoints") if name.endswith("manifest.json")]
    return [json.loads(run.read(f"checkpoints/{name}"))["world_size"] for name in sorted(names)]


def start(nodes: RayNodes, node: RayNode, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A driver on a node that is not waited for. What it says goes to a file: a full pipe would hold it up."""
    environment = {**node.environment, "RAY_ADDRESS": nodes.address, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as file:
        return subprocess.Popen(
            [*MAPS_RAY, *arguments], cwd=node.folder / "work", env=environment, stdout=file, stderr=file
        )


def until(condition: Callable[[], bool], driver: subprocess.Popen[bytes], log: Path, timeout_s: float = 400) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert driver.poll() is None, log.read_text()[-5000:]
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {log.read_text()[-5000:]}"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_train_lose_a_node_sweep_and_export(
    tls: dict[str, str], base: Path, demonstrations: Path, tmp_path: Path
) -> None:
    place, shared = "s3://runs/folder", tmp_path / "shared"
    elastic = run(base, demonstrations, place, {"min": 1, "max": 2}, "over-two")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(elastic))
    with s3_server("runs"), ray_nodes(**tls) as nodes:
        over_two = RunStorage(f"{place}/over-two")
        head = nodes.start("head", "--num-cpus=1")
        other = nodes.start("other", "--num-cpus=1")
        # Who has no certificate, or another token, is told so in seconds.
        for taken, said in (
            ({"RAY_USE_TLS": "0"}, "no Ray cluster can be joined"),
            ({"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "0" * 64}, "no Ray cluster can be joined"),
        ):
            stranger = RayNode("stranger", head.folder, {**head.environment, **taken}, head.process)
            refused = nodes.driver(stranger, *MAPS_RAY, "train", str(tmp_path / "run.yaml"))
            assert refused.returncode == 1 and said in refused.stderr, refused.stdout + refused.stderr
        log = tmp_path / "driver.log"
        driver = start(nodes, head, log, "train", str(tmp_path / "run.yaml"))
        until(lambda: len(group_sizes(over_two)) >= 2, driver, log)
        other.kill()
        until(lambda: group_sizes(over_two)[-1:] == [1], driver, log)
        nodes.start("third", "--num-cpus=1")
        until(lambda: group_sizes(over_two)[-1:] == [2], driver, log)
        driver.send_signal(signal.SIGINT)
        assert driver.wait(timeout=300) == 130, log.read_text()[-5000:]
        sizes = group_sizes(over_two)
        assert [size for size, before in zip(sizes, [0, *sizes], strict=False) if size != before] == [2, 1, 2], sizes
        stopped = json.loads(over_two.read("result.json"))["step"]
        last = ["--set", f"training.max_steps={stopped + 5}"]
        # From another node, which has nothing of the run on its disk.
        resumed = nodes.driver(
            *(nodes.nodes[-1], *MAPS_RAY, "train", str(tmp_path / "run.yaml"), "--resume", *last), timeout=600
        )
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        result = json.loads(over_two.read("result.json"))
        assert (result["status"], result["start_step"], result["step"]) == ("finished", stopped, stopped + 5)
        # As one worker makes it alone, up to the order of sums.
        whole = run(base, demonstrations, place, 1, "alone")
        whole["training"] = {**whole["training"], "gradient_accumulation": 2}  # type: ignore[dict-item]
        (tmp_path / "alone.yaml").write_text(yaml.safe_dump(whole))
        alone = nodes.driver(head, *MAPS_RAY, "train", str(tmp_path / "alone.yaml"), *last, timeout=600)
        assert alone.returncode == 0, alone.stderr
        folders = [fetched(f"{place}/{name}", tmp_path / "fetched") for name in ("over-two", "alone")]
        curves = [read_history(folder).metrics["train/loss"] for folder in folders]
        assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]] == list(range(1, stopped + 6))
        assert max(abs(one - other) for (_, one), (_, other) in zip(*curves, strict=True)) < 1e-3
        done = nodes.driver(
            *(head, *MAPS_RAY, "export", f"{place}/over-two", "--format", "openvla-oft"),
            *("--out", str(tmp_path / "exported")),
        )
        assert done.returncode == 0 and (tmp_path / "exported" / "config.json").is_file(), done.stderr

        short = run(base, demonstrations, str(shared), 1, "short")
        short["training"] = {**short["training"], "max_steps": 6}  # type: ignore[dict-item]
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(short))
        sweep = {
            **{"name": "swept", "base": "base.yaml", "searcher": "random", "num_samples": 2, "known_strengths": []},
            "space": [str(ROOT / "tune_spaces" / "orders.yaml")],
        }
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
        swept = nodes.driver(head, *MAPS_RAY, "sweep", str(tmp_path / "sweep.yaml"), timeout=600)
        assert swept.returncode == 0 and "2 trials ended" in swept.stdout, swept.stdout + swept.stderr
    secret = (tmp_path / "token").read_bytes()
    left = [path for folder in (shared, *folders) for path in folder.rglob("*") if path.is_file()]
    holders = [path for path in left if secret in path.read_bytes()]
    assert not holders and os.stat(tmp_path / "token").st_mode & 0o077 == 0


@pytest.mark.slow
def test_a_folder_that_the_nodes_do_not_share_is_named(base: Path, demonstrations: Path, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    storage.mkdir()
    # To the node this folder is one of its own, as with the default `runs` on machines that share nothing.
    apart = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{storage}" && exec "$@"', "sh"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs mount namespaces")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run(base, demonstrations, str(storage), 2, "apart")))
    with ray_nodes(RAY_AUTH_MODE="disabled") as nodes:
        head = nodes.start("head", "--num-cpus=1")
        nodes.start("other", "--num-cpus=1", inside=apart)
        refused = nodes.driver(head, *MAPS_RAY, "train", str(tmp_path / "run.yaml"), timeout=400)
    assert refused.returncode == 1, refused.stdout + refused.stderr
    assert f"does not see what the driver has written to {storage / 'apart'}: cluster.storage must be" in refused.stderr
    assert "restart" not in refused.stderr.splitlines()[-1]
