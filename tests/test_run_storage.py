"""A run's folder on an object store: faults that pass are waited for, others are named."""

from __future__ import annotations

import http.server
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_gate import Gate, s3_server
from s3fs import S3FileSystem

from maps_ray import run_storage
from maps_ray.data import DatasetError
from maps_ray.data.storage import Storage
from maps_ray.run_copies import fetched
from maps_ray.run_storage import NotThere, RunStorage, StorageError, storage_problems, work_folder
from maps_ray.spec import ClusterSpec, SpecError


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Gate, Any]]:
    with s3_server("bucket") as found:
        yield found


@pytest.fixture
def gate(server: tuple[Gate, Any]) -> Gate:
    server[0].open()
    return server[0]


def cluster(tmp_path: Path, storage: str = "s3://bucket/runs") -> ClusterSpec:
    return ClusterSpec.model_validate({"storage": storage, "scratch": tmp_path / "scratch"})


def test_files_go_there_and_come_back(gate: Gate, tmp_path: Path) -> None:
    storage = RunStorage("s3://bucket/there")
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "a.json").write_text("{}")
    (source / "deep/b.bin").write_bytes(bytes(range(256)) * 1000)
    storage.write("final/old", b"of an earlier time")
    storage.upload_folder(source, "final", last=("a.json",))
    assert storage.files("final") == {"a.json": 2, "deep/b.bin": 256_000}
    assert storage.exists("final/a.json") and not storage.exists("final/old") and not storage.exists("final")
    assert storage.read("final/a.json") == b"{}"
    with pytest.raises(NotThere, match="s3://bucket/there/final/none: not there"):
        storage.read("final/none")
    assert sorted(storage.fetch_folder("final", tmp_path / "back")) == ["a.json", "deep/b.bin"]
    assert (tmp_path / "back/deep/b.bin").read_bytes() == (source / "deep/b.bin").read_bytes()
    storage.remove_folder("final")
    storage.remove("final/a.json")
    assert storage.files() == {}


def test_a_full_scratch_is_named(gate: Gate, small_disk: Path) -> None:
    storage = RunStorage("s3://bucket/full")
    part = bytes(600 * 2**10)
    # Larger than what s3fs reads in one go, too.
    for name, size in (("large", 3 * 2**20), ("larger", 60 * 2**20)):
        storage.write(name, bytes(size))
        said = (
            rf"s3://bucket/full/{name}: no room in {small_disk}/s3, where 1.0 MiB are free and it takes "
            rf"{size / 2**20:.1f} MiB: free some space there, or name a folder on a larger disk in cluster.scratch or "
            "MAPS_RAY_SCRATCH$"
        )
        with pytest.raises(StorageError, match=said):
            storage.fetch(name, small_disk / "s3" / name)
        assert list((small_disk / "s3").iterdir()) == []
    # What has no room together is not begun; what lies there of an earlier time makes room.
    storage.write("parts/a", part)
    storage.write("parts/b", part)
    said = rf"s3://bucket/full/parts: no room in {small_disk}/s3, where 1.0 MiB are free and it takes 1.2 MiB: free"
    with pytest.raises(StorageError, match=said):
        storage.fetch_folder("parts", small_disk / "s3")
    assert list((small_disk / "s3").iterdir()) == []
    storage.remove("parts/b")
    assert storage.fetch_folder("parts", small_disk / "s3") == ["a"]
    with pytest.raises(SpecError, match=rf"RUN = 's3://bucket/full': .*no room in {small_disk}/fetched/.*MAPS_RAY"):
        fetched("s3://bucket/full", small_disk)


