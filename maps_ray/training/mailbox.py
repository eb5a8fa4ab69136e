"""How a run's driver and its workers speak: a small Ray actor beside the driver. Files are the record, no signal.

    driver, or trial actor            Mailbox (no CPU)            rank 0: Line, in a thread
      stop()  ───────────────────────>            <── exchange(progress) 5 times a second: stop or not, regroup or not
      state() ───────────────────────>            <── saved(step), ended(outcome)
      give(task), decide(step, word) ─>           <── next_task(), evaluated(step, values): wait for an answer
      (spool of the run's records)                <── record(items) from another node, copy_records()

A mailbox that is lost is started again by Ray, empty. Nothing rests on what it held: the driver says `stop` again,
gives the task again, and workers repeat what has not been answered.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict, Unpack

from maps_ray.run_storage import RunStorage
from maps_ray.tracking import Tracker
from maps_ray.tracking.spool import Spool
from maps_ray.tracking.tracker import Item, SentTracker, take
from maps_ray.training.claims import Claim
from maps_ray.training.mirror import Mirror

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_log = logging.getLogger(__name__)
Word = Literal["go", "stop", "save", "wait"]
"""What a driver says to an evaluation: go on, end here, make a checkpoint and ask again, or ask again."""

# An answer that takes longer is asked for again, so that ranks that wait for rank 0 meet it in a collective meanwhile.
_TURN_S = 20.0
_EXCHANGE_S = 0.2
# The last records of a worker on another node, videos of rollouts among them.
_SEND_S = 60.0


class ProgressValues(TypedDict, total=False):
    """What is shown of a run beside its phase and step."""

    loss: float
    samples_per_second: float
    seconds_left: float | None
    episodes: int
    all_episodes: int


class Progress(ProgressValues, total=False):
    """Where a run stands; empty before the workers have said anything."""

    phase: str
    """In words."""
    step: int
    """Optimizer steps done."""


class Outcome(TypedDict, total=False):
    """How workers end."""

    status: Literal["finished", "stopped", "regroup", "failed"]
    """`regroup`: to go on in another number."""
    message: str
    """Why it failed; the only other field then."""
    step: int
    start_step: int
    """That they began from."""
    metrics: dict[str, float]
    """The last value of each."""


class MergeTask(TypedDict):
    """What is merged and evaluated in place of training; `weights` or `lines` as `training.merge.merge` takes them."""

    run: str
    """Folder of a finished run, or its address on an object store."""
    weights: dict[str, float] | None
    lines: list[float] | None


class RunTask(TypedDict):
    """A run, as its workers are given it."""

    spec: dict[str, object]
    """The resolved spec as plain data."""
    claims: Sequence[Claim]
    """Of its `Fence`."""
    records: Records
    name: NotRequired[str]
    """Tells tasks apart, where workers get one after the other."""
    merge: NotRequired[MergeTask]


class WorkerConfig(TypedDict):
    """What `Fit` tells each worker beside what it is to do."""

    mailbox: ActorHandle[Mailbox]
    gpu: bool
    """Whether each worker has one."""


class MailboxState(TypedDict):
    """What the workers have said so far."""

    task: str | None
    """Name of the one in hand."""
    progress: Progress
    saved: int
    """Step of the newest checkpoint, -1 before there is one."""
    evaluations: dict[int, dict[str, float]]
    """Step -> values."""
    outcome: Outcome | None
    """None while they work."""
    starts: int
    """Groups of workers that have begun."""


class Mailbox:
    """The actor; `open_mailbox` starts one. Its methods are coroutines: who waits in one holds nobody up."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._stop = False
        self._regroup = False
        self._closed = False
        self._task: RunTask | None = None
        self._progress: Progress = {}
        self._saved = -1
        self._outcome: Outcome | None = None
        self._evaluations: dict[int, dict[str, float]] = {}
        self._decides: tuple[str, int] | None = None
        self._decided = -1
        self._words: dict[int, Word] = {}
        self._starts = 0
        self._mirrors: dict[str, Mirror] = {}

    # The driver's side

    async def stop(self) -> None:
        """Asks the workers to make a checkpoint at the next step and to end."""
        async with self._changed:
            self._stop = True
            self._changed.notify_all()

    async def regroup(self) -> None:
        """Asks the workers to end at the next checkpoint that they make anyway, to start again in another number."""
        # Nobody is woken: rank 0 asks 5 times a second, and heeds it at its next checkpoint.
        self._regroup = True

    async def close(self) -> None:
        """Asks workers that wait for a task to end."""
        async with self._changed:
            self._stop = self._closed = True
            self._changed.notify_all()

    async def give(self, task: RunTask, decides: tuple[str, int] | None = None, decided: int = -1) -> None:
        """Hands workers that wait for one their next task, and forgets what was said of the one before.

        Args:
            task: with a `name`.
            decides: workers wait after each evaluation that has this metric, before this step, for `decide`.
            decided: the last step that needs no decision any more.
        """
        async with self._changed:
            self._task, self._decides, self._decided = task, decides, decided
            self._stop = False
            self._progress, self._saved, self._outcome = {}, -1, None
            self._evaluations, self._words = {}, {}
            self._changed.notify_all()

    async def decide(self, step: int, word: Word) -> None:
        """Answers the evaluation of a step. `save` answers it once, and the evaluation is asked for again."""
        async with self._changed:
            self._words[step] = word
            self._changed.notify_all()

    async def state(self, known: int = -1, timeout_s: float = 0.0) -> MailboxState:
        """What the workers said, at once or when there is more of it.

        Args:
            known: the last step whose evaluation the caller has: a later one is news, as an outcome is.
            timeout_s: how long to wait for news.
        """

        def news() -> bool:
            return self._outcome is not None or any(step > known for step in self._evaluations)

        await self._wait(news, timeout_s)
        return {
            "task": self._task["name"] if self._task else None,
            "progress": self._progress,
            "saved": self._saved,
            "evaluations": dict(self._evaluations),
            "outcome": self._outcome,
            "starts": self._starts,
        }

    # The workers' side

    async def started(self) -> None:
        """A group of workers has started."""
        self._starts += 1
        self._regroup = False
        # Of the group before: `Fit` would take it for the end of this one.
        if self._outcome is not None and self._outcome["status"] == "regroup":
            self._outcome = None

    async def exchange(self, progress: Progress | None) -> tuple[bool, bool]:
        """Takes where the run stands, if there is news; returns whether it is to stop, and to regroup."""
        if progress is not None:
            self._progress = progress
        return self._stop, self._regroup

    async def saved(self, step: int) -> None:
        """A checkpoint of this step is complete."""
        async with self._changed:
            self._saved = step
            self._changed.notify_all()

    async def record(self, run_dir: str, items: list[Item]) -> None:
        """Puts records of a worker on another node into the run's spool, which lies on this one."""
        await asyncio.to_thread(take, Spool(run_dir), items)

    async def copy_records(self, run_dir: str, address: str) -> None:
        """Brings the copy of the run's spool on the object store up to date."""
        mirror = self._mirrors.setdefault(address, Mirror(Path(run_dir), RunStorage(address)))
        await asyncio.to_thread(mirror.push_records)

    async def ended(self, outcome: Outcome) -> None:
        """The workers are done with their task, or with their run."""
        async with self._changed:
            self._outcome = outcome
            self._changed.notify_all()

    async def next_task(self) -> RunTask | Literal["close", "wait"]:
        """A task that has no outcome; `close` when there will be none, `wait` when none came for a while."""
        await self._wait(lambda: self._closed or self._open_task() is not None, _TURN_S)
        return self._open_task() or ("close" if self._closed else "wait")

    async def evaluated(self, step: int, values: dict[str, float]) -> Word:
        """An evaluation has ended; returns what the driver says to it."""
        async with self._changed:
            self._evaluations[step] = {**self._evaluations.get(step, {}), **values}
            self._changed.notify_all()
        if self._decides is None or step <= self._decided:
            return "go"
        metric, before = self._decides
        if step >= before or metric not in self._evaluations[step]:
            return "go"
        await self._wait(lambda: self._stop or step in self._words, _TURN_S)
        if self._stop:
            return "stop"
        word = self._words.get(step, "wait")
        if word == "save":
            del self._words[step]
        return word

    def _open_task(self) -> RunTask | None:
        return self._task if self._outcome is None and not self._closed else None

    async def _wait(self, condition: Callable[[], bool], timeout_s: float) -> None:
        async with self._changed:
            # That nothing came is no fault: who waits looks at what there is.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait_for(condition), timeout_s)


