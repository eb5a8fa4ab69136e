"""The JPEG round trip of the published evaluation, bit by bit as TensorFlow computes it. numpy and PIL only.

Pillow and TensorFlow encode alike (baseline, quality 95, chroma at half size), but decode differently: Pillow by
libjpeg's accurate inverse transform, TensorFlow by its fast one (Arai, Agui and Nakajima, with 8-bit constants). Pixels
differ by 1.3 grey levels on average, by 11 at most. Pillow does not offer the fast one, so libjpeg's arithmetic stands
here, all but Huffman coding, which loses nothing.
"""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

QUALITY = 95

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int32]

# AAN scale factors of a row or column: 1 for the first, else sqrt(2) cos(k pi / 16).
_AAN = np.array([1.0, *(np.sqrt(2) * np.cos(np.arange(1, 8) * np.pi / 16))])


def through_jpeg(image: Bytes) -> Bytes:
    """Encodes and decodes (H, W, 3) RGB as `tf.io.decode_image(tf.image.encode_jpeg(image))` does.

    Raises:
        ValueError: fewer than 5 pixels in a row, where libjpeg interpolates otherwise.
    """
    height, width = image.shape[:2]
    if width < 5:
        raise ValueError(f"an image of {height} x {width} is too narrow: needs 5 pixels in a row")
    red, green, blue = image.transpose(2, 0, 1).astype(np.int32)
    half = 1 << 15
    planes = (
        (19595 * red + 38470 * green + 7471 * blue + half) >> 16,
        (-11059 * red - 21709 * green + 32768 * blue + (128 << 16) + half - 1) >> 16,
        (32768 * red - 27439 * green - 5329 * blue + (128 << 16) + half - 1) >> 16,
    )
    luminance, chrominance = _quantization()
    luma = _code(_pad(planes[0], 8, 8), luminance)[:height, :width]
    small = ((height + 1) // 2, (width + 1) // 2)
    chroma = [_double(_code(_halve(plane), chrominance)[: small[0], : small[1]]) for plane in planes[1:]]
    b, r = (plane[:height, :width] - 128 for plane in chroma)
    decoded = (
        luma + ((91881 * r + half) >> 16),
        luma + ((-22554 * b - 46802 * r + half) >> 16),
        luma + ((116130 * b + half) >> 16),
    )
    return np.clip(np.stack(decoded, axis=2), 0, 255).astype(np.uint8)


@cache
def _quantization() -> tuple[Ints, Ints]:
    """The tables of luminance and chrominance, (8, 8), as libjpeg scales them to the quality."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=QUALITY)
    tables = Image.open(buffer).quantization  # type: ignore[attr-defined]
    first, second = (np.array(tables[number], np.int32).reshape(8, 8) for number in (0, 1))
    return first, second


def _pad(plane: Ints, rows: int, columns: int) -> Ints:
    """Repeats the last row and column up to whole multiples."""
    height, width = plane.shape
    return np.pad(plane, ((0, -height % rows), (0, -width % columns)), mode="edge")


def _halve(plane: Ints) -> Ints:
    """Means of 2 x 2, rounded down and up in turns, in whole blocks."""
    padded = _pad(plane, 2, 16)
    total = padded[::2, ::2] + padded[::2, 1::2] + padded[1::2, ::2] + padded[1::2, 1::2]
    return _pad((total + 1 + np.arange(total.shape[1], dtype=np.int32) % 2) >> 2, 8, 8)


def _double(plane: Ints) -> Ints:
    """Twice as high and wide: each new value is 3/4 of the nearer and 1/4 of the farther neighbour, both ways."""
    height, width = plane.shape
    framed = np.pad(plane, 1, mode="edge")
    middle = 3 * framed[1:-1]
    out = np.empty((2 * height, 2 * width), np.int32)
    for row, other in enumerate((framed[:-2], framed[2:])):
        sums = middle + other
        out[row::2, ::2] = (3 * sums[:, 1:-1] + sums[:, :-2] + 8) >> 4
        out[row::2, 1::2] = (3 * sums[:, 1:-1] + sums[:, 2:] + 7) >> 4
    return out


def _code(plane: Ints, table: Ints) -> Ints:
    """Whole blocks of 8 x 8 through transform, quantisation and the fast inverse transform."""
    height, width = plane.shape
    blocks = (plane - 128).reshape(height // 8, 8, width // 8, 8)
    # The transforms work along the first axis: (row, column, block).
    values = blocks.transpose(1, 3, 0, 2).reshape(8, 8, -1)
    values = _forward(_forward(values.swapaxes(0, 1), first=True).swapaxes(0, 1), first=False)
    steps = (8 * table)[..., None]
    levels = np.sign(values) * ((np.abs(values) + steps // 2) // steps)
    scales = np.rint(np.outer(_AAN, _AAN) * 2**14).astype(np.int32)
    multipliers = (table * scales + (1 << 11)) >> 12
    values = _inverse(_inverse(levels * multipliers[..., None]).swapaxes(0, 1)).swapaxes(0, 1)
    decoded = np.clip((values >> 5) + 128, 0, 255).astype(np.int32)
    return decoded.reshape(8, 8, height // 8, width // 8).transpose(2, 0, 3, 1).reshape(height, width)


def _forward(values: Ints, first: bool) -> Ints:
    """libjpeg's accurate transform of 8 values (Loeffler, Ligtenberg and Moschytz), scaled by sqrt(8) a pass.

    The first pass leaves two more bits, which the second takes away.
    """
    sums = values[:4] + values[:3:-1]
    away = values[:4] - values[:3:-1]
    even, odd = sums[:2] + sums[:1:-1], sums[:2] - sums[:1:-1]
    shift = 13 - 2 if first else 13 + 2

    def scaled(value: Ints, bits: int = shift) -> Ints:
        return (value + (1 << bits - 1)) >> bits

    def plain(value: Ints) -> Ints:
        return value << 2 if first else scaled(value, 2)

    out = np.empty_like(values)
    out[0], out[4] = plain(even[0] + even[1]), plain(even[0] - even[1])
    turned = (odd[1] + odd[0]) * 4433
    out[2], out[6] = scaled(turned + odd[0] * 6270), scaled(turned - odd[1] * 15137)
    d, c, b, a = away
    z1, z2, z3, z4 = -7373 * (a + d), -20995 * (b + c), -16069 * (a + c), -3196 * (b + d)
    z5 = 9633 * (a + c + b + d)
    z3, z4 = z3 + z5, z4 + z5
    out[7], out[5] = scaled(2446 * a + z1 + z3), scaled(16819 * b + z2 + z4)
    out[3], out[1] = scaled(25172 * c + z2 + z3), scaled(12299 * d + z1 + z4)
    return out


def _inverse(values: Ints) -> Ints:
    """libjpeg's fast inverse transform of 8 scaled values; products are cut off, not rounded."""
    c0, c1, c2, c3, c4, c5, c6, c7 = values
    sum04, sum26 = c0 + c4, c2 + c6
    away04, away26 = c0 - c4, (((c2 - c6) * 362) >> 8) - sum26
    even = (sum04 + sum26, away04 + away26, away04 - away26, sum04 - sum26)
    sum53, away53, sum17, away17 = c5 + c3, c5 - c3, c1 + c7, c1 - c7
    seventh = sum17 + sum53
    turned = ((away53 + away17) * 473) >> 8
    sixth = ((away53 * -669) >> 8) + turned - seventh
    fifth = (((sum17 - sum53) * 362) >> 8) - sixth
    fourth = ((away17 * 277) >> 8) - turned + fifth
    odd = (seventh, sixth, fifth, -fourth)
    top = [left + right for left, right in zip(even, odd, strict=True)]
    bottom = [left - right for left, right in zip(even, odd, strict=True)]
    return np.stack([*top, *bottom[::-1]])
