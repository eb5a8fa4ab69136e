"""Openpi's protocol over a real socket, in one process: bad messages, queues, limits, several robots at once."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
import uvicorn
from openpi_client import Client, pack
from websockets.sync.client import connect

from maps_ray.models import load_policy
from maps_ray.serving.actions import Limits
from maps_ray.serving.options import ServeOptions
from maps_ray.serving.server import PolicyServer


@contextlib.contextmanager
def serving(checkpoint: Path, **options: Any) -> Iterator[tuple[str, PolicyServer]]:
    """One replica's application behind a server of its own, without Ray."""
    replica = PolicyServer(str(checkpoint), {}, ServeOptions(dtype="float32", **options))
    assert replica.fault() is None, replica.fault()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(replica.app(), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"ws://127.0.0.1:{listening.getsockname()[1]}", replica
        server.should_exit = True
        thread.join(timeout=30)


@pytest.fixture(scope="module")
def served(checkpoint: Path) -> Iterator[tuple[str, PolicyServer]]:
    with serving(checkpoint, max_body_bytes=200_000, batch=4) as found:
        yield found


def seen(seed: int = 0, **changes: Any) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    image, wrist = draw.integers(0, 256, (2, 32, 32, 3), np.uint8)
    fields = {"observation/image": image, "observation/wrist_image": wrist, "prompt": "pick up the red bowl"}
    fields["observation/state"] = draw.uniform(-1, 1, 8)
    return {name: value for name, value in {**fields, **changes}.items() if value is not None}


def expected(checkpoint: Path, fields: dict[str, Any]) -> np.ndarray:
    images = [fields["observation/image"], fields["observation/wrist_image"]]
    return load_policy(checkpoint, dtype=torch.float32).predict(images, fields["prompt"], fields["observation/state"])


IMAGE = np.zeros((32, 32, 3), np.uint8)


def array(**parts: Any) -> bytes:
    """A message with an array of these parts."""
    return msgpack.packb({"a": {b"__ndarray__": True, **{name.encode(): part for name, part in parts.items()}}})


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"\xc1", "cannot be read as msgpack"),
        (b"", "cannot be read as msgpack"),
        (pack(seen())[:-40], "cannot be read as msgpack"),
        (pack([1, 2]), "an observation must be a map of fields, found list"),
        ("hello", "binary messages"),
        (bytes(200_001), "the message has 200001 bytes, more than 200000"),
        (
            msgpack.packb({"observation/image": {b"__ndarray__": True, b"data": b"x", b"dtype": "|O", b"shape": [1]}}),
            "obj",
        ),
        (
            msgpack.packb({"a": {b"__ndarray__": True, b"data": b"12", b"dtype": "|u1", b"shape": [3]}}),
            "3 bytes, found 2",
        ),
        (array(dtype="|u1"), "cannot be read as msgpack with numpy arrays"),
        (array(data=b"12", dtype="?!", shape=[2]), "cannot be read"),
        (pack(seen(prompt=None)), "`prompt` must be a sentence"),
        (pack(seen(prompt=["pick"])), "`prompt` must be a sentence"),
        (pack(seen(**{"observation/image": None})), "`observation/image` .* is missing; the message has"),
        (
            pack(seen(**{"observation/wrist_image": None})),
            r"1 images .*\(observation/image\); the policy reads 2",
        ),
        (pack(seen(**{"observation/image_2": IMAGE})), "3 images were given"),
        (pack(seen(**{"observation/image": IMAGE / 255})), r"float64; its values are 0\.\.1: send 0\.\.255"),
        (
            pack(seen(**{"observation/image": IMAGE[None]})),
            r"\[1, 32, 32, 3\] uint8; take the batch dimension off",
        ),
        (pack(seen(**{"observation/image": IMAGE.transpose(2, 0, 1)})), "put the channels last"),
        (pack(seen(**{"observation/state": np.zeros((1, 8))})), r"found shape \[1, 8\]: take the batch dimension off"),
        (pack(seen(**{"observation/state": np.full(8, np.nan)})), "finite numbers"),
        (pack(seen(**{"observation/state": np.zeros(7)})), r"proprio has shape \[7\], expected \[8\]"),
        (pack(seen(**{"observation/state": None})), "proprio was not given"),
        (pack(seen(reset="yes")), "`reset` must be true or false"),
    ],
)
def test_bad_messages_are_answered_in_words_and_the_connection_goes_on(
    served: tuple[str, PolicyServer], message: bytes | str, text: str
) -> None:
    with Client(served[0]) as client:
        with pytest.raises(RuntimeError, match=text):
            client.say(message)
        assert client.infer(seen())["actions"].shape == (4, 7)


