"""What this machine has, and what a Ray cluster that is started on it gives away. No torch, no Ray."""

from __future__ import annotations

import os
from pathlib import Path


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
