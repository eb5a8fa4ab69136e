"""One robot's websocket connection: openpi's protocol on top of a policy. No Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import numpy as np
from numpy.typing import NDArray
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from maps_ray.models.predict import NotFiniteError
from maps_ray.serving.actions import ActionQueue, UnsafeActions, queue_fault
from maps_ray.serving.engine import PolicyEngine
from maps_ray.serving.metrics import Metrics, Outcome
from maps_ray.serving.openpi import decode_observation, encode_actions, pack
from maps_ray.serving.protocol import ActionRequest, RequestError

logger = logging.getLogger(__name__)

_POLICY_VIOLATION = 1008


class Session:
    """Answers one connection until its client leaves.

    Without a queue an observation's answer is its chunk. With one it is the action of this step, (1, action_dim), and a
    chunk is computed behind it, see `ActionQueue`.

    Args:
        socket: not yet accepted; its query may say `execute_steps` and `ensemble`.
        engine: the policy.
        metrics: where its observations are counted.
        max_bytes: of a message.
        execute_steps: of the queue where the query does not say it; None for none.
        ensemble: likewise.
    """

    def __init__(
        self,
        socket: WebSocket,
        engine: PolicyEngine,
        metrics: Metrics,
        max_bytes: int,
        execute_steps: int | None,
        ensemble: float | None,
    ) -> None:
        self._socket = socket
        self._engine = engine
        self._metrics = metrics
        self._max_bytes = max_bytes
        self._execute_steps = execute_steps
        self._ensemble = ensemble
        self._queue: ActionQueue | None = None
        self._pending: tuple[int, asyncio.Task[NDArray[np.float32]]] | None = None
        self._sentence = ""

    async def run(self) -> None:
        """Says what the server is, then answers observation after observation."""
        await self._socket.accept()
        self._metrics.connections.inc()
        try:
            fault = self._read_query()
            if fault is not None:
                await self._socket.send_text(fault)
                await self._socket.close(_POLICY_VIOLATION, "the query cannot be")
                return
            await self._socket.send_bytes(pack({**self._engine.facts(), **self._queue_facts()}))
            await self._answer_all()
        except WebSocketDisconnect:
            pass
        finally:
            self._metrics.connections.dec()
            self._drop_pending()

    async def _answer_all(self) -> None:
        previous: float | None = None
        while True:
            message = await self._socket.receive()
            began = time.monotonic()
            if message["type"] == "websocket.disconnect":
                return
            try:
                answer: bytes | str = await self._answer(message.get("bytes"), began, previous)
                outcome: Outcome = "answered"
            except UnsafeActions as error:
                answer, outcome = str(error), "unsafe"
            except ValueError as error:  # RequestError among them
                answer, outcome = str(error), "refused"
            except NotFiniteError as error:
                answer, outcome = str(error), "failed"
            except Exception:
                logger.exception("an observation failed")
                answer, outcome = "the policy failed on this observation; the server's log says why", "failed"
            self._metrics.count("websocket", outcome)
            if self._socket.application_state is not WebSocketState.CONNECTED:
                return
            if isinstance(answer, str):
                self._drop_pending()
                await self._socket.send_text(answer)
            else:
                await self._socket.send_bytes(answer)
                self._metrics.request(began)
            previous = time.monotonic() - began

    async def _answer(self, message: bytes | None, began: float, previous: float | None) -> bytes:
        if message is None:
            raise RequestError(400, "send observations as binary messages (msgpack), this one was text")
        if len(message) > self._max_bytes:
            raise RequestError(413, f"the message has {len(message)} bytes, more than {self._max_bytes}")
        request, begins = decode_observation(message)
        self._engine.check_cameras(request)
        request = self._engine.fitting(request)
        if self._execute_steps is None:
            actions = await self._engine.act(request)
        else:
            actions = (await self._next_action(request, begins))[None]
        self._engine.limits.check(actions, request.position)
        timing = {"infer_ms": 1000 * (time.monotonic() - began)}
        # As openpi's server: what an answer took with its sending is known when the next one goes.
        if previous is not None:
            timing["prev_total_ms"] = 1000 * previous
        return encode_actions(actions, timing)

    async def _next_action(self, request: ActionRequest, begins: bool) -> NDArray[np.float32]:
        """The action of this step; asks for a new chunk when it is due and waits only where there is none yet."""
        assert self._execute_steps is not None
        # What is left of earlier chunks carries out another sentence, or is of another episode.
        if self._queue is None or begins or request.instruction != self._sentence:
            self._drop_pending()
            self._queue = ActionQueue(self._execute_steps, self._ensemble)
            self._sentence = request.instruction
        queue = self._queue
        self._collect(queue)
        while True:
            if self._pending is None and queue.due:
                # A chunk that comes in while this action is on its way is taken up with the next observation.
                self._pending = queue.ask(), asyncio.create_task(self._engine.act(request))
            if queue.ready:
                return queue.take()
            assert self._pending is not None
            await asyncio.wait([self._pending[1]])
            self._collect(queue)

    def _collect(self, queue: ActionQueue) -> None:
        """Takes over the chunk that is being computed, if it is there; raises what its computation raised."""
        if self._pending is not None and self._pending[1].done():
            (start, task), self._pending = self._pending, None
            queue.add(start, task.result())

    def _drop_pending(self) -> None:
        """Forgets the chunk that is being computed and what is left of others: after a fault nothing old is done."""
        if self._pending is not None:
            self._pending[1].cancel()
            with contextlib.suppress(asyncio.CancelledError, asyncio.InvalidStateError):
                # Asked for, so that asyncio does not log it as one that was "never retrieved".
                self._pending[1].exception()
        self._pending = self._queue = None

    def _read_query(self) -> str | None:
        """Takes the queue's options from the query; returns what is wrong with them."""
        query = self._socket.query_params
        for name, kind in (("execute_steps", int), ("ensemble", float)):
            if name in query:
                try:
                    setattr(self, f"_{name}", kind(query[name]))
                except ValueError:
                    return f"{name} = {query[name]!r}: must be a number"
        fault = queue_fault(self._execute_steps, self._ensemble, self._engine.chunk)
        return None if fault is None else f"{fault[0]} = {fault[1]}: {fault[2]}"

    def _queue_facts(self) -> dict[str, object]:
        if self._execute_steps is None:
            return {}
        return {"execute_steps": self._execute_steps, "ensemble": self._ensemble}
