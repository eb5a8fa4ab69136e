"""Statistics over the train split, in the form of OpenVLA-OFT's `dataset_statistics.json`, and units by them.

One rule holds in training and evaluation: a dimension that never changes in the train split (min == max) is 0 for the
policy, and comes back as its constant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from maps_ray.data.dataset_error import DatasetError
from maps_ray.files import write_json
from maps_ray.models.units import Normalization, VectorUnits


@dataclass(frozen=True)
class VectorStatistics:
    """Of one vector feature with D dimensions, over all steps; each array is float64 (D,)."""

    mean: np.ndarray
    std: np.ndarray
    max: np.ndarray
    min: np.ndarray
    q01: np.ndarray
    q99: np.ndarray
    mask: np.ndarray
    """bool (D,): dimensions to normalise."""

    @classmethod
    def of(cls, values: np.ndarray, mask: np.ndarray | None = None) -> VectorStatistics:
        """From (N, D) values; without a mask every dimension is normalised."""
        mask = np.ones(values.shape[1], bool) if mask is None else mask
        # One dimension at a time: in double precision all of a large data set would not fit in memory.
        quantiles = []
        for dimension in range(values.shape[1]):
            rows = values[:, dimension].astype(np.float64)
            # With numpy's defaults, as openvla-oft's `get_dataset_statistics`: deviation of the whole, quantiles
            # interpolated.
            quantiles.append((rows.mean(), rows.std(), rows.max(), rows.min(), *np.quantile(rows, [0.01, 0.99])))
        mean, std, most, least, q01, q99 = np.asarray(quantiles, np.float64).T
        return cls(mean, std, most, least, q01, q99, mask)

    @classmethod
    def from_dict(cls, raw: Mapping[str, object], where: str) -> VectorStatistics:
        """Reads upstream's lists; a missing `mask` means all dimensions.

        Raises:
            DatasetError: an entry is missing, or the lengths differ.
        """
        names = [field.name for field in fields(cls) if field.name != "mask"]
        missing = [name for name in names if name not in raw]
        if missing:
            raise DatasetError(f"{where}: lacks {', '.join(missing)}")
        arrays = {name: np.asarray(raw[name], np.float64) for name in names}
        arrays["mask"] = np.asarray(raw.get("mask", [True] * len(arrays["mean"])), bool)
        shapes = {name: array.shape for name, array in arrays.items()}
        if len(set(shapes.values())) != 1:
            raise DatasetError(f"{where}: entries differ in length: {shapes}")
        return cls(**arrays)

    def to_dict(self) -> dict[str, list[float] | list[bool]]:
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}


@dataclass(frozen=True)
class DatasetStatistics:
    """What a policy needs to normalise its inputs and to turn its outputs into actions."""

    action: VectorStatistics
    proprio: VectorStatistics | None
    num_transitions: int
    num_trajectories: int

    def to_dict(self) -> dict[str, object]:
        """One entry of `dataset_statistics.json`; `proprio` carries no mask, as upstream."""
        entry: dict[str, object] = {"action": self.action.to_dict()}
        if self.proprio is not None:
            entry["proprio"] = {name: value for name, value in self.proprio.to_dict().items() if name != "mask"}
        return {**entry, "num_transitions": self.num_transitions, "num_trajectories": self.num_trajectories}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "dataset statistics") -> DatasetStatistics:
        if "action" not in raw:
            raise DatasetError(f"{where}: lacks action")
        action = VectorStatistics.from_dict(raw["action"], f"{where}, action")
        proprio = VectorStatistics.from_dict(raw["proprio"], f"{where}, proprio") if "proprio" in raw else None
        return cls(action, proprio, int(raw.get("num_transitions", 0)), int(raw.get("num_trajectories", 0)))


def compute(
    actions: np.ndarray, proprio: np.ndarray | None, mask: np.ndarray, num_trajectories: int
) -> DatasetStatistics:
    """Statistics of some episodes.

    Args:
        actions: (N, A), the gripper already converted.
        proprio: (N, D), or None.
        mask: bool (A,), action dimensions to normalise.
        num_trajectories: episodes that the N steps come from.
    """
    return DatasetStatistics(
        VectorStatistics.of(actions, mask),
        VectorStatistics.of(proprio) if proprio is not None else None,
        len(actions),
        num_trajectories,
    )


def save(statistics: DatasetStatistics, path: Path, key: str) -> None:
    """Writes `{key: statistics}` atomically."""
    write_json(path, {key: statistics.to_dict()}, durable=False, shared=True)


def load(path: Path, key: str | None = None) -> DatasetStatistics:
    """Reads one entry of a `dataset_statistics.json`; `key` may be left out when there is only one.

    Raises:
        DatasetError: unreadable file, unknown key, or an incomplete entry.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot read dataset statistics: {error}") from None
    if key is None and len(entries) == 1:
        key = next(iter(entries))
    if key not in entries:
        raise DatasetError(f"{path}: no entry {key!r}; it has {', '.join(entries)}")
    return DatasetStatistics.from_dict(entries[key], f"{path}, {key}")


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
    # Of exactly 0.5 it makes 0, which leaves the fingers where they are; so does the published evaluation.
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
