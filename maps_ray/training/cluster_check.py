"""Whether every node of a cluster can take part in a run, before one is started: `maps-ray check --cluster`.

A small actor on each node (`node_facts`) says what the node is; what differs between nodes, or is missing on one, is
named with a remedy. It takes seconds and reserves nothing.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maps_ray.ray_internals import HEAD_RESOURCE
from maps_ray.spec import ClusterSpec, Problem, SpecError, TrackingSpec, parse, take_credentials
from maps_ray.spec.load import resolve_paths
from maps_ray.tracking.store import database_file, resolve_uri
from maps_ray.training import node_facts
from maps_ray.training.cluster import capacity, ray_cluster
from maps_ray.training.node_facts import Description
from maps_ray.training.run_faults import TrainingError

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

    Actors = Sequence[ActorHandle[node_facts.NodeFacts]]

# Those whose versions change numbers, files or protocols.
PACKAGES = (
    *("maps_ray", "ray", "torch", "deepspeed", "transformers", "tokenizers", "timm", "accelerate"),
    *("numpy", "safetensors", "pyarrow", "mlflow"),
)
_ANSWER_S = 60.0
_REACH_S = 5.0
# What a client of a network file system may keep to itself: NFS and EFS look names up again within 60 s.
SEE_S = 60.0
_SKEW_S = 5.0
# Ray stops placing objects on a fuller disk, and kills workers on a node with fuller memory.
_FULL = 0.95
_PROBES = ".cluster-check"


@dataclass
class Node:
    """One node, and what it said."""

    id: str
    address: str
    head: bool
    resources: dict[str, float]
    facts: Description = field(default_factory=Description)
    skew_s: float | None = None
    """Its clock less that of this process, in seconds."""
    skew_error_s: float = 0.0
    """What the clocks' comparison may be wrong by: half of what an answer took."""
    storage: str | None = None
    """What is wrong with the storage as seen from there; None when nothing is."""
    seen_after_s: float | None = None
    """How long after they were renamed the other nodes' files were seen."""
    tracking: str | None = None
    """What is wrong with MLflow as seen from there."""
    silent: str | None = None
    """Why it did not answer; None when it did."""

    @property
    def name(self) -> str:
        host = self.facts.get("host")
        return f"{host} ({self.address})" if host and host != self.address else self.address


@dataclass(frozen=True)
class ClusterCheck:
    """What was found."""

    nodes: list[Node]
    storage: str
    tracking: str
    seconds: float
    problems: list[Problem]

    def as_data(self) -> dict[str, object]:
        """Plain data, for JSON."""
        data = asdict(self)
        data["problems"] = [{"field": p.field, "message": str(p)} for p in self.problems]
        return {"ok": not self.problems, **data}


def check_cluster(cluster: ClusterSpec, tracking: TrackingSpec) -> ClusterCheck:
    """Looks at every node of the cluster at `cluster.address`, or at the one that is joined without it.

    Raises:
        SpecError: no cluster answers there.
    """
    began = time.monotonic()
    uri = resolve_uri(tracking.uri, cluster.local_storage)
    try:
        with ray_cluster(cluster):
            nodes = _nodes()
            with _asked(nodes) as actors:
                _describe(nodes, actors)
                _compare_clocks(nodes, actors)
                if isinstance(cluster.storage, Path):
                    _try_storage(nodes, actors, cluster.storage)
                else:
                    for node, faults_there in _answers(nodes, _ask(nodes, actors, "store", cluster.model_dump())):
                        node.storage = faults_there
                _try_tracking(nodes, actors, uri)
            problems = _room(cluster)
    except TrainingError as error:
        raise SpecError([Problem("cluster.address", cluster.address, str(error))]) from None
    problems = [*faults(nodes, cluster, uri), *problems]
    return ClusterCheck(nodes, str(cluster.storage), uri, round(time.monotonic() - began, 2), problems)


def _nodes() -> list[Node]:
    import ray

    nodes = []
    for raw in ray.nodes():
        if raw["Alive"]:
            resources = {name: raw["Resources"].get(name, 0.0) for name in ("CPU", "GPU")}
            head = HEAD_RESOURCE in raw["Resources"]
            nodes.append(Node(raw["NodeID"], raw["NodeManagerAddress"], head, resources))
    return sorted(nodes, key=lambda node: (not node.head, node.address, node.id))


