"""`maps-ray init` writes a spec that `check` passes, or says what is in the way and writes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from maps_ray.cli import app
from maps_ray.data import LeRobotWriter
from maps_ray.spec import SpecError, load_spec
from maps_ray.training.preflight import check

JOBS = Path(__file__).parents[2] / "jobs"


def write(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["init", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_bundled_demonstrations(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "specs/robot.yaml"
    told = write(out, "--checkpoint", base, "--data", JOBS / "assets/libero_demos", "--steps", "40")
    assert f"{out} can run" in told
    spec = load_spec(out)
    assert (spec.name, spec.model.name, spec.model.use_proprio) == ("robot", "openvla_oft", True)
    assert (spec.data.cameras, spec.data.gripper) == (["image", "wrist_image"], "libero")
    assert (spec.training.max_steps, spec.training.checkpoint_every, spec.evaluation.every) == (40, 4, 4)
    assert spec.data.splits.held_out is not None and spec.data.splits.held_out.episodes == "-1:"
    check(spec)
    with pytest.raises(SpecError, match="exists; name another file"):
        write(out, "--checkpoint", base, "--data", JOBS / "assets/libero_demos")


def test_another_robot(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One episode a task, the wrist camera first, a gripper that opens continuously; a name with a dollar sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    random = np.random.default_rng(0)
    names = [f"joint_{i}" for i in range(7)]
    root, cameras = tmp_path / "de$mos", {"a_wrist_cam": (32, 32), "front": (32, 32)}
    with LeRobotWriter(root, cameras=cameras, state_names=names, action_names=names) as writer:
        images = {name: random.integers(0, 256, (12, 32, 32, 3), np.uint8) for name in cameras}
        writer.add_episode("open the drawer", images, random.normal(size=(12, 7)), random.uniform(0, 0.5, (12, 7)))
    write(tmp_path / "robot.yaml", "--checkpoint", base, "--data=~/de$mos", "--name", "arm")
    spec = load_spec(tmp_path / "robot.yaml")
    assert spec.data.path == str(root)
    assert (spec.name, spec.model.use_proprio, spec.data.gripper) == ("arm", True, "none")
    assert (spec.data.cameras, spec.data.splits.held_out) == (["front", "a_wrist_cam"], None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere", "--data", str(JOBS / "assets/libero_demos")], "--checkpoint = 'nowhere'"),
        (["--checkpoint", str(JOBS / "assets/tiny_base"), "--data", "nowhere"], "--data = 'nowhere'"),
        (["--data", "nowhere"], "--checkpoint = None: required where nobody can be asked: folder of the"),
    ],
)
def test_what_is_in_the_way(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        write(tmp_path / "robot.yaml", *arguments)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []
