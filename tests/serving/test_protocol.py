"""Requests as robot clients write them, and requests that nobody should write."""

from __future__ import annotations

import json
from typing import Any

import json_numpy
import numpy as np
import pytest

from maps_ray.serving.protocol import RequestError, decode_request, encode_answer

IMAGE = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
OBSERVATION = {
    "full_image": IMAGE,
    "left_wrist_image": IMAGE + 1,
    "right_wrist_image": IMAGE + 2,
    "state": np.arange(14, dtype=np.float32),
    "instruction": "fold the towel",
}


def test_request_with_arrays() -> None:
    request = decode_request(json_numpy.dumps(OBSERVATION).encode())
    assert [int(image[0, 0, 0]) for image in request.images] == [0, 1, 2]
    assert all(image.dtype == np.uint8 and image.shape == (4, 5, 3) for image in request.images)
    assert request.state is not None and request.state.tolist() == list(range(14))
    assert request.instruction == "fold the towel" and not request.encoded


def test_request_as_text_and_with_lists() -> None:
    wrapped = decode_request(json.dumps({"encoded": json_numpy.dumps(OBSERVATION)}).encode())
    assert wrapped.encoded and np.array_equal(wrapped.images[2], IMAGE + 2)
    lists = {"full_image": IMAGE.tolist(), "instruction": "open the drawer", "state": [1, 2.5]}
    plain = decode_request(json.dumps(lists).encode())
    assert np.array_equal(plain.images[0], IMAGE) and plain.images[0].dtype == np.uint8
    assert plain.state is not None and plain.state.tolist() == [1, 2.5]
    assert decode_request(json.dumps({**lists, "state": None}).encode()).state is None


def test_answer() -> None:
    actions = np.linspace(-1, 1, 14, dtype=np.float32).reshape(2, 7)
    for encoded in (False, True):
        body = encode_answer(actions, encoded)
        text = json.loads(body) if encoded else body
        steps = json_numpy.loads(text)
        assert len(steps) == 2 and all(step.dtype == np.float32 for step in steps)
        assert np.array_equal(steps, actions)


def changed(**changes: Any) -> bytes:
    return json_numpy.dumps({**OBSERVATION, **changes}).encode()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body cannot be read"),
        (b"\xff\xfe", "the body cannot be read"),
        (b'{"full_image": {"__numpy__": "", "dtype": "|u1", "shape": []}}', "the body cannot be read"),
        (b"[" * 100_000, "the body cannot be read"),
        (b"[1]", "must be a JSON object"),
        (b'{"__numpy__": "AAAA", "dtype": "|O", "shape": [1]}', "the body cannot be read"),
        (b'{"__numpy__": "AAAA", "dtype": "|u1", "shape": [4]}', "the body cannot be read"),
        (b'{"__numpy__": "AAAA", "dtype": "|u1"}', "the body cannot be read"),
        (b'{"__numpy__": "AAAA", "dtype": "|u1", "shape": [3]}', "must be a JSON object"),
        (b'{"encoded": "{}", "instruction": "x"}', "stand alone"),
        (b'{"encoded": "nonsense"}', "`encoded` cannot be read"),
        (changed(instruction=" "), "`instruction` must be a sentence"),
        (changed(instruction=5), "`instruction` must be a sentence"),
        (json_numpy.dumps({"instruction": "x"}).encode(), "`full_image` is missing"),
        (changed(full_image=IMAGE.astype(np.float32)), r"`full_image` must be \(H, W, 3\) uint8"),
        (changed(left_wrist_image=IMAGE[..., :2]), "`left_wrist_image` must be"),
        (changed(full_image=[[[1, 2], [3]]]), "list of unequal lists"),
        (changed(full_image=(IMAGE.astype(np.int64) + 300).tolist()), "`full_image` must be"),
        (changed(state=["a"]), "`state` must hold numbers"),
    ],
)
def test_requests_that_are_refused(body: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        decode_request(body)
    assert caught.value.status == 400
