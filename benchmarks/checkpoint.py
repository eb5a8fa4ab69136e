"""How long training stands still for a checkpoint: the copy into host buffers, as a share of the write behind it.

    python benchmarks/checkpoint.py [--parameters 1.5e9] [--processes 2] [--folder DIR]

Each process owns its share of a synthetic model as ZeRO-1 and -2 cut it: fp32 weights and two moments, 12 bytes for
each parameter in all. The old way, beside it, copies each slice and writes by safetensors while training waits.
Both end with fsync, manifest and rename. The first copy also makes the buffers; the median is of those after it.

Memory: 24 bytes for each parameter over all processes (state and buffers), and up to 24 more for the old way.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import torch.distributed as dist
from processes import in_processes
from safetensors.torch import save_file

import maps_ray.training.checkpoint as checkpoints
import maps_ray.training.state as states

_TENSOR = 4 << 20


def synthetic_engine(parameters: int) -> Any:
    """What `Snapshot` looks at of an engine: one flat partition of so many elements, in tensors of 4 Mi each."""
    flat = torch.rand(parameters)
    moments = {"step": torch.tensor(7.0), "exp_avg": torch.rand(parameters), "exp_avg_sq": torch.rand(parameters)}
    pieces = [
        SimpleNamespace(name=f"layers.{offset // _TENSOR}.weight", flat=flat, offset=offset, start=0, numel=numel)
        for offset in range(0, parameters, _TENSOR)
        for numel in [min(_TENSOR, parameters - offset)]
    ]
    binding = SimpleNamespace(averages=lambda flat: None, radii=dict)
    client = SimpleNamespace(state={flat: moments}, binding=binding)
    return SimpleNamespace(optimizer=SimpleNamespace(optimizer=client), pieces=pieces)


def old_way(engine: Any, folder: Path, rank: int) -> list[Path]:
    """Slices copied one by one, then written by safetensors."""
    tensors = {}
    for piece in engine.pieces:
        moments = engine.optimizer.optimizer.state[piece.flat]
        for kind, flat in {"weight": piece.flat, "m": moments["exp_avg"], "v": moments["exp_avg_sq"]}.items():
            tensors[f"{kind}/{piece.name}"] = flat.narrow(0, piece.offset, piece.numel).clone()
    path = folder / f"rank-{rank:05d}.safetensors"
    save_file(tensors, path)
    return [path]


def measure(parameters: int, folder: str, rounds: int) -> dict[str, Any]:
    """Seconds of rank 0: `stalls` and `writes` of the new way, `old` of the old one."""
    engine = synthetic_engine(parameters // dist.get_world_size())
    # In place of what finds the pieces in a real engine: nothing else of a snapshot looks at DeepSpeed.
    states._spans = lambda engine: engine.pieces  # type: ignore[assignment]
    root, writes, stalls, old = Path(folder), [], [], []
    saver = checkpoints.Saver(root / "new", 1, lambda step, seconds: writes.append(seconds))
    for step in range(1, rounds + 1):
        dist.barrier()
        began = time.perf_counter()
        saver.save(engine, step, {})
        stalls.append(time.perf_counter() - began)
        saver.wait()
    rank = dist.get_rank()
    for step in range(1, 3):
        dist.barrier()
        began = time.perf_counter()
        checkpoints.save_checkpoint(root / "old", step, lambda part: old_way(engine, part, rank), {}, 1)
        old.append(time.perf_counter() - began)
    return {"stalls": stalls, "writes": writes, "old": old}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1.5e9)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder by default")
    chosen = parser.parse_args()
    parameters = int(chosen.parameters)
    free = psutil.virtual_memory().available
    if 48 * parameters > free:
        wanted, parameters = parameters, int(free / 2 / 48)
        print(f"{48 * wanted / 2**30:.0f} GiB do not fit: measuring {parameters / 1e9:.2f} B parameters")
    folder = Path(tempfile.mkdtemp(dir=chosen.folder))
    try:
        found = in_processes(chosen.processes, measure, parameters, str(folder), chosen.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    size = 12 * parameters / 2**30
    stall, write, old = (statistics.median(v) for v in (found["stalls"][1:], found["writes"][1:], found["old"]))
    load = os.getloadavg()[0]
    print(
        f"{parameters / 1e9:.2f} B parameters, {size:.2f} GiB, {chosen.processes} processes, load average {load:.0f}\n"
    )
    print("| way | training stands still, s | written after, s |")
    print("|---|---|---|")
    print(f"| old: copy and write, median | {old:.2f} | - |")
    print(f"| snapshot, first | {found['stalls'][0]:.2f} | {found['writes'][0]:.2f} |")
    print(f"| snapshot, median | {stall:.2f} | {write:.2f} |")
    print(f"\nstall / write: {stall / write:.1%}; stall / old way: {stall / old:.1%}")


if __name__ == "__main__":
    main()
