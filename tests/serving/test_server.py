"""A robot's client, written against the published protocol, drives a policy on Ray Serve."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import json_numpy
import numpy as np
import pytest
import torch
from openpi_client import Client
from safetensors.torch import load_file, save_file
from serving_data import STATISTICS, TOKEN
from websockets.exceptions import ConnectionClosedError, InvalidStatus

from maps_ray.models import CheckpointError, load_policy
from maps_ray.serving.options import ServeOptions
from maps_ray.serving.server import PolicyServer, start

# As the published clients do it: json-numpy takes json's place, requests sends and reads the objects.
CLIENT = """
import io
import sys
import json_numpy
json_numpy.patch()
import numpy as np
import requests
url, token = sys.argv[1:]
image = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
observation = {"full_image": image, "wrist_image": image[::-1].copy(), "state": np.linspace(-1, 1, 8),
               "instruction": "pick up the red bowl"}
answer = requests.post(url, json=observation, headers={"Authorization": f"Bearer {token}"}, timeout=60)
answer.raise_for_status()
actions = answer.json()
assert isinstance(actions, list) and isinstance(actions[0], np.ndarray)
# Through a buffer: numpy asks a file for its position, which a pipe has not.
buffer = io.BytesIO()
np.save(buffer, np.stack(actions))
sys.stdout.buffer.write(buffer.getvalue())
"""


def post(url: str, body: bytes, token: str | None = TOKEN, method: str = "POST") -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, body if method == "POST" else None, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def observation(**changes: Any) -> dict[str, Any]:
    image = np.zeros((32, 32, 3), np.uint8)
    return {"full_image": image, "wrist_image": image, "state": np.zeros(8), "instruction": "pick up", **changes}


def test_published_client_gets_the_policys_actions(checkpoint: Path, url: str, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", CLIENT, url, TOKEN], capture_output=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr.decode()
    (tmp_path / "actions.npy").write_bytes(result.stdout)
    actions = np.load(tmp_path / "actions.npy")
    image = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
    policy = load_policy(checkpoint)
    expected = policy.predict([image, image[::-1]], "pick up the red bowl", np.linspace(-1, 1, 8))
    assert actions.shape == (4, 7)
    np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-5)


def test_openpis_client_gets_the_same_actions(checkpoint: Path, url: str) -> None:
    image = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
    seen = {
        "observation/image": image,
        "observation/wrist_image": image[::-1],
        "observation/state": np.linspace(-1, 1, 8),
    }
    address = url.replace("http://", "ws://").removesuffix("/act")
    with Client(address, TOKEN) as client:
        assert client.metadata["action_horizon"] == 4 and client.metadata["num_images"] == 2
        for _ in range(2):
            answer = client.infer({**seen, "prompt": "pick up the red bowl"})
        assert answer["server_timing"]["infer_ms"] > 0 and answer["server_timing"]["prev_total_ms"] > 0
        with pytest.raises(RuntimeError, match="the message has 300000 bytes, more than 200000"):
            client.say(bytes(300_000))
        assert client.infer({**seen, "prompt": "pick up the red bowl"})["actions"].shape == (4, 7)
    expected = load_policy(checkpoint).predict([image, image[::-1]], "pick up the red bowl", np.linspace(-1, 1, 8))
    np.testing.assert_allclose(answer["actions"], expected, rtol=0, atol=1e-5)
    # A message beyond what the proxy takes ends its own connection, and no other.
    with Client(address, TOKEN) as greedy, Client(address, TOKEN) as client:
        with pytest.raises(ConnectionClosedError):
            greedy.say(bytes(17 * 2**20))
        assert client.infer({**seen, "prompt": "pick up the red bowl"})["actions"].shape == (4, 7)
    with pytest.raises(InvalidStatus, match="403"):
        Client(address, "another token")
    for path, text in (
        ("/health", '"status": "ok"'),
        ("/healthz", "OK"),
        ("/metrics", 'maps_ray_latency_seconds{quantile="0.9"'),
    ):
        with urllib.request.urlopen(url.removesuffix("/act") + path, timeout=60) as page:
            assert text in page.read().decode(), path


def test_client_without_json_numpy_for_its_requests(url: str) -> None:
    status, text = post(url, json.dumps({"encoded": json_numpy.dumps(observation())}).encode())
    assert status == 200 and isinstance(text, str)
    assert np.stack(json_numpy.loads(text)).shape == (4, 7)


def test_token(url: str) -> None:
    body = json_numpy.dumps(observation()).encode()
    for token in (None, "another", TOKEN + "x"):
        assert post(url, body, token) == (401, {"error": "send the server's token as `Authorization: Bearer ...`"})
    assert post(url, body)[0] == 200


def test_body_limit(url: str) -> None:
    large = json_numpy.dumps(observation(full_image=np.zeros((300, 300, 3), np.uint8))).encode()
    assert len(large) > 200_000
    assert post(url, large) == (413, {"error": "the request has more than 200000 bytes"})
    # Without a length, in pieces.
    host, _, path = url.removeprefix("http://").partition("/")
    address, _, port = host.partition(":")
    with socket.create_connection((address, int(port)), timeout=60) as connection:
        head = f"POST /{path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {TOKEN}\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for start_ in range(0, len(large), 65536):
            piece = large[start_ : start_ + 65536]
            connection.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert b" 413 " in connection.recv(65536).split(b"\r\n")[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wrist_image": None}, "`wrist_image` must be"),
        ({"left_wrist_image": np.zeros((8, 8, 3), np.uint8)}, "3 images were given; the policy reads 2"),
        ({"state": None}, "proprio was not given"),
        ({"state": [1.0]}, "proprio has shape [1], expected [8]"),
        ({"instruction": ""}, "`instruction` must be a sentence"),
        ({"instruction": "pick \ud800 up"}, "half of a surrogate pair"),
    ],
)
def test_bad_observations(url: str, changes: dict[str, Any], message: str) -> None:
    status, answer = post(url, json_numpy.dumps(observation(**changes)).encode())
    assert status == 400 and message in answer["error"]


def test_other_paths_and_methods(url: str) -> None:
    assert post(url, b"", method="GET")[0] == 405
    assert post(url.replace("/act", "/weights"), b"{}")[0] == 404


def spoilt(checkpoint: Path, out: Path, file: str, change: Any) -> Path:
    """A copy of the checkpoint with one JSON file changed."""
    folder = Path(shutil.copytree(checkpoint, out))
    value = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(change(value)))
    return folder


def test_nothing_starts_with_statistics_that_say_no_units(checkpoint: Path, tmp_path: Path) -> None:
    entry = STATISTICS["demos"]
    two = spoilt(checkpoint, tmp_path / "two", "dataset_statistics.json", lambda all_: {**all_, "others": entry})
    with pytest.raises(CheckpointError, match="choose one of demos, others"):
        start(two, ServeOptions())
    with pytest.raises(CheckpointError, match="no data set 'other'; choose one of demos, others"):
        start(two, ServeOptions(), {"dataset": "other"})
    with pytest.raises(CheckpointError, match="normalization = 'none': must be one of"):
        start(two, ServeOptions(), {"dataset": "demos", "normalization": "none"})
    broken = {"demos": {**entry, "action": {**entry["action"], "q99": [1.0, float("nan"), *[1.0] * 5]}}}
    with pytest.raises(CheckpointError, match=r"q99\[1\] = nan: must be a finite number"):
        start(spoilt(checkpoint, tmp_path / "nan", "dataset_statistics.json", lambda _: broken), ServeOptions())


def answer(server: PolicyServer, body: bytes) -> tuple[int, Any]:
    """What one replica says to a request, without the network."""
    sent: list[dict[str, Any]] = []
    headers = [(b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": "/act", "query_string": b"", "headers": headers}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    asyncio.run(server.app()(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_a_robot_never_gets_actions_that_are_not_finite(checkpoint: Path) -> None:
    server = PolicyServer(str(checkpoint), {}, ServeOptions(dtype="float32"))
    assert server.fault() is None
    body = json_numpy.dumps(observation()).encode()
    assert answer(server, body)[0] == 200
    with torch.no_grad():
        next(server._engine.policy.parameters()).fill_(torch.nan)
    status, said = answer(server, body)
    assert status == 500 and "28 of 28 predicted values are not finite" in said["error"]


def test_a_damaged_head_is_found_before_anything_starts_and_when_it_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    (file,) = folder.glob("action_head--*")
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = torch.inf
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="values that are not finite in"):
        start(folder, ServeOptions())
    server = PolicyServer(str(folder), {}, ServeOptions(dtype="float32"))
    assert f"{file}: values that are not finite in" in str(server.fault())
    status, said = answer(server, json_numpy.dumps(observation()).encode())
    assert status == 503 and "the policy is not loaded" in said["error"]


def test_nothing_starts_with_a_bad_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        start(tmp_path / "nowhere", ServeOptions())
    with pytest.raises(CheckpointError, match="unexpected keyword argument 'images_number'"):
        start(checkpoint, ServeOptions(), {"images_number": 3})
    with pytest.raises(CheckpointError, match="num_images = 3: the checkpoint was trained with 2"):
        start(checkpoint, ServeOptions(), {"num_images": 3})
