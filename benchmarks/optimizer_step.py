"""What does the projection cost? Time of a projected step beside torch's fused Adam, and what it reads and launches.

    python benchmarks/optimizer_step.py                     # all that follows
    python benchmarks/optimizer_step.py --only alone        # 50 million parameters in one process
    python benchmarks/optimizer_step.py --only sharded      # ZeRO-2 in 2 processes
    python benchmarks/optimizer_step.py --only tiny         # the same for training steps of the tiny VLA
    python benchmarks/optimizer_step.py --only sharded --stage 3 --processes 1
    python benchmarks/optimizer_step.py --device cuda --only alone

All optimizers of a table run in the same processes. Rounds alternate between them, so that a busy machine slows all
alike. Times are medians over the rounds, of rank 0; ratios are medians of the ratios within a round, which a busy
machine disturbs least. `CPU ms` is the time of the process's threads: where others take the cores it is the better
one, with OMP_NUM_THREADS=1, for threads that wait for one another take time as well.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections import Counter
from typing import Any

import memory
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


def tensors(parameters: float, device: str, width: int = 768) -> list[nn.Parameter]:
    """Weights and biases of square layers."""
    torch.manual_seed(0)
    layers = max(1, round(parameters / (width * width + width)))
    shapes = [(width, width), (width,)] * layers
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
    spent: dict[str, list[float]] = {kind: [] for kind in optimizers}
    for round_number in range(rounds + 2):
        for kind, (own, optimizer) in optimizers.items():
            for parameter, grad in zip(own, grads, strict=True):
                parameter.grad = grad
            wait(device)
            began, used = time.perf_counter(), time.process_time()
            optimizer.step()
            wait(device)
            # The first rounds make the moments and load the kernels.
            if round_number > 1:
                times[kind].append(time.perf_counter() - began)
                spent[kind].append(time.process_time() - used)
    numel = sum(parameter.numel() for parameter in plain)
    print(f"{numel / 1e6:.1f} M fp32 parameters in {len(plain)} tensors, {device}, {torch.get_num_threads()} threads")
    titles = f"{'optimizer':28} {'step ms':>8} {'ratio':>6} {'CPU ms':>8} {'ratio':>6}"
    print(f"{titles} {'operations':>11} {'syncs':>6} {'bytes/parameter':>16}")

    def cells(columns: dict[str, list[float]], kind: str) -> str:
        base = next(iter(columns.values()))
        ratio = statistics.median(mine / theirs for mine, theirs in zip(columns[kind], base, strict=True))
        return f"{statistics.median(columns[kind]) * 1e3:8.1f} {ratio:6.2f}"

    for kind, (_, optimizer) in optimizers.items():
        with Operations() as found:
            optimizer.step()
        syncs = found.counts["aten._local_scalar_dense.default"]
        print(
            f"{kind:28} {cells(times, kind)} {cells(spent, kind)} {sum(found.counts.values()):11} "
            f"{syncs:6} {traffic(kind):>16}"
        )


def traffic(kind: str) -> str:
    """Bytes of memory that one step moves for a parameter, counted from the passes."""
    adam = 4 * 4 + 3 * 4  # gradient, weight and moments read; weight and moments written
    if "AdamSPD" not in kind:
        return f"{adam}"
    anchor = 2 if "bf16" in kind else 4
    return f"{adam + anchor} to {adam + anchor + 8 + anchor}"  # the pull reads weight and anchor and writes the weight


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def layers_of(parameters: float) -> nn.Module:
    """Square layers, in bf16."""
    torch.manual_seed(0)
    layers = max(1, round(parameters / (WIDTH * WIDTH + WIDTH)))
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers))).to(torch.bfloat16)


def engine_of(kind: str, stage: int, model: nn.Module) -> tuple[Any, torch.optim.Optimizer]:
    import deepspeed

    from maps_ray.proximity.zero import ShardedAdamSPD, bind

    anchors = {name: weight.detach() + 1e-3 for name, weight in model.named_parameters()}
    sharded = kind.startswith("ShardedAdamSPD")
    optimizer_class = ShardedAdamSPD if sharded else torch.optim.Adam
    optimizer = optimizer_class(model.parameters(), lr=1e-4, fused=True)
    half = next(model.parameters()).dtype == torch.bfloat16
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": half},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
        },
    )
    if sharded:
        strength = 0.0 if "strength 0" in kind else 1.0
        bind(engine, optimizer, dict.fromkeys(anchors, strength), anchors.__getitem__)
    return engine, optimizer


def clocks() -> tuple[float, float]:
    """Seconds of the wall and of this process's threads."""
    return time.perf_counter(), time.process_time()


