from __future__ import annotations

import io
import json
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from older_formats import as_v21
from PIL import Image
from squares_data import Recorded

from maps_ray.data import DatasetError, check_data, open_dataset
from maps_ray.data.checks import conversions
from maps_ray.data.formats import lerobot
from maps_ray.spec import DataSpec


def edit_info(root: Path, **changes: object) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_data(root: Path, change: object, file: int = 0) -> None:
    """Rewrites one data file from `change(rows)`."""
    path = root / f"data/chunk-000/file-{file:03d}.parquet"
    rows = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist(change(rows)), path)


def messages(root: Path, **options: object) -> list[str]:
    spec = DataSpec(path=root, **options.pop("spec", {}))
    return [str(problem) for problem in check_data(spec, **options)]


def test_vectors_come_back_exactly(squares: Recorded) -> None:
    dataset = open_dataset(squares.root)
    assert [episode.task for episode in dataset.episodes] == squares.tasks
    assert dataset.fps == 20
    for index, episode in enumerate(dataset.episodes):
        np.testing.assert_array_equal(dataset.vectors("action", index), squares.actions[index])
        np.testing.assert_array_equal(dataset.vectors("state", index), squares.states[index])
        assert episode.length == len(squares.actions[index])
        assert episode.extra == {"seed": index, "success": True}


def test_scripts_of_others_find_samples_and_names_where_they_are(squares: Recorded) -> None:
    # Outside this repository such scripts hold data sets against the field's: these names and places stay.
    from maps_ray.data import Demonstrations
    from maps_ray.data.layout import ACTION, STATE

    spec = DataSpec(path=squares.root, chunk=2, cameras=["image"])
    samples = Demonstrations(spec, use_proprio=True).samples("train")
    sample = samples[0]
    names = json.loads((squares.root / "meta/info.json").read_text())["features"]
    assert {ACTION, STATE} <= names.keys() and sample.episode in samples.episodes and sample.step == 0
    assert sample.instruction in squares.tasks and sample.images[0].dtype == np.uint8
    assert sample.actions.shape[1] == names[ACTION]["shape"][0] and sample.proprio is not None


def test_every_step_of_every_episode_has_its_own_frame(squares: Recorded) -> None:
    dataset = open_dataset(squares.root)
    for camera, originals in squares.images.items():
        stacked = np.concatenate(originals).astype(np.int16)
        row = 0
        for episode in dataset.episodes:
            for step in range(episode.length):
                read = dataset.frame(camera, episode.index, step)
                assert read.shape == (32, 48, 3) and read.dtype == np.uint8
                distance = np.abs(stacked - read).mean(axis=(1, 2, 3))
                assert distance.argmin() == row
                assert distance[row] < 6
                row += 1
    with pytest.raises(IndexError, match="step 9 of episode 0, which has 9"):
        dataset.frame("image", 0, 9)


def test_threads_do_not_close_one_anothers_videos(squares: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lerobot, "_VIDEOS_KEPT", 1)
    dataset, alone = open_dataset(squares.root), open_dataset(squares.root)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            read = list(pool.map(lambda turn: dataset.frame("image", turn % 2 * 8, 3), range(60)))
    finally:
        sys.setswitchinterval(interval)
    for turn, frame in enumerate(read):
        np.testing.assert_array_equal(frame, alone.frame("image", turn % 2 * 8, 3))


def test_a_pickled_data_set_carries_no_content(squares: Recorded) -> None:
    dataset = open_dataset(squares.root)
    frame, fresh = dataset.frame("image", 3, 2), len(pickle.dumps(open_dataset(squares.root)))
    assert len(pickle.dumps(dataset)) == fresh < 50_000
    other = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(other.frame("image", 3, 2), frame)
    assert other.fingerprint() == dataset.fingerprint()


def test_a_sound_data_set_has_no_problems(squares: Recorded) -> None:
    assert messages(squares.root, action_dim=7, proprio_dim=8) == []


