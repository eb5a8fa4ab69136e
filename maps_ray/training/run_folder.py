"""The folder of one run: who may write it, the spec it was started with, how it ended.

<storage>/<name>/, or under an object store this node's copy of it (`mirror`)
  spec.yaml         the resolved spec, with absolute paths: `maps-ray train <this file> --resume` continues the run
  inputs.json       what base checkpoint and data are, by content (`inputs`): the run goes on wherever these lie
  strengths.json    the schedule, layer by layer
  base.json         where the base was, and its fingerprint
  claims.json       which drivers have taken the run (`claims`)
  lock              held by the driver while it runs
  progress.json     where the run stands (`progress`)
  checkpoints/      complete checkpoints (`checkpoint`)
  error.txt         what the workers raised, if they were given up
  evaluation.json   action errors and success rates at each evaluation
  rollouts/         episodes, tables and videos of each step that was rolled out (`rollouts`)
  final/            trained weights as a checkpoint folder that `load_policy` reads
  result.json       how the run ended
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NotRequired, TypedDict

from maps_ray.files import file_lock, read_json, write_atomically, write_json
from maps_ray.run_storage import StorageError
from maps_ray.spec import ClusterSpec, Problem, RunSpec, SpecError, dump, load_spec, parse, read_yaml
from maps_ray.training.inputs import difference, fingerprint, fingerprints, input_paths, without_places
from maps_ray.training.mirror import Mirror
from maps_ray.training.run_faults import CheckpointError
from maps_ray.training.shelf import FolderShelf, ObjectShelf, newest

BASE_FILE = "base.json"
_LOCK_FILE = "lock"
INPUTS_FILE = "inputs.json"

# What may change between the parts of one run: where it runs, how it is recorded, not what is computed.
_MAY_CHANGE = (
    "cluster.",
    "tracking.uri",
    "tracking.credentials",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.log_every",
    "evaluation.",
    # How it is computed: up to the order of sums the results are the same.
    "training.zero_stage",
    "training.activation_checkpointing",
    "training.deepspeed.",
    # Their product with the number of workers, the global batch, may not: `keep_global_batch`.
    "training.batch_size",
    "training.gradient_accumulation",
)


def claim(spec: RunSpec, resume: bool) -> RunSpec:
    """Whether this spec may write its run folder, and the spec to run.

    Args:
        spec: as the user gave it.
        resume: whether to continue the run that the folder holds.

    Returns:
        the spec with absolute paths, so that it means the same from any working directory. A run that is continued
        keeps its global batch: on another number of workers, forward passes and their size are adapted, never beyond
        the `training.batch_size` asked for.

    Raises:
        SpecError: the folder holds a run and `resume` is false; nothing to resume; or the spec to resume with differs
            from the run's in a field that changes what is computed, or names another base checkpoint or other data:
            what counts is their content, not where they lie.
    """
    spec = spec.model_copy(
        update={
            "model": spec.model.absolute(),
            "data": spec.data.absolute(),
            "cluster": _absolute(spec.cluster),
        }
    )
    mirror, started = Mirror.of(spec), spec.run_dir / "spec.yaml"
    saved: dict[str, object] | None = None
    try:
        begun = mirror.has("spec.yaml")
        if not resume:
            if begun or (mirror.storage is None and _is_taken(spec.run_dir)):
                message = f"{spec.run_place} exists already; continue that run with --resume, or choose another name"
                raise SpecError([Problem("name", spec.name, message)])
            return spec
        if begun:
            mirror.pull(spec)
            saved = _saved_spec(mirror)
    except StorageError as error:
        raise SpecError([Problem("cluster.storage", str(spec.cluster.storage), str(error))]) from None
    if not begun:
        message = f"nothing to resume: {spec.run_place}/spec.yaml does not exist; start the run without --resume"
        raise SpecError([Problem("name", spec.name, message)])
    earlier, raw = load_spec(started), read_yaml(started)
    trained = earlier
    if saved is not None:
        # Not the file alone, which may have been edited in its place; one of an earlier version may have other fields.
        with suppress(SpecError):
            trained, raw = parse(RunSpec, {**saved, "name": earlier.name}), saved
    model = raw.get("model")
    if trained.model.name == "minivla_oft" and isinstance(model, dict) and "attention_mask" not in model:
        # Begun before the mask could be chosen: the run attends both ways to its end.
        trained, spec = _bidirectional(trained), _bidirectional(spec)
    before, now = (flat(without_places(s)) for s in (trained, spec))
    # A constant rate does not depend on where the run ends; a decaying one would take another course.
    allowed = (*_MAY_CHANGE, "training.max_steps") if spec.training.schedule == "constant" else _MAY_CHANGE
    problems = [
        Problem(field, now.get(field), f"the run was started with {before.get(field)!r}; {_remedy(field)}")
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field) and not field.startswith(allowed)
    ]
    problems += other_inputs(spec, earlier)
    if problems:
        raise SpecError(problems)
    return keep_global_batch(spec, global_batch_size(trained))


def _saved_spec(mirror: Mirror) -> dict[str, object] | None:
    """The spec in the newest checkpoint, which was trained with it; None where there is none."""
    root = mirror.run_dir / "checkpoints"
    shelf = FolderShelf(root) if mirror.storage is None else ObjectShelf(mirror.storage, mirror.run_dir / "work")
    last = newest(shelf)
    # What cannot be read is said where the run goes on from it.
    with suppress(CheckpointError):
        return shelf.manifest(last).get("spec") if last else None
    return None


def is_begun(spec: RunSpec) -> bool:
    """Whether the spec's run folder holds a run.

    Raises:
        SpecError: its object store does not answer.
    """
    try:
        return Mirror.of(spec).has("spec.yaml")
    except StorageError as error:
        raise SpecError([Problem("cluster.storage", str(spec.cluster.storage), str(error))]) from None


def _absolute(cluster: ClusterSpec) -> ClusterSpec:
    storage, scratch = cluster.storage, cluster.scratch
    places = {
        "storage": storage.resolve() if isinstance(storage, Path) else storage,
        # Links in it are not followed: they may lead elsewhere on another node.
        "scratch": scratch and scratch.absolute(),
    }
    return cluster.model_copy(update=places)


def global_batch_size(spec: RunSpec) -> int:
    """Samples of one optimizer step over all workers."""
    return spec.cluster.most_workers * spec.training.batch_size * spec.training.gradient_accumulation


def _bidirectional(spec: RunSpec) -> RunSpec:
    mask = spec.model.attention_mask or "bidirectional"
    return spec.model_copy(update={"model": spec.model.model_copy(update={"attention_mask": mask})})


def _is_taken(run_dir: Path) -> bool:
    """Whether anything is there but what a driver leaves that found no room for its workers."""
    if not run_dir.is_dir():
        return run_dir.exists()
    return any(path.name != _LOCK_FILE for path in run_dir.iterdir())


def at_size(spec: RunSpec, workers: int) -> RunSpec:
    """The spec for so many workers of an elastic group: with the same global batch, by more forward passes each."""
    if spec.cluster.workers == workers:
        return spec
    fixed = spec.model_copy(update={"cluster": spec.cluster.model_copy(update={"workers": workers})})
    return keep_global_batch(fixed, global_batch_size(spec))


def elastic_problems(spec: RunSpec) -> list[Problem]:
    """Ends of a range of workers that cannot share the global batch."""
    workers, size = spec.cluster.workers, global_batch_size(spec)
    if isinstance(workers, int):
        return []
    sizes = [n for n in range(1, size + 1) if size % n == 0]
    return [
        Problem(
            f"cluster.workers.{end}",
            number,
            f"{number} workers cannot share the {size} samples of an optimizer step evenly; numbers that can: "
            f"{', '.join(map(str, sizes))}; or change training.batch_size",
        )
        for end, number in (("min", workers.min), ("max", workers.max))
        if size % number
    ]


def keep_global_batch(spec: RunSpec, size: int) -> RunSpec:
    """The spec with so many samples in an optimizer step, at most `training.batch_size` in a forward pass.

    Raises:
        SpecError: its workers cannot share them evenly.
    """
    each, left = divmod(size, spec.cluster.most_workers)
    if left:
        message = f"the run has {size} samples in each optimizer step, which so many workers cannot share evenly"
        raise SpecError([Problem("cluster.workers", spec.cluster.most_workers, message)])
    passes = next(n for n in range(1, each + 1) if each % n == 0 and each // n <= spec.training.batch_size)
    training = spec.training.model_copy(update={"batch_size": each // passes, "gradient_accumulation": passes})
    return spec.model_copy(update={"training": training})


def other_inputs(spec: RunSpec, earlier: RunSpec) -> list[Problem]:
    """Inputs of the spec that are not those that the run was started with."""
    known = read_json(spec.run_dir / INPUTS_FILE) or {}
    places = input_paths(earlier)
    problems = []
    for field, place in input_paths(spec).items():
        if field not in known and places[field] == place:
            continue
        # A run that was started before fingerprints were kept knows its inputs by their places alone.
        before = known.get(field) or fingerprint(places[field])
        fault = difference(before, fingerprint(place))
        if fault and not before:
            message = f"the run was started with {places[field]}, which is gone and of which nothing more is known"
            problems.append(Problem(field, place, message + "; put it back there"))
        elif fault:
            message = (
                f"the run was started with other content, then at {places[field]}: of its {len(before)} files {fault}; "
                "name the same content, wherever it lies, or start a run of another name"
            )
            problems.append(Problem(field, place, message))
    return problems


def write_spec(spec: RunSpec) -> Path:
    """Writes the resolved spec into the run folder, and what its inputs are; returns the spec's path."""
    path = spec.run_dir / "spec.yaml"
    # Once, for it says what the run was begun with. The spec comes last: with it there is a run (`is_begun`).
    if not (spec.run_dir / INPUTS_FILE).exists():
        write_json(spec.run_dir / INPUTS_FILE, fingerprints(spec))
    write_atomically(path, dump(spec))
    return path


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Holds the run folder; the lock goes with the process, however it ends.

    Raises:
        SpecError: another driver holds it.
    """
    with file_lock(run_dir / _LOCK_FILE, wait_s=0) as got:
        if not got:
            message = f"{run_dir} is in use by another `maps-ray train`; wait for it or choose another name"
            raise SpecError([Problem("name", run_dir.name, message)])
        yield


class SplitErrors(TypedDict, total=False):
    """Action errors on one split: absolute differences of normalised actions, averaged."""

    samples: int
    action_l1: float
    position_l1: float
    """As the next two, of actions with 7 dimensions alone."""
    rotation_l1: float
    gripper_l1: float
    tasks: dict[str, float]
    """Sentence -> `action_l1`."""
    episodes: dict[str, dict[str, float]]
    """`Mixture.episode` -> the values above."""


class EvaluationEntry(TypedDict):
    """What was measured at one step."""

    step: int
    splits: dict[str, SplitErrors]
    rollouts: NotRequired[dict[str, float]]
    """Metric -> value."""


class EvaluationRecord:
    """`evaluation.json`: a list of entries, ascending in step."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "evaluation.json"

    def at(self, step: int) -> dict[str, SplitErrors] | None:
        """The results of one step, split -> result; None when there are none."""
        return next((entry["splits"] for entry in self._entries() if entry["step"] == step), None)

    def add(self, step: int, results: Mapping[str, SplitErrors]) -> None:
        """Adds the results of one step, in place of all that was known of it."""
        entries = [entry for entry in self._entries() if entry["step"] != step]
        entries.append({"step": step, "splits": dict(results)})
        write_json(self._path, sorted(entries, key=lambda entry: int(entry["step"])))

    def rollouts_at(self, step: int) -> dict[str, float] | None:
        """The metrics of one step's rollouts; None when there are none."""
        return next((entry.get("rollouts") for entry in self._entries() if entry["step"] == step), None)

    def add_rollouts(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the metrics of rollouts to what is known of a step."""
        if self.at(step) is None:
            self.add(step, {})
        entries = self._entries()
        for entry in entries:
            if entry["step"] == step:
                entry["rollouts"] = dict(values)
        write_json(self._path, entries)

    def _entries(self) -> list[EvaluationEntry]:
        return read_json(self._path) or []


def flat(value: object, prefix: str = "") -> dict[str, object]:
    """Nested mappings as dotted names with their values."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, part in value.items() for k, v in flat(part, f"{prefix}.{name}".lstrip(".")).items()}


def _remedy(field: str) -> str:
    if field == "training.max_steps":
        return "a decaying learning rate depends on it, so only schedule `constant` may be made longer"
    return "it changes what the run means: set it back, or start a run of another name"
