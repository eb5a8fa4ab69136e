"""`maps-ray evaluate`: exit codes, folders, tables and the record, without a simulator."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console
from tiny_policies import write_policy

from maps_ray import cli
from maps_ray.evaluation.rollouts import Evaluation, RolloutError, RolloutRequest, command, tables
from maps_ray.evaluation.rollouts.environment import SuiteFacts
from maps_ray.evaluation.rollouts.plan import Episode, Queue
from maps_ray.evaluation.rollouts.protocol import EpisodeResult
from maps_ray.evaluation.rollouts.record import record
from maps_ray.evaluation.simulators import Suite, Task
from maps_ray.tracking import Tracker, resolve_uri


def finished(folder: Path, outcomes: dict[str, list[bool]]) -> Evaluation:
    """Suites with one task each, of which the first changes nothing and the others positions."""
    suites, results = {}, {}
    for name, successes in outcomes.items():
        change = "none" if not suites else "position"
        tasks = (Task(name, 0, "task", f"a sentence of {name}", len(successes)),)
        suites[name] = SuiteFacts(Suite(name, "toy", 100, next(iter(outcomes)), change), tasks, 7)  # type: ignore[arg-type]
        for state, success in enumerate(successes):
            episode = Episode(name, 0, state)
            results[episode] = EpisodeResult(episode, success, 10 + state, 2, {"grasp": True, "place": success}, 1.0)
    return Evaluation.complete(str(folder / "policy"), folder / "out", suites, results, results, {"seed": 0})


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["maps-ray", "evaluate", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_bad_input_ends_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, str(tmp_path / "nothing"), "--suite", "libero_object") == 2
    assert "no checkpoint folder" in capsys.readouterr().err
    checkpoint = str(write_policy(tmp_path / "base"))
    assert call(monkeypatch, checkpoint, "--suite", "libero_objects", "--out", str(tmp_path / "out")) == 2
    assert "did you mean 'libero_object'" in capsys.readouterr().err
    assert call(monkeypatch, checkpoint, "--suite", "libero_object", "--tasks", "first") == 2
    assert "indices like 0,3" in capsys.readouterr().err
    assert call(monkeypatch, checkpoint, "--suite", "libero_object", "--set", "rows=0") == 2
    assert "rows = 0: must be a whole number, at least 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "the same command goes on from here"),
        (RolloutError("reach, task 1: given up"), 1, "reach, task 1: given up"),
    ],
)
def test_how_it_ends(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    def stopped(*_: object, **__: object) -> Evaluation:
        raise error

    monkeypatch.setattr(command, "evaluate", stopped)
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, str(write_policy(tmp_path / "base")), "--suite", "libero_object") == code
    assert message in capsys.readouterr().err


def test_tables_group_suites_by_what_they_change(tmp_path: Path) -> None:
    evaluation = finished(tmp_path, {"plain": [True, True, False, False], "moved": [True, False, False, False]})
    text = tables.as_text(evaluation)
    lines = [line for line in text.splitlines() if "plain" in line or "moved" in line]
    assert any("none" in line and "50.0%" in line and "2/4" in line for line in lines)
    assert any("position" in line and "25.0%" in line and "5%..70%" in line for line in lines)
    assert "0: a sentence of moved" in text and "grasp 100%, place 25%" in text
    metrics = evaluation.metrics()
    assert metrics["rollout/id/success"] == 0.5 and metrics["rollout/ood/success"] == 0.25
    assert metrics["rollout/moved/place"] == 0.25
    other = finished(tmp_path, {"plain": [False] * 4, "moved": [True] * 4})
    pairs = evaluation.against(other)
    assert (pairs["all"].first_only, pairs["all"].second_only) == (2, 3)
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(tables.comparison(pairs, "another"))
    assert "2 of 8" in console.export_text()


def test_a_rate_is_never_of_fewer_episodes(tmp_path: Path) -> None:
    evaluation = finished(tmp_path, {"plain": [True, True]})
    plan = [Episode("plain", 0, state) for state in range(3)]
    results = {result.episode: result for result in evaluation.results}
    with pytest.raises(RolloutError, match="1 of 3 episodes have no result, the first is plain, task 0"):
        Evaluation.complete("policy", tmp_path, evaluation.suites, plan, results, {})


def test_the_record_stands_beside_the_training_run(tmp_path: Path) -> None:
    uri = resolve_uri(None, tmp_path)
    run = tmp_path / "tiny"
    Tracker.create(run, uri=uri, experiment="arms", run_name="tiny").finish("FINISHED")
    first = finished(run, {"plain": [True, False]})
    evaluation = Evaluation(str(run / "final"), run / "rollouts" / "a", first.suites, first.results, {"seed": 0})
    video = evaluation.out / "videos" / "plain" / "task00-success-state000.mp4"
    video.parent.mkdir(parents=True)
    video.write_bytes(b"a video")
    record(evaluation, wait_s=60)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("arms")
    assert experiment is not None
    runs = {found.info.run_name: found for found in client.search_runs([experiment.experiment_id])}
    recorded = runs["tiny rollouts"]
    assert recorded.info.status == "FINISHED"
    assert recorded.data.metrics["rollout/plain/success"] == 0.5
    assert recorded.data.tags["maps_ray.training_run_id"] == runs["tiny"].info.run_id
    names = {item.path for item in client.list_artifacts(recorded.info.run_id, "rollouts")}
    assert {"rollouts/table.txt", "rollouts/evaluation.json", "rollouts/videos"} <= names


def test_a_store_out_of_reach_costs_a_warning(tmp_path: Path) -> None:
    evaluation = finished(tmp_path, {"plain": [True]})
    with pytest.warns(RuntimeWarning, match="was not recorded in MLflow"):
        record(evaluation, "ftp://nowhere")


def test_workers_keep_their_task_and_share_the_last_one() -> None:
    queue = Queue([Episode("a", task, state) for task in range(2) for state in range(3)])
    first = queue.take(None, [])
    second = queue.take(None, [("a", 0)])
    assert (first, second) == (Episode("a", 0, 0), Episode("a", 1, 0))
    assert queue.take(("a", 0), [("a", 1)]) == Episode("a", 0, 1)
    assert queue.take(("a", 0), [("a", 1)]) == Episode("a", 0, 2)
    # Nothing of its own is left, and nobody's task: it helps.
    assert queue.take(("a", 0), [("a", 1)]) == Episode("a", 1, 1)
    queue.give_back(Episode("a", 1, 1))
    assert [queue.take(("a", 1), []) for _ in range(3)] == [Episode("a", 1, 1), Episode("a", 1, 2), None]


def test_noise_is_a_matter_of_the_episode() -> None:
    episode = Episode("a", 1, 2)
    seeds = {episode.seed(0, 0), episode.seed(0, 1), episode.seed(1, 0), Episode("a", 2, 1).seed(0, 0)}
    assert len(seeds) == 4 and all(0 <= seed < 2**63 for seed in seeds)
    assert episode.seed(0, 0) == Episode("a", 1, 2).seed(0, 0)


def test_the_folder_depends_on_what_changes_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = write_policy(tmp_path / "base")
    options = command.Options(checkpoint)
    folders = [
        command._out(options, checkpoint, request)
        for request in (
            RolloutRequest(("a",)),
            RolloutRequest(("a", "b"), episodes=3),
            RolloutRequest(("a",), seed=1),
        )
    ]
    assert folders[0] == folders[1] != folders[2]
    assert folders[0].parent == Path("runs/rollouts") and folders[0].name.startswith("trained-")
