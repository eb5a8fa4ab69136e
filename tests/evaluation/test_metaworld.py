"""Metaworld for real: needs the `metaworld` extra, which cannot stand beside the `libero` one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest

from maps_ray.evaluation.simulators import Simulator, open_simulator

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("metaworld") is None,
    reason="Metaworld is not installed: `pip install maps_ray[metaworld]` in an environment without LIBERO",
)


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    simulator = open_simulator("metaworld_mt10", image_size=64)
    yield simulator
    simulator.close()


def _index(simulator: Simulator, name: str) -> int:
    return next(task.index for task in simulator.tasks if task.name == name)


def test_suites_have_the_published_number_of_tasks_and_sentences() -> None:
    sizes = {"metaworld_mt10": 10, "metaworld_mt50": 50, "metaworld_ml45": 45, "metaworld_ml45_test": 5}
    tasks = {name: open_simulator(name).tasks for name in sizes}
    assert {name: len(found) for name, found in tasks.items()} == sizes
    assert len({task.sentence for task in tasks["metaworld_mt50"]}) == 50
    assert not any("-" in task.sentence for task in tasks["metaworld_mt50"])
    seen = {task.name for task in tasks["metaworld_ml45"]}
    assert not seen & {task.name for task in tasks["metaworld_ml45_test"]}


def test_metaworlds_own_policy_opens_the_drawer(simulator: Simulator) -> None:
    policy = importlib.import_module("metaworld.policies").SawyerDrawerOpenV3Policy()
    simulator.reset(_index(simulator, "drawer-open-v3"), 7)
    assert not simulator.success
    for _ in range(simulator.suite.max_steps):
        action = np.clip(policy.get_action(simulator.env._get_obs()), -1, 1)
        assert simulator.step(action[None]) == 1
        if simulator.success:
            break
    assert simulator.success


def test_a_seed_gives_one_initial_state(simulator: Simulator) -> None:
    task = _index(simulator, "push-v3")
    simulator.reset(task, 3)
    first = simulator.env.data.qpos.copy(), simulator.env._target_pos.copy()
    simulator.reset(task, 4)
    assert not np.array_equal(first[1], simulator.env._target_pos)
    simulator.step(np.full((10, 4), 0.5))
    simulator.reset(task, 3)
    assert np.array_equal(first[0], simulator.env.data.qpos) and np.array_equal(first[1], simulator.env._target_pos)


def test_pictures_state_and_bad_actions(simulator: Simulator) -> None:
    simulator.reset(_index(simulator, "drawer-open-v3"), 0)
    seen = simulator.observe()
    assert seen.sentence == "open the drawer"
    assert seen.proprio.shape == (4,) and seen.proprio.dtype == np.float32
    assert set(seen.images) == {"image", "wrist_image"} == set(simulator.cameras)
    # Upright: the grey background fills the top rows of the picture and no bottom one.
    spread = np.ptp(seen.images["image"].astype(int), axis=(1, 2))
    assert spread[:4].max() < 40 < spread[-10:].min()
    with pytest.raises(ValueError, match="finite"):
        simulator.step(np.full((1, 4), np.nan))
    with pytest.raises(ValueError, match=r"shape \(n, 4\)"):
        simulator.step(np.zeros((1, 7)))
