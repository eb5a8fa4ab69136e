"""Between recorded units and the policy's [-1, 1], as OpenVLA-OFT computes it.

One rule holds in training and evaluation: a dimension that never changes in the train split (min == max) is 0 for the
policy, and comes back as its constant.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from maps_ray.data.statistics import VectorStatistics
from maps_ray.models.units import Normalization, VectorUnits


def normalize(values: np.ndarray, statistics: VectorStatistics, mode: Normalization) -> np.ndarray:
    """Recorded values (..., D) -> float32: clip(2 (x - low) / (high - low + 1e-8) - 1, -1, 1) where `mask`."""
    return _units(statistics, mode).normalize(values)


def unnormalize(values: np.ndarray, statistics: VectorStatistics, mode: Normalization) -> np.ndarray:
    """The policy's values (..., D) -> float32 in recorded units: 0.5 (a + 1) (high - low + 1e-8) + low where `mask`."""
    return _units(statistics, mode).unnormalize(values)


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


def _units(statistics: VectorStatistics, mode: Normalization) -> VectorUnits:
    low, high = (statistics.q01, statistics.q99) if mode == "q01_q99" else (statistics.min, statistics.max)
    return VectorUnits(low, high, statistics.mask, statistics.min == statistics.max, statistics.min)
