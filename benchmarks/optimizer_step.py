"""What does the projection cost? Time of a projected step beside torch's fused Adam, and what it reads and launches.

    python benchmarks/optimizer_step.py                     # 50 million parameters alone, then ZeRO-2 in 2 processes
    python benchmarks/optimizer_step.py --only alone
    python benchmarks/optimizer_step.py --only sharded --stage 3 --processes 1
    python benchmarks/optimizer_step.py --device cuda --only alone

All optimizers of a table run in the same processes. Rounds alternate between them, so that a busy machine slows all
alike. Times are medians over the rounds, of rank 0; ratios are medians of the ratios within a round, which a busy
machine disturbs least.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from processes import in_processes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

WIDTH = 512


class Operations(TorchDispatchMode):
    """Counts what torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def tensors(parameters: float, device: str) -> list[nn.Parameter]:
    """Weights and biases of square layers."""
    torch.manual_seed(0)
    layers = max(1, round(parameters / (WIDTH * WIDTH + WIDTH)))
    shapes = [(WIDTH, WIDTH), (WIDTH,)] * layers
    return [nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]


def alone(parameters: float, rounds: int, device: str) -> None:
    """AdamSPD on plain tensors beside torch's fused AdamW."""
    from maps_ray.proximity.adam_spd import AdamSPD

    def held(dtype: torch.dtype, **options: Any) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        own = tensors(parameters, device)
        # One step away from the start, so that every tensor has a drift to measure.
        anchors = [(parameter.detach() + 1e-3).to(dtype) for parameter in own]
        return own, AdamSPD([{"params": own, "anchors": anchors, "strength": 1.0}], lr=1e-5, **options)

    plain = tensors(parameters, device)
    optimizers = {
        "torch.optim.AdamW, fused": (plain, torch.optim.AdamW(plain, lr=1e-5, fused=True)),
        "AdamSPD, anchors fp32": held(torch.float32),
        "AdamSPD, anchors bf16": held(torch.bfloat16),
    }
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(p.shape, generator=generator).to(device) for p in plain]
    times: dict[str, list[float]] = {kind: [] for kind in optimizers}
    for round_number in range(rounds + 2):
        for kind, (own, optimizer) in optimizers.items():
            for parameter, grad in zip(own, grads, strict=True):
                parameter.grad = grad
            wait(device)
            began = time.perf_counter()
            optimizer.step()
            wait(device)
            if round_number > 1:
                times[kind].append(time.perf_counter() - began)
    numel = sum(parameter.numel() for parameter in plain)
    print(f"{numel / 1e6:.1f} M fp32 parameters in {len(plain)} tensors, {device}, {torch.get_num_threads()} threads")
    print(f"{'optimizer':28} {'step ms':>8} {'ratio':>6} {'operations':>11} {'syncs':>6} {'bytes/parameter':>16}")
    base = next(iter(times.values()))
    for kind, (_, optimizer) in optimizers.items():
        with Operations() as found:
            optimizer.step()
        ratio = statistics.median(mine / theirs for mine, theirs in zip(times[kind], base, strict=True))
        syncs = found.counts["aten._local_scalar_dense.default"]
        print(
            f"{kind:28} {statistics.median(times[kind]) * 1e3:8.1f} {ratio:6.2f} {sum(found.counts.values()):11} "
            f"{syncs:6} {traffic(kind):>16}"
        )


def traffic(kind: str) -> str:
    """Bytes of memory that one step moves for a parameter: counted from the passes, blocks being in cache."""
    adam = 4 * 4 + 3 * 4  # gradient, weight and moments read; weight and moments written
    if "AdamSPD" not in kind:
        return f"{adam}"
    anchor = 2 if "bf16" in kind else 4
    return f"{adam + anchor} to {adam + anchor + 8 + anchor}"  # the pull reads weight and anchor and writes the weight


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def build(layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers))).to(torch.bfloat16)


def engine_of(kind: str, stage: int, layers: int) -> tuple[Any, torch.optim.Optimizer]:
    import deepspeed

    from maps_ray.proximity.zero import ShardedAdamSPD, bind

    model = build(layers)
    anchors = {name: weight.detach() + 1e-3 for name, weight in model.named_parameters()}
    sharded = kind.startswith("ShardedAdamSPD")
    optimizer_class = ShardedAdamSPD if sharded else torch.optim.Adam
    optimizer = optimizer_class(model.parameters(), lr=1e-4, fused=True)
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
        bind(engine, optimizer, dict.fromkeys(anchors, strength), anchors.__getitem__)
    return engine, optimizer


def sharded(stage: int, layers: int, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of the client optimizer's step and of the whole engine.step in each round, for each optimizer."""
    kinds = ["torch.optim.Adam, fused", "ShardedAdamSPD, strength 0", "ShardedAdamSPD, strength 1"]
    engines = {kind: engine_of(kind, stage, layers) for kind in kinds}
    times: dict[str, tuple[list[float], list[float]]] = {kind: ([], []) for kind in kinds}
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
                times[kind][0].append(sum(spent) - sum(began))
                times[kind][1].append(time.perf_counter() - start)
            before.remove()
            after.remove()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("alone", "sharded"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of the optimizers alone")
    parser.add_argument("--parameters", type=float, default=50e6, help="alone")
    parser.add_argument("--sharded-parameters", type=float, default=20e6)
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2, 3))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if options.only != "sharded":
        alone(options.parameters, options.rounds, options.device)
    if options.only == "alone":
        return
    layers = max(1, round(options.sharded_parameters / (WIDTH * WIDTH + WIDTH)))
    times = in_processes(options.processes, sharded, options.stage, layers, options.rounds)
    print(
        f"{layers * (WIDTH + 1) * WIDTH / 1e6:.1f} M parameters in {2 * layers} tensors, ZeRO-{options.stage}, "
        f"{options.processes} processes, bf16 weights and anchors"
    )
    print(f"{'optimizer':28} {'step ms':>8} {'ratio':>6} {'engine.step ms':>15} {'ratio':>6}")
    base = next(iter(times.values()))
    for kind, columns in times.items():
        cells = []
        for mine, theirs in zip(columns, base, strict=True):
            ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            cells.append((statistics.median(mine) * 1e3, ratio))
        (step, step_ratio), (whole, whole_ratio) = cells
        print(f"{kind:28} {step:8.1f} {step_ratio:6.2f} {whole:15.1f} {whole_ratio:6.2f}")


if __name__ == "__main__":
    main()
