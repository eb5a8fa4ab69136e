"""Actions that must succeed on every rank, or fail on every rank alike.

A rank that raised alone would leave the others waiting in their next collective. What ranks agree on travels over gloo,
beside the tensors: nothing of it waits for the queue of a device.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist

Result = TypeVar("Result")
_groups: dict[str, tuple[dist.ProcessGroup | None, dist.ProcessGroup]] = {}
_SLOWEST_WRITE_S = 1800


class RanksError(RuntimeError):
    """What went wrong on which ranks."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("; ".join(faults))


def gloo_group(purpose: Literal["control", "saving"] = "control", timeout_s: float | None = None) -> dist.ProcessGroup:
    """All ranks, on gloo; made when first asked for, by every rank alike.

    Each purpose has a group of its own, so that a thread that saves and the loop never wait for one another.

    Args:
        purpose: what the ranks agree on.
        timeout_s: how long a rank waits for the slowest, where the group is made; none takes torch's 30 minutes. Ranks
            that save wait for the slowest writer, and that long at least.
    """
    # By the world that it was made in: a process may end one and begin another, which the old group knows nothing of.
    world = dist.group.WORLD
    known = _groups.get(purpose)
    if known is None or known[0] is not world:
        timeout = None
        if timeout_s is not None:
            timeout = timedelta(seconds=max(timeout_s, _SLOWEST_WRITE_S if purpose == "saving" else 0))
        known = _groups[purpose] = (world, dist.new_group(backend="gloo", timeout=timeout))
    return known[1]


def on_all_ranks(action: Callable[[], Result], group: dist.ProcessGroup | None = None) -> list[Result]:
    """Runs `action` on every rank; every rank calls this.

    The action must hold no collective. Its results must be small: all ranks get all of them.

    Args:
        action: called once on each rank.
        group: what the ranks agree over; the control group by default.

    Returns:
        the results by rank.

    Raises:
        RanksError: on every rank, when the action raised on any.
    """
    result, fault = None, None
    try:
        result = action()
    except Exception as error:
        # As text: not every exception survives pickling.
        fault = f"{type(error).__name__}: {error}"
    outcomes: list[tuple[Result | None, str | None]] = [(None, None)] * dist.get_world_size()
    # Results and faults in one collective: a rank that raises still takes part in it.
    dist.all_gather_object(outcomes, (result, fault), group=group or gloo_group())
    faults: dict[str, list[int]] = {}
    for rank, (_, message) in enumerate(outcomes):
        if message:
            faults.setdefault(message, []).append(rank)
    if faults:
        raise RanksError([f"rank {', '.join(map(str, ranks))}: {message}" for message, ranks in faults.items()])
    return [cast(Result, result) for result, _ in outcomes]


class Poll:
    """Questions of yes and no that all ranks answer after each step, counted behind the next one.

    The answers are one step old when they are known, on every rank alike: so nobody waits for the slowest rank to
    answer, and all ranks still leave the loop after the same step.
    """

    def __init__(self) -> None:
        self._asked: tuple[dist.Work, torch.Tensor] | None = None

    def ask(self, *mine: bool) -> list[int] | None:
        """Gives this rank's answers; returns how many ranks said yes one call ago, None in the first call."""
        before = self._asked
        counts = torch.tensor(mine, dtype=torch.int64)
        self._asked = dist.all_reduce(counts, group=gloo_group(), async_op=True), counts
        if before is None:
            return None
        before[0].wait()
        return list(before[1].tolist())

    def settle(self) -> None:
        """Waits for the last answers, which nobody asks for any more."""
        if self._asked is not None:
            self._asked[0].wait()
            self._asked = None
