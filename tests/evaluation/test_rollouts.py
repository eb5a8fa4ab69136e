"""Evaluations with real Ray actors in a suite without physics: results, faults, and going on after them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reach_suite import STATES, toys
from safetensors.torch import load_file, save_file
from tiny_policies import write_policy

from maps_ray.data.video import probe
from maps_ray.evaluation.rollouts import (
    Evaluation,
    Limits,
    Progress,
    Resources,
    RolloutError,
    RolloutRequest,
    evaluate,
)
from maps_ray.evaluation.rollouts.journal import NAME
from maps_ray.ray_connection import connected
from maps_ray.spec import SpecError

REQUEST = RolloutRequest(("reach",), episodes=3)
# Reserves nothing: tests of three environments run on one core, too.
FREE = Resources(cpus=0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with connected():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy") / "base")


def run(checkpoint: Path, folder: Path, request: RolloutRequest = REQUEST, **options: Any) -> Evaluation:
    source = toys(folder / "faults")
    return evaluate(
        checkpoint, request, folder / "out", simulators=source, **{"workers": 2, "resources": FREE, **options}
    )


def ask_for(folder: Path, fault: str, times: int) -> None:
    (folder / "faults").mkdir(parents=True, exist_ok=True)
    (folder / "faults" / fault).write_text(str(times))


def resets(folder: Path) -> list[str]:
    """Task and initial state of each reset but the first, which only looks at the robot's state."""
    lines = (folder / "faults" / "resets").read_text().splitlines()
    return [line.rpartition(" ")[0] for line in lines[1:]]


def outcome(evaluation: Evaluation) -> list[tuple[Any, ...]]:
    return [(r.episode, r.success, r.steps, r.replans, r.sub_goals) for r in evaluation.results]


