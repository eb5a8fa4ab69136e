"""`gs://` goes to gcsfs, the extra `gcs`. A stand-in speaks the part of Google's JSON interface that reading needs."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
from fsspec.registry import _registry

from maps_ray.data import DatasetError, open_dataset
from maps_ray.data.storage import Storage

DATA = Path(__file__).parents[1] / "fixtures" / "data" / "pi_libero" / "data"


@pytest.mark.parametrize("protocol", ["gs", "gcs"])
def test_without_the_extra_its_name_is_told(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    # What fsspec has imported it keeps.
    for known in ("gs", "gcs"):
        monkeypatch.delitem(_registry, known, raising=False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DatasetError, match=rf"{protocol}://bucket/x: .* pip install 'maps_ray\[gcs\]'"):
        open_dataset(f"{protocol}://bucket/x")


class _Handler(BaseHTTPRequestHandler):
    """The bucket `demos`, whose objects are the files of a folder."""

    protocol_version = "HTTP/1.1"
    sent = 0

    def do_GET(self) -> None:
        where, asked = urlsplit(self.path), parse_qs(urlsplit(self.path).query)
        place, _, name = where.path.partition("/storage/v1/b/demos/o")[2].partition("/")
        name = unquote(name)
        objects = {path.relative_to(DATA).as_posix(): path for path in sorted(DATA.rglob("*")) if path.is_file()}
        if place or "/storage/v1/b/demos/o" not in where.path or (name and name not in objects):
            self._answer(404, json.dumps({"error": {"code": 404, "message": "Not Found"}}).encode())
        elif name and asked.get("alt") == ["media"]:
            data = objects[name].read_bytes()
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1 if last else None]
            type(self).sent += len(part)
            self._answer(206, part)
        elif name:
            self._answer(200, json.dumps(_facts(name, objects[name])).encode())
        else:
            prefix, cut = asked.get("prefix", [""])[0], asked.get("delimiter", [""])[0]
            below = [n for n in objects if n.startswith(prefix)]
            deeper = {prefix + n[len(prefix) :].split(cut)[0] + cut for n in below if cut and cut in n[len(prefix) :]}
            here = [n for n in below if not cut or cut not in n[len(prefix) :]]
            found = {"items": [_facts(n, objects[n]) for n in here], "prefixes": sorted(deeper)}
            self._answer(200, json.dumps(found).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def _facts(name: str, path: Path) -> dict[str, str]:
    size = str(path.stat().st_size)
    return {"kind": "storage#object", "name": name, "bucket": "demos", "size": size, "etag": size, "generation": "1"}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    gcsfs = pytest.importorskip("gcsfs", reason="the extra gcs is not installed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_address[1]}")
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield "gs://demos"
    gcsfs.GCSFileSystem.clear_instance_cache()
    server.shutdown()


def test_the_same_as_local(bucket: str) -> None:
    local, remote = open_dataset(DATA), open_dataset(bucket)
    assert remote.format == "lerobot_v2.0" and remote.tasks == local.tasks
    assert remote.fingerprint() == local.fingerprint()
    np.testing.assert_array_equal(remote.vectors("action", 1), local.vectors("action", 1))
    np.testing.assert_array_equal(remote.frame("wrist_image", 1, 4), local.frame("wrist_image", 1, 4))
    _Handler.sent = 0
    assert Storage(bucket).read("meta/info.json", 2, 9) == (DATA / "meta/info.json").read_bytes()[2:9]
    assert _Handler.sent == 7
    with pytest.raises(DatasetError, match=r"gs://demos/meta/none.json: not found \(404\)"):
        Storage(bucket).read("meta/none.json")
