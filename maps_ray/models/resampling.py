"""Resizing and cropping as the published evaluation and augmentation compute them with TensorFlow. numpy and PIL only.

Lanczos-3 stretches its kernel when it shrinks an image (antialias); the bilinear crop puts the corners of the box on
the centers of the corner pixels and takes single samples. The crop is computed in fp32 in TensorFlow's order, so that
every byte is the same; Lanczos-3 is not, and one value in a thousand or fewer falls on the other side of a half.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maps_ray.models.jpeg import through_jpeg

CROP_AREA = 0.9
"""Share of the image that training crops at random and evaluation takes from the middle."""
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
    side = np.sqrt(np.float32(area))
    edge = (np.float32(1) - side) / np.float32(2)
    return to_bytes(crop_and_resize(to_floats(image), edge, edge, side))


def crop_and_resize(image: Floats, top: float, left: float, side: float) -> Floats:
    """A box of (H, W, C), resized to (H, W) bilinearly.

    Args:
        image: floating point.
        top, left: corner of the box, as shares of height and width.
        side: of the box, as a share of both.
    """
    return _between(_between(image, left, side, axis=1), top, side, axis=0)


def to_floats(image: Bytes) -> Floats:
    """0..255 -> 0..1."""
    return image.astype(np.float32) * np.float32(1 / 255)


def to_bytes(image: Floats) -> Bytes:
    """0..1, clipped -> 0..255, in TensorFlow's 256 equal steps (x 255.5, cut off)."""
    return (np.clip(image, 0, 1) * np.float32(255.5)).astype(np.uint8)


def _between(image: Floats, start: float, side: float, axis: int) -> Floats:
    last = np.float32(image.shape[axis] - 1)
    first = np.float32(start)
    step = (first + np.float32(side) - first) * last / max(last, np.float32(1))
    places = np.minimum(first * last + np.arange(image.shape[axis], dtype=np.float32) * step, last)
    low = np.floor(places)
    shape: list[Any] = [1] * image.ndim
    shape[axis] = -1
    near = image.take(low.astype(np.int64), axis=axis)
    far = image.take(np.ceil(places).astype(np.int64), axis=axis)
    return near + (far - near) * (places - low).reshape(shape)
