"""What ends an evaluation."""

from __future__ import annotations


class RolloutError(RuntimeError):
    """An evaluation that cannot be completed; finished episodes are kept, and no rate is computed from a part."""


class Stopped(RuntimeError):
    """The caller asked for the end of an evaluation; finished episodes are kept."""


class PolicyFault(RolloutError):
    """What a policy answers, or asks for, cannot be used in the simulator; trying again would change nothing."""
