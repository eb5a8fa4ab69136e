"""Between recorded units and the policy's [-1, 1], as OpenVLA-OFT computes it.

One rule holds in training and evaluation: a dimension that never changes in the train split (min == max) is 0 for the
policy, and comes back as its constant.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from maps_ray.data.statistics import VectorStatistics

Mode = Literal["q01_q99", "min_max"]
_EPS = 1e-8


def _bounds(statistics: VectorStatistics, mode: Mode) -> tuple[np.ndarray, np.ndarray]:
    if mode == "q01_q99":
        return statistics.q01, statistics.q99
    return statistics.min, statistics.max


def normalize(values: np.ndarray, statistics: VectorStatistics, mode: Mode) -> np.ndarray:
    """Recorded values (..., D) -> float32: clip(2 (x - low) / (high - low + 1e-8) - 1, -1, 1) where `mask`."""
    low, high = _bounds(statistics, mode)
    scaled = np.clip(2 * (values.astype(np.float64) - low) / (high - low + _EPS) - 1, -1, 1)
    result = np.where(statistics.mask, scaled, values)
    return np.where(statistics.min == statistics.max, 0.0, result).astype(np.float32)


def unnormalize(values: np.ndarray, statistics: VectorStatistics, mode: Mode) -> np.ndarray:
    """The policy's values (..., D) -> float32 in recorded units: 0.5 (a + 1) (high - low + 1e-8) + low where `mask`."""
    low, high = _bounds(statistics, mode)
    values = values.astype(np.float64)
    scaled = 0.5 * (values + 1) * (high - low + _EPS) + low
    result = np.where(statistics.mask, scaled, values)
    return np.where(statistics.min == statistics.max, statistics.min, result).astype(np.float32)


def gripper_from_libero(actions: np.ndarray) -> np.ndarray:
    """LIBERO's gripper command (-1 open .. 1 closed, last dimension) -> 1 open .. 0 closed: 1 - clip(g, 0, 1)."""
    converted = np.array(actions, np.float32)
    converted[..., -1] = 1 - np.clip(converted[..., -1], 0, 1)
    return converted


def gripper_to_libero(actions: np.ndarray) -> np.ndarray:
    """The way back for the simulator: -sign(2 g - 1), so -1 opens and 1 closes."""
    converted = np.array(actions, np.float32)
    converted[..., -1] = -np.sign(2 * converted[..., -1] - 1)
    return converted


def action_mask(action_dim: int, gripper: Literal["libero", "none"]) -> np.ndarray:
    """bool (A,): dimensions to normalise; LIBERO's gripper stays as it is."""
    mask = np.ones(action_dim, bool)
    mask[-1] = gripper == "none"
    return mask
