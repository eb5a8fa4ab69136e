"""What does the projection cost? Time of a ShardedAdamSPD step beside torch.optim.Adam under the same DeepSpeed engine.

    python benchmarks/optimizer_step.py                      # 20 million parameters, ZeRO-2, bf16, 2 processes
    python benchmarks/optimizer_step.py --stage 3 --processes 1

One engine for each optimizer, all in the same processes. Rounds alternate between the engines, so that a busy machine
slows all of them; the table gives medians over the rounds, of rank 0.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from processes import in_processes
from torch import nn

WIDTH = 512


def build(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers))).to(torch.bfloat16)


def engine_of(kind: str, stage: int, layers: int) -> tuple[Any, torch.optim.Optimizer]:
    import deepspeed

    from maps_ray.proximity.zero import ShardedAdamSPD, bind

    model = build(layers)
    names = [name for name, _ in model.named_parameters()]
    # One step away from the start, so that every tensor has a drift to measure.
    anchors = {name: weight.detach() + 1e-3 for name, weight in model.named_parameters()}
    fused = True if "fused" in kind else None
    sharded = kind.startswith("ShardedAdamSPD")
    optimizer_class = ShardedAdamSPD if sharded else torch.optim.Adam
    optimizer = optimizer_class(model.parameters(), lr=1e-4, fused=fused)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
        },
    )
    if sharded:
        strength = 0.0 if "strength 0" in kind else 1.0
        bind(engine, optimizer, dict.fromkeys(names, strength), anchors.__getitem__)
    return engine, optimizer


def measure(stage: int, layers: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of the client optimizer's step and of the whole engine.step, for each optimizer."""
    kinds = [
        "torch.optim.Adam",
        "ShardedAdamSPD, strength 0",
        "ShardedAdamSPD, strength 1",
        "torch.optim.Adam, fused",
        "ShardedAdamSPD, strength 0, fused",
        "ShardedAdamSPD, strength 1, fused",
    ]
    engines = {kind: engine_of(kind, stage, layers) for kind in kinds}
    inner: dict[str, list[float]] = {kind: [] for kind in kinds}
    outer: dict[str, list[float]] = {kind: [] for kind in kinds}
    x = torch.randn(1, WIDTH, dtype=torch.bfloat16)
    for round_number in range(rounds + 1):
        for kind, (engine, optimizer) in engines.items():
            began: list[float] = []
            spent: list[float] = []
            before = optimizer.register_step_pre_hook(lambda *_, began=began: began.append(time.perf_counter()))
            after = optimizer.register_step_post_hook(lambda *_, spent=spent: spent.append(time.perf_counter()))
            engine.backward(engine(x).square().mean())
            dist.barrier()
            start = time.perf_counter()
            engine.step()
            if round_number > 0:
                outer[kind].append(time.perf_counter() - start)
                inner[kind].append(sum(spent) - sum(began))
            before.remove()
            after.remove()
    return {kind: (statistics.median(inner[kind]), statistics.median(outer[kind])) for kind in kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2, 3))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--parameters", type=float, default=20e6)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    layers = max(1, round(options.parameters / (WIDTH * WIDTH + WIDTH)))
    times = in_processes(options.processes, measure, options.stage, layers, options.rounds)
    print(
        f"{layers * (WIDTH + 1) * WIDTH / 1e6:.1f} M parameters in {2 * layers} tensors, ZeRO-{options.stage}, "
        f"{options.processes} processes, bf16 weights and anchors"
    )
    print(f"{'optimizer':36} {'step ms':>8} {'ratio':>6} {'engine.step ms':>15} {'ratio':>6}")
    for kind, (step, whole) in times.items():
        base = times["torch.optim.Adam, fused" if "fused" in kind else "torch.optim.Adam"]
        print(f"{kind:36} {step * 1e3:8.1f} {step / base[0]:6.2f} {whole * 1e3:15.1f} {whole / base[1]:6.2f}")


if __name__ == "__main__":
    main()
