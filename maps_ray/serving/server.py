"""`maps-ray serve`: one policy on Ray Serve, answering `POST /act`."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from maps_ray import machine
from maps_ray.models.errors import CheckpointError
from maps_ray.models.predict import NotFiniteError
from maps_ray.ray_connection import require_answer
from maps_ray.serving.options import ServeOptions, check_checkpoint, check_options, split_options, starts_here
from maps_ray.serving.protocol import RequestError, decode_request, encode_answer

logger = logging.getLogger(__name__)
APPLICATION = "maps-ray"


class ServingError(RuntimeError):
    """A policy that cannot be served, or that is served no longer; the message says why."""


class PolicyServer:
    """One replica: a policy, asked for one observation at a time."""

    def __init__(
        self,
        checkpoint: str,
        policy_options: dict[str, Any],
        token_digest: bytes | None,
        max_body_bytes: int,
        dtype: str,
        device_map: str = "auto",
    ) -> None:
        self._token_digest = token_digest
        self._max_body_bytes = max_body_bytes
        self._one_at_a_time = asyncio.Lock()
        self._policy: Any = None
        self._fault: str | None = None
        try:
            self._policy = _load(Path(checkpoint), policy_options, dtype, device_map)
        except CheckpointError as error:
            # Raised, it would make Serve try again and again, and bury the reason in its log.
            self._fault = str(error)
        except Exception as error:
            logger.exception("the policy cannot be loaded")
            self._fault = f"{type(error).__name__}: {error}"

    def fault(self) -> str | None:
        """Why the policy could not be loaded; None when it answers."""
        return self._fault

    async def __call__(self, request: Request) -> Response:
        try:
            if self._fault is not None:
                raise RequestError(503, f"the policy is not loaded: {self._fault}")
            if request.url.path != "/act":
                raise RequestError(404, "the only path is /act")
            if request.method != "POST":
                raise RequestError(405, "use POST")
            self._check_token(request)
            observation = decode_request(await self._body(request))
            async with self._one_at_a_time:
                # In a thread, so that the replica answers health checks meanwhile.
                actions = await asyncio.to_thread(
                    self._policy.predict, observation.images, observation.instruction, observation.state
                )
            return Response(encode_answer(actions, observation.encoded), media_type="application/json")
        except RequestError as error:
            return _refusal(error.status, str(error))
        except ValueError as error:
            return _refusal(400, str(error))
        except NotFiniteError as error:
            return _refusal(500, str(error))
        except Exception:
            logger.exception("a request failed")
            return _refusal(500, "the policy failed on this request; the server's log says why")

    def _check_token(self, request: Request) -> None:
        if self._token_digest is None:
            return
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(_digest(token.strip()), self._token_digest):
            raise RequestError(401, "send the server's token as `Authorization: Bearer ...`")

    async def _body(self, request: Request) -> bytes:
        limit = self._max_body_bytes
        declared = request.headers.get("content-length", "0")
        body = bytearray()
        if declared.isdigit() and int(declared) <= limit:
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    break
            else:
                return bytes(body)
        raise RequestError(413, f"the request has more than {limit} bytes")


def start(checkpoint: str | Path, options: ServeOptions, policy_options: dict[str, Any] | None = None) -> str:
    """Loads a policy and answers requests, on the Ray cluster that this process belongs to, or on a new local one.

    Args:
        checkpoint: folder, on a path that every replica can read.
        options: address, token, limits and resources.
        policy_options: `PolicySizes` where the checkpoint's configuration does not say them, and `dataset`,
            `normalization`, `images` of `Codec.read`.

    Returns:
        the URL to post to; the policy is loaded and answers.

    Raises:
        CheckpointError: the checkpoint cannot be used: what its files say, before anything was started; values of its
            weights, after they were loaded.
        SpecError: the options cannot be, or this machine has not what they ask for; nothing was started.
        ServingError: nothing answers.
    """
    folder = Path(checkpoint).resolve()
    given = dict(policy_options or {})
    here = starts_here()
    check_options(options, here)
    check_checkpoint(folder, given)
    if here:
        ray.init(
            address="local",
            num_cpus=machine.cpus(),
            include_dashboard=False,
            log_to_driver=True,
            logging_level="warning",
        )
    elif not ray.is_initialized():
        require_answer(os.environ["RAY_ADDRESS"])
        ray.init(include_dashboard=False, log_to_driver=True, logging_level="warning")
    _say_where_room_is_missing(options)
    deployment = serve.deployment(
        PolicyServer,
        name="policy",
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
    )
    digest = _digest(options.token) if options.token is not None else None
    try:
        serve.start(http_options={"host": options.host, "port": options.port})
        handle = serve.run(
            deployment.bind(str(folder), given, digest, options.max_body_bytes, options.dtype, options.device_map),
            name=APPLICATION,
            route_prefix="/",
        )
        fault = handle.fault.remote().result()
    except Exception as error:
        serve.shutdown()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ServingError(f"nothing answers on {options.host}, port {options.port}: {lines[-1]}") from error
    if fault is not None:
        serve.shutdown()
        raise CheckpointError(fault)
    return f"http://{options.host}:{options.port}/act"


def serve_forever(url: str) -> None:
    """Waits for Ctrl-C, then stops serving.

    Raises:
        ServingError: the policy answers no longer.
    """
    try:
        while serve.status().applications[APPLICATION].status not in ("DEPLOY_FAILED", "NOT_STARTED"):
            time.sleep(5)
        raise ServingError(f"{url} does not answer any more; see the logs of its replicas")
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()


def _load(folder: Path, given: Mapping[str, Any], dtype: str, device_map: str) -> Any:
    import torch

    from maps_ray.models.device_map import load_for_use
    from maps_ray.models.predict import Codec

    sizes, codec = split_options(given)
    policy: Any = load_for_use(folder, dtype=getattr(torch, dtype), device_map=device_map, **sizes)
    policy.codec = Codec.read(folder, policy.config, policy.trained_for, **codec)
    return policy


def _say_where_room_is_missing(options: ServeOptions) -> None:
    """A cluster that was joined may grow: it is waited for, but not in silence."""
    there = ray.cluster_resources()
    for resource, each in (("CPU", options.cpus), ("GPU", options.gpus)):
        if options.replicas * each > there.get(resource, 0):
            logger.warning(
                "waiting: %d replica(s) need %g %ss each, and the cluster has %g now",
                options.replicas,
                each,
                resource,
                there.get(resource, 0),
            )


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _refusal(status: int, message: str) -> Response:
    return Response(json.dumps({"error": message}), status_code=status, media_type="application/json")
