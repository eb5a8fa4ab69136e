"""What can be checked of the simulators' side without a simulator."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from maps_ray.evaluation.experts.motions import WIDEST, candidates
from maps_ray.evaluation.rollouts.protocol import simulator_actions
from maps_ray.evaluation.simulators import SUITES, SimulatorMissing, Task, maniskill, open_simulator, suite
from maps_ray.evaluation.simulators.adapter import checked_cameras, checked_chunk, checked_indices
from maps_ray.evaluation.simulators.calvin import Chain
from maps_ray.evaluation.simulators.libero import LiberoSimulator
from maps_ray.evaluation.simulators.libero_stages import human_name
from maps_ray.evaluation.simulators.processes import ProcessDied, run_in_processes
from tiny_base.libero_scenes import Rectangle
from tiny_base.scene_shards import read_shard


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("libero.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "libero", None)  # what an absent package looks like to import
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    with pytest.raises(SimulatorMissing, match=r"pip install maps_ray\[libero\]"):
        LiberoSimulator("libero_object")


@pytest.mark.parametrize(("backend", "package"), [("osmesa", "libosmesa6"), ("egl", "libegl1")])
def test_missing_opengl_library_names_the_package(
    backend: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MUJOCO_GL", backend)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(SimulatorMissing, match=f"apt-get install {package}"):
        LiberoSimulator("libero_object")


def test_unknown_suite_and_camera_name_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'libero_object'"):
        LiberoSimulator("libero_objects")
    with pytest.raises(ValueError, match="did you mean 'wrist_image'"):
        LiberoSimulator("libero_object", cameras=["wrist"])


def test_narrow_things_are_gripped_across_and_wide_ones_at_the_rim() -> None:
    corners = np.array([(x, y, z) for x in (-0.1, 0.1) for y in (-0.02, 0.02) for z in (0, 0.05)], dtype=float)
    bar = list(candidates(corners, np.zeros(2)))
    assert bar
    for grasp in bar:
        # The bar is 0.04 m wide along y and too long along x: the fingers slide mostly along y.
        assert abs(np.sin(grasp.yaw)) > 0.8
        assert grasp.position[:2] == pytest.approx([0, 0], abs=1e-9)
    angle = np.linspace(0, 2 * np.pi, 100)
    bowl = np.concatenate(
        [np.stack([0.06 * np.cos(angle), 0.06 * np.sin(angle), np.full(100, height)], 1) for height in (0.0, 0.05)]
    )
    rim = list(candidates(bowl, np.zeros(2)))
    assert WIDEST < 2 * 0.06
    for grasp in rim:
        assert np.linalg.norm(grasp.position[:2]) == pytest.approx(0.056, abs=1e-3)
        outward = np.array([np.cos(grasp.yaw), np.sin(grasp.yaw)])
        assert outward @ grasp.position[:2] == pytest.approx(0.056, abs=1e-3)


def test_rectangles_overlap_only_when_they_share_area() -> None:
    one = Rectangle.around(np.array([[0.0, 0.0], [1.0, 1.0]]))
    assert one.overlaps(Rectangle.around(np.array([[0.5, 0.5], [2.0, 2.0]])))
    assert not one.overlaps(Rectangle.around(np.array([[1.5, 0.0], [2.0, 1.0]])))
    assert one.overlaps(Rectangle.around(np.array([[1.05, 0.0], [2.0, 1.0]]), margin=0.1))


def test_objects_have_the_names_of_the_sentences() -> None:
    assert human_name("akita_black_bowl") == "black bowl"
    assert human_name("alphabet_soup") == "alphabet soup"


def test_shards_read_back(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    labels = [{"objects": [], "camera": "image"}, {"objects": [{"name": "plate"}], "camera": "wrist_image"}]
    np.savez_compressed(
        tmp_path / "shard.npz", images=images, annotations=np.array([json.dumps(label) for label in labels])
    )
    read, annotations = read_shard(tmp_path / "shard.npz")
    assert np.array_equal(read, images)
    assert annotations == labels


def _touch(path: Path) -> None:
    path.touch()


def _kill_itself(path: Path) -> None:
    os.kill(os.getpid(), 9)


def _sleep(path: Path) -> None:
    path.touch()
    time.sleep(60)


def test_workers_do_each_unit_once(tmp_path: Path) -> None:
    units = [tmp_path / str(number) for number in range(3)]
    for _ in run_in_processes(_touch, units, workers=2):
        pass
    assert all(path.exists() for path in units)


def test_a_killed_worker_is_an_error_not_a_hang(tmp_path: Path) -> None:
    with pytest.raises(ProcessDied, match="killed"):
        list(run_in_processes(_kill_itself, [tmp_path], workers=1))


def test_closing_the_iterator_ends_the_workers(tmp_path: Path) -> None:
    running = run_in_processes(_sleep, [tmp_path / "started"], workers=1, poll=0.05)
    begin = time.monotonic()
    for _ in running:
        if (tmp_path / "started").exists():
            break
    running.close()
    assert time.monotonic() - begin < 50


def test_every_perturbed_suite_has_a_base_and_says_what_it_changes() -> None:
    for name, found in SUITES.items():
        assert name == found.name
        assert (found.change == "none") == (found.base == name)
        # The authors of MAPS give SimplerEnv's tasks 150 steps, whatever the tasks' own limits.
        assert SUITES[found.base].max_steps == found.max_steps or name.startswith("simpler_ood")
        assert SUITES[found.base].simulator == found.simulator.removesuffix("_plus")
    perturbed = [found for found in SUITES.values() if found.simulator == "libero" and found.change != "none"]
    kinds = ["position", "language", "look", "task"]
    assert sorted(found.change for found in perturbed if found.change != "distractor") == sorted([*4 * kinds, "look"])
    assert suite("libero_10_swap").change == "position"


def test_an_unknown_suite_names_the_nearest_and_all_others() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'libero_goal_lan'.*libero_10_swap.*calvin_abc_d"):
        suite("libero_goal_lang")
    with pytest.raises(ValueError, match="unknown suite 'libero_goal_env'"):
        open_simulator("libero_goal_env")


def test_a_missing_metaworld_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    with pytest.raises(SimulatorMissing, match=r"pip install maps_ray\[metaworld\].*environment of its own"):
        open_simulator("metaworld_mt10")


def test_a_missing_calvin_and_a_missing_maniskill_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "calvin_agent", None)
    with pytest.raises(SimulatorMissing, match=r"git clone --recurse-submodules \S+/calvin"):
        open_simulator("calvin_abc_d")
    monkeypatch.setitem(sys.modules, "mani_skill", None)
    with pytest.raises(SimulatorMissing, match="pip install mani_skill"):
        open_simulator("simpler_bridge_table")


def test_a_chain_of_instructions_ends_with_the_first_miss() -> None:
    chain = Chain(["open_drawer", "turn_on_led", "push_into_drawer"], limit=3)
    assert not chain.advance(False) and chain.advance(True)
    assert chain.current == "turn_on_led"
    assert [chain.advance(False) for _ in range(3)] == [False] * 3
    assert chain.missed and not chain.advance(True)
    assert chain.reached() == {"1 of 3": True, "2 of 3": False, "3 of 3": False}
    whole = Chain(["open_drawer", "turn_on_led"], limit=1)
    assert whole.advance(True) and whole.advance(True)
    assert whole.complete and not whole.missed and not whole.advance(True)


def test_arguments_of_every_adapter_are_checked() -> None:
    tasks = [Task("some_suite", 0, "some_task", "do it", 5)]
    with pytest.raises(ValueError, match=r"some_suite has tasks 0\.\.0, not 1"):
        checked_indices(tasks, 1, 0)
    with pytest.raises(ValueError, match=r"some_task has initial states 0\.\.4, not -1"):
        checked_indices(tasks, 0, -1)
    with pytest.raises(ValueError, match="finite"):
        checked_chunk(np.array([[0.0, np.nan]]), 2)
    with pytest.raises(ValueError, match=r"\(n, 2\), not \(1, 3\)"):
        checked_chunk(np.zeros((1, 3)), 2)
    assert checked_cameras(None, ("image", "wrist_image")) == ("image", "wrist_image")
    assert checked_cameras((), ("image",)) == ()


def test_simplers_ood_columns_say_what_each_task_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = {"StackGreenCubeOnYellowCubeBakedTexInScene-v1": None}
    monkeypatch.setattr(maniskill, "_import_maniskill", lambda assets: SimpleNamespace(registry=registered))
    visual = maniskill.ManiSkillSimulator("simpler_ood_visual")
    # Called the carrot in the paper's list; what it is stands here.
    assert visual.tasks[0].sentence == "stack the green block on the yellow block" and visual.tasks[0].missing is None
    assert [task.initial_states for task in visual.tasks] == [50] * 3 and visual.suite.max_steps == 150
    with pytest.raises(SimulatorMissing, match=r"task 1: the new table cloth .*/ManiSkill2_real2sim"):
        visual.reset(1, 0)
    with pytest.raises(SimulatorMissing, match=r"none of 3 tasks runs; 0: the can .*; 1: the ball .*; 2: the zucchini"):
        maniskill.ManiSkillSimulator("simpler_ood_object")
    # An installation that has it runs it.
    registered["PutRedbullOnPlateInScene-v1"] = None
    assert maniskill.ManiSkillSimulator("simpler_ood_object").tasks[0].missing is None
    with pytest.raises(ValueError, match="did you mean 'simpler_ood_category'"):
        open_simulator("simpler_ood_categories")


def test_bridge_actions_for_the_widowx() -> None:
    actions = np.array([[0.01, 0, 0, 0, 0, np.pi / 2, 0.6], [0, 0.02, 0, 0.1, 0.2, 0.3, 0.5]])
    found = simulator_actions(actions, 7, "widowx")
    assert found[0] == pytest.approx([0.01, 0, 0, 0, 0, np.pi / 2, 1])
    # Turned about z by 0.3, of what was turned about y by 0.2, of what was turned about x by 0.1.
    turns = [Rotation.from_rotvec(vector) for vector in ([0.1, 0, 0], [0, 0.2, 0], [0, 0, 0.3])]
    assert found[1, 3:6] == pytest.approx((turns[2] * turns[1] * turns[0]).as_rotvec(), abs=1e-6)
    assert found[1, 6] == -1
