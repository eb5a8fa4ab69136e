"""Random changes of training images: their order, their ranges, and that only seed and position decide them."""

from __future__ import annotations

import colorsys
from itertools import chain

import numpy as np
import pytest
from squares_data import Recorded

from maps_ray.data import Batches, Demonstrations, Mixture
from maps_ray.data.augment import augment, augmentation_rng, change_colors
from maps_ray.spec import DataSpec


class Numbers:
    """Stands in for a generator: gives the six numbers it was made with."""

    def __init__(self, **numbers: float) -> None:
        # 0.5 is the middle of each range: no change of color, and the crop from the center.
        names = ("top", "left", "shift", "contrast", "saturation", "turn")
        self._numbers = [numbers.get(name, 0.5) for name in names]

    def random(self, count: int) -> list[float]:
        assert count == 6
        return self._numbers


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(60, 190, (24, 32, 3), dtype=np.uint8)


def test_colors_change_in_hsv() -> None:
    pixels = np.random.default_rng(0).random((3, 20, 20)).astype(np.float32)
    pixels[:, 0, 0], pixels[:, 0, 1], pixels[:, 0, 2] = 0.5, 0.0, [1, 1, 0]
    for saturation, turn in ((0.8, -0.05), (1.2, 0.05), (1.0, 0.0)):
        expected = np.empty_like(pixels)
        for row, column in np.ndindex(20, 20):
            hue, full, value = colorsys.rgb_to_hsv(*map(float, pixels[:, row, column]))
            expected[:, row, column] = colorsys.hsv_to_rgb((hue + turn) % 1, min(full * saturation, 1), value)
        np.testing.assert_allclose(change_colors(pixels, saturation, turn), expected, rtol=0, atol=2e-6)


def test_crop_keeps_nine_tenths_of_the_area() -> None:
    ramp = np.tile(np.arange(101, dtype=np.uint8)[:, None, None], (1, 101, 3))
    side = 0.9**0.5
    for share, first in ((0.0, 0.0), (0.5, (1 - side) / 2), (1.0, 1 - side)):
        rows = augment(ramp, Numbers(top=share))[:, 0, 0].astype(float)  # type: ignore[arg-type]
        np.testing.assert_allclose(rows, 100 * (first + side * np.arange(101) / 100), atol=1.01)


def test_brightness_and_contrast(image: np.ndarray) -> None:
    plain = augment(image, Numbers()).astype(float)  # type: ignore[arg-type]
    brighter = augment(image, Numbers(shift=1.0)).astype(float)  # type: ignore[arg-type]
    np.testing.assert_allclose(brighter, plain + 0.2 * 255, atol=1.5)
    softer = augment(image, Numbers(contrast=0.0)).astype(float)  # type: ignore[arg-type]
    mean = plain.mean(axis=(0, 1))
    np.testing.assert_allclose(softer, (plain - mean) * 0.8 + mean, atol=1.5)


def test_shape_kind_and_determinism(image: np.ndarray) -> None:
    before = image.copy()
    first, again = (augment(image, augmentation_rng(1, 7)) for _ in range(2))
    assert first.dtype == np.uint8 and first.shape == image.shape and np.array_equal(first, again)
    assert np.array_equal(image, before)
    for other in (augmentation_rng(1, 8), augmentation_rng(2, 7)):
        assert not np.array_equal(first, augment(image, other))
    gray = np.full((8, 8, 3), 77, np.uint8)
    assert len(np.unique(augment(gray, augmentation_rng(0, 0)))) == 1


class Images:
    """A processor that keeps the images."""

    def encode(self, instruction, images, proprio, actions):
        return list(images)

    def collate(self, samples):
        return samples


@pytest.fixture(scope="module")
def train(squares: Recorded) -> Mixture:
    spec = DataSpec(path=squares.root, cameras=["image"])
    return Demonstrations(spec, use_proprio=True).samples("train")


def batches(train: Mixture, **options) -> Batches:
    return Batches(train, Images(), **{"seed": 3, "global_batch_size": 6, **options})


def test_any_number_of_workers_sees_the_same_changes(train: Mixture) -> None:
    alone = batches(train, augment=True)
    for world_size, micro_batches in ((2, 1), (3, 2)):
        workers = [
            batches(train, augment=True, rank=rank, world_size=world_size, micro_batches=micro_batches)
            for rank in range(world_size)
        ]
        parts = [worker.batch(2, micro) for micro in range(micro_batches) for worker in workers]
        assert np.array_equal(list(chain.from_iterable(parts)), alone.batch(2))
    assert not np.array_equal(batches(train).batch(2), alone.batch(2))


def test_a_sample_changes_anew_in_each_epoch(train: Mixture) -> None:
    endless = batches(train, global_batch_size=1, augment=True)
    first = endless.sample_at(0)
    later = next(position for position in range(len(train), 2 * len(train)) if endless.sample_at(position) == first)
    assert not np.array_equal(endless.batch(0), endless.batch(later))
