"""CALVIN's protocol: published chains, success counting, average length, overlapping requests.

CALVIN itself has no package. `StandIn` takes its place here and in this file alone: a table whose instructions are
carried out by counting steps, behind the functions of `calvin_env` and `calvin_agent` that the adapter calls.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from maps_ray.evaluation.rollouts.plan import Episode
from maps_ray.evaluation.rollouts.protocol import EpisodeResult, play
from maps_ray.evaluation.rollouts.statistics import MeanLength, Rate
from maps_ray.evaluation.simulators import calvin
from maps_ray.evaluation.simulators.calvin_sequences import RULES, Chains, follows


def test_the_first_published_chain() -> None:
    chains = Chains()
    assert len(chains) == 1000 and len(RULES) == 34
    # As many published evaluations print it.
    first = ("rotate_blue_block_right", "move_slider_right", "lift_red_block_slider", "place_in_slider")
    assert chains[0][1] == (*first, "turn_off_lightbulb")
    assert chains[0] == Chains()[0]
    for index in (1, 500, 999):
        start, names = chains[index]
        assert follows(start, names) and len(set(names)) == 5
    assert not follows({**chains[0][0], "slider": "right"}, chains[0][1])


class StandIn:
    """The table: an instruction is carried out in its `needs`-th step since it became due; 0 is never."""

    def __init__(self, needs: int) -> None:
        self.needs = needs
        self.cameras: list[str] = ["static", "gripper"]
        self.actions: list[np.ndarray] = []

    def reset(self, robot_obs: Any, scene_obs: Any) -> None:
        self.count = 0
        self.actions = []

    def get_info(self) -> int:
        return self.count

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        assert not self.cameras  # nothing is rendered by a step
        self.count += 1
        self.actions.append(action)
        return None, 0.0, False, self.count

    def get_task_info_for_set(self, start: int, info: int, names: set[str]) -> set[str]:
        return names if self.needs and info - start == self.needs else set()

    def get_camera_obs(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {name: np.zeros((20, 20, 3), np.uint8) for name in ("rgb_static", "rgb_gripper")}, {}

    def get_state_obs(self) -> dict[str, np.ndarray]:
        return {"robot_obs": np.zeros(15)}

    def close(self) -> None:
        pass


class Words(dict[str, list[str]]):
    def __missing__(self, name: str) -> list[str]:
        return [f"please {name.replace('_', ' ')}"]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    def open_table(needs: int, suite: str = "calvin_abc_d") -> tuple[calvin.CalvinSimulator, StandIn]:
        stand_in = StandIn(needs)
        modules = {
            "omegaconf": SimpleNamespace(OmegaConf=SimpleNamespace(load=lambda path: Words())),
            "hydra": SimpleNamespace(utils=SimpleNamespace(instantiate=lambda tasks: stand_in)),
            "calvin_agent": SimpleNamespace(__file__="/calvin/calvin_models/calvin_agent/__init__.py"),
            "calvin_agent.evaluation.utils": SimpleNamespace(get_env_state_for_initial_condition=lambda c: (c, c)),
            "calvin_env.envs.play_table_env": SimpleNamespace(get_env=lambda folder, show_gui: stand_in),
        }
        monkeypatch.setattr(calvin, "_import_calvin", lambda: modules)
        monkeypatch.setattr(calvin, "_scene_folder", lambda: Path("/data/task_ABC_D/validation"))
        return calvin.CalvinSimulator(suite, image_size=16), stand_in

    return open_table


def run(simulator: calvin.CalvinSimulator, act: Any, max_steps: int | None = None) -> EpisodeResult:
    limit = max_steps or simulator.suite.max_steps
    episode = play(simulator, Episode(simulator.suite.name, 0, 0), act, max_steps=limit, gripper="none")
    try:
        while True:
            next(episode)
    except StopIteration as end:
        return end.value


def test_a_chain_is_carried_out_instruction_by_instruction(table: Any) -> None:
    simulator, _ = table(13)
    asked: list[str] = []

    def act(seen: Any, replan: int) -> np.ndarray:
        asked.append(seen.sentence)
        return np.zeros((8, 7))

    result = run(simulator, act)
    # 13 steps are a chunk of 8 and 5 of the next, which ends there: the policy plans anew for the next instruction.
    assert result.success and result.steps == 65 and result.replans == 10
    assert asked[::2] == asked[1::2] and len(set(asked)) == 5
    assert asked[0] == "please rotate blue block right" and sum(result.sub_goals.values()) == 5


@pytest.mark.parametrize(("suite", "limit"), [("calvin_abc_d", 360), ("calvin_abc_d_overlapping", 800)])
def test_a_missed_instruction_ends_the_chain(table: Any, suite: str, limit: int) -> None:
    simulator, _ = table(0, suite)
    result = run(simulator, lambda seen, replan: np.zeros((8, 7)))
    assert not result.success and result.steps == limit and not any(result.sub_goals.values())


def test_overlapping_requests(table: Any) -> None:
    simulator, stand_in = table(0, "calvin_abc_d_overlapping")

    def act(seen: Any, replan: int) -> np.ndarray:
        chunk = np.zeros((8, 7))
        chunk[:, 0] = 100 * (replan + 1) + replan + np.arange(8)  # request and step of the round
        chunk[:, 6] = -1 if replan == 0 else 0.4
        return chunk

    assert run(simulator, act, max_steps=10).replans == 3
    values = [action[0] for action in stand_in.actions]
    # Means over the requests that cover a step; the third action twice, that of step 7 left out.
    expected = [100, 151, 202, 202, 203, 204, 205, 206, 258, 309]
    assert values == pytest.approx(expected)
    # The gripper is decided after averaging: the mean of -1 and 0.4 closes, two of 0.4 open.
    grippers = [action[6] for action in stand_in.actions]
    assert grippers == [-1, -1, -1, -1, -1, -1, -1, -1, 1, 1]


def test_a_round_ends_with_the_instruction(table: Any) -> None:
    simulator, stand_in = table(1, "calvin_abc_d_overlapping")
    result = run(simulator, lambda seen, replan: np.zeros((8, 7)))
    assert result.success and result.steps == 5 and len(stand_in.actions) == 5


def test_mean_length() -> None:
    length = MeanLength((10, 20, 30, 20, 10, 10))
    assert length.value == pytest.approx(2.3)
    low, high = length.interval
    values = np.repeat(np.arange(6), (10, 20, 30, 20, 10, 10))
    half = 1.96 * values.std() / 10
    assert low == pytest.approx(2.3 - half, abs=0.04) and high == pytest.approx(2.3 + half, abs=0.04)
    assert MeanLength((0, 0, 0, 0, 0, 8)).interval == pytest.approx((5 * Rate(8, 8).interval[0], 5))
    assert MeanLength((8, 0, 0, 0, 0, 0)).interval[0] == pytest.approx(0, abs=1e-9)
    assert str(MeanLength((1, 1))) == "0.50 [0.09, 0.91]"
