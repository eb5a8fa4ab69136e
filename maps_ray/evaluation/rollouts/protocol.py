"""One episode, as the published LIBERO evaluation runs it (OpenVLA-OFT, arXiv:2502.19645).

The simulator settles at reset and turns its images; a chunk is executed open-loop to its end, then the policy plans
again from a new observation; the episode ends with the goal or at the suite's step limit, settling steps not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from maps_ray.data.statistics import gripper_to_libero
from maps_ray.evaluation.rollouts.plan import Episode, PolicyFault
from maps_ray.evaluation.simulators.base import Observation, Simulator

OVERLAPPING = 3
"""Requests at the start of a round of a suite with overlapping requests."""
Gripper = Literal["libero", "widowx", "none"]
Act = Callable[[Observation, int], NDArray[np.floating]]
"""Observation and number of the replan -> actions (chunk, action_dim), in the units of the training data."""


@dataclass(frozen=True)
class EpisodeResult:
    """How one episode went."""

    episode: Episode
    success: bool
    steps: int
    """Actions applied, settling steps not counted."""
    replans: int
    """How often the policy was asked."""
    sub_goals: dict[str, bool]
    """Parts of the task that were reached; empty where the simulator does not tell."""
    seconds: float
    """Wall time from reset to end."""
    frames: list[NDArray[np.uint8]] = field(default_factory=list, repr=False, compare=False)
    """What the policy saw, cameras side by side: (height, width, 3) uint8 for each replan, and the end."""


def play(
    simulator: Simulator,
    episode: Episode,
    act: Act,
    *,
    max_steps: int,
    gripper: Gripper,
    keep_frames: bool = False,
    render_each_step: bool = False,
) -> Generator[None, None, EpisodeResult]:
    """Runs one episode; yields after each replan and returns the result.

    Args:
        simulator: any suite; the episode's task is loaded if need be.
        episode: what to run.
        act: the policy.
        max_steps: actions after which the episode has failed.
        gripper: `libero` where the training data had 1 open .. 0 closed in the last dimension: it becomes LIBERO's -1
            open, 1 closed. `widowx` where they were Bridge's: Euler angles become an axis-angle, and a gripper above
            0.5 opens (1), else closes (-1), at once (SimplerEnv's sticky gripper repeats a WidowX's command once,
            which changes nothing). `none` leaves actions as they are.
        keep_frames: whether the result shall have them.
        render_each_step: observe after every action, although the policy does not look: smooth videos, slow.

    Raises:
        PolicyFault: actions that are not finite or of another shape than the simulator takes.
    """
    began = time.perf_counter()
    simulator.reset(episode.task, episode.initial_state)
    frames: list[NDArray[np.uint8]] = []
    steps = replans = 0

    def observe() -> Observation:
        observation = simulator.observe()
        if keep_frames:
            frames.append(side_by_side(observation))
        return observation

    seen = observe()
    while steps < max_steps and not simulator.success and not _over(simulator):
        if simulator.suite.overlapping:
            steps += yield from _overlapping_round(simulator, act, seen, replans, max_steps - steps, gripper)
            replans += OVERLAPPING
            if keep_frames or (steps < max_steps and not simulator.success):
                seen = observe()
            continue
        actions = np.asarray(act(seen, replans))
        replans += 1
        chunk = simulator_actions(actions, simulator.action_dim, gripper)[: max_steps - steps]
        if render_each_step:
            for action in chunk:
                steps += simulator.step(action[None])
                seen = observe()
                if simulator.success:
                    break
        else:
            steps += simulator.step(chunk)
            if steps < max_steps and not simulator.success:
                seen = observe()
            elif keep_frames:
                observe()
        yield
    reached = {name: bool(value) for name, value in simulator.sub_goals().items()}
    seconds = time.perf_counter() - began
    return EpisodeResult(episode, bool(simulator.success), steps, replans, reached, seconds, frames)


def _overlapping_round(
    simulator: Simulator, act: Act, seen: Observation, replans: int, left: int, gripper: Gripper
) -> Generator[None, None, int]:
    """One round of ten actions, as the authors of MAPS run CALVIN; returns how many were applied.

    The policy is asked before the first three actions. An action is the mean over the chunks that cover its step; after
    the third request nothing is asked, the third action is executed twice, and that of the eighth step is left out. The
    gripper's command is decided after averaging. A sentence that changes, because an instruction was carried out, ends
    the round: its chunks are another instruction's.
    """
    chunks: list[NDArray[np.floating]] = []
    applied = 0
    for step in range(OVERLAPPING):
        if step:
            previous, seen = seen.sentence, simulator.observe()
            if seen.sentence != previous:
                return applied
        chunks.append(np.asarray(act(seen, replans + step)))
        yield
        steps = [step] if step < OVERLAPPING - 1 else [2, 2, *range(3, 7), 8, 9]
        mean = np.stack([_mean_of_step(chunks, at) for at in steps if at < len(chunks[-1]) + len(chunks) - 1])
        applied += simulator.step(simulator_actions(mean, simulator.action_dim, gripper)[: left - applied])
        if simulator.success or _over(simulator) or applied >= left:
            break
    return applied


def _over(simulator: Simulator) -> bool:
    """Whether a simulator says that the episode can succeed no more; most cannot tell."""
    return bool(getattr(simulator, "over", False))


def _mean_of_step(chunks: Sequence[NDArray[np.floating]], step: int) -> NDArray[np.floating]:
    """The mean action of one step of a round, over the chunks that were asked for at steps 0, 1, ... and cover it."""
    covering = [chunk[step - start] for start, chunk in enumerate(chunks) if 0 <= step - start < len(chunk)]
    return np.asarray(np.mean(covering, axis=0))


def simulator_actions(actions: NDArray[np.floating], action_dim: int, gripper: Gripper) -> NDArray[np.float32]:
    """The policy's actions (chunk, action_dim) in the simulator's convention.

    Raises:
        PolicyFault: not finite, or of another shape.
    """
    if actions.ndim != 2 or actions.shape[1] != action_dim:
        raise PolicyFault(f"its actions have shape {list(actions.shape)}, the simulator takes (n, {action_dim})")
    if not np.isfinite(actions).all():
        raise PolicyFault("its actions are not finite: the checkpoint's weights or statistics are broken")
    if gripper == "widowx":
        return _widowx_actions(actions)
    return gripper_to_libero(actions) if gripper == "libero" else np.asarray(actions, np.float32)


def _widowx_actions(actions: NDArray[np.floating]) -> NDArray[np.float32]:
    """Bridge's actions (n, 7) in the convention of SimplerEnv's WidowX; angles in rad, about fixed x, y and z."""
    rotations = Rotation.from_euler("xyz", actions[:, 3:6]).as_rotvec()
    command = np.where(actions[:, 6:] > 0.5, 1.0, -1.0)
    return np.concatenate([actions[:, :3], rotations, command], axis=1).astype(np.float32)


def side_by_side(observation: Observation) -> NDArray[np.uint8]:
    """All cameras of an observation in one image; they have one height."""
    return np.concatenate(list(observation.images.values()), axis=1)
