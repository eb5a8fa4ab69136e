"""Random changes of training images, in the order and with the ranges of OpenVLA's training."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from maps_ray.models.resampling import CROP_AREA, crop_and_resize, to_bytes, to_floats

_BRIGHTNESS = 0.2
_CONTRAST = (0.8, 1.2)
_SATURATION = (0.8, 1.2)
_HUE = 0.05
# Keeps the augmentation's numbers apart from those of the sample order, which come from the same seed.
_STREAM = 0xA0C


def augmentation_rng(seed: int, position: int) -> np.random.Generator:
    """The generator of one position in the endless sequence of training samples, whichever worker encodes it."""
    return np.random.default_rng([seed, _STREAM, position])


def augment(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Crops 90 % of the area at random and resizes it back, then changes brightness, contrast, saturation and hue.

    Brightness is shifted by up to 0.2 of the range, contrast (about each channel's mean) and saturation are scaled by
    0.8 to 1.2, and the hue is turned by up to 0.05 of a circle.

    Args:
        image: RGB (H, W, 3).
        rng: gives six numbers.

    Returns:
        an image of the same shape.
    """
    top, left, shift, contrast, saturation, turn = rng.random(6)
    side = math.sqrt(CROP_AREA)
    pixels = crop_and_resize(to_floats(image), top * (1 - side), left * (1 - side), side)
    # Whole planes: arithmetic on them is several times as fast as on interleaved channels.
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    planes = np.clip(planes + np.float32(_within((-_BRIGHTNESS, _BRIGHTNESS), shift)), 0, 1)
    mean = planes.mean(axis=(1, 2), keepdims=True)
    planes = np.clip((planes - mean) * np.float32(_within(_CONTRAST, contrast)) + mean, 0, 1)
    planes = change_colors(planes, _within(_SATURATION, saturation), _within((-_HUE, _HUE), turn))
    return np.ascontiguousarray(to_bytes(planes).transpose(1, 2, 0))


def change_colors(planes: NDArray[np.float32], saturation: float, turn: float) -> NDArray[np.float32]:
    """Scales the saturation (at most to 1) and turns the hue, in HSV.

    Args:
        planes: RGB (3, H, W), 0..1.
        saturation: factor.
        turn: share of a full circle, less than half of one either way.
    """
    red, green, blue = planes
    value = planes.max(axis=0)
    spread = value - planes.min(axis=0)
    slope = 1 / np.where(spread > 0, spread, np.float32(1))
    # Hue in sixths of a circle: 0 red, 2 green, 4 blue; -1..5.
    hue = np.where(value == green, 2 + (blue - red) * slope, 4 + (red - green) * slope)
    hue = np.where(value == red, (green - blue) * slope, hue) + np.float32(6 * turn)
    full = np.minimum(spread * np.float32(saturation), value)
    # Each channel is the value less a trapezoid over the hue: nothing near its own hue, all of the spread opposite.
    changed = np.empty_like(planes)
    for plane, own in zip(changed, (0, 2, 4), strict=True):
        away = np.abs(hue - np.float32(own))
        away = np.minimum(away, 6 - away)
        np.subtract(value, full * np.clip(away - 1, 0, 1), out=plane)
    return changed


def _within(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * share
