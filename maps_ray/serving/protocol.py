"""What robot clients of OpenVLA-OFT send to `/act`, and what they get back. No Ray.

A request is a JSON object in which numpy arrays are written as json-numpy does it
(`{"__numpy__": base64, "dtype": ..., "shape": ...}`):

- `full_image`: RGB (H, W, 3) uint8, the primary camera;
- every other key with `wrist` in it, in the order of the request: further cameras;
- `state`: proprioception, in recorded units;
- `instruction`: the task's sentence.

The answer is a list of arrays, one action for each step of the chunk. A client that has no json-numpy for its own
requests wraps the whole object as text, `{"encoded": "..."}`, and gets a text back. Lists are taken for arrays.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import json_numpy
import numpy as np
from numpy.typing import NDArray


class RequestError(ValueError):
    """A request that cannot be answered: HTTP status and what is wrong."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ActionRequest:
    """One observation."""

    images: list[NDArray[np.uint8]]
    instruction: str
    state: NDArray[np.float64] | None
    encoded: bool
    """The request was wrapped as text, and so must be the answer."""


def decode_request(body: bytes) -> ActionRequest:
    """Reads the body of a request.

    Raises:
        RequestError: no such object, or a field that is missing or of another kind.
    """
    payload = _object(body, "the body")
    encoded = "encoded" in payload
    if encoded:
        if len(payload) != 1 or not isinstance(payload["encoded"], str):
            raise RequestError(400, "`encoded` must be a text, and stand alone")
        payload = _object(payload["encoded"].encode(), "`encoded`")
    instruction = payload.get("instruction")
    if not isinstance(instruction, str) or not instruction.strip():
        raise RequestError(400, "`instruction` must be a sentence")
    try:
        instruction.encode()
    except UnicodeEncodeError:
        raise RequestError(400, "`instruction` has half of a surrogate pair, which is no character") from None
    if "full_image" not in payload:
        raise RequestError(400, "`full_image` is missing")
    cameras = ["full_image", *(name for name in payload if "wrist" in name)]
    state = payload.get("state")
    return ActionRequest(
        images=[_image(name, payload[name]) for name in cameras],
        instruction=instruction,
        state=None if state is None else _numbers("state", state),
        encoded=encoded,
    )


def encode_answer(actions: NDArray[np.float32], encoded: bool) -> bytes:
    """Actions (chunk, action_dim) -> the body of the answer."""
    text = json_numpy.dumps(list(actions))
    return (json.dumps(text) if encoded else text).encode()


def _object(text: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_hook=json_numpy.object_hook)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RequestError(400, f"{what} cannot be read as JSON with arrays: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(400, f"{what} must be a JSON object")
    return value


def _image(name: str, value: Any) -> NDArray[np.uint8]:
    array = _array(name, value)
    if array.dtype != np.uint8 and array.dtype.kind in "iu" and array.size and 0 <= array.min() <= array.max() <= 255:
        array = array.astype(np.uint8)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise RequestError(400, f"`{name}` must be (H, W, 3) uint8, found {list(array.shape)} {array.dtype}")
    return array


def _numbers(name: str, value: Any) -> NDArray[np.float64]:
    array = _array(name, value)
    if array.dtype.kind not in "iuf":
        raise RequestError(400, f"`{name}` must hold numbers, found {array.dtype}")
    return array.astype(np.float64)


def _array(name: str, value: Any) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except ValueError:
        raise RequestError(400, f"`{name}` is a list of unequal lists") from None
