"""mlflow-server.sh, for real."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cluster_scripts import LOCAL, clean_environment, free_port, in_group, status
from mlflow import MlflowClient


def allowed_hosts_on_kubernetes() -> str:
    documents = yaml.safe_load_all((LOCAL.parent / "kuberay" / "mlflow.yaml").read_text())
    server = next(document for document in documents if document["kind"] == "Deployment")
    environment = server["spec"]["template"]["spec"]["containers"][0]["env"]
    return next(entry["value"] for entry in environment if entry["name"] == "MLFLOW_SERVER_ALLOWED_HOSTS")


@contextlib.contextmanager
def running(environment: dict[str, str], log: Path) -> Iterator[str]:
    """Starts the script and yields the server's URI; SIGTERM to the one process must end all that it started."""
    uri = f"http://127.0.0.1:{environment['MLFLOW_PORT']}"
    with log.open("w") as output:
        process = subprocess.Popen(
            [LOCAL / "mlflow-server.sh"], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                if status(f"{uri}/health") == 200:
                    break
            except urllib.error.URLError:
                pass
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        yield uri
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        time.sleep(0.5)
        left = in_group(process.pid)
        assert not left, left


@pytest.fixture
def postgres() -> Iterator[tuple[str, str]]:
    """A throwaway PostgreSQL with an empty database: its URI without the password, and the password."""
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("initdb and pg_ctl are not installed")
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    user = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        if shutil.which("runuser") is None or "postgres" not in {entry.pw_name for entry in pwd.getpwall()}:
            pytest.skip("as root this needs runuser and a user named postgres")
        shutil.chown(folder, "postgres")
        user = ["runuser", "-u", "postgres", "--"]
    password, port = "p@ss/w:rd #1", free_port()
    secret = folder / "password"
    secret.write_text(password + "\n")
    secret.chmod(0o644)
    control = [*user, "pg_ctl", "-D", f"{folder}/data", "-l", f"{folder}/log", "-w"]
    initialise = [*user, "initdb", "-D", f"{folder}/data", "-A", "scram-sha-256", "-U", "mlflow"]
    try:
        subprocess.run([*initialise, f"--pwfile={secret}"], check=True, capture_output=True, cwd="/")
        listen = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
        subprocess.run([*control, "-o", listen, "start"], check=True, stdout=subprocess.DEVNULL, cwd="/")
        try:
            yield f"postgresql://mlflow@127.0.0.1:{port}/postgres", password
        finally:
            subprocess.run([*control, "-m", "fast", "stop"], check=True, stdout=subprocess.DEVNULL, cwd="/")
    finally:
        shutil.rmtree(folder)


def test_records_a_run_under_allowed_names_and_refuses_a_second_server(tmp_path: Path) -> None:
    environment = clean_environment() | {
        "MLFLOW_PORT": str(free_port()),
        "MLFLOW_STATE": str(tmp_path / "state"),
        "MLFLOW_SERVER_ALLOWED_HOSTS": allowed_hosts_on_kubernetes(),
    }
    with running(environment, tmp_path / "log") as uri:
        client = MlflowClient(tracking_uri=uri)
        run = client.create_run(client.create_experiment("cluster"))
        client.log_metric(run.info.run_id, "loss", 0.5)
        client.log_text(run.info.run_id, "kept", "note.txt")
        assert client.get_run(run.info.run_id).data.metrics == {"loss": 0.5}
        assert (tmp_path / "state" / "mlflow.db").is_file()
        assert [path.read_text() for path in (tmp_path / "state" / "artifacts").rglob("note.txt")] == ["kept"]

        search = f"{uri}/api/2.0/mlflow/experiments/search?max_results=1"
        assert status(search, Host="mlflow:5000") == status(search, Host="mlflow.maps-ray:5000") == 200
        assert status(search, Host="elsewhere.example.com") == 403

        second = subprocess.run(
            [LOCAL / "mlflow-server.sh"], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert second.returncode == 1
        assert f"port {environment['MLFLOW_PORT']} on 127.0.0.1 is in use" in second.stderr
        assert "MLFLOW_PORT" in second.stderr


def test_a_port_that_any_program_holds_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment = clean_environment() | {
            "MLFLOW_PORT": str(taken.getsockname()[1]),
            "MLFLOW_STATE": str(tmp_path / "state"),
        }
        result = subprocess.run(
            [LOCAL / "mlflow-server.sh"], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    assert result.returncode == 1 and "is in use" in result.stderr
    assert not (tmp_path / "state").exists()


@pytest.mark.slow
def test_records_into_postgres_without_the_password_in_the_log(postgres: tuple[str, str], tmp_path: Path) -> None:
    database, password = postgres
    environment = clean_environment() | {
        "MLFLOW_PORT": str(free_port()),
        "MLFLOW_STATE": str(tmp_path / "state"),
        "MLFLOW_BACKEND_STORE_URI": database,
        "PGPASSWORD": password,
    }
    with running(environment, tmp_path / "log") as uri:
        client = MlflowClient(tracking_uri=uri)
        run = client.create_run(client.create_experiment("cluster"))
        client.log_metric(run.info.run_id, "loss", 0.5)
        assert client.get_run(run.info.run_id).data.metrics == {"loss": 0.5}
    assert not (tmp_path / "state" / "mlflow.db").exists()
    assert password not in (tmp_path / "log").read_text()
