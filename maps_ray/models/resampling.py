"""JPEG, resizing and cropping as the published evaluation and augmentation compute them with TensorFlow. No TensorFlow.

Lanczos-3 stretches its kernel when it shrinks an image (antialias); the bilinear crop puts the corners of the box on
the centers of the corner pixels and takes single samples. The crop is computed in fp32 in TensorFlow's order, so that
every byte is the same; Lanczos-3 is not, and one value in a thousand or fewer falls on the other side of a half.

Floating point stands in whole planes (C, H, W): arithmetic on them is several times as fast as on interleaved channels.
"""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

CROP_AREA = 0.9
"""Share of the image that training crops at random and evaluation takes from the middle."""
QUALITY = 95
"""Of the JPEG: `tf.image.encode_jpeg`'s default."""
Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
# New pixels that are computed by one product: of small bands of the weights, all but their corners is filled.
_BAND = 32


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
    before, width, channels = image.shape
    # At one place per pixel the kernel is 1 there and 0 at all others: the image itself.
    if (before, width) == size:
        return image
    rows = np.empty((size[0], width * channels), np.float32)
    # In order: a rotated image is a view that runs backwards.
    floats = image.astype(np.float32, order="C").reshape(before, width * channels)
    for new, old, weights in _lanczos_bands(before, size[0]):
        np.matmul(weights, floats[old], out=rows[new])
    planes = np.ascontiguousarray(rows.reshape(size[0], width, channels).transpose(2, 0, 1))
    planes = planes.reshape(channels * size[0], width)
    resized = np.empty((channels * size[0], size[1]), np.float32)
    for new, old, weights in _lanczos_bands(width, size[1]):
        np.matmul(planes[:, old], weights.T, out=resized[:, new])
    # Halves go to the even number, as with `tf.round`; and the kernel overshoots at edges.
    np.clip(np.rint(resized, out=resized), 0, 255, out=resized)
    return _interleaved(resized.astype(np.uint8).reshape(channels, *size))


def center_crop(image: Bytes, area: float = CROP_AREA) -> Bytes:
    """The middle of (H, W, C), `area` of it, resized back."""
    # In fp32, as TensorFlow computes the box: in double its edge would differ in the last bit, and some bytes with it.
    side = np.sqrt(np.float32(area))
    edge = (np.float32(1) - side) / np.float32(2)
    return to_bytes(crop_and_resize(image, edge, edge, side))


def crop_and_resize(image: Bytes, top: float, left: float, side: float) -> Floats:
    """A box of (H, W, C), 0..255, resized to (H, W) bilinearly.

    Args:
        image: bytes.
        top, left: corner of the box, as shares of height and width.
        side: of the box, as a share of both.

    Returns:
        (C, H, W), 0..1.
    """
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    low, high, share = _places(planes.shape[2], left, side)
    # Bytes are picked and then made floats: four times less to move.
    near, far = (to_floats(planes.take(places, axis=2, mode="clip")) for places in (low, high))
    columns = _between(near, far, share)
    low, high, share = _places(planes.shape[1], top, side)
    near, far = (columns.take(places, axis=1, mode="clip") for places in (low, high))
    return _between(near, far, share[:, None])


def to_floats(image: Bytes) -> Floats:
    """0..255 -> 0..1."""
    # `tf.image.convert_image_dtype` multiplies by the reciprocal; a division would round otherwise.
    return image.astype(np.float32) * np.float32(1 / 255)


def to_bytes(planes: Floats) -> Bytes:
    """(C, H, W), 0..1, clipped -> (H, W, C), 0..255, in TensorFlow's 256 equal steps (x 255.5, cut off)."""
    clipped = np.clip(planes, 0, 1)
    # `tf.image.convert_image_dtype` scales by the greatest byte plus 0.5, then casts.
    return _interleaved(np.multiply(clipped, np.float32(255.5), out=clipped).astype(np.uint8))


@cache
def _lanczos_bands(before: int, after: int) -> list[tuple[slice, slice, Floats]]:
    """Weights of the old pixels for some new ones at a time: (new, old, (new, old) weights)."""
    scale = before / after
    stretch = max(scale, 1.0)
    centers = (np.arange(after) + 0.5) * scale - 0.5
    away = (np.arange(before) - centers[:, None]) / stretch
    weights = np.where(np.abs(away) < 3, np.sinc(away) * np.sinc(away / 3), 0)
    # At an edge a part of the kernel lies outside of the image; what is inside must still add up to 1.
    weights /= weights.sum(axis=1, keepdims=True)
    bands = []
    for start in range(0, after, _BAND):
        band = weights[start : start + _BAND]
        used = np.flatnonzero(band.any(axis=0))
        old = slice(int(used[0]), int(used[-1]) + 1)
        bands.append((slice(start, start + len(band)), old, np.ascontiguousarray(band[:, old], np.float32)))
    return bands


def _places(length: int, start: float, side: float) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Of each new pixel along one axis: the pixels before and after it, and its share of the way between them."""
    last = np.float32(length - 1)
    first = np.float32(start)
    # Not `side` itself: `tf.image.crop_and_resize` gets both corners and takes their difference, rounded twice.
    step = (first + np.float32(side) - first) * last / max(last, np.float32(1))
    # Rounding may carry the last place past the last pixel.
    places = np.minimum(first * last + np.arange(length, dtype=np.float32) * step, last)
    low = np.floor(places)
    return low.astype(np.int64), np.ceil(places).astype(np.int64), places - low


def _between(near: Floats, far: Floats, share: Floats) -> Floats:
    """near + (far - near) * share, in the memory of `far`."""
    np.subtract(far, near, out=far)
    np.multiply(far, share, out=far)
    return np.add(near, far, out=far)


def _interleaved(planes: Bytes) -> Bytes:
    """(C, H, W) -> (H, W, C)."""
    return np.stack(list(planes), axis=2)


def decode_jpeg(data: bytes) -> Bytes:
    """RGB (H, W, 3), bit by bit as `tf.io.decode_image`.

    TensorFlow's default is libjpeg-turbo's fast inverse transform (Arai, Agui and Nakajima) with smooth upsampling of
    chroma. Pillow only offers the accurate one, which is up to 15 grey levels away.

    Raises:
        ValueError: no JPEG, or a broken one.
    """
    decoded: Bytes = simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, fastupsample=False)
    return decoded


def through_jpeg(image: Bytes) -> Bytes:
    """Encodes and decodes (H, W, 3) RGB as `tf.io.decode_image(tf.image.encode_jpeg(image))` does."""
    # TensorFlow encodes with the accurate transform, as Pillow does and simplejpeg does not: only its decoder is fast.
    buffer = io.BytesIO()
    # `tf.image.encode_jpeg` halves the chroma unless it is told not to (`chroma_downsampling`).
    Image.fromarray(image).save(buffer, "JPEG", quality=QUALITY, subsampling="4:2:0")
    return decode_jpeg(buffer.getvalue())
