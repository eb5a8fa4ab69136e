"""The experts in LIBERO for real: needs the `libero` extra and an OpenGL library; run with `pytest -m sim`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from maps_ray.data import open_dataset
from maps_ray.evaluation.experts import NoPlan
from maps_ray.evaluation.experts.attempts import measure, solve
from maps_ray.evaluation.experts.collect import Episode, _save, collect
from maps_ray.evaluation.experts.drawer import Drawer
from maps_ray.evaluation.experts.motions import Arm
from maps_ray.evaluation.simulators import SUITES
from maps_ray.evaluation.simulators.libero import CAMERAS, LiberoSimulator

pytestmark = pytest.mark.sim

MIDDLE_DRAWER, PUSH_PLATE, TURN_ON_STOVE = 0, 5, 7


@pytest.fixture(scope="module")
def goal() -> Iterator[LiberoSimulator]:
    simulator = LiberoSimulator("libero_goal", image_size=32)
    yield simulator
    simulator.close()


@pytest.mark.slow
def test_a_drawer_is_opened_and_the_same_seed_gives_the_same_actions(goal: LiberoSimulator) -> None:
    actions = solve(goal, MIDDLE_DRAWER, 0, seed=0)
    assert goal.success and len(actions) < goal.suite.max_steps
    drawer = Drawer(Arm(goal, np.random.default_rng(0)), "wooden_cabinet_1_middle_region")
    assert drawer.is_open
    assert np.array_equal(actions, solve(goal, MIDDLE_DRAWER, 0, seed=0))
    with pytest.raises(NoPlan, match="wooden_cabinet_1_top_side is no drawer"):
        Drawer(Arm(goal, np.random.default_rng(0)), "wooden_cabinet_1_top_side")


@pytest.mark.slow
@pytest.mark.parametrize("task", [TURN_ON_STOVE, PUSH_PLATE])
def test_a_knob_is_turned_and_a_plate_pushed(goal: LiberoSimulator, task: int) -> None:
    solve(goal, task, 0, seed=0)
    assert goal.success


def _stage(staging: Path, suite: str, task: int, state: int) -> None:
    length = 4
    images = {name: np.full((length, 32, 32, 3), 10 * state, np.uint8) for name in CAMERAS}
    episode = Episode(f"sentence {task}", images, np.zeros((length, 8), np.float32), np.zeros((length, 7), np.float32))
    _save(staging / f"{suite}-{task:02d}-{state:02d}.npz", episode)


def test_an_interrupted_collection_goes_on_where_it_was(tmp_path: Path) -> None:
    """All attempts that are needed were staged before the interruption: nothing is left to simulate."""
    out, suite = tmp_path / "demos", "libero_object_swap"
    staging = tmp_path / "demos.staging"
    staging.mkdir()
    _stage(staging, suite, 4, 0)
    (staging / f"{suite}-04-01.failed").write_text("slipped\n")
    _stage(staging, suite, 4, 2)
    _stage(staging, suite, 7, 0)
    _stage(staging, suite, 7, 1)
    (staging / f"{suite}-07-02.partial").write_text("cut off")
    *_, tallies = collect(out, suite, [7, 4], 2, workers=1, image_size=32)
    assert [(tally.index, tally.attempts, tally.successes) for tally in tallies] == [(4, 3, 2), (7, 2, 2)]
    assert not staging.exists()
    extras = [episode.extra for episode in open_dataset(out).episodes]
    assert [(extra["suite"], extra["suite_task"], extra["initial_state"]) for extra in extras] == [
        (suite, 4, 0),
        (suite, 4, 2),
        (suite, 7, 0),
        (suite, 7, 1),
    ]
    *_, again = collect(out, suite, [4], 2, workers=1, image_size=32)
    assert [(tally.present, tally.attempts) for tally in again] == [(2, 0)]


@pytest.mark.slow
def test_attempts_at_a_perturbed_suite_are_measured() -> None:
    *_, attempts = measure("libero_goal_lan", [TURN_ON_STOVE], 1, workers=1)
    (attempt,) = attempts
    assert (attempt.task, attempt.initial_state, attempt.failure) == (TURN_ON_STOVE, 0, "")
    assert 0 < attempt.steps < SUITES["libero_goal_lan"].max_steps and attempt.seconds > 0
