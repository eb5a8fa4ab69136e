"""One GPU, one command: exactness, resume, memory against the plan, samples a second, launches and host syncs.

    python benchmarks/gpu/run.py --out results                        # on a machine with one GPU
    python benchmarks/gpu/run.py --out results --device cpu --tiny     # the same lines, in a minute, on a CPU

Writes `results/gpu.json` and `results/gpu.md`; a part that fails is a row that says why, and the others go on.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

GIB = 2**30
STEPS = 3
TRAINED = {"action_dim": 7, "proprio_dim": 8}


def start(device: str, folder: str) -> torch.device:
    """The process group of one rank, NCCL on a GPU."""
    from maps_ray.training.engine import prepare_process

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
    chosen = prepare_process(device == "cuda")
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
    return chosen


def spec_of(**training: Any) -> Any:
    """A spec without files, for the engine and the planner."""
    from maps_ray.spec import RunSpec, parse

    model = {"checkpoint": "/nowhere", **training.pop("model", {})}
    settings = {"learning_rate": 1e-3, "zero_stage": 2, **training}
    return parse(
        RunSpec,
        {"name": "gpu", "model": model, "data": {"path": "/nowhere"}, "training": settings, "cluster": {"workers": 1}},
    )


def projected(stage: int, device: torch.device, precision: str) -> tuple[Any, nn.Module, dict[str, torch.Tensor]]:
    """A small network under DeepSpeed with anchors a step away; also a copy of it, and the anchors."""
    from maps_ray.proximity.zero import ShardedAdamSPD, bind
    from maps_ray.training.engine import DTYPES, initialize

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).to(device, DTYPES[precision])
    twin = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).to(device)
    twin.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    anchors = {name: (weight.detach() + 1e-2).cpu() for name, weight in model.named_parameters()}
    strengths = dict.fromkeys(anchors, 1.0)
    optimizer = ShardedAdamSPD(model.parameters(), lr=1e-3)
    engine = initialize(model, optimizer, spec_of(zero_stage=stage, precision=precision, clip_norm=0.0).training)
    bind(engine, optimizer, strengths, anchors.__getitem__)
    return engine, twin, anchors


def batch_of(step: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(32, 64, generator=generator).to(device, dtype)


def train(engine: Any, steps: range, device: torch.device, dtype: torch.dtype) -> None:
    for step in steps:
        inputs = batch_of(step, device, dtype)
        engine.backward((engine(inputs) - inputs.roll(1, dims=1)).float().square().mean())
        engine.step()


def exactness(stage: int, device: torch.device) -> dict[str, Any]:
    """Greatest difference from `AdamSPD` on whole tensors, after ten fp32 steps."""
    from maps_ray.proximity.adam_spd import AdamSPD
    from maps_ray.training.state import full_weights

    engine, twin, anchors = projected(stage, device, "fp32")
    groups = [
        {"params": [weight], "anchors": [anchors[name].to(device)], "strength": 1.0}
        for name, weight in twin.named_parameters()
    ]
    optimizer = AdamSPD(groups, lr=1e-3)
    train(engine, range(10), device, torch.float32)
    for step in range(10):
        optimizer.zero_grad()
        inputs = batch_of(step, device, torch.float32)
        (twin(inputs) - inputs.roll(1, dims=1)).square().mean().backward()
        optimizer.step()
    weights = full_weights(engine, 0)
    error = max(float((weights[name] - weight.detach().cpu()).abs().max()) for name, weight in twin.named_parameters())
    return {"greatest difference": error, "ok": error < 1e-5}


def resume(stage: int, device: torch.device) -> dict[str, Any]:
    """Whether a run that was stopped and restored has the bits of one that was not."""
    from maps_ray.training.state import Snapshot, full_weights, load_state

    whole, _, _ = projected(stage, device, "bf16")
    train(whole, range(6), device, torch.bfloat16)
    first, _, _ = projected(stage, device, "bf16")
    train(first, range(3), device, torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        # No manifest is written here, so the files are named by hand.
        parts = Snapshot().take(first).write(Path(folder), 0)
        second, _, _ = projected(stage, device, "bf16")
        load_state(second, Path(folder), 1, 0, 1, files={part.name: part.stat().st_size for part in parts})
    train(second, range(3, 6), device, torch.bfloat16)
    expected, found = full_weights(whole, 0), full_weights(second, 0)
    return {"ok": all(torch.equal(expected[name], found[name]) for name in expected)}


def policy_step(
    raw: dict[str, Any], device: torch.device, memory: int | None, lora: bool, batch: int, **settings: Any
) -> dict[str, Any]:
    """A training step of a policy with random weights: time, memory beside the plan, launches and syncs.

    Args:
        raw: contents of a `config.json`.
        device: to run on; random weights are made there.
        memory: bytes that there are; none asks nothing. What the planner says is more is not run.
        lora: rank 32 adapters in place of all weights.
        batch: samples.
        settings: of the spec's `training`.
    """
    from maps_ray.models import create_policy
    from maps_ray.models.activations import checkpoint_blocks
    from maps_ray.models.lora import add_adapters
    from maps_ray.training.engine import DTYPES, start_engine
    from maps_ray.training.planning.subject import Subject
    from maps_ray.training.planning.terms import Setup, needed, terms

    names = {"openvla": "openvla_oft"}
    name = names.get(raw.get("model_type", ""), "minivla_oft")
    spec = spec_of(
        model={"name": name, **({"lora": {"rank": 32}} if lora else {})}, batch_size=batch, precision="bf16", **settings
    )
    subject = Subject(spec, raw, TRAINED, 32, "bfloat16")
    setup = Setup(spec.training.zero_stage, 1, "bf16", 1, lazy=device.type == "cpu")
    planned = needed(terms(subject.counts, setup, subject.activations(batch)))
    row: dict[str, Any] = {"planned GiB": planned / GIB}
    if memory is not None and planned > 0.95 * memory:
        return {**row, "note": "not run: the plan does not fit this device", "ok": True}
    # Made in bf16 where it will run: 7 billion random weights in fp32 would fill the memory on the way.
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES["bf16"])
    try:
        with torch.device(device):
            policy: Any = create_policy(raw, name=name, dtype=DTYPES["bf16"], num_images=2, use_proprio=True, **TRAINED)
            if lora:
                add_adapters(policy, 32)
    finally:
        torch.set_default_dtype(default)
    if spec.training.activation_checkpointing:
        checkpoint_blocks(policy.modules())
    weights = dict(policy.named_parameters())

    def read_anchor(key: str) -> torch.Tensor | None:
        weight: Any = weights.get(key)
        if weight is None:
            return None
        # Under stage 3 the whole weights are gone by then; what the anchors are changes no time.
        shape = getattr(weight, "ds_shape", weight.shape)
        return weight.detach().cpu() if weight.shape == shape else torch.zeros(shape, dtype=weight.dtype)

    policy.read_anchor = read_anchor
    engine = start_engine(spec, policy).engine
    inputs = {
        key: (torch.rand(tensor.shape) if tensor.is_meta else tensor).to(device)
        for key, tensor in subject.batch(batch).items()
    }
    try:
        return {**row, **_measure(engine, inputs, batch, device), "ok": True}
    finally:
        engine.destroy()


def _measure(engine: Any, inputs: dict[str, torch.Tensor], batch: int, device: torch.device) -> dict[str, Any]:
    def step() -> None:
        engine.backward(engine(**inputs).loss)
        engine.step()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    wait()
    seconds = (time.perf_counter() - began) / STEPS
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        wait()
    counts = {event.key: event.count for event in profiler.key_averages()}
    return {
        "measured GiB": peak,
        "seconds": seconds,
        "samples/s": batch / seconds,
        "launches": sum(count for key, count in counts.items() if "LaunchKernel" in key),
        "syncs": sum(count for key, count in counts.items() if "Synchronize" in key),
        "values read": counts.get("aten::_local_scalar_dense", 0),
        "operations": sum(count for key, count in counts.items() if key.startswith("aten::")),
    }


def cases(tiny: bool, device: torch.device) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name of each row -> what measures it."""
    from maps_ray.models import stock_config
    from maps_ray.models.openvla_oft.tiny import tiny_config

    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    small = tiny_config()
    small["vision_kwargs"]["img_size"] = 28
    small["image_sizes"] = [28, 28]
    mini = small if tiny else stock_config("minivla_oft")
    large = small if tiny else stock_config("openvla_oft")
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for stage in (1, 2, 3):
        found[f"exactness, stage {stage}"] = lambda stage=stage: exactness(stage, device)
        found[f"resume, stage {stage}"] = lambda stage=stage: resume(stage, device)
    for stage in (1, 2, 3):
        found[f"MiniVLA-OFT, full, batch 4, stage {stage}"] = lambda stage=stage: policy_step(
            mini, device, memory, False, 4, zero_stage=stage
        )
    found["OpenVLA-OFT-7B, LoRA, batch 1"] = lambda: policy_step(large, device, memory, True, 1)
    found["OpenVLA-OFT-7B, LoRA, batch 8"] = lambda: policy_step(large, device, memory, True, 8)
    found["OpenVLA-OFT-7B, full, batch 1, checkpointing"] = lambda: policy_step(
        large, device, memory, False, 1, activation_checkpointing=True
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="very small policies, to try every line")
    parser.add_argument("--only", default="", help="regular expression of the rows wanted")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        device = start(arguments.device, folder)
        title = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        rows: dict[str, dict[str, Any]] = {}
        for name, case in cases(arguments.tiny, device).items():
            if not re.search(arguments.only, name):
                continue
            try:
                rows[name] = case()
            except Exception as error:  # the other rows are worth having
                traceback.print_exc()
                rows[name] = {"ok": False, "note": f"{type(error).__name__}: {error}".splitlines()[0]}
            print(name, rows[name], flush=True)
            write(arguments.out, title, rows)
            # An engine and its hooks hold one another: without this a row would begin with the last one's memory.
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        dist.destroy_process_group()
    sys.exit(0 if all(row["ok"] for row in rows.values()) else 1)


def write(out: Path, title: str, rows: dict[str, dict[str, Any]]) -> None:
    """`gpu.json` and `gpu.md`, after every row: a machine may be taken away."""
    (out / "gpu.json").write_text(json.dumps({"device": title, "torch": torch.__version__, "rows": rows}, indent=1))
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [f"# {title}, torch {torch.__version__}", "", "| | " + " | ".join(columns) + " |"]
    lines.append("|" + "---|" * (len(columns) + 1))
    for name, row in rows.items():
        cells = [f"{row[key]:.4g}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    (out / "gpu.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
