"""An S3 server that keeps its objects when it is killed: moto's, with every object in a file too.

    python benchmarks/chaos_s3.py --port 9000 --folder s3 --bucket chaos

A request is answered when what it changed is on disk, so what a client was told is there stays there. A server that is
started again in the same folder has all objects; of an upload in parts that was under way it knows nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, run_simple
from werkzeug.test import Client

# What tells moto that a request is for S3.
_OWN = {"Authorization": "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request"}


class KeptObjects:
    """moto's S3 as a WSGI application, and its objects in a folder: each a line of JSON, then its content."""

    def __init__(self, folder: Path, bucket: str) -> None:
        self._folder = folder
        self._inner = DomainDispatcherApplication(create_backend_app)
        self._client = Client(self._inner)
        self._change = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._client.put(f"/{bucket}", headers=_OWN)
        for path in folder.glob("*.object"):
            with path.open("rb") as file:
                address = json.loads(file.readline())
                self._client.put(address, data=file.read(), headers=_OWN)

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return self._inner(environ, start)
        said: list[Any] = []
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        # One change at a time: the file of an object is that of its last change.
        with self._change:
            answer = list(self._inner(environ, lambda *args, **_: said.append(args)))
            address = environ["PATH_INFO"]
            for key in re.findall(rb"<Key>(.*?)</Key>", body):
                self._keep(f"{address.rstrip('/')}/{key.decode()}")
            self._keep(address)
        start(*said[-1])
        return answer

    def _keep(self, address: str) -> None:
        """Makes an object's file what the object is now."""
        if address.strip("/").count("/") < 1:
            return
        path = self._folder / f"{hashlib.sha256(address.encode()).hexdigest()}.object"
        found = self._client.get(address, headers=_OWN)
        if found.status_code != 200:
            path.unlink(missing_ok=True)
            return
        partial = path.with_suffix(".partial")
        partial.write_bytes(json.dumps(address).encode() + b"\n" + found.data)
        os.replace(partial, path)


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_request(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--bucket", required=True)
    options = parser.parse_args()
    objects = KeptObjects(options.folder, options.bucket)
    run_simple("127.0.0.1", options.port, objects, threaded=True, request_handler=_Quiet)


if __name__ == "__main__":
    main()