def test_checking_needs_neither_torch_nor_pandas(squares: Recorded) -> None:
    code = (
        "import sys\nfrom maps_ray.data import check_data\nfrom maps_ray.spec import DataSpec\n"
        f"assert check_data(DataSpec(path={str(squares.root)!r}), action_dim=7) == []\n"
        "assert not {'torch', 'pandas', 'ray'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_folder_and_metadata(tmp_path: Path) -> None:
    # Of what may not be looked at, such as another user's folder, the system's error is told.
    with pytest.raises(DatasetError, match="cannot read"):
        open_dataset(tmp_path / ("x" * 300))
    with pytest.raises(DatasetError, match="no such data set folder"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"no data set that is known: a LeRobotDataset has meta/info\.json"):
        open_dataset(tmp_path)
    assert messages(tmp_path / "nowhere")[0].startswith("data.path = ")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("v1.6", "known are v2.0, v2.1 and v3"),
        ("v4.0", "known are v2.0, v2.1 and v3"),
        (None, "codebase_version = None"),
    ],
)
def test_versions_it_cannot_read(copy: Path, version: str | None, message: str) -> None:
    edit_info(copy, codebase_version=version)
    with pytest.raises(DatasetError, match=message):
        open_dataset(copy)


def test_broken_json(copy: Path) -> None:
    (copy / "meta/info.json").write_text("{")
    with pytest.raises(DatasetError, match="not readable as JSON"):
        open_dataset(copy)


def test_counts_that_do_not_agree(copy: Path) -> None:
    (copy / "meta/episodes/chunk-000/file-002.parquet").unlink()
    with pytest.raises(DatasetError, match="total_episodes = 9, meta/episodes has 8"):
        open_dataset(copy)


def test_a_missing_camera_names_those_there_are(squares: Recorded) -> None:
    (message,) = messages(squares.root, spec={"cameras": ["image", "wrist_imag"]})
    assert message.startswith("data.cameras = 'wrist_imag'")
    assert "did you mean 'wrist_image'? allowed: image, wrist_image" in message


def test_an_unknown_transform_names_those_near(squares: Recorded) -> None:
    (message,) = messages(squares.root, spec={"transform": "liber"})
    assert message.startswith("data.transform = 'liber': ") and "did you mean 'libero'?" in message


def test_cameras_by_their_full_name(squares: Recorded) -> None:
    assert open_dataset(squares.root).camera_key("observation.images.image") == "observation.images.image"


def test_wrong_widths(squares: Recorded) -> None:
    first, second = messages(squares.root, action_dim=14, proprio_dim=9)
    assert "action has 7 dimensions, the policy has 14" in first
    assert "observation.state has 8 dimensions, the policy has 9" in second
    assert messages(squares.root, action_dim=7, proprio_dim=9, use_proprio=False) == []


def test_rows_of_another_width_than_the_metadata(copy: Path) -> None:
    edit_data(copy, lambda rows: [{**row, "action": row["action"][:6]} for row in rows])
    assert "action must have 7 dimensions in every row; found 6" in messages(copy)[0]


def test_a_missing_column_names_those_there_are(copy: Path) -> None:
    edit_data(copy, lambda rows: [{k: v for k, v in row.items() if k != "action"} for row in rows])
    assert "no column 'action'; " in messages(copy)[0]


def test_a_feature_without_metadata(copy: Path) -> None:
    features = json.loads((copy / "meta/info.json").read_text())["features"]
    features["observation.state_joint"] = features.pop("observation.state")
    edit_info(copy, features=features)
    assert "no feature 'observation.state'; did you mean 'observation.state_joint'" in messages(copy)[0]


