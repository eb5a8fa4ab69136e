"""What can be checked of the experts and their collection without a simulator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from maps_ray.cli import app
from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.writer import LeRobotWriter
from maps_ray.evaluation.experts import collect as collection
from maps_ray.evaluation.experts.attempts import Attempt, summarise
from maps_ray.evaluation.experts.collect import collect
from maps_ray.evaluation.experts.motions import candidates, pointing, pointing_down
from maps_ray.evaluation.experts.push import is_flat
from maps_ray.evaluation.experts.recordings import recording
from maps_ray.evaluation.simulators.processes import ProcessDied
from maps_ray.spec import SpecError


def _disc(radius: float, height: float) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 60)
    rings = [np.stack([radius * np.cos(angle), radius * np.sin(angle), np.full(60, z)], 1) for z in (0.0, height)]
    return np.concatenate(rings)


def test_a_summary_counts_each_task_and_means_only_successes() -> None:
    attempts = [
        Attempt(3, "lift", 0, 80, 2.0),
        Attempt(3, "lift", 1, 0, 4.0, "lift: the arm gets stuck"),
        Attempt(3, "lift", 2, 100, 3.0),
        Attempt(1, "open", 0, 0, 1.0, "open: out of reach"),
    ]
    first, second = summarise(attempts)
    assert (first.task, first.attempts, first.successes, first.mean_steps) == (1, 1, 0, 0)
    assert (second.task, second.name, second.attempts, second.successes) == (3, "lift", 3, 2)
    assert second.mean_steps == 90 and second.mean_seconds == pytest.approx(3.0)


def test_only_wide_and_flat_things_are_pushed() -> None:
    assert is_flat(_disc(0.07, 0.019))
    assert not is_flat(_disc(0.07, 0.05))  # a bowl
    assert not is_flat(_disc(0.03, 0.019))  # narrow enough to be taken across


def test_a_plate_is_taken_at_its_rim_with_the_tips_above_its_bottom() -> None:
    for grasp in candidates(_disc(0.07, 0.019), np.zeros(2)):
        assert grasp.position[2] == pytest.approx(0.018)
        assert np.linalg.norm(grasp.position[:2]) == pytest.approx(0.066, abs=1e-3)


def test_rotations_of_the_hand_are_right_handed() -> None:
    for yaw in (-2.0, 0.0, 0.7):
        rotation = pointing_down(yaw)
        assert rotation @ rotation.T == pytest.approx(np.eye(3), abs=1e-12)
        assert np.linalg.det(rotation) == pytest.approx(1)
        assert rotation[:, 2] == pytest.approx([0, 0, -1])
    tilted = pointing(np.array([0, -1.0, 0]), np.array([0, 0, 1.0]))
    assert np.linalg.det(tilted) == pytest.approx(1)


def test_a_folder_that_is_no_data_set_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match="neither empty nor a LeRobotDataset"):
        collection._check_same_features(tmp_path, "libero_goal", 32)
    with pytest.raises(DatasetError, match="is a file"):
        collection._check_same_features(tmp_path / "notes.txt", "libero_goal", 32)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    collection._check_same_features(tmp_path / "new", "libero_goal", 32)


def _write_episode(out: Path, size: int, extra: dict[str, str | int]) -> None:
    kept = recording("libero_goal")
    with LeRobotWriter(
        out,
        cameras=dict.fromkeys(kept.cameras, (size, size)),
        state_names=kept.state_names,
        action_names=kept.action_names,
        fps=kept.fps,
    ) as writer:
        images = {name: np.zeros((4, size, size, 3), np.uint8) for name in kept.cameras}
        writer.add_episode("lift", images, np.zeros((4, 8)), np.zeros((4, 7)), extra)


def test_other_pictures_are_refused_before_anything_is_simulated(tmp_path: Path) -> None:
    _write_episode(tmp_path / "demos", 32, {"suite": "libero_goal", "suite_task": 2, "initial_state": 7})
    collection._check_same_features(tmp_path / "demos", "libero_goal", 32)
    with pytest.raises(DatasetError, match="cannot append"):
        collection._check_same_features(tmp_path / "demos", "libero_goal", 64)
    with pytest.raises(DatasetError, match="cannot append"):
        collection._check_same_features(tmp_path / "demos", "metaworld_small", 32)
    assert collection._present(tmp_path / "demos", "libero_goal") == {(2, 7)}
    assert collection._present(tmp_path / "demos", "libero_goal_swap") == set()


def test_a_data_set_of_another_origin_is_refused(tmp_path: Path) -> None:
    _write_episode(tmp_path / "demos", 32, {"robot": "mine"})
    with pytest.raises(DatasetError, match="extra/suite_task"):
        collection._present(tmp_path / "demos", "libero_goal")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "libero_objects", "--dry-run"], "did you mean 'libero_object'"),
        (
            ["--suite", "calvin_abc_d", "--dry-run"],
            "no scripted expert for calvin_abc_d: experts exist for suites of libero",
        ),
        (["--suite", "libero_object"], "name the folder of the data set, or measure with --dry-run"),
        (["--suite", "libero_object", "--out", "demos", "--json"], "--json = True: goes with --dry-run"),
        (["--suite", "libero_object", "--dry-run", "--tasks", "one"], "give 'all', or indices such as 0,2,7"),
    ],
)
def test_bad_arguments_say_what_to_give(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["collect", *arguments])
    assert isinstance(result.exception, SpecError)
    assert message in str(result.exception)


def test_a_missing_simulator_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "libero", None)  # what an absent package looks like to import
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    result = CliRunner().invoke(app, ["collect", "--suite", "libero_object", "--dry-run"])
    assert isinstance(result.exception, SpecError)
    assert "pip install maps_ray[libero]" in str(result.exception)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ProcessDied("the process for task 3 of libero_goal was killed, most likely for want of memory"), 1, "task 3"),
        (KeyboardInterrupt(), 130, "the same command goes on"),
    ],
)
def test_an_interruption_says_how_to_go_on(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(collection, "collect", interrupted)
    result = CliRunner().invoke(app, ["collect", "--suite", "libero_goal", "--out", str(tmp_path / "demos")])
    assert result.exit_code == code
    assert message in result.stderr and "goes on where it was" in result.stderr


def test_collecting_starts_nothing_for_an_unknown_suite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'libero_goal_swap'"):
        next(collect(tmp_path / "demos", "libero_goal_swaps", None, 1, workers=1))
    assert not list(tmp_path.iterdir())
