"""Ray Train in a thread of its own: the caller's thread stays free for signals and for what it shows.

Losses are counted here, not by Ray Train, which counts those of a group that starts apart from those of one that
works, and never anew: a run of weeks is not given up for the losses of weeks.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from maps_ray.ray_internals import startup_faults
from maps_ray.training.cluster import Capacity, grown
from maps_ray.training.mailbox import WorkerConfig
from maps_ray.training.run_faults import FinalError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from maps_ray.training.mailbox import Mailbox, MailboxState

# Until a lost node is known to be, and what its group held is free.
_SETTLE_S = 10.0
_log = logging.getLogger(__name__)
Config = TypeVar("Config", bound=WorkerConfig)


@dataclass(frozen=True)
class Loss:
    """One end of a group of workers that was not theirs to choose."""

    when: str
    """`while starting` or `at work`."""
    what: str


class Fit(threading.Thread):
    """One group of workers that call a function, started again when one is lost."""

    def __init__(
        self,
        function: Callable[[Config], None],
        config: Mapping[str, object],
        need: Capacity,
        storage: Path,
        *,
        max_failures: int,
        start_timeout_s: float,
        collective_timeout_s: float,
        mailbox: ActorHandle[Mailbox],
        patient: bool = False,
        sizes: Sequence[int] = (),
    ) -> None:
        """
        Args:
            function: what every worker calls, with `config` and what `WorkerConfig` has.
            config: what else it is given.
            need: workers and their resources.
            storage: folder for what Ray Train itself writes.
            max_failures: losses survived without progress: each new checkpoint, or task, starts the count anew.
            start_timeout_s: how long workers may wait for room.
            collective_timeout_s: how long a worker waits for the others in a collective.
            mailbox: that the workers speak through.
            sizes: numbers of workers that there may be, ascending, where it may change from group to group.
            patient: having found no room in all of `start_timeout_s` counts as a loss, and does not end it at once.
        """
        # A daemon: after a second Ctrl-C the driver ends and nobody waits for the workers.
        super().__init__(name="ray-train", daemon=True)
        self._function = function
        self._config = config
        self._need = need
        self._storage = storage
        self._max_failures = max_failures
        self._start_timeout_s = start_timeout_s
        self._collective_timeout_s = collective_timeout_s
        self._mailbox = mailbox
        self._patient = patient
        self._sizes = sizes
        self._progress: tuple[str | None, int] | None = None
        self.error: Exception | None = None
        """Why the workers were given up; known when the thread has ended."""
        self.losses: list[Loss] = []
        """Since the last progress, the one that ended all included."""
        self.workers = need.workers
        """Of the group that works now, or did last."""

    def run(self) -> None:
        with ray_train_environment(self._start_timeout_s):
            starts = 0
            while True:
                error = self._fit()
                try:
                    if error is None:
                        if self._ended():
                            return
                        continue
                    if isinstance(error, _preempted()):
                        # Known beforehand, and with a checkpoint for it: no loss to be counted.
                        _log.warning("a node was taken away (%s); starting the workers again", cause(error))
                        continue
                    starts = self._count(error, starts)
                except Exception as gone:
                    # Ray itself has ended, or the mailbox with it.
                    self.error = gone
                    return
                if not self._is_loss(error) or len(self.losses) > self._max_failures:
                    self.error = error
                    return
                _log.warning("the workers were lost %s (%s); starting them again", self.losses[-1].when, cause(error))

    def describe(self) -> str:
        """What happened and how often, in one line."""
        assert self.error is not None
        if not self.losses:
            return cause(self.error)
        times = Counter(loss.when for loss in self.losses)
        counts = ", ".join(f"{count} {when}" for when, count in times.items())
        return f"the workers were lost {_times(len(self.losses))} without a new checkpoint ({counts}), at last by " + (
            self.losses[-1].what
        )

    def more_room(self) -> bool:
        """Whether a group that starts now would have more workers than the one that works."""
        # Its own room counts as free: the group that works would make place.
        return bool(self._sizes) and grown(self._need, self._sizes, held=self.workers).workers > self.workers

    def _ended(self) -> bool:
        """Whether a group that ended well has come to the end, and not to make place for one of another size."""
        import ray

        outcome = ray.get(self._mailbox.state.remote())["outcome"]
        return not (self._sizes and outcome and outcome["status"] == "regroup")

    def _size(self) -> int:
        """Workers of the next group: as many as there is room for once what was lost is known to be."""
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline:
            size = grown(self._need, self._sizes).workers
            if size == self._sizes[-1]:
                return size
            time.sleep(0.5)
        return grown(self._need, self._sizes).workers

    def _count(self, error: Exception, starts: int) -> int:
        """Notes a loss; returns how many groups have begun to work so far."""
        import ray

        if not self._is_loss(error):
            return starts
        state: MailboxState = ray.get(self._mailbox.state.remote())
        progress = (state["task"], state["saved"])
        if progress != self._progress:
            self.losses = []
        self._progress = progress
        self.losses.append(Loss("at work" if state["starts"] > starts else "while starting", cause(error)))
        return state["starts"]

    def _is_loss(self, error: Exception) -> bool:
        """Whether starting again may help: a worker or the controller is lost, working or starting."""
        from ray.exceptions import RayActorError
        from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

        if final_fault(error) is not None:
            return False
        if isinstance(error, ControllerError):
            return isinstance(error.controller_failure, startup_faults(timeouts=self._patient))
        return isinstance(error, (WorkerGroupError, RayActorError))

    def _fit(self) -> Exception | None:
        """One group from its start to its end; returns what ended it too early."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        from maps_ray.training.placement import Trainer
        from maps_ray.training.worker import RaysRanks

        if self._sizes:
            self.workers = self._size()
        gpu = self._need.gpus_per_worker > 0
        trainer = Trainer(
            self._function,
            train_loop_config={**self._config, "mailbox": self._mailbox, "gpu": gpu},
            # Whole seconds are what `TorchConfig` takes.
            torch_config=RaysRanks(timeout_s=max(1, round(self._collective_timeout_s))),
            scaling_config=ScalingConfig(num_workers=self.workers, use_gpu=gpu, resources_per_worker=self._need.bundle),
            run_config=RunConfig(
                name="ray",
                storage_path=str(self._storage),
                # Ray Train gives up at once: losses are counted here, and progress starts the count anew.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            ),
        )
        try:
            trainer.fit()
        except Exception as error:
            return error
        return None


@contextmanager
def ray_train_environment(start_timeout_s: float) -> Iterator[None]:
    """Ray Train's settings, where the user has not set them, for as long as the context lasts."""
    values = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(start_timeout_s),
        # How soon a lost worker is noticed.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    }
    # Ray Train reads them in this process when it starts its controller: for the next run they may be others.
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _preempted() -> type[Exception]:
    from ray.train.v2.api.exceptions import PreemptionError

    return PreemptionError


def cause(error: Exception) -> str:
    """The last line of what went wrong, with the worker's rank where it is known."""
    failures = getattr(error, "worker_failures", None) or {}
    return "; ".join(f"worker {rank}: {_last_line(e)}" for rank, e in sorted(failures.items())) or _last_line(error)


def final_fault(error: Exception) -> str | None:
    """What one worker met that a restart would only repeat, such as full memory; None when it is nothing such."""
    failures = (getattr(error, "worker_failures", None) or {}).values()
    return next((_last_line(failure) for failure in failures if isinstance(failure, FinalError)), None)


def _last_line(error: BaseException) -> str:
    # Ray's errors hold the worker's traceback as text, and what was raised is its last line.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
