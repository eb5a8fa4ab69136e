"""Rollouts in LIBERO for real: needs the `libero` extra and an OpenGL library; run with `pytest -m sim`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_policies import write_policy

from maps_ray import cli
from maps_ray.data import open_dataset
from maps_ray.data.statistics import gripper_from_libero
from maps_ray.data.video import probe
from maps_ray.evaluation.rollouts.plan import Episode
from maps_ray.evaluation.rollouts.protocol import EpisodeResult, play
from maps_ray.evaluation.simulators import Observation, open_simulator

pytestmark = pytest.mark.sim

DEMONSTRATIONS = Path(__file__).parents[2] / "jobs" / "assets" / "libero_demos"


def test_a_demonstration_succeeds_as_a_policy_would_give_it() -> None:
    dataset = open_dataset(DEMONSTRATIONS)
    found = [(number, episode) for number, episode in enumerate(dataset.episodes)]
    number, demonstration = next(pair for pair in found if pair[1].extra["suite"] == "libero_object")
    # As a policy predicts it: the gripper 1 open .. 0 closed.
    actions = gripper_from_libero(dataset.vectors("action", number))
    asked: list[Observation] = []

    def act(seen: Observation, replan: int) -> np.ndarray:
        asked.append(seen)
        return actions[8 * replan : 8 * replan + 8]

    episode = Episode("libero_object", demonstration.extra["suite_task"], demonstration.extra["initial_state"])
    simulator = open_simulator("libero_object", image_size=64, cameras=("image",))
    rollout = play(simulator, episode, act, max_steps=280, gripper="libero", keep_frames=True)
    replans = 0
    try:
        while True:
            next(rollout)
            replans += 1
    except StopIteration as end:
        result: EpisodeResult = end.value
    finally:
        simulator.close()
    assert result.success and result.sub_goals and all(result.sub_goals.values())
    assert abs(result.steps - len(actions)) <= 2
    assert result.replans == replans == len(asked) == -(-result.steps // 8)
    assert len(result.frames) == replans + 1 and result.frames[0].shape == (64, 64, 3)
    assert asked[0].sentence == demonstration.task


@pytest.mark.slow
def test_the_command_with_one_and_with_two_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_policy(tmp_path / "base")

    def evaluate(out: str, *more: str) -> dict[str, Any]:
        arguments = ["--suite", "libero_object", "--tasks", "2", "--episodes", "2", "--max-steps", "10", "--json"]
        tracking = ["--tracking-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
        command = ["maps-ray", "evaluate", str(checkpoint), *arguments, *tracking, "--out", str(tmp_path / out), *more]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        printed: dict[str, Any] = json.loads(capsys.readouterr().out)
        return printed

    alone, pair = evaluate("alone", "--workers", "1"), evaluate("pair", "--workers", "2")
    assert alone["suites"] == pair["suites"] and alone["metrics"] == pair["metrics"]
    episodes = [(tmp_path / out / "episodes.jsonl").read_text().splitlines() for out in ("alone", "pair")]
    kept = [sorted(_without_time(line) for line in lines) for lines in episodes]
    assert kept[0] == kept[1] and len(kept[0]) == 4
    assert alone["episodes"] == 2 and "rollout/libero_object/success" in alone["metrics"]
    videos = list((tmp_path / "alone" / "videos" / "libero_object").iterdir())
    assert len(videos) == 1 and probe(videos[0]).width == 56


def _without_time(line: str) -> str:
    return json.dumps({name: value for name, value in json.loads(line).items() if name != "seconds"}, sort_keys=True)
