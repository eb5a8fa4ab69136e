from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from squares_data import SIZE, TASKS, Recorded, square_video

from maps_ray.data import DatasetError, LeRobotWriter, open_dataset
from maps_ray.data.video import decode, probe


def writer(root: Path, **options: object) -> LeRobotWriter:
    return LeRobotWriter(root, cameras={"image": SIZE}, state_names=["s"], action_names=["a", "b"], **options)


def add(to: LeRobotWriter, episode: int, length: int = 6, task: str = "push") -> int:
    images = {"image": square_video(episode, length, 0)}
    return to.add_episode(task, images, np.full((length, 1), episode), np.full((length, 2), episode))


def test_info_and_layout_are_those_of_v3(squares: Recorded) -> None:
    info = json.loads((squares.root / "meta/info.json").read_text())
    frames = sum(len(actions) for actions in squares.actions)
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (9, frames, 3)
    assert info["splits"] == {"train": "0:9"}
    assert info["features"]["observation.images.wrist_image"]["shape"] == [32, 48, 3]
    assert info["features"]["action"] == {
        "dtype": "float32",
        "shape": [7],
        "names": ["x", "y", "z", "rx", "ry", "rz", "gripper"],
    }
    for key in ("data", "videos/observation.images.image", "videos/observation.images.wrist_image", "meta/episodes"):
        assert len(list(squares.root.glob(f"{key}/chunk-000/file-00?.*"))) == 3


def test_rows_count_frames_and_point_to_their_task(squares: Recorded) -> None:
    paths = sorted(squares.root.glob("data/*/*.parquet"))
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    assert [row["index"] for row in rows] == list(range(len(rows)))
    tasks = {row["task_index"]: row["task"] for row in pq.read_table(squares.root / "meta/tasks.parquet").to_pylist()}
    for row in rows:
        assert tasks[row["task_index"]] == squares.tasks[row["episode_index"]]
        assert row["timestamp"] == pytest.approx(row["frame_index"] / 20)


def test_tasks_are_the_pandas_index_that_lerobot_looks_up(squares: Recorded) -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.read_parquet(squares.root / "meta/tasks.parquet")
    assert table.index.name == "task"
    assert [table.loc[task].task_index for task in TASKS] == [0, 1, 2]


