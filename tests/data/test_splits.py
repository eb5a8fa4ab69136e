from __future__ import annotations

from dataclasses import replace

import pytest
from squares_data import TASKS, Recorded

from maps_ray.data import Dataset, open_dataset
from maps_ray.data.splits import select, select_all
from maps_ray.spec import SpecError, SplitSpec, SplitsSpec


@pytest.fixture(scope="module")
def dataset(squares: Recorded) -> Dataset:
    """Episodes 0, 3, 6 have the red cube, 1, 4, 7 the blue one, 2, 5, 8 the drawer."""
    return open_dataset(squares.root)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ({}, list(range(9))),
        ({"tasks": ["pick up*"]}, [0, 1, 3, 4, 6, 7]),
        ({"tasks": ["*BLUE*"]}, [1, 4, 7]),
        ({"tasks": ["*red*", "*drawer"]}, [0, 2, 3, 5, 6, 8]),
        ({"exclude_tasks": ["*Cube"]}, [2, 5, 8]),
        ({"episodes": ":2"}, [0, 1, 2, 3, 4, 5]),
        ({"episodes": "-1:"}, [6, 7, 8]),
        ({"tasks": ["*red*"], "episodes": "1:2"}, [3]),
        ({"tasks": [TASKS[2]]}, [2, 5, 8]),
    ],
)
def test_patterns_ignore_case_and_slices_run_over_each_task(
    dataset: Dataset, split: dict[str, object], expected: list[int]
) -> None:
    assert select(dataset, SplitSpec(**split), "data.splits.train") == expected


def test_a_sentence_with_brackets_matches_itself(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    task = "pick up the [red] cube"
    episodes = [replace(episode, task=task if "red" in episode.task else episode.task) for episode in dataset.episodes]
    monkeypatch.setattr(dataset, "episodes", tuple(episodes))
    assert select(dataset, SplitSpec(tasks=[task.upper()]), "data.splits.train") == [0, 3, 6]


def test_no_matching_task_names_the_nearest(dataset: Dataset) -> None:
    with pytest.raises(SpecError) as error:
        select(dataset, SplitSpec(tasks=["open the drawers*"]), "data.splits.ood")
    (problem,) = error.value.problems
    assert problem.field == "data.splits.ood.tasks"
    assert "'open the drawer'" in problem.message


def test_a_slice_past_the_end_says_how_many_there_are(dataset: Dataset) -> None:
    with pytest.raises(SpecError) as error:
        select(dataset, SplitSpec(episodes="3:"), "data.splits.held_out")
    (problem,) = error.value.problems
    assert problem.field == "data.splits.held_out.episodes" and "3 to 3 episodes" in problem.message


def faults(dataset: Dataset, **splits: dict[str, object]) -> dict[str, str]:
    with pytest.raises(SpecError) as error:
        select_all(lambda stored: dataset, SplitsSpec(**splits))
    return {problem.field: problem.message for problem in error.value.problems}


def test_three_sound_splits(dataset: Dataset) -> None:
    splits = SplitsSpec(
        train={"tasks": ["*cube"], "episodes": ":-1"},
        held_out={"tasks": ["*cube"], "episodes": "-1:"},
        ood={"tasks": ["*drawer"]},
    )
    assert select_all(lambda stored: dataset, splits) == {
        "train": ("train", [0, 1, 3, 4]),
        "held_out": ("train", [6, 7]),
        "ood": ("train", [2, 5, 8]),
    }
    assert select_all(lambda stored: dataset, SplitsSpec()) == {"train": ("train", list(range(9)))}


def test_stored_splits_are_opened_by_name_and_share_no_episode(dataset: Dataset) -> None:
    asked: list[str] = []

    def stored(name: str) -> Dataset:
        asked.append(name)
        return dataset

    splits = SplitsSpec(held_out={"stored": "val", "episodes": ":1"})
    assert select_all(stored, splits)["held_out"] == ("val", [0, 1, 2])
    assert set(asked) == {"train", "val"}


def test_overlap_names_both_splits_and_the_episodes(dataset: Dataset) -> None:
    found = faults(dataset, train={"episodes": ":2"}, held_out={"episodes": "1:"})
    assert "episodes 3, 4, 5 stand in data.splits.train" in found["data.splits.held_out"]


def test_held_out_tasks_are_tasks_of_train(dataset: Dataset) -> None:
    found = faults(dataset, train={"tasks": ["*red*"]}, held_out={"tasks": ["*blue*"]})
    assert "never shows: Pick up the Blue cube" in found["data.splits.held_out.tasks"]


def test_ood_tasks_are_not_tasks_of_train(dataset: Dataset) -> None:
    found = faults(dataset, train={"episodes": ":2"}, ood={"tasks": ["*drawer"], "episodes": "2:"})
    assert "open the drawer" in found["data.splits.ood.tasks"]


def test_all_faults_are_listed(dataset: Dataset) -> None:
    found = faults(dataset, train={"tasks": ["nothing"]}, held_out={"episodes": "9:"})
    assert set(found) == {"data.splits.train.tasks", "data.splits.held_out.episodes"}
