"""One replica's policy: loaded, warmed up, and asked for several observations in one forward pass. No Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from maps_ray.models.predict import finite
from maps_ray.serving.actions import Limits
from maps_ray.serving.metrics import Metrics
from maps_ray.serving.options import split_options
from maps_ray.serving.protocol import ActionRequest, RequestError

if TYPE_CHECKING:
    from maps_ray.models.collate import Sample


# Told apart by identity: `==` of samples would compare arrays, which have no one truth value.
@dataclass(frozen=True, eq=False)
class _Waiting:
    sample: Sample
    answer: asyncio.Future[NDArray[np.float32]]

    @property
    def length(self) -> int:
        return len(self.sample["input_ids"])


class PolicyEngine:
    """A policy that answers the observations of all connections.

    Observations that wait when a forward pass ends share the next one, as far as their sentences have equally many
    tokens: nothing is padded, so that nobody's sentence changes another's answer beyond rounding.

    Args:
        checkpoint: its folder.
        policy_options: see `split_options`.
        dtype: of the weights.
        device_map: see `maps_ray.models.device_map`.
        rows: most observations in one forward pass.
        limits: on what a robot may be told.
        metrics: where forward passes are counted.

    Raises:
        CheckpointError: the policy cannot be loaded.
    """

    def __init__(
        self,
        checkpoint: Path,
        policy_options: Mapping[str, object],
        dtype: str,
        device_map: str,
        rows: int,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        import torch

        from maps_ray.models.device_map import load_for_use
        from maps_ray.models.predict import Codec

        sizes, codec = split_options(policy_options)
        self.policy = load_for_use(checkpoint, dtype=getattr(torch, dtype), device_map=device_map, **sizes)
        self.codec = self.policy.codec = Codec.read(self.policy, **codec)
        self._rows = rows
        self.limits = limits
        self._metrics = metrics
        self._waiting: list[_Waiting] = []
        self._worker: asyncio.Task[None] | None = None
        self.warm_up_s = self._warm_up()

    @property
    def chunk(self) -> int:
        """Actions in one answer."""
        return int(self.policy.config.chunk)

    @property
    def action_dim(self) -> int:
        """Length of an action."""
        return int(self.policy.config.action_dim)

    def facts(self) -> dict[str, object]:
        """What a client may want to know before it sends anything."""
        codec = self.codec
        proprio = codec.units.proprio if codec.use_proprio else None
        return {
            "server": "maps_ray",
            "policy": type(self.policy).__module__.split(".")[2],
            "action_horizon": self.chunk,
            "action_dim": self.action_dim,
            "num_images": codec.num_images,
            "image_size": list(codec.image_size),
            "state_dim": proprio.low.size if proprio is not None else 0,
            "dataset": codec.units.key,
        }

    async def act(self, request: ActionRequest) -> NDArray[np.float32]:
        """Actions (chunk, action_dim) for one observation, in the units of the training data; limits are not looked at.

        Raises:
            ValueError: an observation that does not fit the policy.
            NotFiniteError: the policy predicts NaN or infinities.
        """
        # In threads, so that the replica takes requests and answers health checks meanwhile.
        sample = await asyncio.to_thread(self.codec.encode, request.images, request.instruction, request.state)
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(sample, answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._answer_all())
        # Each row by itself: who shares a forward pass with it gets its answer all the same.
        return finite(cast(NDArray[np.float32], await answer))

    def check_cameras(self, request: ActionRequest) -> None:
        """Raises `RequestError` where an observation has another number of cameras than the policy reads."""
        expected = self.codec.num_images
        if len(request.images) != expected:
            raise RequestError(
                400,
                f"{len(request.images)} images were given ({', '.join(request.cameras)}); the policy reads {expected}, "
                "primary first",
            )

    def fitting(self, request: ActionRequest) -> ActionRequest:
        """The observation without a state that the policy does not read: openpi's clients always send one."""
        return request if self.codec.use_proprio else replace(request, state=None)

    async def _answer_all(self) -> None:
        while self._waiting:
            length = self._waiting[0].length
            group = [one for one in self._waiting if one.length == length][: self._rows]
            self._waiting = [one for one in self._waiting if one not in group]
            # A client that is gone takes no room.
            group = [one for one in group if not one.answer.done()]
            if not group:
                continue
            began = time.monotonic()
            try:
                actions = await asyncio.to_thread(self.policy.predict_batch, [one.sample for one in group])
            except Exception as error:
                for one in group:
                    if not one.answer.done():
                        one.answer.set_exception(error)
                continue
            self._metrics.forward(len(group), time.monotonic() - began)
            for one, row in zip(group, actions, strict=True):
                if not one.answer.done():
                    one.answer.set_result(row)

    def _warm_up(self) -> float:
        """Runs the smallest and the largest batch twice, so that the first robot does not wait for memory and kernels;
        returns the seconds of the last pass with one observation."""
        codec = self.codec
        images = [np.zeros((*codec.image_size, 3), np.uint8)] * codec.num_images
        units = codec.units.proprio if codec.use_proprio else None
        sample = codec.encode(images, "warm up", units.low if units is not None else None)
        for rows in {self._rows, 1}:
            self.policy.predict_batch([sample] * rows)
        began = time.perf_counter()
        self.policy.predict_batch([sample])
        return time.perf_counter() - began