def test_episode_statistics_add_up_to_those_of_all_data(squares: Recorded) -> None:
    stats = json.loads((squares.root / "meta/stats.json").read_text())
    actions = np.concatenate(squares.actions).astype(np.float64)
    assert stats["action"]["count"] == [len(actions)]
    for kind, expected in (("min", actions.min(0)), ("max", actions.max(0)), ("mean", actions.mean(0))):
        np.testing.assert_allclose(stats["action"][kind], expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(stats["action"]["std"], actions.std(0), rtol=1e-6)
    assert np.shape(stats["observation.images.image"]["mean"]) == (3, 1, 1)
    assert 0.2 < stats["observation.images.image"]["mean"][0][0][0] < 0.6


def test_each_episode_starts_with_a_key_frame_at_its_timestamp(squares: Recorded) -> None:
    import av

    rows = pq.read_table(squares.root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    path = squares.root / "videos/observation.images.image/chunk-000/file-000.mp4"
    with av.open(str(path)) as container:
        keys = {round(float(p.pts * p.time_base) * 20) for p in container.demux() if p.size and p.is_keyframe}
    for row in rows:
        assert round(row["videos/observation.images.image/from_timestamp"] * 20) in keys


def test_pixels_survive_encoding(squares: Recorded) -> None:
    path = squares.root / "videos/observation.images.image/chunk-000/file-000.mp4"
    original = np.concatenate(squares.images["image"][:4]).astype(float)
    read = np.stack([frame for _, frame in decode(path)])
    assert probe(path).frames == len(original)
    assert np.abs(read - original).mean() < 6


def test_same_frames_give_the_same_video(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with writer(tmp_path / name) as to:
            add(to, 0)
    video = "videos/observation.images.image/chunk-000/file-000.mp4"
    one, two = (list(decode(tmp_path / name / video)) for name in ("one", "two"))
    assert [time for time, _ in one] == [time for time, _ in two]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(one, two, strict=True))


def test_a_folder_with_files_is_not_written_over(squares: Recorded) -> None:
    with pytest.raises(DatasetError, match="append=True"):
        writer(squares.root)


def test_an_unfinished_folder_is_refused_by_the_reader(tmp_path: Path) -> None:
    to = writer(tmp_path / "data")
    add(to, 0)
    with pytest.raises(DatasetError, match="interrupted"):
        open_dataset(tmp_path / "data")


def test_append_drops_what_a_crash_left_and_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "data"
    to = writer(root, episodes_per_file=2)
    for episode in range(3):
        add(to, episode, task=f"task {episode}")
    # The process dies here: two episodes are committed, the third is not.
    for left_behind in ("videos/observation.images.image/chunk-000/file-001.mp4", "data/chunk-000/file-001.parquet"):
        (root / left_behind).write_bytes(b"cut short")
    assert len(open_dataset(root).episodes) == 2
    with writer(root, append=True) as again:
        assert again.total_episodes == 2
        assert add(again, 2, task="task 0") == 2
    dataset = open_dataset(root)
    assert [episode.task for episode in dataset.episodes] == ["task 0", "task 1", "task 0"]
    np.testing.assert_array_equal(dataset.vectors("action", 2), np.full((6, 2), 2))
    stats = json.loads((root / "meta/stats.json").read_text())
    assert stats["action"]["max"] == [2, 2] and stats["action"]["count"] == [18]


def test_append_refuses_other_features(squares: Recorded) -> None:
    with pytest.raises(DatasetError, match="cannot append"):
        writer(squares.root, append=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": " "}, "task is empty"),
        ({"images": {}}, "cameras"),
        ({"images": {"image": np.zeros((6, 48, 32, 3), np.uint8)}}, r"must be uint8 \(T, 32, 48, 3\)"),
        ({"images": {"image": np.zeros((5, 32, 48, 3), np.uint8)}}, "lengths must be equal"),
        ({"state": np.zeros((6, 2))}, r"observation.state must have shape \(T, 1\)"),
        ({"actions": np.full((6, 2), np.nan)}, "episode 0, frame 0: actions holds nan"),
    ],
)
def test_bad_episodes_are_refused_and_leave_no_trace(tmp_path: Path, change: dict[str, object], message: str) -> None:
    good = {
        "task": "push",
        "images": {"image": square_video(0, 6, 0)},
        "state": np.zeros((6, 1)),
        "actions": np.zeros((6, 2)),
    }
    with writer(tmp_path / "data") as to:
        with pytest.raises(DatasetError, match=message):
            to.add_episode(**{**good, **change})
        assert to.total_episodes == 0
        to.add_episode(**good)
    assert len(open_dataset(tmp_path / "data").episodes) == 1


def test_extra_facts_have_the_same_names_in_every_episode(tmp_path: Path) -> None:
    arrays = ({"image": square_video(0, 6, 0)}, np.zeros((6, 1)), np.zeros((6, 2)))
    with writer(tmp_path / "data") as to:
        to.add_episode("push", *arrays, {"seed": 3, "suite": "libero_object"})
        with pytest.raises(DatasetError, match="extra"):
            to.add_episode("push", *arrays, {"seed": 4})
    assert open_dataset(tmp_path / "data").episodes[0].extra == {"seed": 3, "suite": "libero_object"}


def test_odd_image_sizes_are_refused(tmp_path: Path) -> None:
    to = LeRobotWriter(tmp_path / "data", cameras={"image": (31, 48)}, state_names=["s"], action_names=["a"])
    with pytest.raises(DatasetError, match="even"):
        to.add_episode("push", {"image": np.zeros((3, 31, 48, 3), np.uint8)}, np.zeros((3, 1)), np.zeros((3, 1)))
