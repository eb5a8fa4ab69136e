"""Ray for this process: the cluster it has joined, one to join, or one started on this machine for it alone."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from maps_ray import machine
from maps_ray.ray_internals import cluster_of_this_machine, keep_environment, read_environment_again

# Little passes through Ray's object store: observations and answers, never weights or batches.
_OBJECT_STORE_BYTES = 100 * 2**20
# Of the processes of a cluster that was started here, after it was shut down.
_END_S = 10.0
_TOKEN = secrets.token_hex(32)
ANSWER_S = 10.0
"""A cluster that does not answer in that time is not there; Ray itself would ask for minutes."""
RAY_CLIENT = "ray://"
"""How addresses begin under which a machine that is no node speaks through one."""
# What every gRPC server, Ray's too, answers with a SETTINGS frame of its own: the preface of HTTP/2, and no settings.
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_SETTINGS = 4


class ConnectionFailed(RuntimeError):
    """No cluster answers at an address, or Ray does not start on this machine."""


@contextmanager
def connected(address: str | None = None, answer_s: float = ANSWER_S) -> Iterator[None]:
    """Ray, connected: the cluster this process has joined already, the one at `address`, the one of the submitted job,
    or one started on this machine, which ends with the context.

    A cluster started here keeps its files in a folder of its own, has no dashboard, and asks every client for a token
    that only this process and its children know.

    Args:
        address: `auto`, `host:port`, `ray://host:port`; `local` starts a cluster here whatever RAY_ADDRESS says.
        answer_s: how long a cluster to join may take to answer; never more than `ANSWER_S`.

    Raises:
        ConnectionFailed: no cluster answers at the address, or Ray does not start here.
    """
    if _connected():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A thread that calls Ray after it was shut down must fail, not start another cluster.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    told = "" if address else " (RAY_ADDRESS)"
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        require_answer(address, answer_s, told)
        with _joined(address):
            yield
        return
    with _started():
        yield


def require_answer(address: str, answer_s: float = ANSWER_S, told: str = "") -> None:
    """Raises `ConnectionFailed` unless something at a Ray address speaks as Ray does, `answer_s` seconds from now;
    `told` says behind the address where it is from."""
    try:
        place = _host_and_port(address)
    except (ConnectionError, ValueError) as error:
        raise ConnectionFailed(f"no Ray cluster can be joined at {address}{told}: {error}") from None
    if place is None:
        return
    deadline = time.monotonic() + min(answer_s, ANSWER_S)
    while (fault := _fault_of(place, deadline - time.monotonic())) is not None:
        if time.monotonic() + 0.5 > deadline:
            raise ConnectionFailed(
                f"no Ray cluster can be joined at {address}{told}: {fault}; start one there (`ray start --head`), "
                "correct the address, or leave it out to start Ray on this machine"
            )
        time.sleep(0.5)


def _host_and_port(address: str) -> tuple[str, int] | None:
    """Where to knock; None for addresses of another kind, which Ray resolves by itself.

    Raises:
        ConnectionError: `auto`, and no cluster is known on this machine.
        ValueError: no port, or the address of a dashboard.
    """
    if address.startswith(("http://", "https://")):
        # As `ray job submit` takes it from RAY_ADDRESS, where Ray itself takes no such address.
        raise ValueError("that is a dashboard's address; name the cluster as `auto`, host:port or ray://host:port")
    if address == "auto":
        address = cluster_of_this_machine()
        if not address:
            raise ConnectionError("no cluster is known on this machine")
    address = address.removeprefix(RAY_CLIENT)
    if "://" in address:
        return None
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError("an address is `auto`, host:port or ray://host:port")
    return host.strip("[]"), int(port)


def _fault_of(place: tuple[str, int], wait_s: float) -> str | None:
    """What is wrong with a server of Ray's; None when it answers."""
    try:
        with socket.create_connection(place, timeout=max(wait_s, 0.1)) as connection:
            # With TLS no more can be said than that somebody listens: the greeting would have to be encrypted.
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return None
            connection.sendall(_GREETING)
            answer = b""
            while len(answer) < 9 and (part := connection.recv(9 - len(answer))):
                answer += part
    except TimeoutError:
        return "it does not answer"
    except OSError as error:
        return error.strerror or str(error)
    return None if len(answer) == 9 and answer[3] == _SETTINGS else "what listens there is not Ray"


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
    try:
        # Paths of sockets below it may have 107 bytes in all.
        folder = tempfile.mkdtemp(prefix="maps-ray-", dir=None if len(tempfile.gettempdir()) < 24 else "/tmp")
    except OSError as error:
        raise ConnectionFailed(
            f"Ray does not start on this machine: it has no folder for temporary files ({error}); set TMPDIR to one "
            "with a short name that can be written"
        ) from None
    # A token of this process, unless the user has chosen how Ray authenticates.
    token = {} if "RAY_AUTH_MODE" in os.environ else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN}
    os.environ.update(token)
    # Ray runs workers at nice 15 so that its own processes stay responsive; here anything else would starve them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    # The token mode above, in a process that has imported Ray earlier.
    read_environment_again()
    keep_environment()
    try:
        try:
            ray.init(
                address="local",
                num_cpus=machine.cpus(),
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
        # Before: once the first of them has ended, those below it are nobody's children here.
        own = _processes_of(folder)
        ray.shutdown()
        # They end a moment later, and write into the folder until then.
        for left in psutil.wait_procs(own, _END_S)[1]:
            left.kill()
        shutil.rmtree(folder, ignore_errors=True)
        # A cluster that is joined later may have another mode, and has another token.
        for name in token:
            os.environ.pop(name, None)


def _processes_of(folder: str) -> list[psutil.Process]:
    """Processes of the Ray session that this process started with its files in `folder`, workers included."""
    processes = []
    for child in psutil.Process().children():
        try:
            if any(folder in argument for argument in child.cmdline()):
                processes += [child, *child.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
    return processes
