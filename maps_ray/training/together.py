"""Actions that must succeed on every rank, or fail on every rank alike.

A rank that raised alone would leave the others waiting in their next collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


class TogetherError(RuntimeError):
    """What went wrong on which ranks."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("; ".join(faults))


def together(action: Callable[[], Result]) -> list[Result]:
    """Runs `action` on every rank; every rank calls this.

    The action must hold no collective. Its results must be small: all ranks get all of them.

    Returns:
        the results by rank.

    Raises:
        TogetherError: on every rank, when the action raised on any.
    """
    result, fault = None, None
    try:
        result = action()
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, fault))
    faults: dict[str, list[int]] = {}
    for rank, (_, found) in enumerate(outcomes):
        if found:
            faults.setdefault(found, []).append(rank)
    if faults:
        raise TogetherError([f"rank {', '.join(map(str, ranks))}: {found}" for found, ranks in faults.items()])
    return [result for result, _ in outcomes]
