"""What a queue hands out step by step, and which actions are refused."""

from __future__ import annotations

import numpy as np
import pytest

from maps_ray.serving.actions import ActionQueue, Limits, UnsafeActions, queue_fault


def chunk(value: float, length: int = 4) -> np.ndarray:
    """Actions value.0, value.1, ... in one dimension."""
    return (value + np.arange(length)[:, None] / 10).astype(np.float32)


def test_the_newest_chunk_counts_and_its_past_actions_are_left_out() -> None:
    queue = ActionQueue(2)
    assert queue.due and not queue.ready
    with pytest.raises(LookupError, match="no chunk has an action for step 0"):
        queue.take()
    queue.add(queue.ask(), chunk(1))
    assert [float(queue.take()[0]) for _ in range(2)] == pytest.approx([1.0, 1.1])
    assert queue.due and queue.ready
    start = queue.ask()
    # Its answer takes one step: meanwhile the old chunk goes on.
    assert not queue.due and float(queue.take()[0]) == pytest.approx(1.2)
    queue.add(start, chunk(2))
    assert float(queue.take()[0]) == pytest.approx(2.1)


def test_a_chunk_that_comes_too_late_is_asked_for_again() -> None:
    queue = ActionQueue(1)
    queue.add(queue.ask(), chunk(1, 2))
    queue.take()
    start = queue.ask()
    queue.take()
    queue.step += 2
    queue.add(start, chunk(2, 2))
    assert not queue.ready and queue.due


def test_ensemble_weights_are_those_of_act() -> None:
    queue = ActionQueue(1, 0.5)
    for value in (1, 2, 3):
        queue.add(queue.ask(), chunk(value))
        last = queue.take()
    # Step 2: the third action of the oldest chunk, the second, the first; the oldest weighs most.
    weights = np.exp(-0.5 * np.arange(3))
    assert float(last[0]) == pytest.approx(float(weights @ [1.2, 2.1, 3.0] / weights.sum()))


@pytest.mark.parametrize(
    ("steps", "ensemble", "length", "expected"),
    [
        (None, None, 8, None),
        (8, 0.01, 8, None),
        (9, None, 8, ("execute_steps", 9, "must be 1 to 8, the actions of a chunk")),
        (0, None, None, ("execute_steps", 0, "must be at least 1")),
        (4, -1.0, 8, ("ensemble", -1.0, "must be 0 or more")),
        (None, 0.1, 8, ("ensemble", 0.1, "needs execute_steps: without a queue there is nothing to average")),
    ],
)
def test_options_of_a_queue(steps: int | None, ensemble: float | None, length: int | None, expected: object) -> None:
    assert queue_fault(steps, ensemble, length) == expected


def moves(*steps: tuple[float, float, float]) -> np.ndarray:
    return np.array([[*step, 0, 0, 0, 1] for step in steps], np.float32)


def test_steps() -> None:
    Limits((0.05,)).check(moves((0.03, 0.04, 0)) * 0.999, None)
    with pytest.raises(UnsafeActions, match=r"action 1 moves by 0.06, more than the largest step 0.05"):
        Limits((0.05,)).check(moves((0.01, 0, 0), (0, 0, -0.06)), None)
    with pytest.raises(UnsafeActions, match=r"action 0 has 1 in dimension 6, more than the largest step 0.5"):
        Limits((1, 1, 1, 1, 1, 1, 0.5)).check(moves((0, 0, 0)), None)


def test_workspace_follows_the_chunk() -> None:
    limits = Limits(workspace=(0.2, 0.7, -0.4, 0.4, 0.0, 0.6), metres_per_unit=0.05)
    start = np.array([0.65, 0.0, 0.3])
    limits.check(moves((0.5, 0, 0), (0.4, 0, 0)), start)
    with pytest.raises(UnsafeActions, match=r"action 2 leads to x = 0.705 m, outside the workspace 0.2..0.7 m"):
        limits.check(moves((0.5, 0, 0), (0.4, 0, 0), (0.2, 0, 0)), start)
    for unknown in (None, np.array([0.3, np.nan, 0.1])):
        with pytest.raises(UnsafeActions, match="the observation must say the hand's position"):
            limits.check(moves((0, 0, 0)), unknown)


@pytest.mark.parametrize(
    ("limits", "option"),
    [
        (Limits((0.0,)), "--max-step"),
        (Limits((float("nan"),)), "--max-step"),
        (Limits((1.0, 1.0)), "--max-step"),
        (Limits(workspace=(0, 1, 0, 1)), "--workspace"),
        (Limits(workspace=(1, 0, 0, 1, 0, 1)), "--workspace"),
        (Limits(metres_per_unit=0), "--metres-per-unit"),
    ],
)
def test_limits_that_cannot_be(limits: Limits, option: str) -> None:
    fault = limits.fault(7)
    assert fault is not None and fault[0] == option
    assert Limits((0.1,), (0, 1, 0, 1, 0, 1), 0.05).fault(7) is None
