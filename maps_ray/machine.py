"""What this machine has, what a Ray cluster that is started on it gives away, and how a run records it.

Neither torch nor Ray is imported.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import psutil

_PACKAGES = ("maps_ray", "torch", "deepspeed", "ray", "transformers", "timm", "mlflow")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpus() -> int:
    """CPUs that Ray has to give away: the cores that this process may use, and never less than two.

    They are shares of a schedule, not cores: two workers, the fewest that have shards, run on one core too, in turns.
    """
    return max(2, cores())


def gpus() -> int:
    """NVIDIA GPUs that this process may use: those that are there, as far as CUDA_VISIBLE_DEVICES names them."""
    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return present
    # CUDA stops at the first name that is none: -1, an empty one, `NoDevFiles`.
    names = [name.strip() for name in named.split(",")]
    wrong = [place for place, name in enumerate(names) if not name or name.startswith("-") or name == "NoDevFiles"]
    return min(present, wrong[0] if wrong else len(names))


def describe_environment() -> dict[str, str]:
    """Processor, memory, GPUs (where torch sees any), Python and package versions of this process."""
    described = {
        "processor": f"{_processor()}, {cores()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "gpu": _gpu_names(),
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


def _gpu_names() -> str:
    # Asked of torch alone and where it is loaded anyway: importing it here would cost seconds.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
