"""Success rates of a checkpoint: from a request to an `Evaluation`, on this machine or on a Ray cluster."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maps_ray.evaluation.rollouts.checkpoint import PolicyFacts, read_facts
from maps_ray.evaluation.rollouts.environment import Conditions, Environment, Fault, Simulators, SuiteFacts
from maps_ray.evaluation.rollouts.journal import Journal
from maps_ray.evaluation.rollouts.plan import Episode, Queue, RolloutError, RolloutRequest, Stopped
from maps_ray.evaluation.rollouts.policy_server import PolicyServer
from maps_ray.evaluation.rollouts.pool import Limits, Pool
from maps_ray.evaluation.rollouts.summary import Evaluation
from maps_ray.evaluation.rollouts.videos import Videos
from maps_ray.files import write_json
from maps_ray.ray_connection import ConnectionFailed, connected
from maps_ray.spec import Problem, SpecError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

# One LIBERO environment with its process, as measured.
_WORKER_BYTES = 1.9 * 2**30
_START_S = 600.0
_POLL_S = 0.5
_SUMMARY = "evaluation.json"


@dataclass(frozen=True)
class Progress:
    """How far an evaluation is."""

    done: int
    total: int
    successes: int


@dataclass(frozen=True)
class Resources:
    """What an evaluation takes of the Ray cluster."""

    workers: int | None = None
    """Environments at a time; none means as many as cores and free memory allow."""
    cpus: float | None = None
    """That Ray reserves for each environment; none means 1, or an even share where workers outnumber cores."""
    gpus: float | None = None
    """For the policy; none means one where the cluster has any."""
    environment_gpus: float = 0
    """For each environment."""
    environment_memory: int = 0
    """For each environment, in bytes."""
    policy_cpus: float = 0
    """For the policy."""
    policy_memory: int = 0
    """For the policy, in bytes."""
    node: str | None = None
    """Id of the node that all of it must lie on; none lets Ray choose."""

    def options(self, cpus: float, gpus: float, memory: int) -> dict[str, object]:
        """Of an actor, in Ray's words."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Not softly: the weights may lie on the disk of this node alone.
        strategy = NodeAffinitySchedulingStrategy(self.node, soft=False) if self.node else "DEFAULT"
        reserved = {"memory": memory} if memory else {}
        return {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": strategy, **reserved}


def evaluate(
    checkpoint: Path,
    request: RolloutRequest,
    out: Path,
    *,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    address: str | None = None,
    resources: Resources | None = None,
    limits: Limits | None = None,
    simulators: Simulators | None = None,
    stop: Callable[[], bool] | None = None,
) -> Evaluation:
    """Rolls a policy out. Finished episodes are kept in `out`: the same call goes on where it stopped.

    Args:
        checkpoint: checkpoint folder, or folder of a finished run; on a path that all nodes can read.
        request: which episodes. More suites, tasks or episodes than before may be asked for in the same `out`.
        out: folder for `episodes.jsonl`, `evaluation.json` and `videos/`.
        workers: simulators at a time; in short for `resources.workers`.
        on_progress: called at the start and after each episode; an exception that it raises ends the evaluation.
        address: of a Ray cluster; see `maps_ray.ray_connection.connected`.
        resources: what is taken of the cluster.
        limits: when a simulator is given up.
        simulators: other than those of `maps_ray.evaluation.simulators`.
        stop: asked about twice a second whether to end before all episodes have ended.

    Raises:
        Stopped: as `stop` asked for.
        SpecError: bad input; nothing was run.
        RolloutError: the episodes cannot be completed; those that ended are kept.
    """
    source, limits, resources = simulators or Simulators(), limits or Limits(), resources or Resources()
    if workers is not None:
        resources = replace(resources, workers=workers)
    if resources.workers is not None and resources.workers < 1:
        raise SpecError([Problem("workers", resources.workers, "must be at least 1")])
    request.check()
    _check_suites(request.suites, source)
    facts = read_facts(Path(checkpoint), request)
    identity = {
        "checkpoint": facts.fingerprint,
        **{name: value for name, value in facts.identity().items() if name != "fingerprint"},
        **{name: getattr(request, name) for name in ("seed", "max_steps", "rows", "threads")},
    }
    with Journal(Path(out), identity) as journal:
        # Where all is on record Ray need not start, which takes seconds.
        if not all(name in journal.suites for name in request.suites) or _left(request, journal):
            try:
                with connected(address):
                    run = _Run(facts, request, source, journal, Path(out), limits, resources, stop or (lambda: False))
                    run.complete(on_progress)
            except ConnectionFailed as error:
                raise RolloutError(str(error)) from None
        plan = _plan(request, journal)
        suites = {name: journal.suites[name] for name in request.suites}
        evaluation = Evaluation.complete(facts.folder, Path(out), suites, plan, journal.results, identity)
        write_json(Path(out) / _SUMMARY, evaluation.as_json(), durable=False)
    return evaluation


class _Run:
    """The part of an evaluation that needs Ray."""

    def __init__(
        self,
        facts: PolicyFacts,
        request: RolloutRequest,
        source: Simulators,
        journal: Journal,
        out: Path,
        limits: Limits,
        resources: Resources,
        stop: Callable[[], bool],
    ) -> None:
        self._facts, self._request, self._source = facts, request, source
        self._journal, self._videos, self._limits = journal, Videos(out), limits
        self._resources, self._stop = resources, stop
        self._policy: ActorHandle | None = None
        self._environment: ActorHandle | None = None
        """The first one; it looks at the suites before the others start."""
        self._conditions = Conditions(
            cameras=facts.cameras,
            camera_size=facts.camera_size,
            use_proprio=facts.proprio_dim is not None,
            gripper=facts.gripper,
            seed=request.seed,
            max_steps=request.max_steps,
        )

    def complete(self, on_progress: Callable[[Progress], None] | None) -> None:
        """Runs what is left of the plan."""
        import ray

        try:
            self._policy = self._start_policy()
            self._environment = self._start_environment()
            self._inspect(self._environment)
            left = _left(self._request, self._journal)
            self._tell(on_progress)
            if not left:
                return
            self._check_proprio(self._environment, left[0])
            # Last: it loads while the simulator is looked at.
            self._await("the policy", self._policy.facts.remote())
            self._run(left, on_progress)
        except RolloutError as error:
            raise RolloutError(f"{self._facts.folder}: {error}") from None
        finally:
            for actor in (self._policy, self._environment):
                if actor is not None:
                    with suppress(Exception):
                        ray.kill(actor)

    def _run(self, left: list[Episode], on_progress: Callable[[Progress], None] | None) -> None:
        workers = min(self._workers(), len(left))
        pool = Pool(
            self._start_environment,
            workers,
            Queue(left),
            self._limits,
            self._videos.wants,
            self._environment,
        )
        # Closed, whatever is raised below: the pool's simulators end with its generator.
        with closing(pool.results(self._heed)) as results:
            for finished in results:
                # The video first: an episode in the journal is never run again.
                self._videos.keep(finished.result)
                self._journal.add(finished.result)
                self._tell(on_progress)

    def _heed(self) -> None:
        if self._stop():
            raise Stopped("asked to stop")

    def _tell(self, on_progress: Callable[[Progress], None] | None) -> None:
        if on_progress is None:
            return
        plan = _plan(self._request, self._journal)
        ended = [self._journal.results[episode] for episode in plan if episode in self._journal.results]
        on_progress(Progress(len(ended), len(plan), sum(result.success for result in ended)))

    def _start_policy(self) -> ActorHandle:
        import ray

        gpus = self._resources.gpus
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
        asked = self._resources.options(self._resources.policy_cpus, gpus, self._resources.policy_memory)
        # An answer depends on its request alone, so one that was lost with its server may be asked for again.
        return ray.remote(**asked, max_restarts=2, max_task_retries=2)(PolicyServer).remote(
            self._facts, self._request.rows, self._request.threads, self._request.device_map
        )

    def _start_environment(self) -> ActorHandle:
        import ray

        cpus = self._resources.cpus
        if cpus is None:
            # Rounded down, as Ray rounds: three shares of two thirds must fit two cores.
            share = ray.cluster_resources().get("CPU", 1.0) / (self._resources.workers or 1)
            cpus = min(1.0, math.floor(share * 1000) / 1000)
        asked = self._resources
        options = asked.options(cpus, asked.environment_gpus, asked.environment_memory)
        return ray.remote(**options)(Environment).remote(self._source, self._conditions, self._policy)

    def _workers(self) -> int:
        import ray

        if self._resources.workers is not None:
            return self._resources.workers
        total = ray.cluster_resources()
        by_memory = ray.available_resources().get("memory", 0.0) // _WORKER_BYTES
        return max(1, int(min(total.get("CPU", 1.0), by_memory)))

    def _inspect(self, environment: ActorHandle) -> None:
        missing = [name for name in self._request.suites if name not in self._journal.suites]
        inspected: list[SuiteFacts] | Fault = []
        if missing:
            inspected = self._await("the simulator", environment.inspect.remote(missing))
        if isinstance(inspected, Fault):
            raise SpecError([Problem("suites", missing, inspected.message)])
        known = {**self._journal.suites, **{facts.suite.name: facts for facts in inspected}}
        problems = _misfits(self._request, self._facts, [known[name] for name in self._request.suites])
        if problems:
            raise SpecError(problems)
        for facts in inspected:
            self._journal.add_suite(facts)

    def _check_proprio(self, environment: ActorHandle, episode: Episode) -> None:
        wanted = self._facts.proprio_dim
        if wanted is None:
            return
        dimension = self._await("the simulator", environment.proprio_dim.remote(episode))
        if dimension != wanted:
            message = f"the policy reads {wanted} numbers of proprioception, {episode.suite} gives {dimension}"
            raise SpecError([Problem("CHECKPOINT", self._facts.folder, message)])

    def _await(self, what: str, answer: object) -> Any:
        import ray

        deadline = time.monotonic() + _START_S
        try:
            while not ray.wait([answer], timeout=_POLL_S)[0] and time.monotonic() < deadline:
                self._heed()
            return ray.get(answer, timeout=0)
        except ray.exceptions.GetTimeoutError:
            raise RolloutError(
                f"{what} did not start within {_START_S:g} s: the cluster has no room, or it hangs"
            ) from None
        except ray.exceptions.RayError as error:
            lines = [line for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
            raise RolloutError(f"{what} does not start: {lines[-1].strip() if lines else error!r}") from error


def _check_suites(names: Iterable[str], source: Simulators) -> None:
    problems = []
    for name in names:
        try:
            source.suite(name)
        except ValueError as error:
            problems.append(Problem("suites", name, str(error)))
    if problems:
        raise SpecError(problems)


def _plan(request: RolloutRequest, journal: Journal) -> list[Episode]:
    """All episodes of a request, whose suites are known: by suite, task and initial state."""
    return [
        Episode(name, task, state)
        for name in request.suites
        for task in _tasks(request, journal.suites[name])
        for state in range(request.first_state, request.first_state + request.episodes)
    ]


def _tasks(request: RolloutRequest, facts: SuiteFacts) -> Sequence[int]:
    """Indices of the tasks that are asked for; those that lack files are not part of `all`."""
    return request.tasks or [task.index for task in facts.tasks if task.missing is None]


def _left(request: RolloutRequest, journal: Journal) -> list[Episode]:
    return [episode for episode in _plan(request, journal) if episode not in journal.results]


def _misfits(request: RolloutRequest, policy: PolicyFacts, suites: Sequence[SuiteFacts]) -> list[Problem]:
    """What of the request the simulators cannot do."""
    problems = []
    for facts in suites:
        name, count = facts.suite.name, len(facts.tasks)
        if facts.action_dim != policy.action_dim:
            message = f"its actions have {policy.action_dim} dimensions, {name} takes {facts.action_dim}"
            problems.append(Problem("CHECKPOINT", policy.folder, message))
        for task in _tasks(request, facts):
            if not 0 <= task < count:
                problems.append(Problem("tasks", task, f"{name} has tasks 0 .. {count - 1}"))
            elif (missing := facts.tasks[task].missing) is not None:
                problems.append(Problem("tasks", task, f"{name}, task {task}: {missing}"))
            elif request.first_state + request.episodes > facts.tasks[task].initial_states:
                message = f"{name}, task {task} has {facts.tasks[task].initial_states} initial states"
                problems.append(Problem("episodes", request.episodes, message))
    return problems