def test_observations_of_several_robots_share_passes(checkpoint: Path, served: tuple[str, PolicyServer]) -> None:
    url, _ = served

    def robot(seed: int) -> np.ndarray:
        with Client(url) as client:
            barrier.wait(timeout=60)
            return np.stack([client.infer(seen(seed))["actions"] for _ in range(5)])

    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(robot, range(4)))
    for seed, answer in enumerate(answers):
        np.testing.assert_allclose(answer, np.stack([expected(checkpoint, seen(seed))] * 5), rtol=0, atol=1e-5)
    with urllib.request.urlopen(url.replace("ws://", "http://") + "/metrics", timeout=60) as page:
        lines = page.read().decode().splitlines()
    passes, alone = (
        float(next(line.split()[-1] for line in lines if line.startswith(f"maps_ray_forward_rows_{name}")))
        for name in ("count", "bucket")
    )
    assert alone < passes, "no pass had more than one observation"
    assert any("maps_ray_latency_seconds{" in line and 'quantile="0.99"' in line for line in lines)


def test_a_client_that_leaves_in_mid_chunk_harms_nobody(served: tuple[str, PolicyServer]) -> None:
    url, replica = served
    with Client(url) as other:
        for _ in range(3):
            with connect(url, compression=None) as leaving:
                leaving.recv()
                leaving.send(pack(seen()))
                leaving.socket.shutdown(socket.SHUT_RDWR)
        assert other.infer(seen())["actions"].shape == (4, 7)
    deadline = time.monotonic() + 30
    while replica._metrics.connections._value.get() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert replica._metrics.connections._value.get() == 0


def test_a_robot_that_takes_one_action_a_message(checkpoint: Path, served: tuple[str, PolicyServer]) -> None:
    # As many steps as a chunk has: every fourth message waits, and the actions are the chunks' own, one after another.
    chunks = [expected(checkpoint, seen(seed)) for seed in (0, 4)]
    with Client(f"{served[0]}/?execute_steps=4") as client:
        assert client.metadata["execute_steps"] == 4
        answers = [client.infer(seen(seed))["actions"] for seed in range(8)]
        assert answers[0].shape == (1, 7)
        np.testing.assert_allclose(np.concatenate(answers), np.concatenate(chunks), rtol=0, atol=1e-5)
        # A new sentence, or a new episode, leaves nothing of the old chunk.
        for changes in ({"prompt": "pick up the bowl"}, {"prompt": "pick up the bowl", "reset": True}):
            client.infer(seen(1, **changes))
            first = client.infer(seen(2, **changes))["actions"][0]
            start = 2 if changes.get("reset") else 1
            wanted = expected(checkpoint, seen(start, prompt="pick up the bowl"))[2 - start]
            np.testing.assert_allclose(first, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("execute_steps=5", "execute_steps = 5: must be 1 to 4, the actions of a chunk"),
        ("execute_steps=0", "execute_steps = 0: must be 1 to 4"),
        ("execute_steps=many", "execute_steps = 'many': must be a number"),
        ("ensemble=0.1", "ensemble = 0.1: needs execute_steps"),
        ("execute_steps=2&ensemble=nan", "ensemble = nan: must be 0 or more"),
    ],
)
def test_queues_that_cannot_be(served: tuple[str, PolicyServer], query: str, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        Client(f"{served[0]}/?{query}")


def test_limits(checkpoint: Path) -> None:
    fields = seen(**{"observation/cartesian_position": np.array([0.5, 0.0, 0.3, 0.0, 0.0, 0.0])})
    actions = expected(checkpoint, fields)
    longest = float(np.linalg.norm(actions[:, :3], axis=1).max())
    box = (-10.0, 10.0, -10.0, 10.0, 0.2, 10.0)
    with serving(checkpoint, limits=Limits((longest * 1.01,), box, 1e-3)) as (url, replica), Client(url) as client:
        np.testing.assert_allclose(client.infer(fields)["actions"], actions, rtol=0, atol=1e-5)
        low = {**fields, "observation/cartesian_position": np.array([0.5, 0.0, 0.1])}
        with pytest.raises(RuntimeError, match=r"unsafe: the hand stands at z = 0.1 m, outside the workspace"):
            client.infer(low)
        assert replica._metrics.text().decode().count('outcome="unsafe",protocol="websocket"') >= 1
        replica._engine.limits = Limits((longest * 0.99,))
        with pytest.raises(RuntimeError, match=rf"unsafe: action \d moves by {longest:.4g}, more than"):
            client.infer(fields)
        assert replica.fault() is None
    wrong = PolicyServer(str(checkpoint), {}, ServeOptions(dtype="float32", limits=Limits((1.0, 2.0))))
    assert wrong.fault() == "--max-step = 1,2: must be one number or 7, one for each dimension"
