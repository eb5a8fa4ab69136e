"""A checkpoint's own statistics: recorded units of proprioception and actions, and the policy's -1 .. 1. No torch.

`dataset_statistics.json` is `{data set: {"action": {"mask", "min", "max", "q01", "q99", ...}, "proprio": {...}}}`. One
rule holds for both ways: a dimension that never changed (min == max) is 0 for the policy, and comes back as its
constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, cast, get_args

import numpy as np
from numpy.typing import NDArray

from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.files.formats import read_json

Normalization = Literal["q01_q99", "min_max"]
Images = Literal["plain", "crop", "openvla"]
"""How images are prepared before the processor: not at all; cropped to the middle 90 %, for training with augmentation;
or as the published evaluation does it, through JPEG, Lanczos-3 and that crop."""


class CodecOptions(TypedDict, total=False):
    """What is no size of a policy, but says how observations and actions are read; see `predict.Codec.read`."""

    dataset: str | None
    normalization: Normalization | None
    images: Images | None


CODEC_OPTIONS = tuple(CodecOptions.__annotations__)


def units_and_images(trained_for: Mapping[str, object], given: CodecOptions) -> tuple[Normalization, Images]:
    """How a checkpoint's vectors and images are read: as given, else as it was trained, else as the published ones.

    Args:
        trained_for: `policy` of its `config.json`; may be empty.
        given: what comes before that.

    Raises:
        CheckpointError: neither is one that is known.
    """
    chosen = []
    for name, allowed, published in (
        ("normalization", get_args(Normalization), "q01_q99"),
        ("images", get_args(Images), "openvla"),
    ):
        value = given.get(name) or trained_for.get(name, published)
        if value not in allowed:
            raise CheckpointError(f"{name} = {value!r}: must be one of {', '.join(allowed)}")
        chosen.append(value)
    return cast(tuple[Normalization, Images], tuple(chosen))


Vector = NDArray[np.floating]
_EPS = 1e-8
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class VectorUnits:
    """Range of each dimension of a vector; arrays of shape (D,)."""

    low: Vector
    high: Vector
    mask: NDArray[np.bool_]
    """Dimensions that are normalised at all."""
    fixed: NDArray[np.bool_]
    """Dimensions that never changed."""
    value: Vector
    """Their constants."""

    @classmethod
    def from_dict(cls, raw: Mapping[str, object], normalization: Normalization, where: str) -> VectorUnits:
        """One entry of the statistics; without a mask every dimension is normalised.

        Raises:
            CheckpointError: an entry is missing, is no list of finite numbers, is of another length, or its range is
                upside down.
        """
        low_name, high_name = ("q01", "q99") if normalization == "q01_q99" else ("min", "max")
        low, high, least, most = (_numbers(raw, name, where) for name in (low_name, high_name, "min", "max"))
        # Published statistics of proprioception have none.
        mask = raw.get("mask", [True] * len(low))
        if not isinstance(mask, list) or not all(value in (True, False) for value in mask):
            raise CheckpointError(f"{where}: mask = {mask!r}: must be a list of true and false")
        if len({len(values) for values in (low, high, least, most, mask)}) != 1:
            raise CheckpointError(f"{where}: its entries differ in length")
        for lower, upper, lower_name, upper_name in ((low, high, low_name, high_name), (least, most, "min", "max")):
            if (lower > upper).any():
                place = int(np.argmax(lower > upper))
                raise CheckpointError(
                    f"{where}: {lower_name}[{place}] = {lower[place]:g} lies above {upper_name}[{place}] = "
                    f"{upper[place]:g}: the statistics are damaged; take those of the checkpoint's source"
                )
        # By `min` and `max`, whatever normalises, as upstream's `zeros_mask`: a dimension that moves in fewer steps
        # than one in a hundred has q01 == q99, and is not fixed.
        return cls(low, high, np.asarray(mask, np.bool_), least == most, least)

    def normalize(self, values: Vector) -> NDArray[np.float32]:
        """Recorded values (..., D) -> clip(2 (x - low) / (high - low + 1e-8) - 1, -1, 1) where masked.

        In the precision of the values, so that float32 gives every bit of the published training, and float64 of the
        published deployment: a narrow range makes the difference as large as 1e-5.
        """
        kind = np.dtype(np.float32 if np.asarray(values).dtype == np.float32 else np.float64)
        # The span in double, then rounded: the published `normalize_action_and_proprio` takes it between numpy's
        # numbers, before TensorFlow makes it fp32.
        low, span = self.low.astype(kind), (self.high - self.low + _EPS).astype(kind)
        scaled = np.clip(2 * (np.asarray(values, kind) - low) / span - 1, -1, 1)
        return np.where(self.fixed, 0.0, np.where(self.mask, scaled, values)).astype(np.float32)

    def unnormalize(self, values: Vector) -> NDArray[np.float32]:
        """The policy's values (..., D) -> 0.5 (a + 1) (high - low + 1e-8) + low where masked."""
        scaled = 0.5 * (np.asarray(values, np.float64) + 1) * (self.high - self.low + _EPS) + self.low
        return np.where(self.fixed, self.value, np.where(self.mask, scaled, values)).astype(np.float32)


