"""What robot clients of openpi send over a websocket, and what they get back. No Ray.

The server speaks first: one message with what it is. Then each message of the client is one observation, and each
answer one chunk of actions. Messages are binary, msgpack maps in which numpy arrays are maps too
(`{b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [...]}`) and numpy scalars are
`{b"__npgeneric__": True, b"data": number, b"dtype": "<f4"}`. A text message is never an answer: it says what is wrong.

Facts: github.com/Physical-Intelligence/openpi, `websocket_policy_server.py` and `openpi_client`, whose LIBERO and DROID
clients name the fields of an observation that are read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from maps_ray.serving.protocol import ActionRequest, RequestError, read_image, read_numbers, read_sentence

PRIMARY = ("observation/image", "observation/exterior_image_1_left")
"""The primary camera of a LIBERO and of a DROID client."""
_STATE = "observation/state"
_JOINTS = ("observation/joint_position", "observation/gripper_position")
_HAND = "observation/cartesian_position"
"""DROID's name of the hand's position in m and its Euler angles in rad."""


def pack(value: object) -> bytes:
    """A value of maps, lists, texts, numbers and numpy arrays -> one message."""
    return bytes(msgpack.packb(value, default=_pack_array))


def unpack(message: bytes) -> object:
    """One message -> its value; arrays are copies that may be written.

    Raises:
        RequestError: no msgpack, or an array whose parts contradict each other.
    """
    try:
        value: object = msgpack.unpackb(message, object_hook=_unpack_array)
    except RequestError:
        raise
    except Exception as error:  # msgpack has a class of its own for each fault, numpy raises what it likes
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise RequestError(400, f"the message cannot be read as msgpack with numpy arrays: {reason}") from None
    return value


def decode_observation(message: bytes) -> tuple[ActionRequest, bool]:
    """One message -> the observation, and whether a new episode begins with it (`reset: true`).

    Raises:
        RequestError: no such message, or a field that is missing or of another kind.
    """
    fields = unpack(message)
    if not isinstance(fields, dict):
        raise RequestError(400, f"an observation must be a map of fields, found {type(fields).__name__}")
    begins = fields.get("reset", False)
    if not isinstance(begins, bool | np.bool_):
        raise RequestError(400, "`reset` must be true or false")
    cameras = _cameras(fields)
    state, position = _state(fields)
    request = ActionRequest(
        images=[read_image(name, fields[name]) for name in cameras],
        instruction=read_sentence("prompt", fields.get("prompt")),
        state=state,
        encoded=False,
        cameras=cameras,
        position=position,
    )
    return request, bool(begins)


def encode_actions(actions: NDArray[np.float32], timing: Mapping[str, float]) -> bytes:
    """Actions (n, action_dim) and milliseconds -> the answer."""
    return pack({"actions": np.ascontiguousarray(actions), "server_timing": dict(timing)})


def _cameras(fields: Mapping[object, object]) -> tuple[str, ...]:
    """Names of an observation's images: the primary camera, wrist cameras, others; each kind in the message's order."""
    names = [name for name in fields if isinstance(name, str) and name.startswith("observation/") and "image" in name]
    primary = next((name for name in PRIMARY if name in names), None)
    if primary is None:
        known = ", ".join(sorted(str(name) for name in fields)) or "nothing"
        raise RequestError(400, f"`{PRIMARY[0]}` (or `{PRIMARY[1]}`) is missing; the message has {known}")
    wrist = [name for name in names if "wrist" in name]
    return (primary, *wrist, *(name for name in names if name != primary and name not in wrist))


def _state(fields: Mapping[object, object]) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """The robot's state, and the hand's position (3,) where the observation says it."""
    state = _vector(_STATE, fields[_STATE]) if _STATE in fields else None
    position = state[:3] if state is not None and len(state) >= 3 else None
    parts = [_vector(name, fields[name]) for name in _JOINTS if name in fields]
    if state is None and parts:
        if len(parts) != len(_JOINTS):
            raise RequestError(400, f"{' and '.join(f'`{name}`' for name in _JOINTS)} must come together")
        state = np.concatenate(parts)
    if _HAND in fields:
        position = _vector(_HAND, fields[_HAND])[:3]
        if len(position) < 3:
            raise RequestError(400, f"`{_HAND}` must start with x, y and z")
    return state, position


def _vector(name: str, value: object) -> NDArray[np.float64]:
    array = np.atleast_1d(read_numbers(name, value))
    if array.ndim != 1:
        batch = ": take the batch dimension off" if len(array) == 1 else ""
        raise RequestError(400, f"`{name}` must be one vector, found shape {list(array.shape)}{batch}")
    return array


def _pack_array(value: object) -> dict[bytes, object]:
    if isinstance(value, np.ndarray | np.generic):
        # As openpi's own `msgpack_numpy`: bytes do not say what such a value is.
        if value.dtype.kind in "VOc":
            raise ValueError(f"the protocol has no arrays of {value.dtype}")
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise TypeError(f"the protocol has no {type(value).__name__}")


def _unpack_array(fields: dict[object, Any]) -> object:
    if b"__ndarray__" not in fields and b"__npgeneric__" not in fields:
        return fields
    dtype = np.dtype(fields[b"dtype"])
    if dtype.kind in "VOc":
        raise RequestError(400, f"arrays of {dtype} are not read")
    if b"__npgeneric__" in fields:
        return dtype.type(fields[b"data"])
    shape = tuple(fields[b"shape"])
    # In Python's integers: a product of 64 bits may wrap around to the right size.
    size, expected = len(fields[b"data"]), int(np.prod(shape, dtype=object)) * dtype.itemsize
    if size != expected or any(side < 0 for side in shape):
        raise RequestError(400, f"an array of shape {list(shape)} {dtype} has {expected} bytes, found {size}")
    return np.frombuffer(fields[b"data"], dtype).reshape(shape).copy()
