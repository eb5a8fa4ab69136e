"""Runs independent pieces of simulator work, each in a process of its own, a few side by side.

A simulator process keeps the meshes and graphics contexts of every task that it has loaded, and dies without a word
when memory ends. So each piece gets a fresh process (2 s), and its exit status is looked at.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

Unit = TypeVar("Unit")


class ProcessDied(RuntimeError):
    """A worker process ended before its work was done."""


def run_in_processes(
    function: Callable[[Unit], object], units: Iterable[Unit], workers: int, *, poll: float = 1.0
) -> Iterator[None]:
    """Calls `function(unit)` for each unit; closing the iterator ends the processes that still run.

    Args:
        function: importable by name; keeps its result itself, in a file.
        units: what to call it with; must pickle.
        workers: processes at a time.
        poll: yields at least this often, in seconds, so that the caller can show progress.

    Raises:
        ProcessDied: a process raised an error (which it has printed) or was killed.
    """
    # A forked process would have the parent's graphics contexts, and locks that its threads held.
    context = multiprocessing.get_context("spawn")
    waiting = deque(units)
    running: dict[BaseProcess, Unit] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                unit = waiting.popleft()
                process = context.Process(target=_call, args=(function, unit), daemon=True)
                process.start()
                running[process] = unit
            wait([process.sentinel for process in running], timeout=poll)
            for ended in [process for process in running if process.exitcode is not None]:
                unit = running.pop(ended)
                if ended.exitcode:
                    raise ProcessDied(_reason(unit, ended.exitcode))
            yield
    finally:
        for left in running:
            left.terminate()
        for left in running:
            left.join()


def _call(function: Callable[[Unit], object], unit: Unit) -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    function(unit)


def _reason(unit: object, exitcode: int) -> str:
    if exitcode == -signal.SIGKILL:
        return f"the process for {unit} was killed, most likely for want of memory: use fewer workers"
    return f"the process for {unit} ended with status {exitcode}; its error stands above"
