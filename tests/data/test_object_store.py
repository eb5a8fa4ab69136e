"""Data sets on an object store: moto's server speaks the S3 protocol, and a gate before it refuses or fails at will."""

from __future__ import annotations

import http.client
import io
import pickle
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from PIL import Image
from rlds_data import episode, write
from squares_data import Recorded

from maps_ray.data import DatasetError, open_dataset, storage
from maps_ray.data.storage import Storage
from maps_ray.training import inputs

DATA = Path(__file__).parents[1] / "fixtures" / "data"
BUCKET = "demonstrations"


class Gate(ThreadingHTTPServer):
    """Passes requests on to moto, after it answered some of them itself."""

    daemon_threads = True

    def __init__(self, backend: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend, self.answer, self.left = backend, 0, 0
        self.sent: dict[str, int] = {}


class _Handler(BaseHTTPRequestHandler):
    server: Gate

    def do_GET(self) -> None:
        if self.server.left:
            self.server.left -= 1
            code = {403: "AccessDenied", 503: "SlowDown"}[self.server.answer]
            body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
            self.send_response(self.server.answer)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
            return
        connection = http.client.HTTPConnection(*self.server.backend)
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if self.command != "HEAD":
            name = self.path.split("?")[0].split("/")[-1]
            self.server.sent[name] = self.server.sent.get(name, 0) + len(body)
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


def _pictures(root: Path) -> Path:
    """The images of one episode as noise, in row groups of two."""
    shutil.copytree(DATA / "pi_libero/data", root)
    path = root / "data/chunk-000/episode_000000.parquet"
    table, rng = pq.read_table(path), np.random.default_rng(0)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for name in ("image", "wrist_image"):
        cells = []
        for _ in range(len(table)):
            png = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (128, 128, 3), np.uint8)).save(png, "PNG")
            cells.append({"bytes": png.getvalue(), "path": None})
        table = table.set_column(table.column_names.index(name), name, pa.array(cells, kind))
    pq.write_table(table, path, row_group_size=2)
    return root


@pytest.fixture(scope="module")
def gate(squares: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    gate = Gate((host, port))
    threading.Thread(target=gate.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{gate.server_address[1]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", address)
        patch.setattr(storage, "_FIRST_WAIT_S", 0.01)
        # What the client tries again by itself, before this package does.
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket=BUCKET)
        rng = np.random.default_rng(0)
        large = write(
            tmp_path_factory.mktemp("large") / "1.0.0", [[episode(rng, 12, "go", 128) for _ in range(4)]], "large"
        )
        pictures = _pictures(tmp_path_factory.mktemp("pictures") / "data")
        folders = {name: DATA / name / "data" for name in ("bridge", "lerobot_v21", "pi_libero")}
        for name, folder in {**folders, "squares": squares.root, "large": large, "pictures": pictures}.items():
            for path in folder.rglob("*"):
                if path.is_file():
                    client.upload_file(str(path), BUCKET, f"{name}/{path.relative_to(folder)}")
        yield gate
    gate.shutdown()
    moto.stop()


@pytest.fixture(autouse=True)
def open_gate(gate: Gate) -> None:
    gate.answer, gate.left, gate.sent = 0, 0, {}


@pytest.mark.parametrize("name", ["bridge", "lerobot_v21", "pi_libero", "squares"])
def test_the_same_as_local(name: str, squares: Recorded) -> None:
    local = open_dataset(squares.root if name == "squares" else DATA / name / "data")
    remote = open_dataset(f"s3://{BUCKET}/{name}")
    assert remote.format == local.format and remote.cameras == local.cameras
    assert [e.task for e in remote.episodes] == [e.task for e in local.episodes]
    last = len(local.episodes) - 1
    for dataset in (remote, pickle.loads(pickle.dumps(remote))):
        for kind in ("action", "state"):
            np.testing.assert_array_equal(dataset.vectors(kind, last), local.vectors(kind, last))
        for camera in local.cameras:
            np.testing.assert_array_equal(dataset.frame(camera, last, 3), local.frame(camera, last, 3))
            assert dataset.frame_fault(camera, [last]) is None
    if name != "bridge":
        assert remote.fingerprint() == local.fingerprint()


def test_hdf5_by_ranges(gate: Gate, tmp_path: Path) -> None:
    path = tmp_path / "put_it_there_demo.hdf5"
    images = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), np.uint8)
    with h5py.File(path, "w") as file:
        obs = file.create_group("data/demo_0/obs")
        file["data/demo_0/actions"] = np.zeros((40, 7))
        obs["ee_states"], obs["gripper_states"], obs["agentview_rgb"] = np.zeros((40, 6)), np.zeros((40, 2)), images
    host, port = gate.backend
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    client.upload_file(str(path), BUCKET, f"libero/{path.name}")
    dataset = open_dataset(f"s3://{BUCKET}/libero")
    assert dataset.tasks == ["put it there"] and dataset.vectors("action", 0).shape == (40, 7)
    np.testing.assert_array_equal(dataset.frame("image", 0, 11), images[11, ::-1, ::-1])
    assert gate.sent[path.name] < path.stat().st_size / 3


