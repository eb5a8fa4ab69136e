"""Labelled pictures in memory: shards from disk, with a held-out part."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GRIPPER = "gripper"


class SceneError(ValueError):
    """A folder of scenes that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Thing:
    """Something a picture shows. Places in the image are fractions from its upper left corner."""

    name: str
    centre: tuple[float, float]
    box: tuple[float, float, float, float] | None
    """Left, top, right, bottom; None for the gripper, which is a point."""
    offset: tuple[float, float, float]
    """From the point between the finger tips to the thing, in m along the world's axes."""


@dataclass(frozen=True)
class Picture:
    """One labelled picture."""

    index: int
    """Row in `Scenes.images`."""
    camera: str
    things: tuple[Thing, ...]
    """Visible objects, and the gripper where it is in the picture."""
    partner: int | None
    """Row of the wrist view of the same arrangement, for a primary view that has one."""

    def unique(self) -> list[Thing]:
        """Things whose name no other thing in the picture has."""
        names = [thing.name for thing in self.things]
        return [thing for thing in self.things if names.count(thing.name) == 1]


@dataclass(frozen=True)
class Scenes:
    """All pictures of a folder."""

    images: NDArray[np.uint8]
    """(n, height, width, 3)"""
    pictures: tuple[Picture, ...]
    """One for each image."""
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    """The last pictures of each shard; a wrist view is on the side of its primary view."""

    @property
    def names(self) -> list[str]:
        """Every name that occurs, sorted, without the gripper."""
        return sorted({thing.name for picture in self.pictures for thing in picture.things} - {GRIPPER})


def read_scenes(folder: Path, *, held_out: float = 0.05) -> Scenes:
    """Reads the shards `*.npz` that `jobs/render_scenes.py` writes.

    Args:
        folder: each shard has `images`, uint8 (n, height, width, 3), and `annotations`, n JSON texts.
        held_out: part of each shard to keep from training, rounded up; 0 keeps nothing.

    Raises:
        SceneError: no shard, or one that cannot be read.
    """
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise SceneError(f"{folder}: no scenes (*.npz); make some with jobs/render_scenes.py")
    images: list[NDArray[np.uint8]] = []
    pictures: list[Picture] = []
    train: list[int] = []
    kept: list[int] = []
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as shard:
                images.append(shard["images"])
                labels = [json.loads(text) for text in shard["annotations"]]
            first = len(pictures)
            pictures += [_picture(first + row, labels, row) for row in range(len(labels))]
        except (OSError, ValueError, KeyError) as error:
            raise SceneError(f"{path}: not a shard of scenes ({error}); render it again") from None
        cut = len(labels) - int(np.ceil(len(labels) * held_out))
        while 0 < cut < len(labels) and labels[cut]["camera"] != "image":
            cut += 1
        train += range(first, first + cut)
        kept += range(first + cut, first + len(labels))
    if len({image.shape[1:] for image in images}) > 1:
        raise SceneError(f"{folder}: pictures of different sizes; keep one size in one folder")
    return Scenes(np.concatenate(images), tuple(pictures), tuple(train), tuple(kept))


def _picture(index: int, labels: list[dict[str, Any]], row: int) -> Picture:
    label = labels[row]
    grip = np.array(label["gripper_position"])
    things = [
        Thing(
            thing["name"],
            tuple(thing["centre"]),
            tuple(thing["box"]),
            _triple(np.array(thing["position"]) - grip),
        )
        for thing in label["objects"]
    ]
    if label["gripper"] is not None:
        things.append(Thing(GRIPPER, tuple(label["gripper"]), None, (0.0, 0.0, 0.0)))
    following = labels[row + 1] if row + 1 < len(labels) else None
    # A wrist view follows the primary view of the same arrangement, with the gripper at the same place.
    paired = (
        label["camera"] == "image"
        and following is not None
        and following["camera"] != "image"
        and following["gripper_position"] == label["gripper_position"]
    )
    return Picture(index, label["camera"], tuple(things), index + 1 if paired else None)


def _triple(values: NDArray[np.float64]) -> tuple[float, float, float]:
    x, y, z = values.tolist()
    return x, y, z
