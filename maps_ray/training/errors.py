"""Faults that end a run and that a restart would only repeat."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why, what is safe, and what to try."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be written or read."""
