"""LIBERO-PRO and the stages of LIBERO's tasks for real; needs the `libero` extra; run with `pytest -m sim`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maps_ray.data import open_dataset
from maps_ray.evaluation.simulators import SUITES, open_simulator
from maps_ray.evaluation.simulators.libero import LiberoSimulator

pytestmark = pytest.mark.sim

DEMONSTRATIONS = Path(__file__).parents[2] / "jobs" / "assets" / "libero_demos"
PERTURBED = [name for name, suite in SUITES.items() if suite.simulator == "libero" and suite.change != "none"]


def test_every_perturbed_suite_is_complete_and_rewords_only_where_it_says_so() -> None:
    sentences = {}
    for name in ["libero_spatial", "libero_object", "libero_goal", "libero_10", *PERTURBED]:
        simulator = LiberoSimulator(name)
        assert [task.index for task in simulator.tasks] == list(range(10))
        assert all(task.initial_states >= 50 and task.suite == name for task in simulator.tasks)
        assert all(simulator._bddl(task.index).is_file() for task in simulator.tasks)
        sentences[name] = [task.sentence for task in simulator.tasks]
    for name in PERTURBED:
        suite = SUITES[name]
        same = [one == other for one, other in zip(sentences[name], sentences[suite.base], strict=True)]
        if suite.change in ("language", "task"):
            assert not any(same), name
        elif suite.change == "distractor":  # these suites order their tasks anew
            assert sorted(sentences[name]) == sorted(sentences[suite.base]), name
        else:
            assert all(same), name


def _scene(name: str, task: int) -> dict[str, Any]:
    simulator = LiberoSimulator(name)
    simulator.reset(task, 0)
    problem, data = simulator.env.parsed_problem, simulator.env.sim.data
    found = {
        "folder": Path(simulator.env.bddl_file_name).parent.name,
        "sentence": simulator.task.sentence,
        "instruction": simulator._env.language_instruction,
        "goal": problem["goal_state"],
        "objects": {thing for things in problem["objects"].values() for thing in things},
        "places": {
            thing: np.array(data.body_xpos[simulator.env.obj_body_id[thing]][:2])
            for things in problem["objects"].values()
            for thing in things
        },
    }
    simulator.close()
    return found


def _farthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """How far, in m, the thing that moved most lies from its place in the other scene."""
    return max(float(np.linalg.norm(place - other["places"][thing])) for thing, place in one["places"].items())


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    return _scene("libero_object", 0)


def test_swapped_positions_change_the_places_alone(base: dict[str, Any]) -> None:
    swapped = _scene("libero_object_swap", 0)
    assert swapped["folder"] == "libero_object_swap"
    assert (swapped["sentence"], swapped["goal"]) == (base["sentence"], base["goal"])
    assert swapped["objects"] == base["objects"]
    assert _farthest(swapped, base) > 0.1


def test_rewritten_language_changes_the_sentence_alone(base: dict[str, Any]) -> None:
    reworded = _scene("libero_object_lan", 0)
    assert reworded["folder"] == "libero_object_lan"
    assert reworded["sentence"] == reworded["instruction"] == "grab alphabet soup and put it into basket"
    assert reworded["goal"] == base["goal"] and reworded["objects"] == base["objects"]
    assert _farthest(reworded, base) < 0.1


def test_another_look_changes_the_things_and_keeps_the_sentence(base: dict[str, Any]) -> None:
    other = _scene("libero_object_object", 0)
    assert other["folder"] == "libero_object_object"
    assert other["sentence"] == base["sentence"]
    assert base["objects"] - other["objects"] == {"alphabet_soup_1", "basket_1"}
    assert other["objects"] - base["objects"] == {"bigger_alphabet_soup_1", "red_basket_1"}
    assert other["goal"] == [["in", "bigger_alphabet_soup_1", "red_basket_1_contain_region"]]


def test_another_task_changes_the_goal_and_the_sentence_with_it(base: dict[str, Any]) -> None:
    other = _scene("libero_object_task", 0)
    assert other["folder"] == "libero_object_task"
    assert other["sentence"] == other["instruction"] == "pick the cream cheese and place it in the basket"
    assert base["goal"] == [["in", "alphabet_soup_1", "basket_1_contain_region"]]
    assert other["goal"] == [["in", "cream_cheese_1", "basket_1_contain_region"]]
    assert other["objects"] == base["objects"] and _farthest(other, base) < 0.1


def test_a_distractor_adds_a_thing_and_keeps_goal_and_sentence() -> None:
    plain, crowded = _scene("libero_goal", 7), _scene("libero_goal_with_mug", 7)
    assert (crowded["sentence"], crowded["goal"]) == (plain["sentence"], plain["goal"])
    assert crowded["objects"] - plain["objects"] == {"libero_mug_yellow_1"} and plain["objects"] < crowded["objects"]


def test_a_demonstration_passes_grasp_carry_and_place_in_this_order() -> None:
    dataset = open_dataset(DEMONSTRATIONS)
    number, episode = next(
        (number, episode)
        for number, episode in enumerate(dataset.episodes)
        if episode.extra["suite"] == "libero_object"
    )
    start = episode.extra["suite_task"], episode.extra["initial_state"]
    simulator = LiberoSimulator("libero_object", cameras=())
    simulator.reset(*start)
    seen = [dict(simulator.sub_goals())]
    for action in dataset.vectors("action", number):
        simulator.step(action[None])
        if simulator.sub_goals() != seen[-1]:
            seen.append(dict(simulator.sub_goals()))
    assert [sum(stages.values()) for stages in seen] == [0, 1, 2, 3]
    assert all(list(stages) == ["grasp", "carry", "place"] for stages in seen)
    assert [list(stages.values()) for stages in seen] == [sorted(stages.values(), reverse=True) for stages in seen]
    simulator.reset(*start)
    assert not any(simulator.sub_goals().values())
    simulator.close()


def test_a_knob_has_reach_move_and_done() -> None:
    simulator = LiberoSimulator("libero_goal", cameras=())
    simulator.reset(7, 0)
    assert simulator.task.name == "turn_on_the_stove"
    assert simulator.sub_goals() == {"reach": False, "move": False, "done": False}
    simulator.env.sim.data.set_joint_qpos("flat_stove_1_button", 0.3)
    simulator.step(np.zeros((1, 7)))
    assert simulator.sub_goals()["move"] and not simulator.sub_goals()["done"]
    simulator.env.sim.data.set_joint_qpos("flat_stove_1_button", 1.5)
    assert simulator.step(np.zeros((5, 7))) == 1
    assert simulator.success and all(simulator.sub_goals().values())
    simulator.close()


def test_looking_changes_nothing_and_only_looking_opens_a_graphics_context() -> None:
    simulator = open_simulator("libero_goal", image_size=64)
    assert isinstance(simulator, LiberoSimulator)
    actions = np.random.default_rng(0).uniform(-1, 1, (3, 8, 7))
    actions[..., 2] -= 0.4
    ends = []
    for looks in (False, True):
        simulator.reset(2, 1)
        assert (simulator.env.sim._render_context_offscreen is None) or looks
        for chunk in actions:
            simulator.step(chunk)
            if looks:
                images = simulator.observe().images
                assert {name: image.shape for name, image in images.items()} == dict.fromkeys(
                    simulator.cameras, (64, 64, 3)
                )
        ends.append(simulator.env.sim.get_state().flatten())
    assert np.array_equal(*ends)
    simulator.close()
