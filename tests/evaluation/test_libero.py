"""LIBERO for real: needs the `libero` extra and an OpenGL library; run with `pytest -m sim`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from maps_ray.data import open_dataset
from maps_ray.evaluation.experts.collect import demonstrate
from maps_ray.evaluation.simulators.libero import LiberoSimulator
from tiny_base.libero_scenes import render_scenes

pytestmark = pytest.mark.sim

DEMONSTRATIONS = Path(__file__).parents[2] / "jobs" / "assets" / "libero_demos"


@pytest.fixture(scope="module")
def simulator() -> Iterator[LiberoSimulator]:
    simulator = LiberoSimulator("libero_object", image_size=64)
    yield simulator
    simulator.close()


def test_the_expert_solves_a_task(simulator: LiberoSimulator) -> None:
    episode = demonstrate(simulator, task=4, initial_state=0, seed=0)
    assert simulator.success
    steps = len(episode.actions)
    assert episode.actions.shape == (steps, 7) and episode.state.shape == (steps, 8)
    assert all(images.shape == (steps, 64, 64, 3) for images in episode.images.values())
    assert np.abs(episode.actions).max() <= 1
    assert set(np.unique(episode.actions[:, 6])) == {-1, 1}


def test_a_bundled_episode_succeeds_again(simulator: LiberoSimulator) -> None:
    dataset = open_dataset(DEMONSTRATIONS)
    number, episode = next(
        (number, episode)
        for number, episode in enumerate(dataset.episodes)
        if episode.extra["suite"] == "libero_object"
    )
    actions, states = dataset.vectors("action", number), dataset.vectors("state", number)
    simulator.reset(episode.extra["suite_task"], episode.extra["initial_state"])
    assert simulator.task.sentence == episode.task
    for action, state in zip(actions, states, strict=True):
        assert simulator.proprio() == pytest.approx(state, abs=1e-6)
        simulator.step(action[None])
    assert simulator.success


def test_reset_is_repeatable_and_checks_its_arguments(simulator: LiberoSimulator) -> None:
    simulator.reset(0, 3)
    first = simulator.env.sim.data.qpos.copy()
    simulator.reset(0, 4)
    assert not np.array_equal(simulator.env.sim.data.qpos, first)
    for _ in range(8):
        simulator.step(np.array([[0.5, 0.5, -1, 0.2, 0, 0, 1]]))
    simulator.reset(0, 3)
    assert np.array_equal(simulator.env.sim.data.qpos, first)
    with pytest.raises(ValueError, match=r"tasks 0\.\.9, not 10"):
        simulator.reset(10, 0)
    with pytest.raises(ValueError, match=r"initial states 0\.\.49, not 50"):
        simulator.reset(0, 50)
    with pytest.raises(ValueError, match="finite numbers"):
        simulator.step(np.full((1, 7), np.nan))


def test_pictures_are_upright_and_labels_fit_them(simulator: LiberoSimulator) -> None:
    simulator.reset(0, 0)
    observation = simulator.observe()
    assert observation.sentence == "pick up the alphabet soup and place it in the basket"
    scenes = list(render_scenes(simulator, 0, 6, seed=0))
    assert len(scenes) == 6
    baskets = [thing for scene in scenes for thing in scene.objects if thing.name == "basket"]
    assert baskets
    for scene in scenes:
        for thing in scene.objects:
            left, top, right, bottom = thing.box
            assert 0 <= left <= thing.centre[0] <= right <= 1 and 0 <= top <= thing.centre[1] <= bottom <= 1
        if scene.camera == "image" and scene.gripper is not None:
            # The robot reaches in from the top of the picture, and what is nearer to the camera stands lower.
            near = [thing for thing in scene.objects if thing.position[0] > scene.gripper_position[0] + 0.15]
            assert all(thing.centre[1] > scene.gripper[1] - 0.05 for thing in near)
            # Mirrored left to right: y in the world grows to the left of the picture.
            ordered = sorted(scene.objects, key=lambda thing: thing.centre[0])
            if len(ordered) > 1 and ordered[-1].centre[0] - ordered[0].centre[0] > 0.2:
                assert ordered[0].position[1] > ordered[-1].position[1]
