"""GPUs that the planner and the utilisation figures know: memory, and what their makers state as peaks. No torch.

Peaks are dense figures of NVIDIA's data sheets, without sparsity: `bf16` of the tensor cores with fp32 accumulation,
`fp32` of the ordinary cores, which torch uses for fp32 unless TF32 is asked for. Memory is what `nvidia-smi` shows as
total, in MiB; it is less than the label where error correction or firmware takes a part.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

MIB, GIB = 2**20, 2**30
Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class Device:
    """One GPU."""

    name: str
    """As `--device` takes it: the model, then its label in GB."""
    memory_mib: int
    """Total memory in MiB."""
    bf16_tflops: float
    fp32_tflops: float
    bandwidth: float
    """Of the memory, in GB/s."""
    title: str
    """Regular expression of what CUDA calls it."""

    @property
    def memory(self) -> int:
        """Total memory in bytes."""
        return self.memory_mib * MIB

    def peak_flops(self, precision: Precision) -> float:
        """Most operations a second in this precision; a multiply-add counts as two."""
        return 1e12 * (self.bf16_tflops if precision == "bf16" else self.fp32_tflops)


_DEVICES = (
    Device("rtx3090-24", 24576, 71.0, 35.6, 936, r"GeForce RTX 3090"),
    Device("rtx4090-24", 24564, 165.2, 82.6, 1008, r"GeForce RTX 4090"),
    Device("a10-24", 23028, 125.0, 31.2, 600, r"A10"),
    Device("a10g-24", 23028, 70.0, 31.5, 600, r"A10G"),
    Device("l4-24", 23034, 121.0, 30.3, 300, r"L4"),
    Device("rtx5090-32", 32607, 209.5, 104.8, 1792, r"GeForce RTX 5090"),
    Device("a100-40", 40960, 312.0, 19.5, 1555, r"A100-(SXM4?|PCIE)-40GB"),
    Device("a40-48", 46068, 149.7, 37.4, 696, r"A40"),
    Device("a6000-48", 49140, 154.8, 38.7, 768, r"RTX A6000"),
    Device("rtx6000ada-48", 49140, 364.2, 91.1, 960, r"RTX 6000 Ada Generation"),
    Device("l40s-48", 46068, 362.0, 91.6, 864, r"L40S"),
    Device("a100-80", 81920, 312.0, 19.5, 2039, r"A100-SXM4?-80GB|A100 80GB PCIe"),
    Device("h100-pcie-80", 81559, 756.0, 51.2, 2000, r"H100 PCIe"),
    Device("h100-80", 81559, 989.4, 66.9, 3350, r"H100 80GB HBM3"),
    Device("h100-nvl-94", 95830, 835.0, 60.0, 3938, r"H100 NVL"),
    Device("h20-96", 97871, 148.0, 44.0, 4000, r"H20"),
    Device("h200-141", 143771, 989.4, 66.9, 4800, r"H200"),
    Device("b200-180", 183359, 2250.0, 75.0, 8000, r"B200"),
)
DEVICES = {device.name: device for device in _DEVICES}

SIZES = ("rtx4090-24", "a100-40", "a40-48", "h100-80", "h200-141")
"""One device of each usual size, for tables."""


def device_named(name: str) -> Device:
    """A device by its name in `DEVICES`, in any case.

    Raises:
        ValueError: no such device; the message lists those known.
    """
    device = DEVICES.get(name.strip().lower())
    if device is None:
        raise ValueError(f"no device is known by this name; known: {', '.join(DEVICES)}")
    return device


def device_titled(title: str) -> Device | None:
    """The device that `torch.cuda.get_device_name()` describes; None where the table does not have it.

    Args:
        title: for instance `NVIDIA H100 80GB HBM3`.
    """
    title = title.removeprefix("NVIDIA ").strip()
    # The whole title: an A10G is no A10, and an H200 no H20.
    return next((device for device in _DEVICES if re.fullmatch(device.title, title)), None)


def device_map_fault(text: str) -> str | None:
    """What is wrong with the form of a device map (see `maps_ray.models.device_map`); None when nothing is."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        return None
    try:
        if isinstance(json.loads(text), dict):
            return None
    except json.JSONDecodeError:
        pass
    return "must be auto, cpu, cuda, cuda:N, or a JSON object: module -> device"
