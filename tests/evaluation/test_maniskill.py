"""ManiSkill for real, where it is installed with a Vulkan driver; run with `pytest -m sim`.

The Bridge tasks' own code runs on boxes that stand in for the shapes of things, table and robot: those come from a
server.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maps_ray.evaluation.simulators import Simulator, SimulatorMissing, open_simulator

pytestmark = [
    pytest.mark.sim,
    pytest.mark.skipif(
        importlib.util.find_spec("mani_skill") is None, reason="ManiSkill is not installed: `pip install mani_skill`"
    ),
]

# Sizes in m; the tasks ask for these names.
_THINGS = {
    "bridge_carrot_generated_modified": (0.1, 0.03, 0.03),
    "bridge_plate_objaverse_larger": (0.12, 0.12, 0.01),
    "bridge_spoon_generated_modified": (0.1, 0.02, 0.015),
    "table_cloth_generated_shorter": (0.12, 0.12, 0.005),
    "baked_green_cube_3cm": (0.03, 0.03, 0.03),
    "baked_yellow_cube_3cm": (0.03, 0.03, 0.03),
    "eggplant": (0.1, 0.04, 0.04),
    "dummy_sink_target_plane": (0.15, 0.1, 0.002),
    "sink": (0.3, 0.3, 0.01),
}
# Name, place in the parent in m, axis, limits in rad: an arm of about the WidowX's size.
_JOINTS = (
    ("waist", "0 0 0.07", "0 0 1", -3.1, 3.1),
    ("shoulder", "0 0 0.04", "0 1 0", -1.9, 1.9),
    ("elbow", "0.05 0 0.25", "0 1 0", -2.2, 1.6),
    ("forearm_roll", "0.15 0 0", "1 0 0", -3.1, 3.1),
    ("wrist_angle", "0.1 0 0", "0 1 0", -1.7, 2.1),
    ("wrist_rotate", "0.06 0 0", "1 0 0", -3.1, 3.1),
)


def _link(name: str, size: str = "0.02 0.02 0.02") -> str:
    shape = f'<geometry><box size="{size}"/></geometry>'
    inertia = '<inertia ixx="1e-3" iyy="1e-3" izz="1e-3" ixy="0" ixz="0" iyz="0"/>'
    return (
        f'<link name="{name}"><inertial><mass value="0.1"/>{inertia}</inertial>'
        f"<visual>{shape}</visual><collision>{shape}</collision></link>"
    )


def _joint(name: str, kind: str, parent: str, child: str, place: str, axis: str, low: float, high: float) -> str:
    return (
        f'<joint name="{name}" type="{kind}"><parent link="{parent}"/><child link="{child}"/><origin xyz="{place}"/>'
        f'<axis xyz="{axis}"/><limit lower="{low}" upper="{high}" effort="100" velocity="3"/></joint>'
    )


def _robot() -> str:
    parts, parent = [_link("base_link")], "base_link"
    for name, place, axis, low, high in _JOINTS:
        parts += [_link(f"{name}_link"), _joint(name, "revolute", parent, f"{name}_link", place, axis, low, high)]
        parent = f"{name}_link"
    for side, axis in (("left", "0 1 0"), ("right", "0 -1 0")):
        finger = f"{side}_finger_link"
        parts.append(_link(finger, "0.03 0.005 0.02"))
        parts.append(_joint(f"{side}_finger", "prismatic", parent, finger, "0.09 0 0", axis, 0.015, 0.037))
    parts.append('<link name="ee_gripper_link"/>')
    parts.append(_joint("ee_gripper", "fixed", parent, "ee_gripper_link", "0.09 0 0", "1 0 0", 0, 0))
    return f'<robot name="stand_in">{"".join(parts)}</robot>'


def _write_stand_ins(data: Path) -> None:
    trimesh = importlib.import_module("trimesh")
    scene, robot = data / "tasks" / "bridge_v2_real2sim_dataset", data / "robots" / "widowx"
    for folder in (scene / "real_inpainting", scene / "stages", robot):
        folder.mkdir(parents=True)
    about = {}
    for name, size in _THINGS.items():
        folder = scene / "custom" / "models" / name
        folder.mkdir(parents=True)
        for file in ("collision.obj", "textured.obj"):
            trimesh.creation.box(size).export(folder / file)
        half = [side / 2 for side in size]
        about[name] = {"bbox": {"min": [-side for side in half], "max": half}, "scales": [1.0], "density": 300}
    for file in ("info_bridge_custom_v0.json", "info_bridge_custom_baked_tex_v0.json"):
        (scene / "custom" / file).write_text(json.dumps(about))
    for file in ("bridge_real_eval_1.png", "bridge_sink.png"):
        Image.new("RGB", (640, 480), (90, 120, 90)).save(scene / "real_inpainting" / file)
    for file in ("bridge_table_1_v1.glb", "bridge_table_1_v2.glb"):
        table = trimesh.creation.box((6, 0.04, 6))
        table.apply_translation((-2.0634, 0.85, 2.8313))  # under the robot once the task has turned and moved it
        trimesh.Scene(table).export(scene / "stages" / file)
    (robot / "wx250s.urdf").write_text(_robot())


@pytest.fixture(scope="module", autouse=True)
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("maniskill")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MS_ASSET_DIR", str(folder))  # read when ManiSkill is imported
        with pytest.raises(SimulatorMissing, match="download_asset bridge_v2_real2sim"):
            open_simulator("simpler_bridge_table")
        _write_stand_ins(folder / "data")
        yield


def _opened(name: str) -> Simulator:
    simulator = open_simulator(name, image_size=64)
    try:
        simulator.reset(0, 0)
    except SimulatorMissing as missing:
        pytest.skip(str(missing))
    return simulator


def _check(simulator: Simulator, tasks: int, speed: float) -> None:
    down = np.tile([0, 0, -speed, 0, 0, 0, 1.0], (4, 1))
    for task in simulator.tasks[:tasks]:
        simulator.reset(task.index, 3)
        before = simulator.observe()
        assert before.images["image"].shape == (64, 64, 3) and np.ptp(before.images["image"]) > 20
        assert before.sentence == task.sentence
        assert simulator.step(down) == 4 and not simulator.success
        after = simulator.observe().proprio
        assert after[2] < before.proprio[2] - 0.005 and after[-1] == pytest.approx(1, abs=0.1)
        end = simulator.env.get_state()
        simulator.reset(task.index, 5)
        simulator.reset(task.index, 3)
        simulator.step(down)
        assert bool((simulator.env.get_state() == end).all())
    with pytest.raises(ValueError, match="finite"):
        simulator.step(np.full((1, 7), np.nan))
    simulator.close()


def test_bridge_tasks_run_on_boxes() -> None:
    for name in ("simpler_bridge_table", "simpler_bridge_sink"):
        simulator = _opened(name)
        assert simulator.sub_goals() == {"grasp": False, "place": False}
        assert simulator.env.get_language_instruction() == [simulator.tasks[0].sentence]
        _check(simulator, tasks=3, speed=0.01)  # m a step


def test_tabletop_tasks_run() -> None:
    # A task's shaders take the CPU up to a minute.
    _check(_opened("maniskill_tabletop"), tasks=2, speed=0.5)  # of 0.1 m a step
