"""Rendered scenes on disk: compressed shards of images with their labels, written side by side as they come."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from maps_ray.evaluation.simulators.libero import LiberoSimulator
from maps_ray.evaluation.simulators.metaworld_small import PREFIX as SMALL
from maps_ray.evaluation.simulators.processes import run_in_processes
from maps_ray.files import replaced
from tiny_base import metaworld_scenes
from tiny_base.libero_scenes import Scene, render_scenes

_PICTURES_PER_SHARD = 120

World = Literal["libero", "metaworld_small"]


@dataclass(frozen=True)
class _Shard:
    path: Path
    suite: str
    task: int
    count: int
    seed: int
    image_size: int


def write_scenes(
    out: Path, count: int, *, workers: int, seed: int, image_size: int = 128, world: World = "libero"
) -> Iterator[int]:
    """Renders pictures into `out/scenes-NNNNN.npz`; shards that exist are kept.

    Args:
        out: folder, created when missing.
        count: number of pictures in all.
        workers: processes, each of about 1.8 GB (LIBERO) or 0.5 GB.
        seed: the same seed gives the same shards, whatever the number of workers.
        image_size: side of the pictures in pixels.
        world: what is shown, all five LIBERO suites or Metaworld's small world.

    Yields:
        The number of pictures on disk, about once a second.
    """
    out.mkdir(parents=True, exist_ok=True)
    shards = _plan(out, count, seed, image_size, world)
    missing = [shard for shard in shards if not shard.path.exists()]
    yield _on_disk(shards)
    for _ in run_in_processes(_write_shard, missing, workers):
        yield _on_disk(shards)


def read_shard(path: Path) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """Reads one shard.

    Returns:
        Images, uint8 of shape (n, size, size, 3), and for each the fields of `Scene.annotation()`.
    """
    with np.load(path, allow_pickle=False) as shard:
        return shard["images"], [json.loads(text) for text in shard["annotations"]]


def _on_disk(shards: list[_Shard]) -> int:
    return sum(shard.count for shard in shards if shard.path.exists())


def _plan(out: Path, count: int, seed: int, image_size: int, world: World) -> list[_Shard]:
    """Spreads the pictures over the scenes in turn, so that the first shards already show every suite."""
    scenes = _scenes() if world == "libero" else [(SMALL, number) for number in range(len(metaworld_scenes.SCENES))]
    shards = []
    for number, start in enumerate(range(0, count, _PICTURES_PER_SHARD)):
        suite, task = scenes[number % len(scenes)]
        pictures = min(_PICTURES_PER_SHARD, count - start)
        path = out / f"scenes-{number:05d}.npz"
        shards.append(_Shard(path, suite, task, pictures, seed * 1_000_003 + number, image_size))
    return shards


def _scenes() -> list[tuple[str, int]]:
    """(suite, task) with different sets of objects: tasks of LIBERO-100 share a scene, which their name begins with."""
    by_scene: dict[str, tuple[str, int]] = {}
    for suite in ("libero_90", "libero_10"):
        for task in LiberoSimulator(suite).tasks:
            scene = re.match(r"[A-Z_]+SCENE\d+", task.name)
            by_scene.setdefault(scene.group() if scene else task.name, (suite, task.index))
    objects = [("libero_object", index) for index in range(10)]
    fixed = [("libero_spatial", 0), ("libero_goal", 0), ("libero_spatial", 1), ("libero_goal", 1)]
    turns = zip_longest(by_scene.values(), objects, fixed)
    return [scene for turn in turns for scene in turn if scene is not None]


def _photograph(shard: _Shard) -> list[Scene]:
    if shard.suite == SMALL:
        task = list(metaworld_scenes.SCENES)[shard.task]
        return list(metaworld_scenes.render_small_scenes(task, shard.count, shard.seed, shard.image_size))
    simulator = LiberoSimulator(shard.suite, image_size=shard.image_size)
    try:
        return list(render_scenes(simulator, shard.task, shard.count, shard.seed))
    finally:
        simulator.close()


def _write_shard(shard: _Shard) -> None:
    scenes = _photograph(shard)
    with replaced(shard.path) as partial, partial.open("wb") as stream:
        np.savez_compressed(
            stream,
            images=np.stack([scene.image for scene in scenes]),
            annotations=np.array([json.dumps(scene.annotation()) for scene in scenes]),
        )
