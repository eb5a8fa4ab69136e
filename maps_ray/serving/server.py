"""`maps-ray serve`: one policy on Ray Serve, answering `POST /act`."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from maps_ray.models import describe
from maps_ray.models.errors import CheckpointError
from maps_ray.serving.protocol import RequestError, decode_request, encode_answer

logger = logging.getLogger(__name__)
APPLICATION = "maps-ray"
# What is no size of the policy, but says how observations and actions are read.
_CODEC_OPTIONS = ("dataset", "normalization", "images")


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


class PolicyServer:
    """One replica: a policy, asked for one observation at a time."""

    def __init__(
        self,
        checkpoint: str,
        policy_options: dict[str, Any],
        token_digest: bytes | None,
        max_body_bytes: int,
        dtype: str,
    ) -> None:
        import torch

        from maps_ray.models import load_policy
        from maps_ray.models.predict import Codec

        sizes = {name: value for name, value in policy_options.items() if name not in _CODEC_OPTIONS}
        codec = {name: value for name, value in policy_options.items() if name in _CODEC_OPTIONS}
        folder = Path(checkpoint)
        self._policy = cast(Any, load_policy(folder, dtype=getattr(torch, dtype), **sizes).eval())
        self._policy.codec = Codec.read(folder, self._policy.config, self._policy.trained_for, **codec)
        if torch.cuda.is_available():
            self._policy.to("cuda")
        self._token_digest = token_digest
        self._max_body_bytes = max_body_bytes
        self._one_at_a_time = asyncio.Lock()

    async def __call__(self, request: Request) -> Response:
        try:
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
        CheckpointError: the checkpoint cannot be used; nothing was started.
        RuntimeError: the address is taken, or the cluster has not the resources.
    """
    folder = Path(checkpoint).resolve()
    given = dict(policy_options or {})
    sizes = {name: value for name, value in given.items() if name not in _CODEC_OPTIONS}
    try:
        info = describe(folder, **sizes)
    except TypeError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    faults = info.problems + [f"{name} has no weights in {folder}" for name in info.fresh_modules]
    if not (folder / "dataset_statistics.json").is_file():
        faults.append(f"{folder} has no dataset_statistics.json: its actions would have no units")
    if faults:
        raise CheckpointError("\n".join(faults))
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=True, logging_level="warning")
    serve.start(http_options={"host": options.host, "port": options.port})
    deployment = serve.deployment(
        PolicyServer,
        name="policy",
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
    )
    digest = _digest(options.token) if options.token is not None else None
    serve.run(
        deployment.bind(str(folder), given, digest, options.max_body_bytes, options.dtype),
        name=APPLICATION,
        route_prefix="/",
    )
    return f"http://{options.host}:{options.port}/act"


def serve_forever(url: str) -> None:
    """Waits for Ctrl-C, then stops serving."""
    try:
        while serve.status().applications[APPLICATION].status not in ("DEPLOY_FAILED", "NOT_STARTED"):
            time.sleep(5)
        logger.error("%s does not answer any more; see the logs of its replicas", url)
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _refusal(status: int, message: str) -> Response:
    return Response(json.dumps({"error": message}), status_code=status, media_type="application/json")
