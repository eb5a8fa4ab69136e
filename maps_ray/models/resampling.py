"""Resizing and cropping as the published evaluation and augmentation compute them with TensorFlow. numpy and PIL only.

Lanczos-3 stretches its kernel when it shrinks an image (antialias); the bilinear crop puts the corners of the box on
the centers of the corner pixels and takes single samples.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CROP_AREA = 0.9
"""Share of the image that training crops at random and evaluation takes from the middle."""
_JPEG_QUALITY = 95

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def evaluation_image(image: Bytes, size: tuple[int, int], *, rotate: bool = False, crop: bool = True) -> Bytes:
    """A camera image as the published evaluation hands it to the processor.

    Args:
        image: RGB (H, W, 3).
        size: height and width that the policy reads.
        rotate: by 180 degrees, for LIBERO's raw frames.
        crop: take the middle 90 % of the area, for a policy that was trained with random crops.

    Returns:
        RGB (height, width, 3): rotated, through JPEG, resized by Lanczos-3, cropped and resized back.
    """
    if rotate:
        image = image[::-1, ::-1]
    resized = lanczos3(through_jpeg(image), size)
    return center_crop(resized) if crop else resized


def through_jpeg(image: Bytes) -> Bytes:
    """Encodes and decodes, as images of the training data were."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling="4:2:0")
    return np.asarray(Image.open(buffer))


def lanczos3(image: Bytes, size: tuple[int, int]) -> Bytes:
    """Resizes (H, W, C) to (height, width) in floating point, then rounds and clips."""
    height, width = size
    if image.shape[:2] == size:
        return image
    channels = [
        np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.LANCZOS))
        for channel in np.moveaxis(image.astype(np.float32), 2, 0)
    ]
    return np.clip(np.rint(np.stack(channels, axis=2)), 0, 255).astype(np.uint8)


def center_crop(image: Bytes, area: float = CROP_AREA) -> Bytes:
    """The middle of (H, W, C), `area` of it, resized back."""
    side = math.sqrt(area)
    return to_bytes(crop_and_resize(to_floats(image), (1 - side) / 2, (1 - side) / 2, side))


def crop_and_resize(image: Floats, top: float, left: float, side: float) -> Floats:
    """A box of (H, W, C), resized to (H, W) bilinearly.

    Args:
        image: floating point.
        top, left: corner of the box, as shares of height and width.
        side: of the box, as a share of both.
    """
    height, width = image.shape[:2]
    rows = _between(image, top, side, height, axis=0)
    return _between(rows, left, side, width, axis=1)


def to_floats(image: Bytes) -> Floats:
    """0..255 -> 0..1."""
    return image.astype(np.float32) / np.float32(255)


def to_bytes(image: Floats) -> Bytes:
    """0..1, clipped -> 0..255, in TensorFlow's 256 equal steps (x 255.5, cut off)."""
    return (np.clip(image, 0, 1) * np.float32(255.5)).astype(np.uint8)


def _between(image: Floats, start: float, side: float, count: int, axis: int) -> Floats:
    places = (start + np.arange(count) * side / max(count - 1, 1)) * (count - 1)
    low = np.floor(places).astype(np.int64)
    high = np.minimum(low + 1, count - 1)
    shape: list[Any] = [1] * image.ndim
    shape[axis] = count
    share = (places - low).astype(np.float32).reshape(shape)
    near = image.take(low, axis=axis)
    return near + (image.take(high, axis=axis) - near) * share
