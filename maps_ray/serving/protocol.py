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
    cameras: tuple[str, ...]
    """The images' names in the request."""
    position: NDArray[np.float64] | None
    """The hand's, (3,) in m, for the workspace; none where the request does not say it."""


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
    if "full_image" not in payload:
        raise RequestError(400, "`full_image` is missing")
    cameras = ("full_image", *(name for name in payload if "wrist" in name))
    given = payload.get("state")
    state = None if given is None else read_numbers("state", given)
    return ActionRequest(
        images=[read_image(name, payload[name]) for name in cameras],
        instruction=read_sentence("instruction", payload.get("instruction")),
        state=state,
        encoded=encoded,
        cameras=cameras,
        position=state[:3] if state is not None and state.ndim == 1 and len(state) >= 3 else None,
    )


def encode_answer(actions: NDArray[np.float32], encoded: bool) -> bytes:
    """Actions (chunk, action_dim) -> the body of the answer."""
    text = json_numpy.dumps(list(actions))
    return (json.dumps(text) if encoded else text).encode()


def _object(text: bytes, what: str) -> dict[str, object]:
    try:
        value = json.loads(text, object_hook=json_numpy.object_hook)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise RequestError(400, f"{what} cannot be read as JSON with arrays: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(400, f"{what} must be a JSON object")
    return value


def read_sentence(name: str, value: object) -> str:
    """A field that must be a sentence; raises `RequestError` where it is none."""
    if not isinstance(value, str) or not value.strip():
        raise RequestError(400, f"`{name}` must be a sentence")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(400, f"`{name}` has half of a surrogate pair, which is no character") from None
    return str(value)


def read_image(name: str, value: object) -> NDArray[np.uint8]:
    """A field that must be an image; raises `RequestError` where it is none, with what it looks like instead."""
    array = _array(name, value)
    # What comes as lists of JSON's numbers is int64.
    if array.dtype != np.uint8 and array.dtype.kind in "iu" and array.size and 0 <= array.min() <= array.max() <= 255:
        array = array.astype(np.uint8)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        given = f"found {list(array.shape)} {array.dtype}"
        raise RequestError(400, f"`{name}` must be (H, W, 3) uint8, {given}{_remedy(array)}")
    return np.asarray(array, np.uint8)


def _remedy(array: NDArray[np.generic]) -> str:
    """What would make this array an image, as far as that can be told."""
    said = ""
    if array.ndim == 4 and len(array) == 1:
        said += "; take the batch dimension off"
    if array.ndim >= 3 and array.shape[-3] == 3 != array.shape[-1]:
        said += "; put the channels last"
    if array.dtype.kind == "f" and array.size and array.min() >= 0 and array.max() <= 1:
        said += "; its values are 0..1: send 0..255, (255 * image).astype(np.uint8)"
    elif array.dtype.kind == "f":
        said += "; send bytes, image.astype(np.uint8)"
    return said


def read_numbers(name: str, value: object) -> NDArray[np.float64]:
    """A field that must hold numbers; raises `RequestError` where it does not."""
    array = _array(name, value)
    if array.dtype.kind not in "iuf":
        raise RequestError(400, f"`{name}` must hold numbers, found {array.dtype}")
    return array.astype(np.float64)


def _array(name: str, value: object) -> NDArray[np.generic]:
    try:
        return np.asarray(value)
    except ValueError:
        raise RequestError(400, f"`{name}` is a list of unequal lists") from None
