"""An address that leads nowhere is refused in the time allowed, whatever stands there instead."""

from __future__ import annotations

import contextlib
import http.server
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from maps_ray import ray_connection
from maps_ray.ray_connection import ConnectionFailed, connected
from maps_ray.ray_internals import keep_environment


def refusal(address: str, answer_s: float = 2.0) -> str:
    began = time.monotonic()
    with pytest.raises(ConnectionFailed) as caught, connected(address, answer_s):
        pass
    assert time.monotonic() - began < answer_s + 2
    assert address in str(caught.value)
    return str(caught.value)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has joined no cluster, whatever other tests have left."""
    monkeypatch.setattr(ray_connection, "_connected", lambda: False)


@contextlib.contextmanager
def listener() -> Iterator[int]:
    """Takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@contextlib.contextmanager
def web_server() -> Iterator[int]:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def nothing() -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield free.getsockname()[1]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
@pytest.mark.parametrize(
    ("what", "fault"),
    [(nothing, "refused"), (listener, "it does not answer"), (web_server, "what listens there is not Ray")],
)
def test_nothing_of_rays_at_an_address(
    what: Callable[[], contextlib.AbstractContextManager[int]], fault: str, form: str
) -> None:
    with what() as port:
        assert fault in refusal(form.format(port))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("address", ["somewhere", "127.0.0.1:", "127.0.0.1:99999999", "no.such.host.invalid:6379"])
def test_no_address_at_all(address: str) -> None:
    refusal(address)


@pytest.mark.usefixtures("alone")
def test_a_cluster_that_has_gone_from_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    refusal("auto")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("address", "said"),
    [("127.0.0.1:1", "127.0.0.1:1 (RAY_ADDRESS): "), ("http://127.0.0.1:8265", "that is a dashboard's address")],
)
def test_an_address_of_the_environment_is_named(monkeypatch: pytest.MonkeyPatch, address: str, said: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConnectionFailed) as caught, connected(None, 0.2):
        pass
    assert said in str(caught.value)


@pytest.mark.usefixtures("alone")
def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # A cluster of this process, where one runs, has its own.
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setattr(ray_connection.tempfile, "gettempdir", lambda: "/proc/none")
    with pytest.raises(ConnectionFailed, match="set TMPDIR to one with a short name"), connected():
        pass
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_below_uv_run_workers_keep_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import ray_constants, worker
    from ray._private.runtime_env import uv_runtime_env_hook

    monkeypatch.delenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", raising=False)
    monkeypatch.setattr(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", True)
    monkeypatch.setattr(uv_runtime_env_hook, "_get_uv_run_cmdline", lambda: ["uv", "run", "maps-ray", "train"])
    assert worker._maybe_modify_runtime_env(None, False)["working_dir"] == os.getcwd()
    keep_environment()
    assert worker._maybe_modify_runtime_env(None, False) is None
