"""Ray for this process: the cluster it has joined, one to join, or one started on this machine for it alone."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

# Little passes through Ray's object store: observations and answers, never weights or batches.
_OBJECT_STORE_BYTES = 100 * 2**20
# Of the processes of a cluster that was started here, after it was shut down.
_END_S = 10.0
_TOKEN = secrets.token_hex(32)


class ConnectionFailed(RuntimeError):
    """No cluster answers at an address, or Ray does not start on this machine."""


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Ray, connected: the cluster this process has joined already, the one at `address`, the one of the submitted job,
    or one started on this machine, which ends with the context.

    A cluster started here keeps its files in a folder of its own, has no dashboard, and asks every client for a token
    that only this process and its children know.

    Raises:
        ConnectionFailed: no cluster answers at the address, or Ray does not start here.
    """
    if _connected():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    with _joined(address) if address else _started():
        yield


def _connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@contextmanager
def _joined(address: str) -> Iterator[None]:
    import ray

    try:
        ray.init(address=address, logging_level="warning")
    except Exception as error:
        raise ConnectionFailed(f"no Ray cluster can be joined at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _started() -> Iterator[None]:
    # A token of this process, unless the user has chosen how Ray authenticates.
    token = {} if "RAY_AUTH_MODE" in os.environ else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN}
    os.environ.update(token)
    # Ray runs workers at nice 15 so that its own processes stay responsive; here anything else would starve them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    # Ray has read its environment on import; a process that imported it earlier must read the token mode again.
    ray._raylet.Config.initialize("")
    # Paths of sockets below it may have 107 bytes in all.
    folder = tempfile.mkdtemp(prefix="maps-ray-", dir=None if len(tempfile.gettempdir()) < 24 else "/tmp")
    try:
        try:
            ray.init(
                address="local",
                num_cpus=len(os.sched_getaffinity(0)),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level="warning",
                _temp_dir=folder,
            )
        except Exception as error:
            raise ConnectionFailed(f"Ray does not start on this machine: {error}") from error
        yield
    finally:
        own = _processes_of(folder)
        ray.shutdown()
        # They end a moment later, and write into the folder until then.
        for left in psutil.wait_procs(own, _END_S)[1]:
            left.kill()
        shutil.rmtree(folder, ignore_errors=True)
        for name in token:
            os.environ.pop(name, None)


def _processes_of(folder: str) -> list[psutil.Process]:
    """Processes of the Ray session that this process started with its files in `folder`, workers included."""
    found = []
    for child in psutil.Process().children():
        try:
            if any(folder in argument for argument in child.cmdline()):
                found += [child, *child.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    return found
