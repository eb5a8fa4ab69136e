"""Camera images -> normalised pixels for both towers, as the checkpoint's processor does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maps_ray.models.checkpoint_faults import CheckpointError


@dataclass(frozen=True)
class ImageTransform:
    """Resizes without keeping the aspect, then normalises once for each tower."""

    size: tuple[int, int]
    """Height and width in pixels."""
    resampling: Image.Resampling
    table: NDArray[np.float32]
    """(6, 256): the normalised value of each byte, for DINOv2's three channels, then SigLIP's."""

    @classmethod
    def from_config(cls, raw: Mapping[str, Any]) -> ImageTransform:
        """Reads the contents of `preprocessor_config.json`.

        Raises:
            CheckpointError: a field is missing, or asks for another way to resize than this one.
        """
        try:
            strategy = raw["image_resize_strategy"]
            sizes = {tuple(size[1:]) for size in raw["input_sizes"]}
            if not all(len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size) for size in sizes):
                raise ValueError(f"input_sizes = {raw['input_sizes']!r}")
            interpolations = {str(name) for name in raw["interpolations"]}
            # With these the published processor computes (`processing_prismatic.py`, `apply_transform`); `means` and
            # `stds` only say what they are made from.
            numbers = raw.get("tvf_normalize_params") or [
                {"mean": mean, "std": std} for mean, std in zip(raw["means"], raw["stds"], strict=True)
            ]
            mean = np.array([tower["mean"] for tower in numbers], np.float32).reshape(6, 1)
            std = np.array([tower["std"] for tower in numbers], np.float32).reshape(6, 1)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"preprocessor_config.json: missing or malformed field: {error}") from None
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
            raise CheckpointError("preprocessor_config.json: means and deviations must be finite, deviations positive")
        if strategy != "resize-naive":
            raise CheckpointError(
                f"preprocessor_config.json: image_resize_strategy = {strategy!r}: must be 'resize-naive'"
            )
        if len(sizes) != 1 or len(interpolations) != 1:
            raise CheckpointError(
                f"preprocessor_config.json: the towers ask for different images: {sorted(sizes)}, "
                f"{sorted(interpolations)}"
            )
        name = interpolations.pop().upper()
        if name not in Image.Resampling.__members__:
            raise CheckpointError(f"preprocessor_config.json: unknown interpolation {name.lower()!r}")
        height, width = sizes.pop()
        # torchvision's operations in their order and in fp32 (`to_tensor`, `normalize`): divided by 255, the mean taken
        # off, divided by the deviation.
        bytes_ = np.arange(256, dtype=np.float32) / np.float32(255)
        return cls((int(height), int(width)), Image.Resampling[name], (bytes_ - mean) / std)

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """One RGB image (H, W, 3) uint8 -> (6, height, width) float32.

        Raises:
            ValueError: not an RGB image of bytes.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image must be (H, W, 3) uint8, found {list(image.shape)} {image.dtype}")
        height, width = self.size
        if image.shape[:2] != self.size:
            image = np.asarray(Image.fromarray(image).resize((width, height), self.resampling))
        channels = np.ascontiguousarray(image.transpose(2, 0, 1))
        pixels = np.empty((6, *self.size), np.float32)
        for values, plane, normalised in zip(self.table, (*channels, *channels), pixels, strict=True):
            # A look-up is exact and spares two divisions per value. `clip` takes the bytes as indices as they are.
            np.take(values, plane, out=normalised, mode="clip")
        return pixels

    def all(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Several images -> (6 * images, height, width), one after the other."""
        return np.concatenate([self(image) for image in images])
