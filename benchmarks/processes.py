"""Gloo processes on this machine, ready for DeepSpeed on the CPU."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def in_processes(world: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function(*arguments)` in `world` processes of one group; returns what rank 0 returned."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (world, folder, function, arguments), nprocs=world)
        return pickle.loads(Path(folder, "result").read_bytes())


def _process(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE=str(world), LOCAL_SIZE=str(world))
    torch.set_num_threads(1)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    # BF16_Optimizer prints its memory use, whatever the level.
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    # Without this the first collective compiles a shared-memory extension, and fails where there is no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    deepspeed.init_distributed("gloo", verbose=False)
    result = function(*arguments)
    if rank == 0:
        Path(folder, "result").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
