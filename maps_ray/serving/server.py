"""`maps-ray serve`: one policy on Ray Serve, answering `POST /act` and openpi's websocket clients."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import logging
import os
import time
import uuid
from pathlib import Path

import ray
from ray import serve
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from maps_ray import machine
from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.predict import NotFiniteError
from maps_ray.ray_connection import require_answer
from maps_ray.serving.actions import UnsafeActions, queue_fault
from maps_ray.serving.engine import PolicyEngine
from maps_ray.serving.metrics import CONTENT_TYPE, Metrics, Outcome
from maps_ray.serving.options import ServeOptions, check_checkpoint, check_options, starts_here
from maps_ray.serving.protocol import RequestError, decode_request, encode_answer
from maps_ray.serving.session import Session

logger = logging.getLogger(__name__)
APPLICATION = "maps-ray"
_CONNECTIONS = 100


class ServingError(RuntimeError):
    """A policy that cannot be served, or that is served no longer; the message says why."""


class PolicyServer:
    """One replica: a policy behind HTTP and websockets. Serve builds `app` from it."""

    def __init__(
        self,
        checkpoint: str,
        policy_options: dict[str, object],
        options: ServeOptions,
        token_digest: bytes | None = None,
    ) -> None:
        self._options = options
        self._token_digest = token_digest
        self._metrics = Metrics(uuid.uuid4().hex[:8])
        self._engine: PolicyEngine | None = None
        self._fault: str | None = None
        self._began = time.monotonic()
        try:
            self._engine = PolicyEngine(
                Path(checkpoint),
                policy_options,
                options.dtype,
                options.device_map,
                options.batch,
                options.limits,
                self._metrics,
            )
            self._fault = _fault_beside(self._engine, options)
        except CheckpointError as error:
            # Raised, it would make Serve try again and again, and bury the reason in its log.
            self._fault = str(error)
        except Exception as error:
            logger.exception("the policy cannot be loaded")
            self._fault = f"{type(error).__name__}: {error}"

    def fault(self) -> str | None:
        """Why the policy could not be loaded; None when it answers."""
        return self._fault

    def app(self) -> Starlette:
        """`POST /act`, `/health`, `/healthz`, `/metrics`, and websockets on every path."""
        return Starlette(
            routes=[
                Route("/act", self._act, methods=["POST"]),
                Route("/health", self._health),
                Route("/healthz", self._healthz),
                Route("/metrics", self._metrics_page),
                WebSocketRoute("/{path:path}", self._websocket),
            ],
            exception_handlers={404: _not_found, 405: _wrong_method},
        )

    __serve_build_asgi_app__ = app

    async def _act(self, request: Request) -> Response:
        began = time.monotonic()
        outcome: Outcome = "refused"
        try:
            engine = self._ready()
            if not self._has_token(request):
                raise RequestError(401, "send the server's token as `Authorization: Bearer ...`")
            observation = decode_request(await self._body(request))
            # The state then says where the hand is. Else one that the policy does not read is a client's mistake, which
            # `act` refuses.
            if engine.limits.workspace:
                observation = engine.fitting(observation)
            actions = await engine.act(observation)
            engine.limits.check(actions, observation.position)
            outcome = "answered"
            self._metrics.request(began)
            return Response(encode_answer(actions, observation.encoded), media_type="application/json")
        except RequestError as error:
            return _refusal(error.status, str(error))
        except UnsafeActions as error:
            outcome = "unsafe"
            return _refusal(422, str(error))
        except ValueError as error:
            return _refusal(400, str(error))
        except NotFiniteError as error:
            outcome = "failed"
            return _refusal(500, str(error))
        except Exception:
            outcome = "failed"
            logger.exception("a request failed")
            return _refusal(500, "the policy failed on this request; the server's log says why")
        finally:
            self._metrics.count("http", outcome)

    async def _websocket(self, socket: WebSocket) -> None:
        if self._engine is None or self._fault is not None or not self._has_token(socket):
            # Before the handshake, so that a client sees a refused connection (403) and no half-open one.
            await socket.close(1008)
            return
        options = self._options
        await Session(
            socket, self._engine, self._metrics, options.max_body_bytes, options.execute_steps, options.ensemble
        ).run()

    async def _health(self, _: Request) -> Response:
        try:
            engine = self._ready()
        except RequestError as error:
            return _refusal(error.status, str(error))
        facts = {"status": "ok", "up_s": round(time.monotonic() - self._began, 1), "forward_s": engine.warm_up_s}
        return Response(json.dumps({**facts, **engine.facts()}), media_type="application/json")

    async def _healthz(self, _: Request) -> Response:
        # openpi's server answers so on this path (`websocket_policy_server._health_check`).
        return Response("OK\n") if self._fault is None else Response(f"{self._fault}\n", status_code=503)

    async def _metrics_page(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    def _ready(self) -> PolicyEngine:
        if self._engine is None or self._fault is not None:
            raise RequestError(503, f"the policy is not loaded: {self._fault}")
        return self._engine

    def _has_token(self, connection: HTTPConnection) -> bool:
        if self._token_digest is None:
            return True
        kind, _, token = connection.headers.get("authorization", "").partition(" ")
        # openpi's client sends its key as `Api-Key`.
        # Digests have one length: the time that comparing them takes says nothing of the token's.
        return kind.lower() in ("bearer", "api-key") and hmac.compare_digest(_digest(token.strip()), self._token_digest)

    async def _body(self, request: Request) -> bytes:
        limit = self._options.max_body_bytes
        declared = request.headers.get("content-length", "0")
        body = bytearray()
        if declared.isdigit() and int(declared) <= limit:
            # What comes is counted too: the length may be missing or wrong.
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    break
            else:
                return bytes(body)
        raise RequestError(413, f"the request has more than {limit} bytes")


def _fault_beside(engine: PolicyEngine, options: ServeOptions) -> str | None:
    """Which option does not fit the policy that was loaded."""
    fault = options.limits.fault(engine.action_dim)
    if fault is None and options.execute_steps is not None:
        fault = queue_fault(options.execute_steps, options.ensemble, engine.chunk)
    return None if fault is None else f"{fault[0]} = {fault[1]}: {fault[2]}"


async def _not_found(_: Request, __: Exception) -> Response:
    return _refusal(404, "the paths are /act, /health and /metrics")


async def _wrong_method(request: Request, _: Exception) -> Response:
    return _refusal(405, "use POST" if request.url.path == "/act" else "use GET")


def start(checkpoint: str | Path, options: ServeOptions, policy_options: dict[str, object] | None = None) -> str:
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
        # `ray.init` joins the same one, but asks for minutes where it is dead.
        require_answer(os.environ["RAY_ADDRESS"])
        ray.init(include_dashboard=False, log_to_driver=True, logging_level="warning")
    _say_where_room_is_missing(options)
    deployment = serve.deployment(
        serve.ingress()(PolicyServer),
        name="policy",
        num_replicas=options.replicas,
        # A websocket counts as one request as long as it is open. Serve's own limit is 5: a sixth robot would wait for
        # another one to leave.
        max_ongoing_requests=_CONNECTIONS,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
    )
    digest = _digest(options.token) if options.token is not None else None
    try:
        serve.start(http_options={"host": options.host, "port": options.port})
        handle = serve.run(
            # Ray Serve keeps what a deployment is bound to: the digest does for checking, and nobody can send it.
            deployment.bind(str(folder), given, dataclasses.replace(options, token=None), digest),
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
    return f"http://{options.address}/act"


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
