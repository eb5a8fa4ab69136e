"""Records of a worker on another node than the driver's: sent to the driver's spool, whatever storage they share.

What is sent names the file and the place in it, so that sending it twice changes nothing, and a run shows each record
once. The worker keeps what has not been taken yet; `flush` waits for all of it, before a checkpoint counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from maps_ray.files import write_atomically
from maps_ray.tracking.spool import Spool
from maps_ray.tracking.tracker import Tracker

Item = tuple[str, int, bytes]
"""File relative to the spool, where in it, and what: -1 for a whole file."""


def take(spool: Spool, items: list[Item]) -> None:
    """Writes what was sent into the driver's spool."""
    for name, place, content in items:
        path = spool.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if place < 0:
            if not path.exists():
                write_atomically(path, content, durable=False, shared=True)
            continue
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, content, place)
        finally:
            os.close(descriptor)


class SentTracker(Tracker):
    """As `Tracker`, on another node than the spool.

    Args:
        run_key: of the run.
        send: hands items to the driver's node and waits until they are there; raises when they are not.
    """

    def __init__(self, run_key: str, send: Callable[[list[Item]], None]) -> None:
        self.run_key = run_key
        self._send = send
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._waiting: list[Item] = []
        name = f"{time.time_ns():020d}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}.jsonl"
        self._file, self._place = f"segments/{name}", 0

    def flush(self) -> None:
        """Sends what waits; returns when it has arrived."""
        with self._sending:
            with self._lock:
                items = list(self._waiting)
            if items:
                self._send(_joined(items))
                with self._lock:
                    del self._waiting[: len(items)]

    def _keep(self, source: Path | bytes, name: str, folder: str) -> None:
        content = source if isinstance(source, bytes) else source.read_bytes()
        file = f"artifacts/{hashlib.sha256(content).hexdigest()[:16]}/{name}"
        with self._lock:
            self._waiting.append((file, -1, content))
        self._write(kind="artifact", file=file, folder="" if folder == "." else folder)

    def _put(self, record: Mapping[str, object]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._waiting.append((self._file, self._place, line))
            self._place += len(line)


def _joined(items: list[Item]) -> list[Item]:
    """Lines that follow one another as one item; in the same order."""
    joined: list[Item] = []
    for name, place, content in items:
        if joined and place >= 0 and joined[-1][0] == name and joined[-1][1] + len(joined[-1][2]) == place:
            joined[-1] = (name, joined[-1][1], joined[-1][2] + content)
        else:
            joined.append((name, place, content))
    return joined