@pytest.fixture(scope="module")
def reference(cluster: None, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """By one worker, without faults."""
    return run(checkpoint, tmp_path_factory.mktemp("reference"), workers=1)


def test_each_episode_is_run_once_and_counted(reference: Evaluation) -> None:
    episodes = [(r.episode.task, r.episode.initial_state) for r in reference.results]
    assert episodes == [(task, state) for task in range(3) for state in range(3)]
    assert all(result.success for result in reference.task("reach", 0).results)
    failed = reference.task("reach", 2)
    assert failed.success.value == 0 and failed.steps == 20 and all(r.replans == 5 for r in failed.results)
    metrics = reference.metrics()
    assert metrics["rollout/reach/success"] == metrics["rollout/id/success"] == reference.suite("reach").success.value
    assert 0 < metrics["rollout/reach/start"] <= 1 and "rollout/ood/success" not in metrics
    saved = json.loads((reference.out / "evaluation.json").read_text())
    assert saved["metrics"] == metrics and saved["suites"]["reach"]["tasks"][2]["interval"][0] == 0


def test_the_first_success_and_failure_are_filmed(reference: Evaluation) -> None:
    videos = sorted((reference.out / "videos" / "reach").iterdir())
    assert [path.name for path in videos if path.name.startswith(("task00", "task02"))] == [
        "task00-success-state000.mp4",
        "task02-failure-state000.mp4",
    ]
    # Five replans and the end, both cameras side by side.
    facts = probe(next(path for path in videos if path.name.startswith("task02")))
    assert (facts.frames, facts.height, facts.width) == (6, 28, 56)


@pytest.mark.slow
def test_workers_that_are_lost_change_nothing(reference: Evaluation, checkpoint: Path, tmp_path: Path) -> None:
    for fault, times in {"kill-1-1": 2, "hang-0-2": 1, "raise-2-0": 1, "grow-0-0": 1}.items():
        ask_for(tmp_path, fault, times)
    limits = Limits(silence_s=20, rss_bytes=800 * 2**20)
    # More workers than the cores of a small machine: they share them.
    found = run(checkpoint, tmp_path, workers=3, limits=limits, resources=Resources())
    assert outcome(found) == outcome(reference)
    done = resets(tmp_path)
    again = {"1 1": 3, "0 2": 2, "2 0": 2}
    assert {episode: done.count(episode) for episode in set(done)} == {
        f"{task} {state}": again.get(f"{task} {state}", 1) for task in range(3) for state in range(3)
    }
    lines = (tmp_path / "out" / NAME).read_text().splitlines()
    assert sum('"episode"' in line for line in lines) == 9
    pids = {line.rpartition(" ")[2] for line in (tmp_path / "faults" / "resets").read_text().splitlines()}
    # Three at first, and one for each that was killed, hung or grew; an error alone costs the worker as well.
    assert len(pids) >= 7


@pytest.mark.slow
def test_an_episode_that_never_ends_well_ends_the_evaluation(
    reference: Evaluation, checkpoint: Path, tmp_path: Path
) -> None:
    ask_for(tmp_path, "kill-1-1", 99)
    with pytest.raises(RolloutError, match="reach, task 1, initial state 1: given up after 3 attempts") as caught:
        run(checkpoint, tmp_path, workers=1)
    assert str(checkpoint) in str(caught.value)
    assert not (tmp_path / "out" / "evaluation.json").exists()
    # The cause is gone: the episodes that ended are not run again.
    ask_for(tmp_path, "kill-1-1", 0)
    assert outcome(run(checkpoint, tmp_path)) == outcome(reference)
    assert resets(tmp_path).count("0 0") == 1


@pytest.mark.slow
def test_more_can_be_asked_for_later(reference: Evaluation, checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path, RolloutRequest(("reach",), episodes=3, tasks=(2,)), on_progress=interrupt)
    progress: list[Progress] = []
    request = RolloutRequest(("reach", "reach_swap"), episodes=3)
    more = run(checkpoint, tmp_path, request, on_progress=progress.append)
    assert (progress[0].done, progress[-1].done, progress[-1].total) == (2, 18, 18)
    assert outcome(more)[:9] == outcome(reference)
    assert more.metrics()["rollout/ood/success"] == more.suite("reach_swap").success.value
    assert all(not pair.told_apart for pair in more.against(more).values())
    with pytest.raises(ValueError, match="different episodes"):
        more.against(reference)


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from reach_suite import toys
from maps_ray.evaluation.rollouts import Resources, RolloutRequest, evaluate
folder = Path(sys.argv[3])
evaluate(Path(sys.argv[2]), RolloutRequest(("reach",), episodes=3), folder / "out", workers=1,
         resources=Resources(cpus=0), simulators=toys(folder / "faults"))
"""


@pytest.mark.slow
def test_a_killed_driver_leaves_what_it_finished(reference: Evaluation, checkpoint: Path, tmp_path: Path) -> None:
    ask_for(tmp_path, "hang-1-0", 1)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(Path(__file__).parent), checkpoint, tmp_path])
    journal, deadline = tmp_path / "out" / NAME, time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count('"episode"') == 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    with pytest.raises(SpecError, match="another evaluation writes there"):
        run(checkpoint, tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # What a crash leaves of a line that was being written.
    with journal.open("a") as file:
        file.write('{"episode": {"suite": "rea')
    assert outcome(run(checkpoint, tmp_path)) == outcome(reference)
    assert resets(tmp_path).count("0 2") == 1


def test_episodes_of_another_checkpoint_are_not_mixed_in(
    reference: Evaluation, checkpoint: Path, tmp_path: Path
) -> None:
    other = write_policy(tmp_path / "other", seed=2)
    source = toys(tmp_path / "faults")
    with pytest.raises(SpecError, match=r"another evaluation \(checkpoint was '.*', now '.*'\)"):
        evaluate(other, REQUEST, reference.out, simulators=source)
    with pytest.raises(SpecError, match=r"\(seed was 0, now 5\)"):
        evaluate(checkpoint, RolloutRequest(("reach",), seed=5), reference.out, simulators=source)
    # All is there already: no simulator and no Ray is needed.
    assert outcome(evaluate(checkpoint, REQUEST, reference.out, simulators=source)) == outcome(reference)
    assert not (tmp_path / "faults" / "resets").exists()


def test_actions_that_are_no_numbers(cluster: None, tmp_path: Path) -> None:
    broken = write_policy(tmp_path / "broken")
    file = next(broken.glob("action_head*"))
    weights = load_file(file)
    # Finite by itself; the sums are not.
    save_file({name: torch.full_like(tensor, 3e38) for name, tensor in weights.items()}, file)
    with pytest.raises(RolloutError, match=f"{broken}: reach, task 0, initial state 0: its actions are not finite"):
        run(broken, tmp_path)
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}, file)
    with pytest.raises(RolloutError, match=f"{broken}: the policy does not start: .*values that are not finite"):
        run(broken, tmp_path / "again")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (RolloutRequest(("raech",)), "unknown suite 'raech': did you mean 'reach'"),
        (RolloutRequest(("reach", "reach")), "each once"),
        (
            RolloutRequest(("reach",), tasks=(0, 3), episodes=STATES + 1),
            r"(?s)reach, task 0 has 6 initial states.*tasks = 3: reach has tasks 0 \.\. 2",
        ),
        (RolloutRequest(("elsewhere",)), "run `pip install toy`"),
        (RolloutRequest(("flat",), episodes=1), "its actions have 7 dimensions, flat takes 6"),
        (RolloutRequest(("reach",), settings={"cameras": ["image", "wrist"]}), "did you mean 'wrist_image'"),
    ],
)
def test_requests_that_cannot_be_met(
    cluster: None, checkpoint: Path, tmp_path: Path, request_: RolloutRequest, message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        run(checkpoint, tmp_path, request_)
    assert 'episode"' not in ((tmp_path / "out" / NAME).read_text() if (tmp_path / "out" / NAME).exists() else "")


def test_a_policy_of_another_robot(cluster: None, tmp_path: Path) -> None:
    other = write_policy(tmp_path / "other", proprio_dim=8, action_dim=7)
    file = other / "dataset_statistics.json"
    statistics = json.loads(file.read_text())
    statistics["demos"]["proprio"] = {name: values[:6] for name, values in statistics["demos"]["proprio"].items()}
    file.write_text(json.dumps(statistics))
    with pytest.raises(SpecError, match="the policy reads 6 numbers of proprioception, reach gives 8"):
        run(other, tmp_path)
