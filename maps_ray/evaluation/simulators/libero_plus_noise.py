"""LIBERO-Plus' sensor noise (arXiv:2510.13626): five kinds in ten strengths, after ImageNet-C (arXiv:1903.12261).

Strengths are in pixels, published for images of 256 pixels. 1..10 motion blur, 11..20 Gaussian blur, 21..30 zoom blur,
31..40 fog, 41..50 glass blur. Upstream draws from numpy's global state, so pictures agree in kind and not pixel by
pixel; motion blur follows ImageMagick's kernel.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom

Image = NDArray[np.uint8]

_MOTION = ((5, 2), (8, 3), (10, 4), (12, 5), (15, 6), (18, 8), (20, 10), (25, 12), (30, 15), (35, 20))
"""Radius and sigma."""
_ZOOM = (
    (1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03),
    (1.36, 0.01), (1.41, 0.01), (1.46, 0.02), (1.51, 0.02), (1.56, 0.03),
)  # fmt: skip
"""End and step of the factors, from 1."""
_FOG = (
    (0.5, 3), (1.0, 2.8), (1.5, 2.5), (2.0, 2.2), (2.5, 2.0), (3.0, 1.8), (3.5, 1.6), (4.0, 1.5), (4.5, 1.4),
    (5.0, 1.3),
)  # fmt: skip
"""Thickness, and how fast its detail fades."""
_GLASS = (
    (0.5, 1, 3), (0.7, 1, 3), (0.9, 2, 3), (1.0, 2, 2), (1.1, 3, 2), (1.3, 3, 2), (1.5, 4, 2), (1.8, 4, 2),
    (2.2, 5, 1), (2.5, 5, 1),
)  # fmt: skip
"""Sigma, largest move, rounds."""


def disturb(image: Image, noise: int, generator: Generator) -> Image:
    """One camera's picture with noise.

    Args:
        image: (size, size, 3) uint8.
        noise: 1..50, kind and strength.
        generator: of what is drawn.

    Raises:
        ValueError: no such noise.
    """
    if not 1 <= noise <= 50:
        raise ValueError(f"noise = {noise}: must be 1 to 50")
    kind, strength = divmod(noise - 1, 10)
    values = image / 255.0
    if kind == 0:
        values = _motion_blur(values, *_MOTION[strength], generator.uniform(-45, 45))
    elif kind == 1:
        values = _gaussian(values, strength + 1)
    elif kind == 2:
        factors = np.arange(1, *_ZOOM[strength])
        values = (values + sum(_zoomed(values, factor) for factor in factors)) / (len(factors) + 1)
    elif kind == 3:
        thickness, decay = _FOG[strength]
        haze = _plasma(len(image), decay, generator)[..., None]
        values = (values + thickness * haze) * values.max() / (values.max() + thickness)
    else:
        values = _glass_blur(values, *_GLASS[strength], generator)
    return np.asarray(np.clip(values, 0, 1) * 255).astype(np.uint8)


def _gaussian(values: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    return np.asarray(gaussian_filter(values, (sigma, sigma, 0), mode="nearest"))


def _motion_blur(values: NDArray[np.float64], radius: int, sigma: float, degrees: float) -> NDArray[np.float64]:
    """Each pixel becomes a mean of those behind it in one direction, nearer ones weighing more."""
    along = np.arange(2 * radius + 1)
    weights = np.exp(-(along**2) / (2 * sigma**2))
    down = np.ceil(along * np.sin(np.radians(degrees)) - 0.5).astype(int)
    right = np.ceil(along * np.cos(np.radians(degrees)) - 0.5).astype(int)
    height, width = values.shape[:2]
    rows, columns = np.arange(height)[:, None], np.arange(width)[None]
    blurred = np.zeros_like(values)
    for weight, dy, dx in zip(weights / weights.sum(), down, right, strict=True):
        blurred += weight * values[np.clip(rows + dy, 0, height - 1), np.clip(columns + dx, 0, width - 1)]
    return blurred


def _zoomed(values: NDArray[np.float64], factor: float) -> NDArray[np.float64]:
    size = len(values)
    part = int(np.ceil(size / factor))
    top = (size - part) // 2
    larger = zoom(values[top : top + part, top : top + part], (factor, factor, 1), order=1)
    trim = (len(larger) - size) // 2
    return np.asarray(larger[trim : trim + size, trim : trim + size])


def _plasma(size: int, decay: float, generator: Generator) -> NDArray[np.float64]:
    """A plasma fractal by the diamond-square algorithm, (size, size), 0..1."""
    full = max(256, 1 << (size - 1).bit_length())
    values = np.zeros((full, full))
    step, wibble = full, 100.0

    def drawn(total: NDArray[np.float64]) -> NDArray[np.float64]:
        return total / 4 + wibble * generator.uniform(-wibble, wibble, total.shape)

    while step >= 2:
        half = step // 2
        corners = values[0:full:step, 0:full:step]
        squares = corners + np.roll(corners, -1, axis=0)
        squares = squares + np.roll(squares, -1, axis=1)
        values[half:full:step, half:full:step] = drawn(squares)
        middles, corners = values[half:full:step, half:full:step], values[0:full:step, 0:full:step]
        upper = middles + np.roll(middles, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        left = middles + np.roll(middles, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        values[0:full:step, half:full:step] = drawn(upper)
        values[half:full:step, 0:full:step] = drawn(left)
        step, wibble = half, wibble / decay
    values -= values.min()
    return (values / values.max())[:size, :size]


def _glass_blur(
    values: NDArray[np.float64], sigma: float, move: int, rounds: int, generator: Generator
) -> NDArray[np.float64]:
    """Swaps neighbours at random, within the first 224 rows and columns as upstream, between two blurs."""
    pixels = (_gaussian(values, sigma) * 255).astype(np.uint8)
    edge = min(224, len(pixels) - 1)
    span = np.arange(edge - move, move, -1)
    for _ in range(rounds):
        moves = generator.integers(-move, move, (len(span), len(span), 2))
        for row, moves_of_row in zip(span, moves, strict=True):
            for column, (right, down) in zip(span, moves_of_row, strict=True):
                other = row + down, column + right
                pixels[row, column], pixels[other] = pixels[other].copy(), pixels[row, column].copy()
    return _gaussian(pixels / 255.0, sigma)
