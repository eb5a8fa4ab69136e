"""The DeepSpeed engine of one worker: configuration, quiet start without a compiler, on CPU or CUDA."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed as dist

from maps_ray.spec import TrainingSpec


def prepare_process(gpu: bool) -> torch.device:
    """Chooses the accelerator; call it before anything imports DeepSpeed.

    Args:
        gpu: whether Ray gave this worker a GPU.

    Returns:
        the device that the engine will use.
    """
    os.environ["DS_ACCELERATOR"] = "cuda" if gpu else "cpu"
    import deepspeed.ops
    from deepspeed.utils import logger

    # Without this DeepSpeed compiles a shared-memory collective on first use (47 s) and dies without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        handler.setLevel(logging.ERROR)
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")


def deepspeed_config(training: TrainingSpec) -> dict[str, Any]:
    """DeepSpeed's configuration for a spec: ZeRO stage, precision, clipping, accumulation.

    `round_robin_gradients` stays off: with it DeepSpeed's record of where a tensor lies in the shards is wrong.
    """
    # Adding up in bf16 loses the small gradients of the later passes.
    sums = "fp32" if training.precision == "fp32" or training.gradient_accumulation > 1 else "bf16"
    return {
        "train_micro_batch_size_per_gpu": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "gradient_clipping": training.clip_norm,
        "bf16": {"enabled": training.precision == "bf16"},
        "data_types": {"grad_accum_dtype": sums},
        "zero_optimization": {"stage": training.zero_stage, "round_robin_gradients": False},
        # The optimizer is ours; DeepSpeed asks to say that this is meant.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def initialize(model: torch.nn.Module, optimizer: torch.optim.Optimizer, training: TrainingSpec) -> Any:
    """The DeepSpeed engine around `model`, in the process group that is already there."""
    import deepspeed

    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(training))
    return engine
