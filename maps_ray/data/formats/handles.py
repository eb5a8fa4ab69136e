"""A few open files or decoded parts, kept for the next time they are asked for, in each process for itself."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")
_OF_PARENTS: list[object] = []
"""What forked processes inherited; never closed here."""


class Handles(Generic[Value]):
    """The values used last. Pickled it is empty, and a forked process starts with none: two processes that share a
    file's position would read each other's bytes.

    Args:
        most: values kept.
        close: what to do with one that is dropped.
    """

    def __init__(self, most: int, close: Callable[[Value], None] | None = None) -> None:
        self._most, self._close = most, close
        self._start()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made when it is not there."""
        if self._pid != os.getpid():
            # Not even dropped: a decoder would wait for its threads, which the fork left behind.
            _OF_PARENTS.append(self._kept)
            self._start()
        with self.lock:
            if key not in self._kept:
                self._kept[key] = make()
            self._kept.move_to_end(key)
            while len(self._kept) > self._most:
                self._drop()
            return self._kept[key]

    def peek(self, key: Hashable) -> Value | None:
        """The value of a key if it is there."""
        return self._kept.get(key) if self._pid == os.getpid() else None

    def clear(self) -> None:
        """Drops all values."""
        if self._pid == os.getpid():
            while self._kept:
                self._drop()

    def _drop(self) -> None:
        value = self._kept.popitem(last=False)[1]
        if self._close is not None:
            self._close(value)

    def _start(self) -> None:
        self._pid = os.getpid()
        self._kept: OrderedDict[Hashable, Value] = OrderedDict()
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, object]:
        return {"_most": self._most, "_close": self._close}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._start()