@dataclass(frozen=True)
class Units:
    """Of one data set that a checkpoint was trained on."""

    key: str
    """The data set's name in the file."""
    action: VectorUnits
    proprio: VectorUnits | None

    @classmethod
    def read(cls, folder: Path, normalization: Normalization, key: str | None = None) -> Units:
        """Reads a checkpoint's `dataset_statistics.json`.

        Args:
            folder: the checkpoint.
            normalization: what became -1 .. 1 in training: the quantiles q01 and q99, or minimum and maximum.
            key: the data set; may be left out where there is only one.

        Raises:
            CheckpointError: no such file or data set, or an incomplete entry.
        """
        path = folder / "dataset_statistics.json"
        entries = read_json(path)
        if key is None and isinstance(entries.get("action"), dict) and "q01" in entries["action"]:
            raise CheckpointError(f'{path} names no data set: write its content below one, {{"NAME": {{...}}}}')
        if key is None and len(entries) == 1:
            key = next(iter(entries))
        if key is None:
            raise CheckpointError(
                f"{path} has statistics of {len(entries)} data sets, and `dataset` says none of them; choose one of "
                f"{', '.join(entries)}"
            )
        if not isinstance(key, str) or not isinstance(entries.get(key), dict):
            raise CheckpointError(f"{path}: no data set {key!r}; choose one of {', '.join(entries)}")
        entry = entries[key]
        if not isinstance(entry.get("action"), dict):
            raise CheckpointError(f"{path}: {key} has no statistics of actions")
        proprio = entry.get("proprio")
        if proprio is not None and not isinstance(proprio, dict):
            raise CheckpointError(f"{path}: {key}: proprio = {proprio!r:.80}: must be an object")
        return cls(
            key,
            VectorUnits.from_dict(entry["action"], normalization, f"{path}: {key}: action"),
            VectorUnits.from_dict(proprio, normalization, f"{path}: {key}: proprio") if proprio else None,
        )


def _numbers(raw: Mapping[str, object], name: str, where: str) -> Vector:
    values = raw.get(name)
    if not isinstance(values, list) or not values:
        raise CheckpointError(f"{where}: {name} = {values!r}: must be a list of numbers")
    for place, value in enumerate(values):
        known = isinstance(value, int | float) and not isinstance(value, bool)
        # Actions leave as float32.
        if not known or not abs(value) <= _LARGEST:
            raise CheckpointError(
                f"{where}: {name}[{place}] = {value!r}: must be a finite number; take the statistics of the "
                "checkpoint's source, or compute them anew"
            )
    return np.asarray(values, np.float64)
