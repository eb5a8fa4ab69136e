"""Ranks come from Ray alone: what mpirun, srun or torchrun left in the environment is taken out of the workers.

A shell inside a batch job carries the ranks of its own launcher, and Ray's processes inherit them, also on nodes where
`ray start` was called so. DeepSpeed takes Open MPI's for its own; torch, under torchrun's variables, waits for a store
that nobody serves.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from maps_ray.training.notice import watch_sigterm

if TYPE_CHECKING:
    from ray.train._internal.base_worker_group import BaseWorkerGroup

_LAUNCHERS = re.compile(
    r"""(OMPI|PMIX|PRTE|PMI2?|HYDRA|HYDI|I_MPI|MPIR|MV2|SMPI)_.*  # MPI: Open MPI, MPICH, Intel, MVAPICH, Spectrum
    |MPI_LOCAL.*|(MPI|PMI)_?(RANK|SIZE)
    |(SLURMD?|FLUX|PALS|ALPS|JSM|LSB)_.*  # batch systems
    |TORCHELASTIC_.*|MASTER_(ADDR|PORT)|ROLE_NAME  # torchrun
    |((LOCAL|NODE|GROUP|ROLE|CROSS)_)?RANK|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE|(LOCAL|CROSS)_SIZE
    |AZUREML_.*|AZ_BATCH.*|SM_TRAINING_ENV|DLTS_.*  # where DeepSpeed looks for the ranks of Open MPI
    """,
    re.VERBOSE,
)


def forget_launchers(environment: MutableMapping[str, str] | None = None) -> None:
    """Removes every other launcher's variables from `environment`, by default this process's own."""
    environment = os.environ if environment is None else environment
    for name in [name for name in environment if _LAUNCHERS.fullmatch(name)]:
        del environment[name]


class _RaysRanks(_TorchBackend):
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: TorchConfig) -> None:
        # Before Ray sets the ranks, and torch reads them.
        worker_group.execute(forget_launchers)
        worker_group.execute(watch_sigterm)
        super().on_start(worker_group, backend_config)


@dataclass
class RaysRanks(TorchConfig):
    """Ray's set-up of torch's process group, in an environment without other launchers' variables."""

    @property
    def backend_cls(self) -> type[_RaysRanks]:
        return _RaysRanks