def test_the_same_fingerprint_wherever_it_lies() -> None:
    local = open_dataset(DATA / "bridge/data/1.0.0").fingerprint()
    assert open_dataset(f"s3://{BUCKET}/bridge/1.0.0").fingerprint() == local
    assert open_dataset(f"file://{DATA}/bridge/data").fingerprint() == local


def test_a_run_knows_its_data_wherever_they_lie(gate: Gate) -> None:
    for name in ("bridge", "lerobot_v21"):
        local = inputs.fingerprint(str(DATA / name / "data"))
        assert len(local) > 3 and inputs.fingerprint(f"s3://{BUCKET}/{name}") == local
    host, port = gate.backend
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
    text = (DATA / "lerobot_v21/data/meta/tasks.jsonl").read_bytes()
    for path in (DATA / "lerobot_v21/data/meta").iterdir():
        client.upload_file(str(path), BUCKET, f"edited/meta/{path.name}")
    before = inputs.fingerprint(f"s3://{BUCKET}/edited")
    client.put_object(Bucket=BUCKET, Key="edited/meta/tasks.jsonl", Body=text.replace(b"p", b"q", 1))
    now = inputs.fingerprint(f"s3://{BUCKET}/edited")
    assert inputs.difference(before, now) == "1 changed (meta/tasks.jsonl)"


def test_a_frame_does_not_fetch_its_shard(gate: Gate) -> None:
    shard = "large-train.tfrecord-00000-of-00001"
    size = Storage(f"s3://{BUCKET}/large").size(shard)
    dataset = open_dataset(f"s3://{BUCKET}/large")
    gate.sent = {}
    dataset.frame("image", 1, 5)
    assert 0 < gate.sent[shard] < size / 3
    gate.sent = {}
    dataset.frame("image", 1, 7)
    assert gate.sent.get(shard, 0) < size / 20
    table = "episode_000000.parquet"
    images = open_dataset(f"s3://{BUCKET}/pictures")
    size = Storage(f"s3://{BUCKET}/pictures").size(f"data/chunk-000/{table}")
    gate.sent = {}
    images.frame("wrist_image", 0, 2)
    assert size > 500_000 and 0 < gate.sent[table] < size / 4


def test_a_video_may_be_fetched_whole(tmp_path: Path) -> None:
    asked = []

    def fetch(address: str) -> Path:
        asked.append(address)
        target = tmp_path / address.split("/")[-1]
        folder, _, name = address.rpartition("/")
        target.write_bytes(Storage(folder).read(name))
        return target

    local = open_dataset(DATA / "lerobot_v21/data")
    dataset = open_dataset(f"s3://{BUCKET}/lerobot_v21", fetch=fetch)
    np.testing.assert_array_equal(dataset.frame("image", 2, 9), local.frame("image", 2, 9))
    prefix = f"s3://{BUCKET}/lerobot_v21/videos/chunk-000/observation.images.image"
    assert asked == [f"{prefix}/episode_000002.mp4"]


def test_overload_is_waited_out(gate: Gate) -> None:
    dataset = open_dataset(f"s3://{BUCKET}/bridge")
    gate.answer, gate.left = 503, 3
    assert dataset.frame("image_0", 0, 0).shape == (64, 64, 3)
    assert gate.left == 0


def test_overload_that_stays_is_named(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_TRIES", 2)
    gate.answer, gate.left = 503, 10_000
    with pytest.raises(DatasetError, match=rf"s3://{BUCKET}/bridge.*cannot read after 2 tries"):
        open_dataset(f"s3://{BUCKET}/bridge")


def test_what_is_not_there_or_denied_is_named(gate: Gate) -> None:
    with pytest.raises(DatasetError, match=r"s3://nowhere/at/all: no data set that is known"):
        open_dataset("s3://nowhere/at/all")
    with pytest.raises(DatasetError, match=rf"s3://{BUCKET}/bridge/x.bin: not found \(404\)"):
        Storage(f"s3://{BUCKET}/bridge").read("x.bin")
    gate.answer, gate.left = 403, 10_000
    with pytest.raises(DatasetError, match=rf"s3://{BUCKET}/squares.*access denied \(403.*credentials"):
        open_dataset(f"s3://{BUCKET}/squares")


def test_no_credentials(gate: Gate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(DatasetError, match="no credentials; set AWS_ACCESS_KEY_ID"):
            open_dataset(f"s3://{BUCKET}/squares")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_protocols_that_are_not_known() -> None:
    with pytest.raises(DatasetError, match="unknown protocol 'ftpx'"):
        open_dataset("ftpx://host/data")
