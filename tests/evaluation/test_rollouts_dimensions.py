"""Success by what suites change and by published difficulty; tasks whose files are missing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maps_ray.evaluation.rollouts import tables
from maps_ray.evaluation.rollouts.environment import SuiteFacts
from maps_ray.evaluation.rollouts.plan import Episode, RolloutRequest
from maps_ray.evaluation.rollouts.protocol import EpisodeResult
from maps_ray.evaluation.rollouts.run import _misfits, _plan
from maps_ray.evaluation.rollouts.summary import Evaluation
from maps_ray.evaluation.simulators import Task, suite

LACKS = "scenes/x.xml is not in /assets: download it"


def facts(name: str, levels: tuple[int | None, ...], missing: tuple[int, ...] = ()) -> SuiteFacts:
    tasks = tuple(
        Task(name, i, f"task_{i}", f"sentence {i}", 0 if i in missing else 1, level, LACKS if i in missing else None)
        for i, level in enumerate(levels)
    )
    return SuiteFacts(suite(name), tasks, 7)


SUITES = {
    "libero_object": facts("libero_object", (None, None)),
    "libero_plus_object_camera": facts("libero_plus_object_camera", (1, 3, 1)),
    "libero_plus_goal_camera": facts("libero_plus_goal_camera", (2, 2)),
    "libero_plus_object_layout": facts("libero_plus_object_layout", (4, 5, 4), missing=(0, 2)),
}
SOLVED = {("libero_object", 0), ("libero_plus_object_camera", 0), ("libero_plus_object_camera", 1),
          ("libero_plus_object_layout", 1)}  # fmt: skip


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    plan = _plan(RolloutRequest(tuple(SUITES), episodes=1), SimpleNamespace(suites=SUITES))  # type: ignore[arg-type]
    results = {
        episode: EpisodeResult(episode, (episode.suite, episode.task) in SOLVED, 10, 2, {}, 1.0) for episode in plan
    }
    return Evaluation.complete("checkpoint", tmp_path, SUITES, plan, results, {})


def test_means_by_what_is_changed(evaluation: Evaluation) -> None:
    metrics = evaluation.metrics()
    assert metrics["rollout/id/success"] == 0.5
    assert metrics["rollout/ood/camera/success"] == pytest.approx((2 / 3 + 0) / 2)
    assert metrics["rollout/ood/layout/success"] == 1.0
    assert metrics["rollout/ood/success"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert "rollout/ood/light/success" not in metrics and "rollout/ood/none/success" not in metrics
    text = tables.as_text(evaluation)
    assert "camera" in text and "33.3%" in text and "libero_plus_object_camera, libero_plus_goal_camera" in text


def test_difficulties(evaluation: Evaluation) -> None:
    metrics = evaluation.metrics()
    assert metrics["rollout/libero_plus_object_camera/level-1/success"] == 0.5
    assert metrics["rollout/libero_plus_object_camera/level-3/success"] == 1.0
    assert not any("libero_object/level" in name for name in metrics)
    assert evaluation.as_json()["suites"]["libero_plus_object_camera"]["levels"] == {"1": 0.5, "3": 1.0}
    assert "sentence 1 (level 3)" in tables.as_text(evaluation)


def test_tasks_without_their_files_are_left_out_and_counted(evaluation: Evaluation) -> None:
    assert evaluation.tasks_of("libero_plus_object_layout") == [1]
    assert evaluation.left_out("libero_plus_object_layout") == (2, LACKS)
    assert evaluation.as_json()["suites"]["libero_plus_object_layout"]["tasks_without_files"] == 2
    assert Episode("libero_plus_object_layout", 0, 0) not in [result.episode for result in evaluation.results]


def test_asking_for_a_task_without_its_files_is_refused() -> None:
    policy: Any = SimpleNamespace(action_dim=7, folder="checkpoint")
    request = RolloutRequest(("libero_plus_object_layout",), episodes=1, tasks=(0, 1))
    (problem,) = _misfits(request, policy, [SUITES["libero_plus_object_layout"]])
    assert str(problem) == f"tasks = 0: libero_plus_object_layout, task 0: {LACKS}"
    assert not _misfits(RolloutRequest(("libero_plus_object_layout",), episodes=1), policy, list(SUITES.values()))
