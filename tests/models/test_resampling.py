"""Evaluation images: resizing, cropping and the JPEG round trip, against plain formulas and against TensorFlow.

`evaluation_images.npz` holds what TensorFlow 2.15.1 (CPU) makes of noise and of a piece of a camera's frame, step by
step as OpenVLA-OFT's LIBERO evaluation calls it, for a policy of 28 x 28 pixels: `*_jpeg` =
`tf.io.decode_image(tf.image.encode_jpeg(x), expand_animations=False, dtype=tf.uint8)`; `*_lanczos3` =
`tf.image.resize` of that, `method="lanczos3", antialias=True`, rounded and clipped to 0..255; `*_crop` =
`tf.image.crop_and_resize` of that as floats, a box of side sqrt(0.9) in the middle, clipped and converted back,
saturating.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maps_ray.models.resampling import (
    center_crop,
    crop_and_resize,
    evaluation_image,
    lanczos3,
    through_jpeg,
    to_bytes,
    to_floats,
)


@pytest.fixture
def image() -> np.ndarray:
    rows, columns = np.mgrid[:60, :80]
    smooth = np.stack([128 + 90 * np.sin(rows / 9), 3 * columns, 2 * rows + columns], axis=2)
    return np.clip(smooth + np.random.default_rng(0).normal(0, 9, smooth.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def published() -> dict[str, np.ndarray]:
    return dict(np.load(Path(__file__).parents[1] / "fixtures" / "evaluation_images.npz"))


@pytest.mark.parametrize("name", ["noise", "frame"])
def test_every_byte_is_tensorflows(published: dict[str, np.ndarray], name: str) -> None:
    image, size = published[name], (28, 28)
    decoded, resized, cropped = (published[f"{name}_{step}"] for step in ("jpeg", "lanczos3", "crop"))
    assert np.array_equal(through_jpeg(image), decoded)
    assert np.array_equal(lanczos3(decoded, size), resized)
    assert np.array_equal(center_crop(resized), cropped)
    assert np.array_equal(evaluation_image(image, size), cropped)
    turned = np.ascontiguousarray(image[::-1, ::-1])
    assert np.array_equal(evaluation_image(turned, size, rotate=True), cropped)


def lanczos_matrix(before: int, after: int) -> np.ndarray:
    """Each row is one new pixel's weights: sinc(x) sinc(x / 3), stretched where the image shrinks."""
    scale = before / after
    stretch = max(scale, 1.0)
    centers = (np.arange(after) + 0.5) * scale - 0.5
    away = (np.arange(before)[None] - centers[:, None]) / stretch
    weights = np.where(np.abs(away) < 3, np.sinc(away) * np.sinc(away / 3), 0)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("size", [(56, 56), (20, 33), (90, 160)])
def test_lanczos3(image: np.ndarray, size: tuple[int, int]) -> None:
    expected = np.einsum(
        "ar,bc,rcd->abd", lanczos_matrix(60, size[0]), lanczos_matrix(80, size[1]), image.astype(float)
    )
    resized = lanczos3(image, size)
    assert resized.dtype == np.uint8
    # Floating point may round one in a thousand values to the other side of a half.
    wrong = resized != np.clip(np.rint(expected), 0, 255)
    assert wrong.mean() < 1e-3 and np.abs(resized - np.clip(expected, 0, 255)).max() < 0.51
    assert lanczos3(image, (60, 80)) is image


def test_crop_is_bilinear_between_pixel_centers(image: np.ndarray) -> None:
    planes = to_floats(image).transpose(2, 0, 1)
    top, left, side = 0.03, 0.01, 0.9**0.5
    rows = top + side * np.linspace(0, 1, 60)
    columns = left + side * np.linspace(0, 1, 80)
    grid = torch.tensor(np.stack(np.broadcast_arrays(columns[None], rows[:, None]), axis=2) * 2 - 1)[None]
    source = torch.tensor(planes)[None].double()
    expected = torch.nn.functional.grid_sample(source, grid, align_corners=True)[0].numpy()
    np.testing.assert_allclose(crop_and_resize(image, top, left, side), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(crop_and_resize(image, 0, 0, 1), planes, rtol=0, atol=1e-5)


def test_center_crop_is_nine_tenths_of_the_area(image: np.ndarray) -> None:
    edge = (1 - 0.9**0.5) / 2
    expected = to_bytes(crop_and_resize(image, edge, edge, 0.9**0.5))
    assert np.array_equal(center_crop(image), expected)
    assert not np.array_equal(center_crop(image), image)


def test_bytes_come_back(image: np.ndarray) -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    assert np.array_equal(to_bytes(to_floats(every).transpose(2, 0, 1)), every)
    edges = np.array([-1, 0, 0.995, 1, 2], np.float32)
    assert to_bytes(edges.reshape(1, 1, 5)).ravel().tolist() == [0, 0, 254, 255, 255]
    assert edges[0] == -1


@pytest.mark.parametrize("size", [(8, 8), (17, 9), (31, 5), (60, 80)])
def test_jpeg_of_any_size_is_near_pillows(size: tuple[int, int]) -> None:
    rows, columns = np.mgrid[: size[0], : size[1]]
    image = np.stack([4 * rows, 3 * columns, 2 * rows + columns], axis=2).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling="4:2:0")
    # The same coefficients, through another inverse transform.
    difference = np.abs(through_jpeg(image).astype(int) - np.asarray(Image.open(buffer)))
    assert difference.shape == (*size, 3) and difference.max() <= 8
    assert through_jpeg(image[:1, :1]).shape == (1, 1, 3)


def test_evaluation_image(image: np.ndarray) -> None:
    plain = evaluation_image(image, (56, 56), crop=False)
    assert np.array_equal(plain, lanczos3(through_jpeg(image), (56, 56)))
    assert np.array_equal(evaluation_image(image, (56, 56)), center_crop(plain))
    turned = evaluation_image(np.ascontiguousarray(image[::-1, ::-1]), (56, 56), rotate=True)
    assert np.array_equal(turned, evaluation_image(image, (56, 56)))
