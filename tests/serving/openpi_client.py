"""A client of openpi's websocket protocol, written from its description: what a robot's own computer runs."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
from websockets.sync.client import ClientConnection, connect


def pack(value: Any) -> bytes:
    def encode(item: Any) -> Any:
        if isinstance(item, np.ndarray):
            return {b"__ndarray__": True, b"data": item.tobytes(), b"dtype": item.dtype.str, b"shape": item.shape}
        if isinstance(item, np.generic):
            return {b"__npgeneric__": True, b"data": item.item(), b"dtype": item.dtype.str}
        raise TypeError(type(item))

    return msgpack.packb(value, default=encode)


def unpack(message: bytes) -> Any:
    def decode(item: dict[Any, Any]) -> Any:
        if b"__ndarray__" in item:
            return np.ndarray(buffer=item[b"data"], dtype=np.dtype(item[b"dtype"]), shape=item[b"shape"])
        if b"__npgeneric__" in item:
            return np.dtype(item[b"dtype"]).type(item[b"data"])
        return item

    return msgpack.unpackb(message, object_hook=decode)


class Client:
    """One connection; `infer` raises `RuntimeError` with the server's text, as openpi's client does."""

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {"Authorization": f"Api-Key {key}"} if key else None
        self.socket: ClientConnection = connect(url, compression=None, max_size=None, additional_headers=headers)
        first = self.socket.recv(timeout=60)
        if isinstance(first, str):
            raise RuntimeError(first)
        self.metadata = unpack(first)

    def say(self, message: bytes | str) -> Any:
        self.socket.send(message)
        answer = self.socket.recv(timeout=60)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return unpack(answer)

    def infer(self, observation: dict[str, Any]) -> Any:
        return self.say(pack(observation))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
