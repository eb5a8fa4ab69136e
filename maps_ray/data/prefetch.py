"""Makes batches in a background thread while the last one is being trained on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

Item = TypeVar("Item")
_POLL_S = 0.1


class Prefetch(Generic[Item]):
    """Iterates over `items` in order, at most `depth` ahead of the consumer.

    An error in the background is raised by the consumer's next `next()`. Use it as a context manager, or call
    `close`, so that the thread ends when the consumer stops early.
    """

    def __init__(self, items: Iterable[Item], depth: int = 4) -> None:
        self._queue: queue.Queue[tuple[Item | None, BaseException | None, bool]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._produce, args=(items,), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._ended:
            raise StopIteration
        item, error, ended = self._queue.get()
        self._ended = ended
        if error is not None:
            raise error
        if ended:
            raise StopIteration
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Ends the thread; batches made but not taken are dropped."""
        self._stop.set()
        self._ended = True
        self._thread.join()

    def __enter__(self) -> Prefetch[Item]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _produce(self, items: Iterable[Item]) -> None:
        try:
            for item in items:
                if not self._put(item, None, False):
                    return
            self._put(None, None, True)
        except BaseException as error:
            self._put(None, error, True)

    def _put(self, item: Item | None, error: BaseException | None, ended: bool) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put((item, error, ended), timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False
