"""The compose file, the systemd unit and the image of the MLflow server."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "mlflow"

# The parts of the compose specification that the file may use.
TOP = {"name", "services", "volumes"}
SERVICE = {
    *("build", "cap_drop", "command", "depends_on", "environment", "healthcheck", "image", "ports", "restart"),
    *("security_opt", "volumes"),
}
HEALTHCHECK = {"interval", "retries", "start_period", "test", "timeout"}


def check_compose(compose: dict[str, Any]) -> None:
    """Raises ValueError for an unknown key, a missing health check, a dangling name, an open port or a bare secret."""
    if unknown := set(compose) - TOP:
        raise ValueError(f"unknown {unknown}")
    services = compose["services"]
    for name, service in services.items():
        if unknown := set(service) - SERVICE:
            raise ValueError(f"{name}: unknown {unknown}")
        if unknown := set(service.get("healthcheck", {"no health check": None})) - HEALTHCHECK:
            raise ValueError(f"{name}: unknown {unknown}")
        for needed, condition in service.get("depends_on", {}).items():
            if needed not in services or condition != {"condition": "service_healthy"}:
                raise ValueError(f"{name}: waits for {needed} with {condition}")
        for volume in service.get("volumes", []):
            source, _, target = volume.partition(":")
            if source not in compose["volumes"] or not target.startswith("/"):
                raise ValueError(f"{name}: volume {volume}")
        for port in service.get("ports", []):
            if not port.startswith("${MLFLOW_BIND:-127.0.0.1}:"):
                raise ValueError(f"{name}: port {port} is open to the network")
        for variable, value in service["environment"].items():
            if "PASSWORD" in variable and not re.fullmatch(r"\$\{\w+:\?[^}]+\}", value):
                raise ValueError(f"{name}: {variable} must come from the environment")


def load() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def test_compose_file_is_sound() -> None:
    check_compose(load())
    build = load()["services"]["mlflow"]["build"]
    assert (FOLDER / build["context"] / build["dockerfile"]).resolve() == FOLDER / "Dockerfile"


def _open_port(compose: dict[str, Any]) -> None:
    compose["services"]["mlflow"]["ports"] = ["5000:5000"]


def _written_password(compose: dict[str, Any]) -> None:
    compose["services"]["postgres"]["environment"]["POSTGRES_PASSWORD"] = "mlflow"


def _misspelt_healthcheck(compose: dict[str, Any]) -> None:
    service = compose["services"]["mlflow"]
    service["healthchecks"] = service.pop("healthcheck")


def _dangling_dependency(compose: dict[str, Any]) -> None:
    compose["services"]["mlflow"]["depends_on"] = {"postgresql": {"condition": "service_healthy"}}


def _undeclared_volume(compose: dict[str, Any]) -> None:
    del compose["volumes"]["database"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_open_port, "open to the network"),
        (_written_password, "must come from the environment"),
        (_misspelt_healthcheck, "healthchecks"),
        (_dangling_dependency, "postgresql"),
        (_undeclared_volume, "database"),
    ],
)
def test_a_damaged_compose_file_is_refused(damage: Any, message: str) -> None:
    compose = load()
    damage(compose)
    with pytest.raises(ValueError, match=message):
        check_compose(compose)


def _docker_compose() -> bool:
    found = shutil.which("docker") is not None
    return found and subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _docker_compose(), reason="docker compose is not installed")
def test_docker_compose_reads_the_file() -> None:
    command = ["docker", "compose", "--file", str(FOLDER / "compose.yaml"), "config", "--quiet"]
    unset = subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/usr/local/bin"}
    )
    assert unset.returncode != 0 and "POSTGRES_PASSWORD" in unset.stderr
    environment = {"PATH": "/usr/bin:/usr/local/bin", "POSTGRES_PASSWORD": "p"}
    subprocess.run(command, check=True, env=environment)


def test_image_takes_its_versions_from_the_constraints() -> None:
    install = re.search(r"pip install .*--constraint \S+ (.+)", (FOLDER / "Dockerfile").read_text())
    assert install is not None
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert set(install[1].split()) <= pinned


def _verify(unit: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "mlflow.service"
    path.write_text(unit.replace("/opt/maps_ray", str(ROOT)))
    return subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = (FOLDER / "mlflow.service").read_text()
    accepted = _verify(unit, tmp_path)
    assert accepted.returncode == 0 and not accepted.stderr, accepted.stderr
    misspelt = _verify(unit.replace("ProtectHome=", "ProtectHomes="), tmp_path)
    assert "ProtectHomes" in misspelt.stderr
    missing = _verify(unit.replace("mlflow-server.sh", "mlflow-serve.sh"), tmp_path)
    assert missing.returncode != 0 and "mlflow-serve.sh" in missing.stderr