def open_mailbox() -> ActorHandle[Mailbox]:
    """Starts a mailbox beside the caller, with whom it ends; returns its handle. Ray is connected."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Beside the driver, whose spool it writes.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    # Calls that a lost mailbox has not answered are made again on the next; each that waits takes a place of the 100.
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": 100}
    return ray.remote(Mailbox).options(**options, scheduling_strategy=here).remote()


@dataclass(frozen=True)
class Records:
    """Where a run's records belong: the spool on the driver's node."""

    node: str
    """Ray's id of the driver's node."""
    run_dir: str
    """The run's folder there."""
    run_key: str
    address: str | None
    """The run's folder on an object store, if it is there."""

    @classmethod
    def here(cls, run_dir: Path, address: str | None) -> Records:
        """Of a run whose driver this is. Ray is connected."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return cls(node, str(run_dir), Spool(run_dir).identity().run_key, address)


class Line:
    """Rank 0's end: what the training loop calls never waits for the network, but `evaluated` for the driver's word.

    A line without a mailbox is one that nobody listens to: other ranks have it, and runs without Ray.
    """

    def __init__(self, mailbox: ActorHandle[Mailbox] | None, records: Records | None = None) -> None:
        """
        Args:
            mailbox: of the run; none where nobody listens.
            records: where records belong; none where the run's folder is the driver's own.
        """
        self._mailbox = mailbox
        self._records = records
        self._sent: SentTracker | None = None
        self._news: Progress | None = None
        self._stop = self._regroup = False
        self._hung_up = threading.Event()
        self._thread = threading.Thread(target=self._exchange, name="mailbox", daemon=True)
        if mailbox is not None:
            self._thread.start()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self._hung_up.set()
        if self._mailbox is not None:
            # Without records on their way only the last progress is left to be said, which is worth no long wait.
            self._thread.join(5 if self._sent is None else _SEND_S)

    def stop_requested(self) -> bool:
        """Whether the driver has asked to stop; what it said up to 0.2 s ago."""
        return self._stop

    def regroup_requested(self) -> bool:
        """Whether the driver has room for another number of workers, from the next checkpoint on."""
        return self._regroup

    def progress(self, phase: str, step: int, **values: Unpack[ProgressValues]) -> None:
        """Where the run stands, as `Progress` has it."""
        # Replaced as a whole, never changed: the thread sees the old one or the new one, without a lock.
        self._news = {"phase": phase, "step": step, **values}

    def saved(self, step: int) -> None:
        """A checkpoint of this step is complete: losses from now on are losses after progress."""
        if self._mailbox is not None:
            self._mailbox.saved.remote(step)

    def tracker(self, run_dir: Path) -> Tracker:
        """Of the run: into its spool, wherever that is."""
        if self._records is None:
            return Tracker.open(run_dir)
        import ray

        # The node alone does not tell: a worker has its scratch from the environment of `ray start`, not the driver's.
        here = ray.get_runtime_context().get_node_id(), str(run_dir)
        if (self._records.node, self._records.run_dir) == here:
            return Tracker.open(run_dir)
        self._sent = SentTracker(self._records.run_key, self._send)
        return self._sent

    def secure(self) -> None:
        """Returns when all records so far are where no loss of a worker takes them, nor one of the driver's node where
        the run lies on an object store.

        Raises:
            StorageError: the object store does not take them.
        """
        import ray

        if self._sent is not None:
            try:
                self._sent.flush()
            except ray.exceptions.RayTaskError as error:
                # As beside the driver: a run does not die of its records, such as where the driver's disk is full. A
                # driver's node that is gone is another matter: what it has not got would be in no checkpoint.
                _log.warning("records wait to be sent to the driver's node: %s", error)
        if self._records is not None and self._records.address is not None:
            assert self._mailbox is not None
            ray.get(self._mailbox.copy_records.remote(self._records.run_dir, self._records.address))

    def _send(self, items: list[Item]) -> None:
        import ray

        assert self._mailbox is not None and self._records is not None
        ray.get(self._mailbox.record.remote(self._records.run_dir, items))

    def evaluated(self, step: int, values: dict[str, float]) -> Word:
        """The values measured at a step. Waits for the driver's word where a sweep decides by them, for `wait` at most
        20 s: then all ranks meet, and rank 0 asks again."""
        if self._mailbox is None:
            return "go"
        import ray

        word: Word = ray.get(self._mailbox.evaluated.remote(step, values))
        return word

    def _exchange(self) -> None:
        import ray

        assert self._mailbox is not None
        while not self._hung_up.is_set():
            began = time.monotonic()
            news, self._news = self._news, None
            try:
                self._stop, self._regroup = ray.get(self._mailbox.exchange.remote(news))
            except ray.exceptions.RayError:
                # The driver has gone, and Ray ends its workers.
                return
            if self._sent is not None:
                # What did not arrive is sent again.
                with suppress(ray.exceptions.RayError):
                    self._sent.flush()
            self._hung_up.wait(max(0.0, _EXCHANGE_S - (time.monotonic() - began)))
        if self._news is not None:
            self._mailbox.exchange.remote(self._news)
        if self._sent is not None:
            with suppress(ray.exceptions.RayError):
                self._sent.flush()
