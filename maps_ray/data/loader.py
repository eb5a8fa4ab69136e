"""Training batches on the device, made in loader processes while the last ones are trained on."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from maps_ray.data.batches import Encoder
from maps_ray.data.dataset_error import DatasetError

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

    import torch

    Batch = dict[str, torch.Tensor]

# Batches that each process makes ahead.
_AHEAD = 2


def loader_processes(cpus: float, gpu: bool) -> int:
    """Loader processes of a worker with so many CPU cores: all but its own, and one at least beside a GPU, which would
    stand still while the worker decodes."""
    return max(int(cpus) - 1, int(gpu))


class Planned(Protocol):
    """`Batches`, `EvaluationBatches`."""

    encoder: Encoder

    def plans(self, first: int, stop: int) -> Iterator[list[tuple[int, int]]]:
        """(position, sample) of the rows of each batch of steps first .. stop - 1."""


class Loader:
    """Iterates over the batches of steps first .. stop - 1, on the device.

    With a GPU the batches come through pinned memory, and are copied on a stream of their own: the host waits for
    nothing, and the copy runs beside the kernels of the last step. Which samples stand in which batch does not depend
    on the number of processes. Use it as a context manager, or call `close`, so that the processes end.

    The processes come from a fork server, which starts without the threads and CUDA state of this process; they ignore
    Ctrl-C, and end by themselves when this process is killed.

    Args:
        batches: which samples make which batch.
        first, stop: optimizer steps.
        device: where batches go.
        processes: loader processes; 0 makes batches in this one.

    Raises:
        DatasetError: by `next`, where a sample cannot be read.
    """

    # torch is imported inside, here and below: who checks data imports this room, and needs none.
    def __init__(self, batches: Planned, first: int, stop: int, *, device: torch.device, processes: int = 0) -> None:
        import torch
        from torch.utils.data import DataLoader

        self._device = device
        self.padded = False
        """Whether a sample of the last batch is shorter than another, known before the batch was copied."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._batches: Iterator[Batch | _Fault] | None = iter(
            DataLoader(
                _Guarded(batches.encoder),  # type: ignore[arg-type]
                batch_size=None,
                sampler=batches.plans(first, stop),
                collate_fn=_as_it_is,  # type: ignore[arg-type]  # torch's type knows no loader without batch_size
                pin_memory=self._stream is not None,
                # Else the seed that it draws for its processes would come from the generator that training uses.
                generator=torch.Generator(),
                num_workers=processes,
                multiprocessing_context=_fork_server() if processes else None,
                persistent_workers=processes > 0,
                prefetch_factor=_AHEAD if processes else None,
                worker_init_fn=_begin,
            )
        )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        if self._batches is None:
            raise StopIteration
        batch = next(self._batches)
        if isinstance(batch, _Fault):
            raise DatasetError(batch.message)
        self.padded = not batch["attention_mask"].numpy().all()
        return batch if self._stream is None else self._copied(batch, self._stream)

    def _copied(self, batch: dict[str, torch.Tensor], stream: torch.cuda.Stream) -> dict[str, torch.Tensor]:
        import torch

        with torch.cuda.stream(stream):
            copied = {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(stream)
        for tensor in copied.values():
            # Its memory must not be given to another copy before the step has used it.
            tensor.record_stream(current)
        return copied

    def close(self) -> None:
        """Ends the processes; batches made but not taken are dropped."""
        # The iterator ends its processes when it goes, and offers no other way.
        self._batches = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Fault:
    message: str


class _Guarded:
    """Hands an error on as it was raised: DataLoader would put its own traceback into the message."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def __getitem__(self, plan: list[tuple[int, int]]) -> Batch | _Fault:
        try:
            return self._encoder[plan]
        except DatasetError as error:
            return _Fault(str(error))


def _fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    # Imported once by the server, and shared by all that it forks.
    context.set_forkserver_preload(["torch", "maps_ray.data.loader"])
    # The processes share the cores: each multiplies on one. numpy reads it when it is imported, torch is told later.
    name = "OPENBLAS_NUM_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
    return context


def _as_it_is(batch: Batch | _Fault) -> Batch | _Fault:
    return batch


def _begin(number: int) -> None:
    # Ctrl-C reaches the whole group of processes; the worker decides when its loader processes end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _except_a_worker_that_left
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _except_a_worker_that_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # multiprocessing's thread that hands tensors over reports here; a worker that was interrupted in the middle of one
    # is no fault of this process, which ends with it.
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _end_with_parent() -> None:
    # DataLoader watches the process that forked this one. That is the fork server, which lives as long as any of its
    # children: after a kill -9 of the worker both would wait for each other for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
