"""Notice that a worker is about to be taken away: SIGTERM to its process, or Ray draining its node.

A run that trains makes a checkpoint first. A process that got SIGTERM then leaves, so that its group starts again
elsewhere; on a node that drains the group works on until the node is gone. A second SIGTERM, or one outside of
training, ends the process as Ray has it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from maps_ray.ray_internals import preemption

_told = threading.Event()
_heeded = threading.Event()
_seen: list[object | None] = [None]


class Leaving(RuntimeError):
    """A worker that was told to end has done so, after a checkpoint; the others start again with another."""


def watch_sigterm() -> None:
    """From now on SIGTERM is a notice; called once in a worker process, in its main thread."""
    before = signal.getsignal(signal.SIGTERM)

    def notice(number: int, frame: FrameType | None) -> None:
        if _heeded.is_set() and not _told.is_set():
            _told.set()
            return
        # The second one, or one that no checkpoint will answer, is Ray's to handle.
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(number)

    signal.signal(signal.SIGTERM, notice)


@contextmanager
def heeded() -> Iterator[None]:
    """While this lasts, the run asks `given` after each step."""
    _heeded.set()
    try:
        yield
    finally:
        _heeded.clear()


def given() -> bool:
    """Whether this process has got a notice that no checkpoint has answered yet."""
    return _told.is_set() or preemption() not in (None, _seen[0])


def answer() -> None:
    """A checkpoint has been made since the notice.

    Raises:
        Leaving: this process was told to end.
    """
    # Ray goes on telling of the same node until it is gone: one checkpoint for it is enough.
    _seen[0] = preemption()
    if _told.is_set():
        raise Leaving("told to end by SIGTERM, which it did after a checkpoint")
