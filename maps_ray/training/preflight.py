"""Everything that can be wrong with a run and can be known before a Ray cluster starts; no torch, no process.

It takes well under five seconds: configuration and headers of the checkpoint, metadata and vectors of the data, the
schedule, the storage folder and this machine's resources are looked at, weights and videos are not.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from maps_ray import machine
from maps_ray.data import DatasetError, Demonstrations, check_data, data_sizes
from maps_ray.data.index import Report
from maps_ray.models import CheckpointError, ModelInfo, describe
from maps_ray.proximity.rules import TensorRules, tensor_rules
from maps_ray.proximity.schedule import (
    ScheduleError,
    StrengthRow,
    frozen_tensors,
    strength_table,
)
from maps_ray.proximity.stack import StackError, StackLayer, assign
from maps_ray.run_storage import storage_problems
from maps_ray.spec import Problem, RunSpec, SpecError
from maps_ray.spec.credentials import read_credentials
from maps_ray.spec.paths import scratch_folder
from maps_ray.tracking.store import resolve_uri
from maps_ray.training.cluster import client_problems
from maps_ray.training.model_checks import model_problems, policy_options, trained_parameters, trained_shapes
from maps_ray.training.rollout_checks import rollout_problems
from maps_ray.training.run_folder import elastic_problems

# A checkpoint holds the master weight and two moments of each parameter, in fp32.
_CHECKPOINT_BYTES_PER_PARAMETER = 12


def check(spec: RunSpec, *, patient: bool = True) -> None:
    """Whether the run can start.

    Args:
        spec: of the run.
        patient: look through data sets of any size. Else those of very many shards that were never indexed are left to
            `prepare_data`, which has a cluster.

    Raises:
        SpecError: it cannot; lists every fault found, each with field, value and remedy.
    """
    sizes = _data_sizes(spec, patient)
    problems: list[Problem] = []
    try:
        info = _describe(spec, sizes)
    except SpecError as error:
        problems += error.problems
        info = None
    if info is not None:
        problems += [Problem("model.checkpoint", str(info.path), fault) for fault in info.problems]
        problems += model_problems(spec, info)
        try:
            _strengths(spec, info)
        except SpecError as error:
            problems += error.problems
    # A width that comes from the data fits the policy by itself, unless the checkpoint brings its own head.
    problems += check_data(spec.data, use_proprio=spec.model.use_proprio, patient=patient)
    problems += rollout_problems(spec, sizes)
    problems += _storage_problems(spec, info)
    problems += _machine_problems(spec)
    if not isinstance(spec.cluster.storage, Path):
        problems += client_problems(spec.cluster, "records of a run on an object store wait on the disk of a node")
    problems += elastic_problems(spec)
    # Its database is in the storage, which must be a place.
    if not any(problem.field == "cluster.storage" for problem in problems):
        problems += _tracking_problems(spec)
    if problems:
        raise SpecError(problems)


def prepare_data(spec: RunSpec, report: Report | None = None) -> None:
    """Indexes the data on the cluster that this process has joined, and checks them in full: workers find it done.

    Args:
        spec: with absolute paths.
        report: told of progress.

    Raises:
        SpecError: faults of the data; each with field, value and remedy.
    """
    use_proprio = spec.model.use_proprio
    problems = check_data(spec.data, use_proprio=use_proprio, report=report)
    if problems:
        raise SpecError(problems)
    Demonstrations(spec.data, use_proprio=use_proprio, report=report)


def strengths(spec: RunSpec) -> list[StrengthRow]:
    """The schedule as rows in stack order: `module`, `strength`, `tensors`, `parameters`.

    Raises:
        SpecError: the checkpoint cannot be described, or the order does not fit its modules.
    """
    return _strengths(spec, model_info(spec))


def published_strengths(spec: RunSpec) -> dict[str, float]:
    """The strength of each trained tensor under its name in the published Hugging Face layout, in model order.

    Adapters are named as peft names them in a policy of that layout: `base_model.model.<layer>.lora_A.default.weight`.

    Raises:
        SpecError: as `strengths`.
    """
    info = model_info(spec)
    strengths = _schedule(spec, info)[1].strengths
    root = {True: "base_model.model.", False: ""}
    return {f"{root['.lora_' in name]}{info.published_name(name)}": value for name, value in strengths.items()}


def training_rules(spec: RunSpec, info: ModelInfo) -> TensorRules:
    """Strength, learning rate, first step and L2-SP of each trained tensor.

    Args:
        spec: of the run.
        info: of its model.

    Raises:
        SpecError: a field names what the model lacks, or does not address each pretrained layer once.
    """
    return _schedule(spec, info)[1]


def model_info(spec: RunSpec) -> ModelInfo:
    """What can be said of the spec's model without loading it.

    Raises:
        SpecError: the checkpoint cannot be described.
    """
    return _describe(spec, _data_sizes(spec))


def _data_sizes(spec: RunSpec, patient: bool = True) -> dict[str, int]:
    """Dimensions of actions and proprioception; empty where the data cannot say, which `check_data` reports."""
    try:
        return data_sizes(spec.data, use_proprio=spec.model.use_proprio, patient=patient)
    except DatasetError:
        return {}


def _describe(spec: RunSpec, sizes: Mapping[str, int]) -> ModelInfo:
    try:
        return describe(spec.model.checkpoint, **policy_options(spec), **sizes)
    except CheckpointError as error:
        raise SpecError([Problem("model.checkpoint", str(spec.model.checkpoint), str(error))]) from None


def _strengths(spec: RunSpec, info: ModelInfo) -> list[StrengthRow]:
    owners, rules, frozen = _schedule(spec, info)
    sizes = {name: math.prod(shape) for name, shape in info.parameters.items()}
    return strength_table(info.stack, owners, rules.strengths, sizes, frozen)


def _schedule(spec: RunSpec, info: ModelInfo) -> tuple[dict[str, StackLayer], TensorRules, frozenset[str]]:
    """The layer of each parameter and adapter, the rules of each trained one, and the frozen ones."""
    chosen, trained = spec.proximity, trained_shapes(spec, info)
    try:
        owners = assign(info.stack, {**info.parameters, **trained})
        frozen = frozen_tensors(info.stack, owners, chosen.freeze)
        dimensions = {name: len(shape) for name, shape in trained.items() if name not in frozen}
        rules = tensor_rules(info.stack, owners, dimensions, spec, info.published_name)
    except ScheduleError as error:
        path = error.field if "." in error.field else f"proximity.{error.field}"
        section, field = path.split(".")
        raise SpecError([Problem(path, getattr(getattr(spec, section), field), str(error))]) from None
    except StackError as error:
        raise SpecError([Problem("model.checkpoint", str(info.path), str(error))]) from None
    return owners, rules, frozen


def _storage_problems(spec: RunSpec, info: ModelInfo | None) -> list[Problem]:
    if not isinstance(spec.cluster.storage, Path):
        problems = storage_problems(spec.cluster)
        return problems or _scratch_problems(spec, info)
    storage = spec.cluster.storage.absolute()
    try:
        storage.resolve()
    except (OSError, RuntimeError) as error:
        return [Problem("cluster.storage", str(storage), f"cannot be a folder: {error}; choose another one")]
    existing = next(path for path in (storage, *storage.parents) if path.exists())

    def problem(message: str) -> list[Problem]:
        return [Problem("cluster.storage", str(spec.cluster.storage), message)]

    if not existing.is_dir():
        return problem(f"{existing} is a file, not a folder; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        return problem(f"{existing} cannot be written; choose another folder or change its permissions")
    if info is None:
        return []
    # While a checkpoint is written, those to keep are all still there.
    each = _CHECKPOINT_BYTES_PER_PARAMETER * trained_parameters(spec, info)
    needed = each * (spec.training.keep_checkpoints + 1)
    free = shutil.disk_usage(existing).free
    if free < needed:
        return problem(
            f"{existing} has {free / 2**30:.1f} GiB free; {spec.training.keep_checkpoints} checkpoints and the next "
            f"one take {needed / 2**30:.1f} GiB: free some space, or lower training.keep_checkpoints"
        )
    return []


def _scratch_problems(spec: RunSpec, info: ModelInfo | None) -> list[Problem]:
    """Too little room on this node for what is on its way: here the parts of all workers, as one machine has them."""
    if info is None:
        return []
    scratch = scratch_folder(spec.cluster.scratch)
    needed, free = _CHECKPOINT_BYTES_PER_PARAMETER * trained_parameters(spec, info), shutil.disk_usage(scratch).free
    if free >= needed:
        return []
    message = (
        f"{scratch} has {free / 2**30:.1f} GiB free; a checkpoint on its way takes up to {needed / 2**30:.1f} GiB: "
        "free some space, or name a folder on a larger disk in cluster.scratch or MAPS_RAY_SCRATCH"
    )
    return [Problem("cluster.scratch", str(scratch), message)]


def _tracking_problems(spec: RunSpec) -> list[Problem]:
    problems = []
    try:
        resolve_uri(spec.tracking.uri, spec.cluster.local_storage)
    except SpecError as error:
        problems += error.problems
    if spec.tracking.credentials is not None:
        try:
            read_credentials(spec.tracking.credentials)
        except ValueError as error:
            problems.append(Problem("tracking.credentials", str(spec.tracking.credentials), str(error)))
    return problems


def _share_fault(gpus: float, workers: int) -> str | None:
    """What is wrong with a number of GPUs for each worker, on any machine."""
    if gpus > 1 and gpus != int(gpus):
        return "Ray gives whole GPUs, or a part of one: give a whole number, or less than 1"
    if 0 < gpus <= 0.5 and workers > 1:
        return f"of {workers} workers two would share a GPU, and NCCL takes one on each: give more than 0.5, such as 1"
    return None


def _machine_problems(spec: RunSpec) -> list[Problem]:
    """Workers that this machine cannot hold, where Ray is started on it; GPUs that nobody can count yet."""
    cluster = spec.cluster
    if cluster.autoscaling and cluster.gpus_per_worker == "auto":
        message = "sees only the nodes that are there, and this cluster adds others: give a number, such as 1, or 0"
        return [Problem("cluster.gpus_per_worker", "auto", message)]
    if cluster.gpus_per_worker != "auto" and (fault := _share_fault(cluster.gpus_per_worker, cluster.most_workers)):
        return [Problem("cluster.gpus_per_worker", cluster.gpus_per_worker, fault)]
    if cluster.address is not None or "RAY_ADDRESS" in os.environ:
        return []
    cpus = machine.cpus()
    problems = []
    workers = cluster.workers if isinstance(cluster.workers, int) else cluster.workers.min
    if workers * cluster.cpus_per_worker > cpus:
        most = math.floor(cpus / cluster.cpus_per_worker)
        message = (
            f"{workers} workers with {cluster.cpus_per_worker:g} CPUs each, but this machine has {cpus}; "
            + (f"use at most {most} workers, " if most else "lower cluster.cpus_per_worker, ")
            + "or name a larger cluster in cluster.address"
        )
        problems.append(Problem("cluster.workers", workers, message))
    if cluster.gpus_per_worker != "auto":
        gpus = machine.gpus()
        if workers * cluster.gpus_per_worker > gpus:
            message = (
                f"{workers} workers with {cluster.gpus_per_worker:g} GPUs each, but this machine has {gpus}; "
                "use `auto`, fewer workers, or name a larger cluster in cluster.address"
            )
            problems.append(Problem("cluster.gpus_per_worker", cluster.gpus_per_worker, message))
    return problems
