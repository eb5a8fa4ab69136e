"""What cannot be served is refused before anything is loaded or started."""

from __future__ import annotations

import os
import socket
import sys

import pytest

from maps_ray import cli, machine
from maps_ray.serving.options import ServeOptions, check_options
from maps_ray.spec import SpecError


def faults(here: bool = True, **options: object) -> str:
    with pytest.raises(SpecError) as caught:
        check_options(ServeOptions(**options), here)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")]
)
def test_a_port_that_another_program_listens_on(family: socket.AddressFamily, address: str) -> None:
    with socket.socket(family) as other:
        try:
            other.bind((address, 0))
        except OSError as error:
            pytest.skip(f"{address}: {error}")
        other.listen()
        port = other.getsockname()[1]
        assert f"--port = {port}: cannot listen on 127.0.0.1, port {port}: Address already in use" in faults(port=port)
        assert f"--port = {port}" in faults(port=port, host="0.0.0.0")
        # Where a cluster was joined, its own machines listen.
        check_options(ServeOptions(port=port), here=False)
    check_options(ServeOptions(port=port), here=True)


def test_addresses_as_clients_write_them() -> None:
    assert ServeOptions(host="::1", port=8000).address == "[::1]:8000"
    assert ServeOptions(host="robot.local", port=8000).address == "robot.local:8000"


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_no_port(port: int) -> None:
    assert f"--port = {port}: must be 1 to 65535" in faults(port=port)


def test_an_address_of_no_machine() -> None:
    assert "--host = 'no.such.host.invalid': no address of this machine" in faults(host="no.such.host.invalid")
    assert "cannot listen on 192.0.2.1" in faults(host="192.0.2.1")


@pytest.mark.parametrize("here", [True, False])
def test_other_machines_are_answered_by_token_alone(here: bool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for host in ("0.0.0.0", "::", socket.gethostbyname(socket.gethostname()).replace("127.0.0.1", "0.0.0.0")):
        assert f"--host = '{host}': listens beyond this machine" in faults(here, host=host, port=port)
    for host in ("127.0.0.1", "localhost", "127.0.0.2"):
        check_options(ServeOptions(host=host, port=port, cpus=0.1), here)
    check_options(ServeOptions(host="0.0.0.0", port=port, token="t", cpus=0.1), here)


def test_a_token_among_the_arguments_leaves_the_process_list(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execve", lambda *what: begun.append(what))
    for given in (["--token", "abc"], ["--token=abc"]):
        arguments = ["serve", "runs/tiny", *given, "--port", "9"]
        monkeypatch.setattr(sys, "argv", ["/venv/bin/maps-ray", *arguments])
        monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "/venv/bin/maps-ray", *arguments])
        cli._hide_token()
        program, command, environment = begun.pop()
        assert command == [program, "-X", "dev", "/venv/bin/maps-ray", "serve", "runs/tiny", "--port", "9"]
        assert environment["MAPS_RAY_TOKEN"] == "abc"
    monkeypatch.setattr(sys, "argv", ["maps-ray", "serve", "runs/tiny"])
    cli._hide_token()
    assert not begun


@pytest.mark.parametrize("gpus", [1, 0.5, 64])
def test_gpus_that_this_machine_lacks(monkeypatch: pytest.MonkeyPatch, gpus: float) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert f"--gpus = {gpus}: 1 replica(s) with {gpus:g} GPUs each, but this machine has 0" in faults(gpus=gpus)


def test_more_than_this_machine_has() -> None:
    each = machine.cpus() // 2 + 1
    assert f"2 replica(s) with {each} CPUs each" in faults(replicas=2, cpus=each)


@pytest.mark.parametrize("given", ["-1", "", "NoDevFiles", " "])
def test_cuda_sees_no_gpu(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert machine.gpus() == 0


@pytest.mark.parametrize("here", [True, False])
def test_numbers_that_cannot_be(here: bool) -> None:
    text = faults(here, replicas=0, cpus=1.5, gpus=-1, max_body_bytes=0, token=" ")
    for option in ("--replicas = 0", "--cpus = 1.5", "--gpus = -1", "--max-body-mib = 0", "--token = ''"):
        assert option in text
    assert "--gpus = nan" in faults(here, gpus=float("nan"))