@pytest.mark.parametrize("change", [{"shape": [7, 1]}, {"dtype": "object"}])
def test_a_feature_that_is_no_vector(copy: Path, change: dict[str, object]) -> None:
    features = json.loads((copy / "meta/info.json").read_text())["features"]
    features["action"] |= change
    edit_info(copy, features=features)
    stored = "float32 of shape (7, 1)" if "shape" in change else "object of shape (7,)"
    assert f"'action' is {stored}, and the actions must be vectors of numbers" in messages(copy)[0]


def test_episodes_that_were_removed(copy: Path) -> None:
    path = copy / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).slice(2), path)
    with pytest.raises(DatasetError, match=r"numbered 0 to 6, once each; episode_index 2 comes in place of 0: .* anew"):
        open_dataset(copy)


@pytest.mark.parametrize(("feature", "value"), [("action", float("nan")), ("observation.state", float("inf"))])
def test_nan_and_infinity_name_episode_and_frame(copy: Path, feature: str, value: float) -> None:
    def spoil(rows: list[dict]) -> list[dict]:
        row = next(row for row in rows if row["episode_index"] == 5 and row["frame_index"] == 3)
        row[feature] = [*row[feature][:2], value, *row[feature][3:]]
        return rows

    edit_data(copy, spoil, file=1)
    (message,) = messages(copy)
    assert f"{feature} is {value} in episode 5, frame 3, dimension 2" in message


def test_nan_in_a_split_that_counts_for_the_statistics_alone(copy: Path) -> None:
    edit_info(copy, splits={"train": "0:6", "test": "6:9"})
    assert messages(copy) == []
    edit_data(copy, lambda rows: [{**row, "action": [float("nan")] * 7} for row in rows], file=2)
    assert "action is nan in episode 8, frame 0" in messages(copy)[0]
    assert messages(copy, spec={"splits": {"train": {"episodes": "0:"}}}) == []


def test_nan_outside_the_chosen_splits_does_no_harm(copy: Path) -> None:
    edit_data(copy, lambda rows: [{**row, "action": [float("nan")] * 7} for row in rows], file=2)
    assert messages(copy, spec={"splits": {"train": {"episodes": ":2"}}}) == []


def test_missing_rows(copy: Path) -> None:
    edit_data(copy, lambda rows: rows[:-2])
    assert "episode 3 has 12 frames in meta/episodes, but the file holds 10 rows" in messages(copy)[0]


def test_a_video_cut_short(copy: Path) -> None:
    path = copy / "videos/observation.images.wrist_image/chunk-000/file-001.mp4"
    path.write_bytes(path.read_bytes()[:-300])
    (message,) = messages(copy)
    assert "file-001.mp4" in message and "truncated" in message


def test_a_video_with_too_few_frames(copy: Path) -> None:
    videos = copy / "videos/observation.images.image/chunk-000"
    (videos / "file-001.mp4").write_bytes((videos / "file-000.mp4").read_bytes())
    (message,) = messages(copy)
    assert "has 42 frames, episode 7 needs 58" in message
    dataset = open_dataset(copy)
    with pytest.raises(DatasetError, match=r"no frame at 2.850 s; the video is truncated or does not match"):
        dataset.frame("image", 7, 15)


@pytest.mark.parametrize(
    ("late", "slower", "message"),
    [
        (0.05, 1, r"no frame at 0 s, where step 0 of episode 0 is by fps = 20; the nearest is at 0\.05 s"),
        # Within what may be rounding of its header, but half a second longer than its rows.
        (0, 1.0099, r"no frame at 2\.05 s, where step 11 of episode 3 is by fps = 20"),
        # The first frame is cut off by the file's edit list, though stored: each step would show the next one's.
        (-0.05, 1, r"no frame at 2\.05 s, where step 11 of episode 3 is by fps = 20"),
    ],
)
def test_a_video_that_starts_late_or_drifts(copy: Path, late: float, slower: float, message: str) -> None:
    path = copy / "videos/observation.images.image/chunk-000/file-000.mp4"
    moved = copy / "moved.mp4"
    with av.open(str(path)) as given, av.open(str(moved), "w") as made:
        stream = given.streams.video[0]
        copied = made.add_stream_from_template(stream)
        for packet in given.demux(stream):
            if packet.size:
                packet.pts, packet.dts = (
                    round(time * slower + late / stream.time_base) for time in (packet.pts, packet.dts)
                )
                packet.stream = copied
                made.mux(packet)
    moved.rename(path)
    (fault,) = messages(copy)
    assert re.search(message, fault) and "encode it again" in fault


