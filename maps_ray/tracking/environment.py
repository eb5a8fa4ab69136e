"""Where a run took place: machine and versions, as text for people."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import psutil

from maps_ray import machine

_PACKAGES = ("maps_ray", "torch", "deepspeed", "ray", "transformers", "timm", "mlflow")


def describe_environment() -> dict[str, str]:
    """Processor, memory, GPUs (where torch sees any), Python and package versions of this process."""
    described = {
        "processor": f"{_processor()}, {machine.cores()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "gpu": _gpus(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            described[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return described


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> str:
    # Asked of torch alone and where it is loaded anyway: importing it here would cost seconds.
    import sys

    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
