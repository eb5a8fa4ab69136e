"""The mailbox between driver and workers: what passes, who waits, and what a lost one costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from maps_ray.tracking.spool import read_history
from maps_ray.tracking.tracker import Tracker
from maps_ray.training.mailbox import Line, Records, open_mailbox

ERROR = "eval/ood/action_l1"


@pytest.fixture
def mailbox(ray_session: None) -> Iterator[Any]:
    opened = open_mailbox()
    yield opened
    ray.kill(opened)


def test_progress_goes_one_way_and_stop_the_other(mailbox: Any) -> None:
    with Line(mailbox) as line:
        began = time.monotonic()
        for step in range(1000):
            line.progress("training", step, loss=0.5)
            assert not line.stop_requested()
        # The training loop never waits for the network.
        assert time.monotonic() - began < 0.1
        ray.get(mailbox.stop.remote())
        _until(line.stop_requested)
    assert ray.get(mailbox.state.remote())["progress"] == {"phase": "training", "step": 999, "loss": 0.5}


def test_an_evaluation_waits_for_the_word_only_where_a_sweep_decides(mailbox: Any) -> None:
    ray.get(mailbox.give.remote({"name": "a"}, decides=(ERROR, 10), decided=2))
    with Line(mailbox) as line:
        assert [line.evaluated(step, {ERROR: 1.0}) for step in (2, 10)] == ["go", "go"]
        assert line.evaluated(4, {"eval/held_out/action_l1": 1.0}) == "go"
        words: list[str] = []

        def wait() -> None:
            words.append(line.evaluated(6, {ERROR: 0.5}))
            words.append(line.evaluated(6, {ERROR: 0.5}))

        waiting = threading.Thread(target=wait)
        waiting.start()
        _until(lambda: 6 in ray.get(mailbox.state.remote())["evaluations"])
        assert waiting.is_alive()
        ray.get(mailbox.decide.remote(6, "save"))
        _until(lambda: words == ["save"])
        assert waiting.is_alive()
        ray.get(mailbox.decide.remote(6, "go"))
        waiting.join(10)
        assert words == ["save", "go"]
        ray.get(mailbox.stop.remote())
        assert line.evaluated(8, {ERROR: 0.5}) == "stop"


def test_tasks_are_handed_over_until_they_have_an_outcome(mailbox: Any) -> None:
    ray.get(mailbox.give.remote({"name": "a"}))
    # A group that starts again gets the task that it was lost in.
    assert [ray.get(mailbox.next_task.remote())["name"] for _ in range(2)] == ["a", "a"]
    ray.get(mailbox.ended.remote({"status": "finished"}))
    waiting = mailbox.next_task.remote()
    assert ray.wait([waiting], timeout=0.5) == ([], [waiting])
    ray.get(mailbox.give.remote({"name": "b"}))
    assert ray.get(waiting)["name"] == "b"
    assert ray.get(mailbox.state.remote())["outcome"] is None
    ray.get(mailbox.close.remote())
    assert ray.get(mailbox.next_task.remote()) == "close"


def test_a_lost_mailbox_is_started_again_empty(mailbox: Any) -> None:
    ray.get(mailbox.stop.remote())
    with Line(mailbox) as line:
        _until(line.stop_requested)
        ray.kill(mailbox, no_restart=False)
        _until(lambda: not line.stop_requested())
        # The driver says it again for as long as it is so.
        ray.get(mailbox.stop.remote())
        _until(line.stop_requested)


def test_records_reach_the_drivers_folder_from_a_worker_with_another_scratch(mailbox: Any, tmp_path: Path) -> None:
    driver, worker = tmp_path / "driver", tmp_path / "worker"
    for folder in (driver, worker):
        # The worker's node may hold an earlier part of the run.
        Tracker.create(folder, uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="e", run_name="r", ship=False)
    with Line(mailbox, Records.here(driver, None)) as line:
        line.tracker(worker).metrics(7, {"train/loss": 0.5})
        line.secure()
    assert read_history(driver).metrics == {"train/loss": [(7, 0.5)]}
    assert read_history(worker).metrics == {}


def _until(condition: Any, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