def test_overload_and_slow_answers_are_waited_for(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_storage, "_FIRST_WAIT_S", 0.01)
    storage = RunStorage("s3://bucket/faults")
    gate.faults, gate.slow, gate.slow_s = 0.4, 0.2, 0.05
    for number in range(20):
        storage.write(f"{number}", b"%d" % number)
    assert [storage.read(f"{number}") for number in range(20)] == [b"%d" % number for number in range(20)]
    assert gate.answered["SlowDown"] > 3 and gate.answered["InternalError"] > 3 and gate.answered["slow"] > 3
    gate.faults = 1.0
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"s3://bucket/faults/1: the object store fails after \d+ tries"):
        RunStorage("s3://bucket/faults", patience_s=1).read("1")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("AccessDenied", "access denied"),
        ("InvalidAccessKeyId", "the key is not accepted"),
        ("SignatureDoesNotMatch", "the key is not accepted"),
        ("AuthorizationHeaderMalformed", "lies in another region"),
        ("PermanentRedirect", "lies in another region"),
        ("SlowDown", "the object store fails after"),
    ],
)
def test_a_store_that_refuses_is_named_within_seconds(
    code: str, said: str, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_storage, "ASK_S", 2)
    gate.refusal = code
    began = time.monotonic()
    (problem,) = storage_problems(cluster(tmp_path))
    assert time.monotonic() - began < 15
    assert problem.field == "cluster.storage" and said in problem.message, problem.message


def test_what_is_not_there_is_named(gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = storage_problems(cluster(tmp_path, "s3://no-such-bucket/runs"))
    assert "s3://no-such-bucket: no such bucket; make it" in problem.message
    assert storage_problems(cluster(tmp_path)) == []
    assert RunStorage("s3://bucket/runs").files() == {}
    (tmp_path / "file").write_text("")
    spec = ClusterSpec.model_validate({"storage": "s3://bucket/runs", "scratch": tmp_path / "file"})
    (problem,) = storage_problems(spec)
    assert problem.field == "cluster.scratch" and "choose another folder in cluster.scratch" in problem.message
    with pytest.raises(SpecError, match="nothing is there: no object begins with s3://bucket/runs/none"):
        fetched("s3://bucket/runs/none", tmp_path / "scratch")
    monkeypatch.setattr(run_storage, "ASK_S", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    began = time.monotonic()
    (problem,) = storage_problems(cluster(tmp_path))
    assert "the object store fails" in problem.message and "AWS_ENDPOINT_URL" in problem.message
    assert time.monotonic() - began < 15
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (problem,) = storage_problems(cluster(tmp_path))
    assert "no credentials; set AWS_ACCESS_KEY_ID" in problem.message


@pytest.mark.parametrize("storage", ["s3://", "s3://bucket//runs", "s3://bucket/../runs", "s3:///runs"])
def test_an_address_without_a_name_is_refused(storage: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a folder, or an address such as s3://bucket/runs"):
        cluster(tmp_path, storage)


def test_an_unknown_protocol_is_refused(tmp_path: Path) -> None:
    (problem,) = storage_problems(cluster(tmp_path, "ftpp://bucket/runs"))
    assert "unknown protocol 'ftpp'" in problem.message


def test_a_file_address_is_a_folder(tmp_path: Path) -> None:
    assert cluster(tmp_path, f"file://{tmp_path}/runs").storage == tmp_path / "runs"


def test_scratch_is_cleaned(tmp_path: Path) -> None:
    with work_folder(tmp_path) as folder:
        (folder / "part").write_bytes(b"x")
        host, rest = folder.name.split("-")[0], folder.name
        left = folder.with_name(rest.replace(f"-{rest.rsplit('-', 3)[1]}-", "-999999999-"))
        left.mkdir()
        with work_folder(tmp_path) as other:
            assert other != folder and folder.is_dir() and not left.exists(), host
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_a_certificate_that_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://localhost:{server.server_address[1]}")
    said = r"certificate is not trusted .* set AWS_CA_BUNDLE to the file of its authority"
    with pytest.raises(StorageError, match=said):
        RunStorage("s3://bucket/runs", patience_s=20).read("spec.yaml")
    # fsspec keeps those that it has made, with the endpoint of that time.
    S3FileSystem.clear_instance_cache()
    with pytest.raises(DatasetError, match=said):
        Storage("s3://bucket/demos").read("meta/info.json")
    S3FileSystem.clear_instance_cache()
    server.shutdown()