def test_episodes_on_the_same_frames(copy: Path, tmp_path: Path) -> None:
    path = copy / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    name = "videos/observation.images.wrist_image"
    for row in rows:
        row[f"{name}/from_timestamp"], row[f"{name}/to_timestamp"] = 0.0, row["length"] / 20
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DatasetError, match=rf"file-000\.mp4: episodes 0 and 1 lie .* correct {name}/from_timestamp"):
        open_dataset(copy)


def test_older_episodes_on_the_same_frames(squares: Recorded, tmp_path: Path) -> None:
    root = as_v21(squares.root, tmp_path / "v21")
    edit_info(root, video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_000000.mp4")
    with pytest.raises(DatasetError, match=r"episodes 0 and 1 lie on the same frames, .* correct video_path"):
        open_dataset(root)


def test_hidden_files_are_no_part_of_the_data(copy: Path) -> None:
    before = open_dataset(copy).fingerprint()
    for name in ("meta/.DS_Store", "meta/episodes/chunk-000/._file-000.parquet", "data/chunk-000/._file-000.parquet"):
        (copy / name).write_bytes(b"\0\5\x16\7Mac OS X")
    (copy / ".git").mkdir()
    (copy / ".git/a.parquet").write_bytes(b"")
    assert open_dataset(copy).fingerprint() == before and messages(copy) == []


@pytest.mark.parametrize(
    "name", ["data/chunk-000/file-000.parquet", "videos/observation.images.image/chunk-000/file-000.mp4"]
)
def test_a_pointer_of_git_lfs(copy: Path, name: str) -> None:
    (copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n")
    (message,) = messages(copy)
    assert name in message and "run `git lfs pull`" in message


def test_a_missing_or_broken_video(copy: Path) -> None:
    (copy / "videos/observation.images.image/chunk-000/file-000.mp4").unlink()
    (copy / "videos/observation.images.wrist_image/chunk-000/file-000.mp4").write_bytes(b"no video")
    first, second = messages(copy)
    assert "missing" in first and "unreadable" in second


def test_chunk_longer_than_every_episode(squares: Recorded) -> None:
    (message,) = messages(squares.root, spec={"chunk": 18})
    assert message.startswith("data.chunk = 18") and "longest has 17" in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": None}, "fps = None"),
        ({"video_path": None}, "video_path is missing"),
        ({"features": {"action": {"shape": [7]}}}, r"lacks features\.action\.dtype"),
        ({"data_path": "../{chunk_index}/{file_index}.parquet"}, r"info.json: data_path = '\.\./.* leads out of"),
        ({"data_path": "/etc/{chunk_index}/{file_index}.parquet"}, "info.json: data_path = '/etc/.* leads out of"),
        ({"video_path": "a/../../{video_key}/{chunk_index}/{file_index}.mp4"}, "video_path = 'a/.* leads out of"),
        ({"video_path": "s3://b/{video_key}/{chunk_index}/{file_index}.mp4"}, "video_path = 's3://.* leads out of"),
    ],
)
def test_incomplete_metadata(copy: Path, changes: dict[str, object], message: str) -> None:
    edit_info(copy, **changes)
    with pytest.raises(DatasetError, match=message):
        open_dataset(copy)


