"""How a policy is served, and what of it cannot be: found before anything is loaded or started."""

from __future__ import annotations

import ipaddress
import math
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from maps_ray import machine
from maps_ray.devices import device_map_fault
from maps_ray.models import describe
from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.files.folders import read_config
from maps_ray.models.units import CODEC_OPTIONS, CodecOptions, Units, units_and_images
from maps_ray.serving.actions import Limits, queue_fault
from maps_ray.spec import Problem, SpecError

# Weights that are looked at before anything starts; those of larger models are when a replica loads them.
_READ_AT_ONCE = 2 * 2**30


@dataclass(frozen=True)
class ServeOptions:
    """How a policy is served."""

    host: str = "127.0.0.1"
    port: int = 8777
    token: str | None = field(default=None, repr=False)
    """Clients must send it as `Authorization: Bearer ...`; none lets everyone in."""
    max_body_bytes: int = 32 * 2**20
    """A longer request is refused unread."""
    replicas: int = 1
    cpus: float = 1
    """For each replica."""
    gpus: float = 0
    """For each replica; with any, the policy runs on the GPU."""
    dtype: str = "bfloat16"
    """Of the weights."""
    device_map: str = "auto"
    """Where the weights lie, see `maps_ray.models.device_map`."""
    batch: int = 8
    """Most observations in one forward pass, of those that wait at the same time."""
    execute_steps: int | None = None
    """Websocket clients get one action a message, and a new chunk is computed every so many; None: they get chunks.
    A client may ask for its own in the query, `ws://...:8777/?execute_steps=4`."""
    ensemble: float | None = None
    """Averages the actions of all chunks that cover a step, see `maps_ray.serving.actions`."""
    limits: Limits = field(default_factory=Limits)
    """On the actions that leave the server."""

    @property
    def address(self) -> str:
        """Host and port, as an address has them: `[::1]:8777`."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def split_options(given: Mapping[str, object]) -> tuple[dict[str, Any], CodecOptions]:
    """The sizes of the policy, and the options of its codec."""
    sizes = {name: value for name, value in given.items() if name not in CODEC_OPTIONS}
    codec = {name: value for name, value in given.items() if name in CODEC_OPTIONS}
    return sizes, cast(CodecOptions, codec)


def check_checkpoint(folder: Path, given: Mapping[str, object]) -> None:
    """Raises `CheckpointError` where a folder can't be served: configuration, headers, tokenizer, statistics, or values
    of weights, as far as they are read in seconds."""
    sizes, codec = split_options(given)
    try:
        info = describe(folder, **sizes)
    except TypeError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    faults = info.problems + [f"{name} has no weights in {folder}" for name in info.fresh_modules]
    try:
        _check_statistics(folder, codec)
    except CheckpointError as error:
        faults.append(str(error))
    if faults:
        raise CheckpointError("\n".join(faults))
    from maps_ray.models.files.weights import look_at_weights

    look_at_weights(folder, _READ_AT_ONCE)


def _check_statistics(folder: Path, codec: CodecOptions) -> None:
    if not (folder / "dataset_statistics.json").is_file():
        raise CheckpointError(f"{folder} has no dataset_statistics.json: its actions would have no units")
    normalization, _ = units_and_images(read_config(folder)[1].get("policy") or {}, codec)
    Units.read(folder, normalization, codec.get("dataset"))


def check_options(options: ServeOptions, here: bool) -> None:
    """Whether a policy can be served so.

    Args:
        options: what was asked for.
        here: Ray is to be started on this machine, which then must have the resources and listen on the address.

    Raises:
        SpecError: it cannot; lists every fault with option, value and remedy.
    """
    problems = []
    for name, value in (
        ("--replicas", options.replicas),
        ("--max-body-mib", options.max_body_bytes),
        ("--batch", options.batch),
    ):
        if value < 1:
            problems.append(Problem(name, value, "must be at least 1"))
    for name, each in (("--cpus", options.cpus), ("--gpus", options.gpus)):
        if not math.isfinite(each) or each < 0 or (each > 1 and each != int(each)):
            problems.append(Problem(name, each, "must be a whole number, or a part of one, and not negative"))
    if options.token is not None and not options.token.strip():
        problems.append(Problem("--token", "", "is blank, which everyone can send: give one, or unset MAPS_RAY_TOKEN"))
    if options.token is None and _reaches_others(options.host):
        message = (
            "listens beyond this machine, and whoever reaches it would get answers: set MAPS_RAY_TOKEN, which clients "
            "must send, or listen on 127.0.0.1"
        )
        problems.append(Problem("--host", options.host, message))
    if (unfit := options.limits.fault()) is not None:
        problems.append(Problem(*unfit))
    if (unfit := queue_fault(options.execute_steps, options.ensemble, None)) is not None:
        problems.append(Problem(f"--{unfit[0].replace('_', '-')}", *unfit[1:]))
    if (wrong := device_map_fault(options.device_map)) is not None:
        problems.append(Problem("--device-map", options.device_map, wrong))
    if not 0 < options.port < 2**16:
        problems.append(Problem("--port", options.port, "must be 1 to 65535"))
    elif here and (fault := _address_fault(options.host, options.port)) is not None:
        problems.append(fault)
    if here and not problems:
        problems += _resource_problems(options)
    if problems:
        raise SpecError(problems)


def starts_here() -> bool:
    """Whether serving starts Ray on this machine: it has joined no cluster, and no address says which."""
    import ray

    return not ray.is_initialized() and os.environ.get("RAY_ADDRESS", "local") == "local"


def _reaches_others(host: str) -> bool:
    """Whether more than this machine's own processes can connect to an address; unknown ones are another check's."""
    try:
        # As a server reads it: no host is every address (AI_PASSIVE, getaddrinfo(3)).
        places = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        return False
    return any(not ipaddress.ip_address(str(place[0]).partition("%")[0]).is_loopback for *_, place in places)


def _address_fault(host: str, port: int) -> Problem | None:
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        return Problem("--host", host, f"no address of this machine: {error}")
    for family, kind, protocol, _, place in places:
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: what an earlier server left in TIME_WAIT is not in the way, what listens is.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(place)
            except PermissionError:
                return Problem("--port", port, "this user may not listen on it; take one from 1024 on")
            except OSError as error:
                return Problem(
                    "--port", port, f"cannot listen on {place[0]}, port {port}: {error.strerror}; take another"
                )
    return None


def _resource_problems(options: ServeOptions) -> list[Problem]:
    problems = []
    for name, each, there, what in (
        ("--cpus", options.cpus, machine.cpus(), "CPUs"),
        ("--gpus", options.gpus, machine.gpus(), "GPUs"),
    ):
        if options.replicas * each > there:
            message = (
                f"{options.replicas} replica(s) with {each:g} {what} each, but this machine has {there}; ask for less, "
                "or join a larger cluster with RAY_ADDRESS"
            )
            problems.append(Problem(name, each, message))
    return problems
