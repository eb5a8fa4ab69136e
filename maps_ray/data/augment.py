"""Random changes of training images, in the order and with the ranges of OpenVLA's training."""

from __future__ import annotations

import math

import numpy as np

from maps_ray.models.resampling import CROP_AREA, Bytes, Floats, crop_and_resize, to_bytes

_BRIGHTNESS = 0.2
_CONTRAST = (0.8, 1.2)
_SATURATION = (0.8, 1.2)
_HUE = 0.05
# Keeps the augmentation's numbers apart from those of the sample order, which come from the same seed.
_STREAM = 0xA0C


def augmentation_rng(seed: int, position: int) -> np.random.Generator:
    """The generator of one position in the endless sequence of training samples, whichever worker encodes it."""
    return np.random.default_rng([seed, _STREAM, position])


def augment(image: Bytes, rng: np.random.Generator) -> Bytes:
    """Crops 90 % of the area at random and resizes it back, then changes brightness, contrast, saturation and hue.

    Brightness is shifted by up to 0.2 of the range, contrast (about each channel's mean) and saturation are scaled by
    0.8 to 1.2, and the hue is turned by up to 0.05 of a circle.

    Args:
        image: RGB (H, W, 3).
        rng: gives six numbers.

    Returns:
        an image of the same shape.
    """
    # Independent numbers. dlimp seeds every operation on an image alike, so that its offsets and strengths go together:
    # order and ranges are taken over, not that.
    top, left, shift, contrast, saturation, turn = rng.random(6)
    # Published are scale 0.9 .. 0.9 and ratio 1 .. 1: the place alone is random.
    side = math.sqrt(CROP_AREA)
    planes = crop_and_resize(image, top * (1 - side), left * (1 - side), side)
    # In place: fresh memory for each step costs more than the arithmetic.
    # Clipped after each operation, not at the end, as `dlimp.augmentations.augment` does.
    planes += np.float32(_within((-_BRIGHTNESS, _BRIGHTNESS), shift))
    np.clip(planes, 0, 1, out=planes)
    factor = np.float32(_within(_CONTRAST, contrast))
    mean = planes.mean(axis=(1, 2), keepdims=True)
    planes *= factor
    planes += mean * (1 - factor)
    np.clip(planes, 0, 1, out=planes)
    return to_bytes(change_colors(planes, _within(_SATURATION, saturation), _within((-_HUE, _HUE), turn)))


def change_colors(planes: Floats, saturation: float, turn: float) -> Floats:
    """Scales the saturation (at most to 1) and turns the hue, in HSV.

    Args:
        planes: RGB (3, H, W), 0..1.
        saturation: factor.
        turn: share of a full circle, less than half of one either way.
    """
    red, green, blue = planes
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    # Of a grey the differences below are 0, and so is its hue.
    slope = 1 / np.maximum(spread, np.float32(1e-30))
    # Hue in sixths of a circle: 0 red, 2 green, 4 blue; -1..5.
    hue = _hue(red, green, slope, 4)
    np.copyto(hue, _hue(blue, red, slope, 2), where=value == green)
    np.copyto(hue, _hue(green, blue, slope, 0), where=value == red)
    hue += np.float32(6 * turn)
    full = np.minimum(np.multiply(spread, np.float32(saturation), out=spread), value, out=spread)
    # Each channel is the value less a trapezoid over the hue: nothing near its own hue, all of the spread opposite.
    changed = np.empty_like(planes)
    for plane, own in zip(changed, (0, 2, 4), strict=True):
        away = np.abs(np.subtract(hue, np.float32(own), out=plane), out=plane)
        np.minimum(away, 6 - away, out=plane)
        plane -= np.float32(1)
        np.clip(plane, 0, 1, out=plane)
        plane *= full
        np.subtract(value, plane, out=plane)
    return changed


def _hue(more: Floats, less: Floats, slope: Floats, own: int) -> Floats:
    difference: Floats = more - less
    difference *= slope
    difference += np.float32(own)
    return difference


def _within(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * share
