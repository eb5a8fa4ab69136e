"""Is the planner right? Peak memory of training beside what `maps-ray plan` says, under each ZeRO stage.

    python benchmarks/memory.py                          # the tiny VLA, 2 processes, stages 1 to 3
    python benchmarks/memory.py --size large             # about 0.5 billion parameters; takes some 12 GiB
    python benchmarks/memory.py --size small --stages 3 --precision bf16

Each case trains a few steps on random samples in processes of its own, on the CPU. Measured is the resident set: its
peak over the steps after the first, less what it was before the policy was made. The planner counts the same on the
CPU, where memory that was allocated and not touched takes nothing. What tensors leave behind in the C library's heap
is none of theirs: blocks of 64 KiB and more are mapped, and given back when they are freed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from processes import in_processes

from maps_ray.models import Policy, create_policy
from maps_ray.models.openvla_oft.tiny import tiny_config
from maps_ray.spec import RunSpec, parse

MIB = 2**20
_M_MMAP_THRESHOLD = -3
STEPS = 3
# Name -> hidden, inner and layers of the language model, images' side, samples.
SIZES = {
    "warm": (64, 64, 1, 28, 1),
    "small": (128, 344, 5, 112, 8),
    "medium": (1024, 2752, 12, 56, 2),
    "large": (1536, 4128, 16, 56, 1),
}


DIMENSIONS = {"action_dim": 7, "proprio_dim": 8}


@dataclass(frozen=True)
class Case:
    """One measurement."""

    size: str
    stage: int
    precision: str
    processes: int
    checkpointing: bool


def config_of(size: str) -> dict[str, Any]:
    """The tiny policy's `config.json`, the language model widened."""
    hidden, inner, layers, side, _ = SIZES[size]
    config = tiny_config()
    config["text_config"] |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    config["vision_kwargs"]["img_size"] = side
    config["image_sizes"] = [side, side]
    return config


def spec_of(case: Case) -> RunSpec:
    """A spec that the planner and the engine are given; its files do not exist."""
    batch = SIZES[case.size][4]
    return parse(
        RunSpec,
        {
            "name": "memory",
            "model": {"checkpoint": "/nowhere"},
            "data": {"path": "/nowhere"},
            "training": {
                "batch_size": batch,
                "zero_stage": case.stage,
                "precision": case.precision,
                "activation_checkpointing": case.checkpointing,
            },
            "cluster": {"workers": case.processes},
        },
    )


def predicted(case: Case) -> int:
    """Bytes of one rank by the planner, counted as a CPU counts."""
    from maps_ray.training.planning.subject import Subject
    from maps_ray.training.planning.terms import Setup, needed, terms

    spec = spec_of(case)
    stored = "bfloat16" if case.precision == "bf16" else "float32"
    subject = Subject(spec, config_of(case.size), DIMENSIONS, 32, stored)
    setup = Setup(case.stage, case.processes, spec.training.precision, 1, lazy=True, fused=FUSED)
    return needed(terms(subject.counts, setup, subject.activations(spec.training.batch_size)))


FUSED = True


def measured(case: Case) -> int:
    """Bytes of rank 0: peak of the resident set over the steps after the first."""
    return int(in_processes(case.processes, _train, case))


def _train(case: Case) -> int:
    # By itself glibc raises this threshold to 32 MiB, and keeps what is smaller.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    # What torch, DeepSpeed and gloo load and keep on first use is no part of a run's memory.
    _steps(case, "warm")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident()
    return _steps(case, case.size) - before


def _steps(case: Case, size: str) -> int:
    """Trains a few steps; the peak of the resident set over those after the first."""
    from maps_ray.models.activations import checkpoint_blocks
    from maps_ray.training.engine import start_engine

    case = Case(size, case.stage, case.precision, case.processes, case.checkpointing)
    spec = spec_of(case)
    inputs = random_batch(case)
    gc.collect()
    policy = random_policy(case)
    if case.checkpointing:
        checkpoint_blocks(policy.modules())
    policy.read_anchor = _anchors(policy)
    bound = start_engine(spec, policy)
    for step in range(STEPS):
        # The first step makes the moments, and loads what is loaded on first use. 5 lets the peak start again
        # (proc(5)).
        if step == 1:
            Path("/proc/self/clear_refs").write_text("5")
        loss = bound.engine(**inputs).loss
        bound.engine.backward(loss)
        bound.engine.step()
        del loss
    peak = _peak()
    bound.engine.destroy()
    return peak


def random_batch(case: Case) -> dict[str, torch.Tensor]:
    """A micro-batch as the loader gives it, of random numbers."""
    from maps_ray.training.planning.subject import Subject

    spec = spec_of(case)
    shapes = Subject(spec, config_of(case.size), DIMENSIONS, 32, None).batch(spec.training.batch_size)
    return {name: torch.rand(tensor.shape) if tensor.is_meta else tensor for name, tensor in shapes.items()}


def random_policy(case: Case) -> Policy:
    """The policy with random weights, on the CPU."""
    return create_policy(config_of(case.size), num_images=2, use_proprio=True, dtype=_dtype(case), **DIMENSIONS)


def _anchors(policy: Any) -> Any:
    """A base checkpoint in memory would be measured; anchors are the weights themselves, read when they are bound."""
    parameters = dict(policy.named_parameters())

    def read(name: str) -> torch.Tensor:
        parameter = parameters[name]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return parameter.detach() if parameter.shape == shape else torch.zeros(shape, dtype=parameter.dtype)

    return read


def _dtype(case: Case) -> torch.dtype:
    return torch.bfloat16 if case.precision == "bf16" else torch.float32


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args()
    print("| policy | stage | precision | predicted, MiB | measured, MiB | predicted / measured |")
    print("|---|---|---|---|---|---|")
    for stage in arguments.stages:
        case = Case(arguments.size, stage, arguments.precision, arguments.processes, arguments.checkpointing)
        said, found = predicted(case), measured(case)
        numbers = f"{said / MIB:,.0f} | {found / MIB:,.0f} | {said / found:.2f}"
        print(f"| {case.size} | {stage} | {case.precision} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
