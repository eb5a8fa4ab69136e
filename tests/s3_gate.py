"""An S3 server for tests, moto's, behind a gate that refuses, fails, slows or hides things."""

from __future__ import annotations

import http.client
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

_TEXT = {
    "SlowDown": (503, "Please reduce your request rate."),
    "InternalError": (500, "We encountered an internal error. Please try again."),
    "AccessDenied": (403, "Access Denied"),
    "InvalidAccessKeyId": (403, "The AWS Access Key Id you provided does not exist in our records."),
    "SignatureDoesNotMatch": (403, "The request signature we calculated does not match the signature you provided."),
    "AuthorizationHeaderMalformed": (400, "The authorization header is malformed; the region is wrong."),
    "PermanentRedirect": (
        301,
        "The bucket you are attempting to access must be addressed using the specified endpoint.",
    ),
}


class Gate(ThreadingHTTPServer):
    """Passes requests on, after it answered some of them itself."""

    daemon_threads = True

    def __init__(self, backend: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend = backend
        self.open()

    def open(self) -> None:
        """Passes everything on from now on."""
        self.refusal: str | None = None
        """Code of the answer to every request."""
        self.faults, self.slow, self.slow_s = 0.0, 0.0, 0.0
        """Shares of requests that fail or wait, and how long."""
        self.random = random.Random(0)
        self.hidden_from: tuple[str, ...] = ()
        """Clients, by their access keys, whose looks lag: what others have written they see late."""
        self.hidden_looks = 3
        """How often such a client looks for a new object in vain."""
        self.written: dict[str, str] = {}
        self.looks: Counter[tuple[str, str]] = Counter()
        self.answered: Counter[str] = Counter()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def hides(self, key: str, client: str) -> bool:
        if client not in self.hidden_from or self.written.get(key, client) == client:
            return False
        self.looks[key, client] += 1
        if self.looks[key, client] > self.hidden_looks:
            return False
        self.answered["hidden"] += 1
        return True


class _Handler(BaseHTTPRequestHandler):
    server: Gate
    protocol_version = "HTTP/1.1"

    def _pass(self) -> None:
        gate = self.server
        body = self._body()
        code = gate.refusal
        if code is None and gate.random.random() < gate.faults:
            code = gate.random.choice(("SlowDown", "InternalError"))
        if code is not None:
            self._refuse(code)
            return
        if gate.random.random() < gate.slow:
            gate.answered["slow"] += 1
            time.sleep(gate.slow_s)
        key = self.path.split("?")[0]
        client = (re.findall(r"Credential=([^/]+)/", self.headers.get("Authorization", "")) or [""])[0]
        if self.command in ("GET", "HEAD") and gate.hides(key, client):
            self._send(404, [], b"<Error><Code>NoSuchKey</Code><Message>hidden</Message></Error>")
            return
        connection = http.client.HTTPConnection(*gate.backend)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        connection.request(self.command, self.path, body=body, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
        if self.command == "PUT" and answer.status == 200:
            gate.written[key] = client
            gate.looks = Counter({known: looks for known, looks in gate.looks.items() if known[0] != key})
        if gate.hidden_from and self.command == "GET" and "list-type=2" in self.path:
            content = self._without_hidden(content, key, client)
        kept = [(n, v) for n, v in answer.getheaders() if n.lower() not in ("transfer-encoding", "connection")]
        self._send(answer.status, kept, content)

    def _without_hidden(self, listing: bytes, bucket: str, client: str) -> bytes:
        text = listing.decode()
        for part in text.split("<Contents>")[1:]:
            entry = part.split("</Contents>")[0]
            key = entry.split("<Key>")[1].split("</Key>")[0]
            if self.server.hides(f"{bucket.rstrip('/')}/{key}", client):
                text = text.replace(f"<Contents>{entry}</Contents>", "")
        return text.encode()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _refuse(self, code: str) -> None:
        self.server.answered[code] += 1
        status, text = _TEXT[code]
        body = f"<Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()
        self._send(status, [("Content-Type", "application/xml")], body)

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        head = self.command == "HEAD"
        length = next((v for n, v in headers if n.lower() == "content-length"), None) if head else str(len(body))
        self.send_response(status)
        for name, value in headers:
            if name.lower() != "content-length":
                self.send_header(name, value)
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if not head:
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def s3_server(*buckets: str) -> Iterator[tuple[Gate, Any]]:
    """A server with these buckets: its gate, which the environment names as the endpoint, and a client of the server
    itself."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    gate = Gate((host, port))
    threading.Thread(target=gate.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", gate.address)
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        for bucket in buckets:
            client.create_bucket(Bucket=bucket)
        yield gate, client
    gate.shutdown()
    gate.server_close()
    moto.stop()