def sharded(stage: int, rounds: int, parameters: float | None) -> tuple[str, dict[str, list[tuple[float, ...]]]]:
    """What was stepped, and for each optimizer and round: wall and CPU seconds of its step, of engine.step and of all.

    Args:
        stage: of ZeRO.
        rounds: measured.
        parameters: of square layers in bf16; None for the tiny VLA in fp32, on two images of 112 pixels and 8 samples.
    """
    case = memory.Case("small", stage, "fp32", dist.get_world_size(), checkpointing=False)
    inputs = memory.random_batch(case) if parameters is None else {"x": torch.randn(1, WIDTH, dtype=torch.bfloat16)}

    def model() -> nn.Module:
        return memory.random_policy(case) if parameters is None else layers_of(parameters)

    kinds = ["torch.optim.Adam, fused", "ShardedAdamSPD, strength 0", "ShardedAdamSPD, strength 1"]
    engines = {kind: engine_of(kind, stage, model()) for kind in kinds}
    times: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in kinds}
    for round_number in range(rounds + 2):
        for kind, (engine, optimizer) in engines.items():
            began: list[tuple[float, float]] = []
            ended: list[tuple[float, float]] = []
            before = optimizer.register_step_pre_hook(lambda *_, began=began: began.append(clocks()))
            after = optimizer.register_step_post_hook(lambda *_, ended=ended: ended.append(clocks()))
            dist.barrier()
            whole = clocks()
            loss = engine(**inputs).loss if parameters is None else engine(inputs["x"]).square().mean()
            engine.backward(loss)
            # Else the step's clock would run while this rank waits for the others' backward pass.
            dist.barrier()
            start = clocks()
            engine.step()
            end = clocks()
            if round_number > 1:
                # Added up: stage 3 calls the optimizer once for each sub-group.
                own = [sum(clock) for clock in zip(*map(_less, ended, began), strict=True)]
                times[kind].append((*own, *_less(end, start), *_less(end, whole)))
            before.remove()
            after.remove()
    shapes = [
        getattr(weight, "ds_shape", weight.shape) for weight in next(iter(engines.values()))[0].module.parameters()
    ]
    subject = "the tiny VLA, fp32" if parameters is None else "square layers, bf16"
    return f"{subject}: {sum(map(math.prod, shapes)) / 1e6:.1f} M parameters in {len(shapes)} tensors", times


def _less(end: tuple[float, float], start: tuple[float, float]) -> tuple[float, float]:
    return end[0] - start[0], end[1] - start[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("alone", "sharded", "tiny"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of the optimizers alone")
    parser.add_argument("--parameters", type=float, default=50e6, help="alone")
    parser.add_argument("--sharded-parameters", type=float, default=20e6)
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2, 3))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if options.only in (None, "alone"):
        alone(options.parameters, options.rounds, options.device)
    if options.only in (None, "sharded"):
        table(options, options.sharded_parameters)
    if options.only in (None, "tiny"):
        table(options, None)


def table(options: argparse.Namespace, parameters: float | None) -> None:
    """Prints what steps under ZeRO took, of rank 0."""
    subject, times = in_processes(options.processes, sharded, options.stage, options.rounds, parameters)
    print(f"{subject}, ZeRO-{options.stage}, {options.processes} processes")
    titles = ("optimizer ms", "CPU ms", "engine.step ms", "CPU ms", "whole step ms", "CPU ms")
    print(f"{'optimizer':28}" + "".join(f" {title:>14} {'ratio':>6}" for title in titles))
    base = next(iter(times.values()))
    for kind, rows in times.items():
        cells = []
        for column in range(len(titles)):
            ratio = statistics.median(a[column] / b[column] for a, b in zip(rows, base, strict=True))
            cells.append(f" {statistics.median(row[column] for row in rows) * 1e3:14.1f} {ratio:6.3f}")
        print(f"{kind:28}" + "".join(cells))


if __name__ == "__main__":
    main()
