"""Sections of a run spec on where it runs and where it is recorded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from maps_ray.spec.paths import mirror_folder
from maps_ray.spec.section import (
    Count,
    NonNegative,
    NonNegativeInt,
    Positive,
    Section,
    StoragePlace,
)


class TrackingSpec(Section):
    """Where the run is recorded."""

    uri: str | None = None
    """MLflow tracking URI; none means a sqlite database with an artifact folder under `cluster.storage`, or under
    `cluster.scratch` where that is an object store. A user and password in it are taken out when the spec is read, into
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    credentials: Path | None = None
    """File of mode 0600 with lines `MLFLOW_TRACKING_USERNAME=...`, `MLFLOW_TRACKING_PASSWORD=...` or
    `MLFLOW_TRACKING_TOKEN=...`; none takes these variables from the environment."""
    experiment: Annotated[str, Field(min_length=1)] = "maps_ray"
    """MLflow experiment; made when missing."""


class ElasticSpec(Section):
    """A number of workers that follows the cluster."""

    min: Count
    """Fewer than these wait for nodes."""
    max: Count
    """More than these are not asked for. `training.batch_size` and `gradient_accumulation` are meant for so many."""

    @model_validator(mode="after")
    def _min_is_less(self) -> ElasticSpec:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must not be more than max ({self.max})")
        return self


class ClusterSpec(Section):
    """Where the run takes place."""

    address: str | None = None
    """Ray address (`auto`, `host:port`, `ray://host:port`); none starts Ray on this machine, or joins the cluster of a
    submitted job. From a machine that is no node (`ray://`) no sweep is run, and no run on an object store: submit
    those."""
    workers: Count | ElasticSpec = 2
    """Ray Train workers: data-parallel and ZeRO ranks. `{min: 4, max: 16}` goes on with fewer when nodes are lost, and
    with more from the next checkpoint when there are more, always with the same global batch."""
    cpus_per_worker: Positive = 1
    """CPU cores that Ray reserves, and torch threads, per worker."""
    gpus_per_worker: NonNegative | Literal["auto"] = "auto"
    """`auto` gives each worker one GPU where the cluster has any, else none."""
    autoscaling: bool = False
    """The cluster adds nodes when asked: wait for the workers, up to `start_timeout_s`, where it is too small now.
    `gpus_per_worker` must then be a number: `auto` sees only the nodes that are there."""
    storage: StoragePlace = Path("runs")
    """Folder that all nodes share, or `s3://bucket/folder`, `gs://bucket/folder`: checkpoints, weights, records,
    reports. Credentials of an object store come from the environment of each node."""
    scratch: Path | None = None
    """Under an object store, folder on each node's own disk: parts of checkpoints on their way, and on the driver's the
    records and MLflow's sqlite. None takes `$MAPS_RAY_SCRATCH`, or `maps_ray-USER` among the temporary files."""
    max_failures: NonNegativeInt = 3
    """Losses of workers or nodes, in start-up as at work, survived in a row: each new checkpoint counts anew."""
    # Ray Train's own limit of 60 s is less than a node of a cloud takes to boot.
    start_timeout_s: Positive = 600
    """How long to wait for an autoscaling cluster to bring the workers up."""
    collective_timeout_s: Positive = 1800
    """How long workers wait for the slowest in a collective, such as one that loads on a cold node; then they start
    again."""

    @property
    def most_workers(self) -> int:
        """The number of workers, or the largest that there may be."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    def sizes(self, global_batch_size: int) -> list[int]:
        """Numbers of workers that may train, ascending: those allowed that share the global batch evenly."""
        if isinstance(self.workers, int):
            return [self.workers]
        return [n for n in range(self.workers.min, self.workers.max + 1) if global_batch_size % n == 0]

    @property
    def local_storage(self) -> Path:
        """`storage`; under an object store, where this node keeps what it has of it."""
        return self.storage if isinstance(self.storage, Path) else mirror_folder(self.storage, self.scratch)

    @field_validator("address")
    @classmethod
    def _address_can_be_called(cls, address: str | None) -> str | None:
        if address is None or re.fullmatch(r"auto|local|(ray://)?(\[[0-9a-fA-F:.]+\]|[\w.\-]+):\d{1,5}", address):
            return address
        raise ValueError("an address is auto, host:port or ray://host:port")
