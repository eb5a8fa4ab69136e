"""A small data set of moving coloured squares, written once by the project's own writer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maps_ray.data import LeRobotWriter

TASKS = ["pick up the red cube", "Pick up the Blue cube", "open the drawer"]
SIZE = (32, 48)


@dataclass(frozen=True)
class Recorded:
    """What was given to the writer, episode by episode."""

    root: Path
    tasks: list[str]
    images: dict[str, list[np.ndarray]]
    states: list[np.ndarray]
    actions: list[np.ndarray]


def square_video(episode: int, length: int, camera: int) -> np.ndarray:
    """uint8 (length, 32, 48, 3): a square that moves, over a strip of blocks that spells episode and step."""
    images = np.full((length, *SIZE, 3), 90 + 40 * camera, np.uint8)
    colour = np.array([60 + 20 * (episode % 9), 220 - 20 * (episode % 9), 120])
    for step, image in enumerate(images):
        left = (3 * step) % 36
        image[4:16, left : left + 12] = colour
        code = episode * 32 + step
        for bit in range(12):
            image[24:32, 4 * bit : 4 * bit + 4] = 235 if code >> bit & 1 else 20
    return images


def write(root: Path, *, gop: int = 4, episodes_per_file: int = 4) -> Recorded:
    """Three episodes of each task, lengths 9 to 17, in three files per camera."""
    rng = np.random.default_rng(0)
    recorded = Recorded(root, [], {"image": [], "wrist_image": []}, [], [])
    with LeRobotWriter(
        root,
        cameras={name: SIZE for name in recorded.images},
        state_names=[f"s{i}" for i in range(8)],
        action_names=["x", "y", "z", "rx", "ry", "rz", "gripper"],
        crf=16,
        gop=gop,
        episodes_per_file=episodes_per_file,
    ) as writer:
        for episode in range(9):
            length = 9 + episode
            task = TASKS[episode % 3]
            state = rng.normal(size=(length, 8)).astype(np.float32)
            state[:, 7] = 0.5
            actions = rng.normal(size=(length, 7)).astype(np.float32)
            actions[:, 6] = np.where(np.arange(length) < length // 2, -1, 1)
            images = {name: square_video(episode, length, camera) for camera, name in enumerate(recorded.images)}
            assert writer.add_episode(task, images, state, actions, {"seed": episode, "success": True}) == episode
            recorded.tasks.append(task)
            recorded.states.append(state)
            recorded.actions.append(actions)
            for name, array in images.items():
                recorded.images[name].append(array)
    return recorded