@contextlib.contextmanager
def _asked(nodes: Sequence[Node]) -> Iterator[Actors]:
    """An actor on each node, in the order of nodes."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # By value: a node with another version of this package, or without it, must answer too.
    ray.cloudpickle.register_pickle_by_value(node_facts)
    try:
        actor = ray.remote(num_cpus=0, max_restarts=0)(node_facts.NodeFacts)
        actors = [
            actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote()
            for node in nodes
        ]
    finally:
        ray.cloudpickle.unregister_pickle_by_value(node_facts)
    try:
        yield actors
    finally:
        for started in actors:
            ray.kill(started)


def _answers(
    nodes: Sequence[Node], calls: Sequence[ObjectRef | None], wait_s: float = _ANSWER_S
) -> Iterator[tuple[Node, Any]]:
    """What each node answered; a node that did not is marked silent, and not asked again."""
    import ray

    # One for all: silent nodes are waited for together, not one after the other.
    deadline = time.monotonic() + wait_s
    for node, call in zip(nodes, calls, strict=True):
        if call is None:
            continue
        try:
            yield node, ray.get(call, timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            node.silent = f"it did not answer within {wait_s:g} s"
        except ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            node.silent = lines[-1] if lines else type(error).__name__


def _ask(nodes: Sequence[Node], actors: Actors, what: str, *arguments: object) -> list[ObjectRef | None]:
    return [
        None if node.silent else getattr(actor, what).remote(*arguments)
        for node, actor in zip(nodes, actors, strict=True)
    ]


def _describe(nodes: Sequence[Node], actors: Actors) -> None:
    for node, facts in _answers(nodes, _ask(nodes, actors, "describe", list(PACKAGES), "maps_ray", None)):
        node.facts = facts


def _compare_clocks(nodes: Sequence[Node], actors: Actors) -> None:
    import ray

    for node, actor in zip(nodes, actors, strict=True):
        if node.silent:
            continue
        # The quickest of a few answers says most.
        best = None
        for _ in range(3):
            sent = time.time()
            # The next question to this node finds out, and says, that it is silent.
            with contextlib.suppress(ray.exceptions.RayError):
                theirs = ray.get(actor.clock.remote(), timeout=_REACH_S)
                trip = time.time() - sent
                if best is None or trip < best[0]:
                    # Cristian's method (Distributed Computing 3, 1989): taken as made half way, wrong by half of the
                    # trip at most.
                    best = trip, theirs - sent - trip / 2
        if best is not None:
            node.skew_error_s, node.skew_s = best[0] / 2, best[1]


def _try_storage(nodes: Sequence[Node], actors: Actors, storage: Path) -> None:
    folder = storage / _PROBES / uuid.uuid4().hex[:8]
    names = {node.id: f"node-{place}" for place, node in enumerate(nodes)}
    writes = [
        None if node.silent else actor.write.remote(str(folder), names[node.id])
        for node, actor in zip(nodes, actors, strict=True)
    ]
    for node, fault in _answers(nodes, writes):
        if fault:
            node.storage = f"cannot be written: {fault}"
    written = [names[node.id] for node in nodes if not node.silent and not node.storage]
    answers = _answers(nodes, _ask(nodes, actors, "see", str(folder), written, SEE_S), SEE_S + _ANSWER_S)
    of_name = {names[node.id]: node for node in nodes}
    for node, (missing, seconds) in answers:
        node.seen_after_s = seconds
        if missing and not node.storage:
            writers = ", ".join(of_name[name].name for name in missing)
            node.storage = f"files that {writers} renamed there are not seen after {SEE_S:g} s"
    # A node removes what it made; a folder that several made goes with the last one's file.
    for _ in range(2):
        list(_answers(nodes, _ask(nodes, actors, "forget")))


def _try_tracking(nodes: Sequence[Node], actors: Actors, uri: str) -> None:
    if database_file(uri) is not None:
        return
    for node, fault in _answers(nodes, _ask(nodes, actors, "reach", f"{uri}/health", _REACH_S)):
        node.tracking = fault


def _room(cluster: ClusterSpec) -> list[Problem]:
    """Workers that the nodes cannot hold as they are; nothing where nodes come on demand."""
    import ray

    try:
        need = capacity(cluster)
    except TrainingError as error:
        return [Problem("cluster.workers", cluster.workers, str(error).partition(": ")[2])]
    fit = 0
    for raw in ray.nodes():
        if raw["Alive"]:
            # Node by node: a worker lies whole on one, and sums over the cluster promise room that no node has.
            fit += int(min(raw["Resources"].get(name, 0.0) / each for name, each in need.bundle.items()))
    if fit >= need.workers or cluster.autoscaling:
        return []
    message = (
        f"the nodes hold {fit} workers of {need.bundle}, each whole on one node; ask for at most {fit}, for less per "
        "worker, or for a larger cluster"
    )
    return [Problem("cluster.workers", cluster.workers, message)]


def faults(nodes: Sequence[Node], cluster: ClusterSpec, uri: str) -> list[Problem]:
    """What keeps nodes that were asked from a run, each with its remedy.

    Args:
        nodes: with what they said.
        cluster: as the spec says it.
        uri: resolved, of MLflow.
    """
    problems = [
        Problem("nodes", node.name, f"{node.silent}; look at its raylet's log, or take the node out")
        for node in nodes
        if node.silent
    ]
    answered = [node for node in nodes if not node.silent]
    problems += _versions(answered)
    problems += _gpu_kinds(answered)
    skewed = [n for n in answered if n.skew_s is not None and abs(n.skew_s) - n.skew_error_s > _SKEW_S]
    problems += [
        Problem("clock", node.name, f"{node.skew_s:+.1f} s off this machine's: set it by NTP (chrony, timesyncd)")
        for node in skewed
    ]
    problems += [
        Problem(
            "cluster.storage",
            str(cluster.storage),
            f"from {node.name}: {node.storage}; name storage that all nodes share and may write",
        )
        for node in answered
        if node.storage
    ]
    for node in answered:
        for what, room, remedy in (
            ("scratch", node.facts["scratch"], "free some space there"),
            ("memory", node.facts["memory"], "end what else runs there"),
        ):
            free, total = room["free"], room["total"]
            if free < (1 - _FULL) * total:
                of = f" of {room['folder']}" if "folder" in room else ""
                message = f"{free / 2**30:.1f} GiB of {total / 2**30:.0f} GiB are free{of}, and Ray stops work there"
                problems.append(Problem(what, node.name, f"{message} above {_FULL:.0%} of use: {remedy}"))
    problems += [
        Problem(
            "tracking.uri",
            uri,
            f"cannot be reached from {node.name}: {node.tracking}; start the server, correct the address, or open its "
            "port to the nodes",
        )
        for node in answered
        if node.tracking
    ]
    # As `refuse_shared_sqlite` refuses it when a run starts.
    database, storage = database_file(uri), cluster.storage
    machines = len({node.address for node in nodes})
    shared = isinstance(storage, Path) and database is not None and database.is_relative_to(storage.resolve())
    if shared and machines > 1:
        message = (
            f"a sqlite file in a folder that {machines} machines share, which does not keep its locks: start an MLflow "
            "server and name it, such as tracking.uri=http://HOST:5000"
        )
        problems.append(Problem("tracking.uri", uri, message))
    return problems


def _versions(nodes: Sequence[Node]) -> list[Problem]:
    """Nodes that have not what most have, the head's where none is in the majority."""
    problems = []
    for what in ("python", *PACKAGES, "code"):
        versions = {node.id: _version_of(node, what) for node in nodes}
        if len(set(versions.values())) < 2:
            continue
        # Of a tie `mode` takes what it met first (Python 3.8 and later), and the head comes first.
        usual = statistics.mode(versions.values())
        usual_nodes = sum(version == usual for version in versions.values())
        for node in nodes:
            if versions[node.id] != usual:
                title = "the code of maps_ray" if what == "code" else what
                message = (
                    f"{title} is {versions[node.id] or 'missing'} there and {usual or 'missing'} on {usual_nodes} other"
                    f"{'' if usual_nodes == 1 else 's'}: install the same on all nodes, such as one image or "
                    "constraints.txt"
                )
                problems.append(Problem("versions", node.name, message))
    return problems


