"""The small world: what its suites change and what they leave alone; the part with Metaworld needs its extra."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from maps_ray.evaluation.experts.attempts import solve
from maps_ray.evaluation.experts.collect import collect
from maps_ray.evaluation.experts.recordings import open_recorded
from maps_ray.evaluation.simulators import SUITES, open_simulator
from maps_ray.evaluation.simulators import metaworld_small as small
from tiny_base.scene_shards import read_shard, write_scenes

LOW, HIGH = np.array([-0.1, 0.8, 0.1]), np.array([0.1, 0.9, 0.1])

simulated = pytest.mark.skipif(
    importlib.util.find_spec("metaworld") is None,
    reason="Metaworld is not installed: `pip install maps_ray[metaworld]` in an environment without LIBERO",
)


def test_each_change_is_a_suite_of_the_small_world() -> None:
    suites = [suite for suite in SUITES.values() if suite.base == "metaworld_small"]
    assert [suite.change for suite in suites] == ["none", *small.CHANGES]
    assert [small.change_of(suite.name) for suite in suites] == [suite.change for suite in suites]
    assert small.change_of("metaworld_mt10") is None and small.change_of("metaworld_small_sound") is None
    assert not set(small.TRAINED) & set(small.UNSEEN)


def test_positions_leave_a_gap_to_what_is_shown() -> None:
    def offsets(change: str) -> np.ndarray:
        places = [small.place("drawer-close-v3", state, LOW, HIGH, change) for state in range(300)]  # type: ignore[arg-type]
        assert all((LOW[1:] <= place[1:]).all() and (place[1:] <= HIGH[1:]).all() for place in places)
        return np.array([place[0] for place in places])

    shown, outside = offsets("none"), offsets("position")
    assert np.abs(shown).max() <= 0.12 < 0.15 <= np.abs(outside).min()
    assert (outside < 0).any() and (outside > 0).any() and np.abs(outside).max() <= 0.2
    # All other suites start where the base starts, so that they are compared in pairs.
    assert np.array_equal(shown, offsets("camera"))


def test_an_appearance_changes_what_its_suite_names_and_nothing_else() -> None:
    usual = small.Appearance()
    of = {"camera": {"azimuth", "elevation", "distance"}, "light": {"ambient", "lamps", "lit"}}
    of |= {"look": {"colours"}, "distractor": {"distractors"}, "position": set(), "language": set(), "task": set()}
    for change in small.CHANGES:
        found = small.appearance("drawer-close-v3", 3, change)
        assert {name for name in vars(usual) if getattr(found, name) != getattr(usual, name)} == of[change]
        assert found == small.appearance("drawer-close-v3", 3, change)
        if of[change]:
            assert found != small.appearance("drawer-close-v3", 4, change)


def test_rewritten_sentences_are_other_sentences() -> None:
    for task in small.TRAINED:
        rewritten = {small.sentence(task, state, "usual") for state in range(6)}
        assert len(rewritten) == 3 and "usual" not in rewritten


@simulated
def test_pictures_differ_where_the_suite_changes_the_look_and_starts_are_the_same() -> None:
    pictures, places = {}, {}
    for change in ("none", "look", "light", "camera", "distractor", "language", "position"):
        name = "metaworld_small" + (f"_{change}" if change != "none" else "")
        simulator = open_simulator(name, image_size=64)
        simulator.reset(1, 5)
        seen = simulator.observe()
        assert seen.images["image"].shape == (64, 64, 3) and simulator.cameras == ("image",)
        pictures[change], places[change] = seen.images["image"].astype(int), simulator.env.data.qpos.copy()  # type: ignore[attr-defined]
        if change in ("look", "light", "distractor"):  # taken back for the next episode, drawn again for the same one
            simulator.reset(1, 6)
            assert not np.array_equal(simulator.observe().images["image"], seen.images["image"])
            simulator.reset(1, 5)
            assert np.array_equal(simulator.observe().images["image"], seen.images["image"])
        assert (seen.sentence == "close the drawer") == (change != "language")
        simulator.close()
    moved = {name: np.abs(picture - pictures["none"]).mean() for name, picture in pictures.items()}
    assert moved["language"] == 0 and min(moved[name] for name in ("look", "light", "camera")) > 5
    assert 0 < moved["distractor"] < 15 and moved["position"] > 0
    assert all(np.array_equal(place, places["none"]) for name, place in places.items() if name != "position")


@simulated
@pytest.mark.parametrize("suite", ["metaworld_small", "metaworld_small_position", "metaworld_small_task"])
def test_metaworlds_policies_solve_every_task(suite: str) -> None:
    simulator = open_recorded(suite, 64)
    for task in simulator.tasks:
        for state in (0, 3999):
            assert 10 < len(solve(simulator, task.index, state, seed=0)) < simulator.suite.max_steps
    simulator.close()


@simulated
def test_demonstrations_and_scenes_of_the_small_world(tmp_path: Path) -> None:
    tallies = list(collect(tmp_path / "demos", "metaworld_small", [2], 2, workers=1, image_size=64))[-1]
    assert [(tally.attempts, tally.successes) for tally in tallies] == [(2, 2)]
    written = write_scenes(tmp_path / "scenes", 30, workers=1, seed=0, image_size=64, world="metaworld_small")
    assert list(written)[-1] == 30
    images, labels = read_shard(tmp_path / "scenes" / "scenes-00000.npz")
    assert images.shape == (30, 64, 64, 3)
    # The button is in nearly all pictures; a point of the hand that is labelled lies in the picture.
    buttons = [thing for label in labels for thing in label["objects"] if thing["name"] == "button"]
    assert len(buttons) > 20 and all(0.2 < thing["position"][2] < 0.4 for thing in buttons)
    assert sum(label["gripper"] is not None for label in labels) > 15
