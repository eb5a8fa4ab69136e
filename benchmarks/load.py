"""What does it take to bring a checkpoint into the shards? Host memory, seconds and bytes read, beside the plain way.

    python benchmarks/load.py                                # 1.5 billion parameters, 3 GB in bf16, 2 processes
    python benchmarks/load.py --size 0.2 --engine            # and the DeepSpeed engine with its anchors, 0.2 billion

A synthetic checkpoint with OpenVLA's layout is written to a temporary folder, in shards. `plain`: each process holds
the whole policy, as `load_policy` gives it. `ZeRO-2`, `ZeRO-3`: each process opens the policy without its weights, and
`place_weights` reads what it owns. Each way runs in processes of its own, after the files were dropped from the page
cache.

Memory is that of all processes together. PSS (`/proc/self/smaps_rollup`) counts a page that several processes share,
such as one of a library or of a mapped file, once, divided among them; it is sampled every 20 ms, and the peaks of the
processes are added, whenever they were. Peak RSS (`VmHWM`) misses nothing and counts shared pages once for each
process. Both are given above what the processes had before they opened the checkpoint, and PSS also in all. `read` is
what one process copied out of the files, `disk` what the kernel read from the disk on its behalf: of two processes
that read the same page, only the first one pays.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import in_processes

from maps_ray.models.lora import base_name
from maps_ray.models.openvla_oft.config import PolicyConfig
from maps_ray.models.openvla_oft.tensors import model_shapes
from maps_ray.spec import RunSpec

GIB = 2**30
SHARD_BYTES = GIB
# Billions of parameters -> what differs from openvla-7b.
SIZES: dict[str, dict[str, Any]] = {
    "1.5": {"text_config": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 12}},
    "0.2": {
        "text_config": {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 7},
        "vision_kwargs": {
            "img_size": 224,
            "featurizer": {"patch_size": 14, "embed_dim": 384, "depth": 12, "num_heads": 6, "init_values": 1.0},
            "fused_featurizer": {"patch_size": 14, "embed_dim": 384, "depth": 12, "num_heads": 6},
        },
    },
}


def model_config(size: str) -> dict[str, Any]:
    text = SIZES[size]["text_config"] | {"num_attention_heads": 16, "vocab_size": 32064, "pad_token_id": 32000}
    return {
        "model_type": "openvla",
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "image_sizes": [224, 224],
        **SIZES[size],
        "text_config": text,
    }


def write_checkpoint(folder: Path, size: str) -> tuple[int, int]:
    """Writes the folder; returns the number of parameters and their bytes."""
    from safetensors.torch import save_file

    config = model_config(size)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = model_shapes(PolicyConfig.from_dict(config))
    # Random numbers, repeated: what they are plays no part.
    block = torch.randn(1_000_003).mul_(0.02).to(torch.bfloat16)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    held = 0

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())):05d}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for key, shape in shapes.items():
        numel = math.prod(shape)
        shard[key] = block.repeat(math.ceil(numel / len(block)))[:numel].view(shape)
        held += 2 * numel
        if held > SHARD_BYTES:
            flush()
            held = 0
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    total = sum(math.prod(shape) for shape in shapes.values())
    return total, 2 * total


def forget(folder: Path) -> None:
    """Drops the folder's files from the page cache."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        # Pages that are not written yet would stay (posix_fadvise(2)).
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def field(file: str, name: str) -> int:
    """A number of a file in `/proc/self`."""
    lines = Path("/proc/self", file).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class Memory:
    """The peak of this process's proportional set size while it is entered, in bytes."""

    def __enter__(self) -> Memory:
        self.start = self.peak = self._now()
        # Lets the high-water mark of the resident set start again from here.
        Path("/proc/self/clear_refs").write_text("5")
        self.start_rss = field("status", "VmRSS") * 1024
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self._now())
        self.peak_rss = field("status", "VmHWM") * 1024

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        return field("smaps_rollup", "Pss") * 1024


def measure(folder: Path, way: str, engine: bool) -> list[dict[str, float]]:
    """One way of loading, in every process; what each of them took."""
    # What the policy imports is no part of its weights.
    import maps_ray.models.openvla_oft.checkpoint  # noqa: F401
    from maps_ray.proximity.zero import place_weights
    from maps_ray.training.engine import build_policy, deepspeed_config, start_engine

    spec = RunSpec.model_validate(
        {
            "name": "load",
            "model": {"checkpoint": str(folder)},
            "data": {"path": "unused"},
            "training": {"zero_stage": 3 if way == "plain" else int(way[-1]), "precision": "bf16"},
        }
    )
    sizes = {"action_dim": 7, "proprio_dim": 8}
    dist.barrier()
    disk, began = field("io", "read_bytes"), time.perf_counter()
    with Memory() as memory:
        policy = build_policy(spec, sizes, deferred=way != "plain")
        new = tuple(f"{module}." for module in policy.fresh_modules)
        read = sum(weights.nbytes for name, weights in policy.named_parameters() if not name.startswith(new))
        if engine:
            start_engine(spec, policy)
        elif way != "plain":
            read = place_weights(
                policy,
                policy.deferred,
                lambda name: policy.read_anchor(base_name(name)),
                deepspeed_config(spec.training),
            )
            policy.close_base()
    result = {
        "seconds": time.perf_counter() - began,
        "pss": memory.peak,
        "grown": memory.peak - memory.start,
        "rss": memory.peak_rss - memory.start_rss,
        "read": read,
        "disk": field("io", "read_bytes") - disk,
    }
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, result)
    return gathered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1.5", choices=tuple(SIZES), help="billions of parameters")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=["plain", "ZeRO-2", "ZeRO-3"])
    parser.add_argument("--engine", action="store_true", help="go on to the engine, its masters and its anchors")
    parser.add_argument("--folder", help="where the checkpoint is written; none means the temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        parameters, size = write_checkpoint(folder, options.size)
        print(f"{parameters / 1e9:.2f} billion parameters, P = {size / GIB:.2f} GiB, {options.processes} processes")
        print(f"{'way':8} {'PSS above start':>16} {'of P':>5} {'RSS above start':>16} {'PSS in all':>11}", end="")
        print(f" {'seconds':>8} {'read by each, GiB':>20} {'disk, GiB':>16}")
        for way in options.ways:
            forget(folder)
            ranks = in_processes(options.processes, measure, folder, way, options.engine)
            grown, rss, pss = (sum(rank[key] for rank in ranks) for key in ("grown", "rss", "pss"))
            seconds = max(rank["seconds"] for rank in ranks)
            read, disk = (" ".join(f"{rank[key] / GIB:.2f}" for rank in ranks) for key in ("read", "disk"))
            print(f"{way:8} {grown / GIB:16.2f} {grown / size:5.2f} {rss / GIB:16.2f} {pss / GIB:11.2f}", end="")
            print(f" {seconds:8.1f} {read:>20} {disk:>16}", flush=True)


if __name__ == "__main__":
    main()