def _version_of(node: Node, what: str) -> str | None:
    if what == "python":
        return node.facts["python"]
    return node.facts["code"] if what == "code" else node.facts["versions"][what]


def _gpu_kinds(nodes: Sequence[Node]) -> list[Problem]:
    """GPUs of several kinds: the slowest sets the pace, the smallest what fits."""
    kinds: dict[str, list[str]] = {}
    for node in nodes:
        for kind in sorted({f"{gpu['name']}, {gpu['memory_mib']} MiB" for gpu in node.facts["gpus"]}):
            kinds.setdefault(kind, []).append(node.name)
    problems = []
    if len(kinds) > 1:
        shown = "; ".join(f"{kind} on {', '.join(names)}" for kind, names in kinds.items())
        message = "workers would wait for the slowest: use nodes of one kind, or a cluster of each"
        problems.append(Problem("gpus", shown, message))
    for node in nodes:
        if node.resources["GPU"] and not node.facts["gpus"]:
            message = f"Ray counts {node.resources['GPU']:g} GPUs there, and nvidia-smi shows none: mend its driver"
            problems.append(Problem("gpus", node.name, message))
    return problems


def default_sections(overrides: Mapping[str, object]) -> tuple[ClusterSpec, TrackingSpec]:
    """What is checked without a spec: `cluster` and `tracking` of the overrides; the cluster that is there, unless one
    is named."""
    unknown = sorted(set(overrides) - {"cluster", "tracking"})
    if unknown:
        raise SpecError([Problem("--set", unknown[0], "without a SPEC only fields of cluster and tracking can be set")])
    given: dict[str, dict[str, object]] = {"cluster": {}, "tracking": {}}
    for name, section in overrides.items():
        if not isinstance(section, dict):
            raise SpecError([Problem("--set", name, f"is a section: set a field of it, as {name}.FIELD=VALUE")])
        given[name].update(section)
    cluster, tracking = given["cluster"], given["tracking"]
    cluster.setdefault("storage", str(ClusterSpec.model_fields["storage"].default))
    # Without an address Ray would start a cluster here, of this machine alone, to be looked at.
    if "RAY_ADDRESS" not in os.environ:
        cluster.setdefault("address", "auto")
    if isinstance(uri := tracking.get("uri"), str):
        tracking["uri"] = take_credentials(uri)
    resolve_paths({"cluster": cluster, "tracking": tracking}, Path.cwd())
    return parse(ClusterSpec, cluster), parse(TrackingSpec, tracking)