def test_broken_parquet(copy: Path) -> None:
    (copy / "meta/episodes/chunk-000/file-001.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DatasetError, match=r"file-001.parquet: cannot read"):
        open_dataset(copy)


def test_a_gripper_that_is_not_liberos(copy: Path) -> None:
    for file in range(3):
        edit_data(
            copy, lambda rows: [{**r, "action": [*r["action"][:6], float(r["action"][6] < 0)]} for r in rows], file
        )
    (message,) = messages(copy)
    assert message.startswith("data.gripper = 'libero'") and "use 'none'" in message
    assert messages(copy, spec={"gripper": "none"}) == []
    # The published transform asks for the same commands.
    (message,) = messages(copy, spec={"transform": "libero"})
    assert message.startswith("data.transform = 'libero'") and "set data.gripper: none" in message


def test_episodes_without_sentences(copy: Path) -> None:
    tasks = copy / "meta/tasks.parquet"
    pq.write_table(pa.table({"task_index": [0, 1, 2], "task": [" "] * 3}), tasks)
    for path in (copy / "meta/episodes").rglob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["tasks"]), path)
    (message,) = messages(copy)
    assert "none of the 9 episodes of data.splits.train has a sentence" in message


def test_cameras_stored_as_images_and_other_types_load(tmp_path: Path) -> None:
    """A v3 folder unlike the writer's: PNGs in the data file, float64 lists, another fps, no stats, other names."""
    root = tmp_path / "other"
    frames = np.random.default_rng(0).integers(0, 255, (7, 20, 30, 3), np.uint8)
    rows = []
    for index, frame in enumerate(frames):
        png = io.BytesIO()
        Image.fromarray(frame).save(png, "PNG")
        episode = int(index >= 3)
        rows.append(
            {
                "observation.image": {"bytes": png.getvalue(), "path": None},
                "observation.state": [float(index)],
                "action": [index + 0.5, -1.0],
                "episode_index": episode,
                "frame_index": index - 3 * episode,
            }
        )
    episodes = [
        {
            "episode_index": episode,
            "tasks": ["stack"],
            "length": length,
            "data/chunk_index": 0,
            "data/file_index": 0,
            "dataset_from_index": start,
            "dataset_to_index": start + length,
        }
        for episode, (start, length) in enumerate([(0, 3), (3, 4)])
    ]
    info = {
        "codebase_version": "v3.0",
        "fps": 10,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": None,
        "features": {
            "observation.image": {"dtype": "image", "shape": [20, 30, 3]},
            "observation.state": {"dtype": "float64", "shape": [1]},
            "action": {"dtype": "float64", "shape": [2]},
        },
    }
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    pq.write_table(pa.Table.from_pylist(rows), root / "data/chunk-000/file-000.parquet")
    pq.write_table(pa.Table.from_pylist(episodes), root / "meta/episodes/chunk-000/file-000.parquet")

    assert messages(root, spec={"cameras": ["image"], "chunk": 2, "gripper": "none"}, action_dim=2) == []
    dataset = open_dataset(root)
    for index, frame in enumerate(frames):
        episode = int(index >= 3)
        np.testing.assert_array_equal(dataset.frame("observation.image", episode, index - 3 * episode), frame)
    np.testing.assert_array_equal(dataset.vectors("action", 1)[:, 0], [3.5, 4.5, 5.5, 6.5])


def test_a_convention_is_applied_only_to_its_own_values(copy: Path) -> None:
    """A continuous gripper that reads a little below 0 when shut."""
    for file in range(3):
        edit_data(
            copy, lambda rows: [{**r, "action": [*r["action"][:6], 0.48 * r["action"][6] + 0.47]} for r in rows], file
        )
    (message,) = messages(copy)
    assert message.startswith("data.gripper = 'libero'") and "lies in -0.01 .. 0.95" in message


def test_check_shows_what_a_convention_does(squares: Recorded) -> None:
    (_, *rows) = conversions(DataSpec(path=squares.root, chunk=8))
    assert len(rows) == 7 and rows[6].split() == ["6", "-1", "..", "1", "0", "..", "1"]
    assert all(row.endswith("=") for row in rows[:6])
