"""Labelled pictures of Metaworld's small world in which everything varies that its suites change, all at once.

They are `Scene`s like LIBERO's, so what pretrains on those pretrains on these.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from maps_ray.evaluation.simulators import metaworld_small as small
from maps_ray.evaluation.simulators.metaworld import environment_table
from tiny_base.libero_scenes import Scene, SeenObject

# Metaworld task -> outermost body -> what people call it.
SCENES: dict[str, dict[str, str]] = {
    "button-press-topdown-v3": {"box": "button"},
    "drawer-close-v3": {"drawer": "drawer"},
    "handle-press-v3": {"box": "handle"},
    "window-close-v3": {"window": "window"},
    "button-press-v3": {"box": "button"},
    "coffee-button-v3": {"coffee_machine": "coffee machine", "obj": "mug"},
    "handle-press-side-v3": {"box": "handle"},
    "faucet-close-v3": {"faucetBase": "faucet"},
    "door-lock-v3": {"door": "door"},
    "lever-pull-v3": {"lever": "lever"},
}
_HAND_LOW, _HAND_HIGH = np.array([-0.3, 0.45, 0.07]), np.array([0.3, 0.85, 0.35])
_DRIVEN, _DRIVE_STEPS = 0.5, 60
_SMALLEST_VISIBLE = 6  # pixels in a 64 x 64 picture


def render_small_scenes(task: str, count: int, seed: int, image_size: int = 64) -> Iterator[Scene]:
    """Makes `count` pictures of one task's thing among distractors, with the hand anywhere.

    Args:
        task: a key of `SCENES`.
        count: number of pictures.
        seed: the same seed gives the same pictures.
        image_size: their side in pixels.

    Raises:
        SimulatorMissing: Metaworld is not installed.
    """
    table = environment_table()
    random = np.random.default_rng(seed)
    env = table.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-goal-observable"](seed=0)
    env.max_path_length = sys.maxsize
    env._freeze_rand_vec = True
    stage = small.Stage(env, image_size)
    usual_hand = np.array(env.hand_init_pos)
    try:
        for _ in range(count):
            space = env._random_reset_space
            env._last_rand_vec = small.place_anywhere(task, random, space.low, space.high)
            driven = random.random() < _DRIVEN
            env.hand_init_pos = usual_hand if driven else random.uniform(_HAND_LOW, _HAND_HIGH)
            env.reset()
            if driven:
                _drive(env, task, int(random.integers(_DRIVE_STEPS)))
            stage.dress(small.any_appearance(random))
            yield _photograph(env, stage, task, image_size)
    finally:
        stage.close()
        env.close()


def _drive(env: Any, task: str, steps: int) -> None:
    """Some steps of Metaworld's own policy: the hand on its way, the thing half moved."""
    name = "".join(part.capitalize() for part in task.split("-"))
    policy = getattr(importlib.import_module("metaworld.policies"), f"Sawyer{name}Policy")()
    for _ in range(steps):
        env.step(np.clip(policy.get_action(env._get_obs()), -1, 1).astype(np.float32))


def _photograph(env: Any, stage: small.Stage, task: str, image_size: int) -> Scene:
    image = stage.render()
    owners = stage.owners()
    grip = np.asarray(env.tcp_center, np.float64)
    places: dict[str, tuple[str, Any]] = {}
    for number, (root, name) in enumerate(SCENES[task].items()):
        # The part that is acted on, of the first; where the body stands, of the others.
        places[root] = name, env._get_pos_objects()[:3] if number == 0 else env.data.body(root).xpos
    places |= {one.name: (one.name, np.array([*one.place, one.size])) for one in stage.distractors}
    objects = []
    for owner, (name, position) in places.items():
        rows, columns = np.nonzero(owners == owner)
        if len(rows) < _SMALLEST_VISIBLE * (image_size / 64) ** 2:
            continue
        box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        left, top, right, bottom = (float(value) / image_size for value in box)
        x, y, z = (float(value) for value in position)
        centre = (float(columns.mean()) + 0.5) / image_size, (float(rows.mean()) + 0.5) / image_size
        objects.append(
            SeenObject(name, owner, (left, top, right, bottom), centre, len(rows) / image_size**2, (x, y, z))
        )
    seen = stage.project(grip)
    if seen is not None and not all(0 <= value <= 1 for value in seen):
        seen = None
    grip_x, grip_y, grip_z = (float(value) for value in grip)
    return Scene(image, "image", small.PREFIX, task, tuple(objects), seen, (grip_x, grip_y, grip_z))
