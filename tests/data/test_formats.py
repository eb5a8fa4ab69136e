"""Each reader against reference values of the published pipelines.

`tests/fixtures/data`: each set was written by its format's own writer (tensorflow_datasets 4.9.3; lerobot 0.3.3 for
v2.1, its commit 638d411c for v2.0); `expected` was computed by openvla-oft 213c5ff with dlimp_openvla 040105d on
TensorFlow 2.15, and by lerobot 0.3.3's reader. The episodes are windows of the bundled demonstrations, scaled down; all
of `bridge` is made up.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from maps_ray.data import DatasetError, open_dataset
from maps_ray.data.statistics import DatasetStatistics, compute, normalize
from maps_ray.models.resampling import lanczos3

DATA = Path(__file__).parents[1] / "fixtures" / "data"
RLDS = [("libero_spatial", "libero", ("train",)), ("bridge", "bridge", ("train", "val"))]


def blocks(image: np.ndarray) -> np.ndarray:
    """Means of 8 x 8 blocks, as the references keep of each frame."""
    height, width, _ = image.shape
    return image.reshape(8, height // 8, 8, width // 8, 3).astype(np.float64).mean((1, 3))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize(("name", "version"), [("lerobot_v21", "lerobot_v2.1"), ("pi_libero", "lerobot_v2.0")])
def test_lerobot_v2(name: str, version: str) -> None:
    dataset = open_dataset(DATA / name / "data")
    expected, values = read(DATA / name / "expected/dataset.json"), np.load(DATA / name / "expected/episodes.npz")
    assert (dataset.format, dataset.fps, dataset.cameras) == (version, expected["fps"], expected["cameras"])
    for episode, told in zip(dataset.episodes, expected["episodes"], strict=True):
        i, length = episode.index, episode.length
        assert [dataset.task(i, t) for t in range(length)] == [s for s, n in told["task_of_frames"] for _ in range(n)]
        assert length == told["length"]
        for kind in ("action", "state"):
            np.testing.assert_array_equal(dataset.vectors(kind, i), values[f"e{i}/{kind}"])
            assert dataset.vectors(kind, i).dtype == np.float32
        for camera in dataset.cameras:
            for t in range(0, length, 3):
                assert np.abs(blocks(dataset.frame(camera, i, t)) - values[f"e{i}/blocks/{camera}"][t]).max() < 0.2
    for path in (DATA / name / "expected").glob("*.png"):
        episode_, frame, camera = path.stem.split("_", 2)
        read_ = dataset.frame(camera, int(episode_[1:]), int(frame[1:]))
        assert np.abs(read_.astype(int) - np.asarray(Image.open(path))).max() <= 2


@pytest.mark.parametrize(("name", "transform", "splits"), RLDS)
def test_rlds_standardised_as_published(name: str, transform: str, splits: tuple[str, ...]) -> None:
    told = read(DATA / name / "expected/trajectories.json")["splits"]
    raw_statistics = read(DATA / name / "expected/statistics.json")
    expected = raw_statistics.get("bridge_orig") or raw_statistics.get("libero_spatial_no_noops") or raw_statistics
    opened = {split: open_dataset(DATA / name / "data", split, transform) for split in splits}
    pairs = [(dataset, i) for dataset in opened.values() for i in range(len(dataset.episodes))]
    actions, states = ([dataset.vectors(kind, i) for dataset, i in pairs] for kind in ("action", "state"))
    chosen = opened["train"].transform
    assert chosen is not None
    mask = chosen.action_mask(7)
    mine = compute(np.concatenate(actions), np.concatenate(states), mask, len(actions)).to_dict()
    for kind in ("action", "proprio"):
        for entry, value in expected[kind].items():
            if entry in mine[kind]:
                np.testing.assert_allclose(mine[kind][entry], value, rtol=0, atol=1e-6, err_msg=f"{kind} {entry}")
    assert mine["num_transitions"] == expected["num_transitions"]
    assert mine["num_trajectories"] == expected["num_trajectories"]
    statistics = DatasetStatistics.from_dict(expected)
    assert statistics.proprio is not None
    for split, dataset in opened.items():
        stored, values = open_dataset(DATA / name / "data", split), np.load(DATA / name / f"expected/{split}.npz")
        assert dataset.format == "rlds" and len(dataset.episodes) == len(told[split])
        for i, said in enumerate(told[split]):
            assert dataset.episodes[i].task == said["language_instruction"]
            assert dataset.episodes[i].length == said["standardised_steps"]
            assert stored.episodes[i].length == said["raw_steps"]
            assert said["metadata"].items() <= dict(dataset.episodes[i].extra).items()
            action, state = dataset.vectors("action", i), dataset.vectors("state", i)
            np.testing.assert_array_equal(action, values[f"t{i}/action_standardised"])
            np.testing.assert_array_equal(state, values[f"t{i}/proprio_standardised"])
            normalised = normalize(action, statistics.action, "q01_q99")
            np.testing.assert_array_equal(normalised, values[f"t{i}/action_normalised"])
            np.testing.assert_array_equal(
                normalize(state, statistics.proprio, "q01_q99"), values[f"t{i}/proprio_normalised"]
            )
            chunks = values.get(f"t{i}/action_chunks_8", ())
            for t in range(len(chunks)):
                np.testing.assert_array_equal(normalised[t : t + 8], chunks[t])
            for camera in ("primary", "wrist"):
                means = values.get(f"t{i}/image_blocks_{camera}", ())
                for t in range(0, len(means), 4):
                    resized = lanczos3(dataset.frame(camera, i, t), (224, 224))
                    assert np.abs(blocks(resized) - means[t]).max() < 0.2


@pytest.mark.parametrize(("name", "transform"), [entry[:2] for entry in RLDS])
def test_jpeg_is_decoded_as_tensorflow_does(name: str, transform: str) -> None:
    paths = list((DATA / name / "expected").glob("*_decoded.png"))
    assert len(paths) >= 2
    for path in paths:
        split, episode, step, camera, _ = path.stem.split("_")
        dataset = open_dataset(DATA / name / "data", split, transform)
        frame = dataset.frame(camera, int(episode[1:]), int(step[1:]))
        assert np.array_equal(frame, np.asarray(Image.open(path)))


def test_a_view_that_a_configuration_lacks_is_black() -> None:
    dataset = open_dataset(DATA / "bridge/data", "val", "bridge")
    assert dataset.fps == 5 and dataset.cameras == ["image_0", "image_1", "image_2", "image_3"]
    assert not dataset.frame("wrist", 0, 0).any() and dataset.frame("wrist", 0, 0).shape == (64, 64, 3)
    with pytest.raises(DatasetError, match="no camera 'wrist'"):
        open_dataset(DATA / "bridge/data").frame("wrist", 0, 0)


def test_features_by_their_own_names() -> None:
    dataset = open_dataset(DATA / "libero_spatial/data", state="joint_state", cameras={"primary": "wrist_image"})
    assert dataset.width("state") == 7
    np.testing.assert_array_equal(dataset.frame("primary", 0, 3), dataset.frame("wrist_image", 0, 3))
    with pytest.raises(DatasetError, match=r"no feature 'gripper'; .*name the one that holds the states"):
        open_dataset(DATA / "libero_spatial/data", state="gripper").vectors("state", 0)


def test_unknown_names_give_the_nearest() -> None:
    with pytest.raises(DatasetError, match="no split 'vall'; did you mean 'val'"):
        open_dataset(DATA / "bridge/data", "vall")
    with pytest.raises(DatasetError, match="unknown name 'brigde'; did you mean 'bridge'"):
        open_dataset(DATA / "bridge/data", transform="brigde")
    with pytest.raises(DatasetError, match=r"no camera 'image_5'; did you mean 'image_\d'"):
        open_dataset(DATA / "bridge/data").frame("image_5", 0, 0)


def demonstrations(path: Path, *, published: bool, lengths: tuple[int, ...] = (4, 5, 3), gap: bool = False) -> Path:
    """An HDF5 file in LIBERO's layout; frames are upside down, as the simulator's buffer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    numbers = [0, 2, 10] if gap else range(len(lengths))
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        if published:
            data.attrs["problem_info"] = json.dumps({"language_instruction": "put the cup there"})
            data.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 25}})
        for number, length in zip(numbers, lengths, strict=True):
            demo = data.create_group(f"demo_{number}")
            demo["actions"] = rng.normal(size=(length, 7))
            obs = demo.create_group("obs")
            obs["ee_states"], obs["gripper_states"] = rng.normal(size=(length, 6)), rng.normal(size=(length, 2))
            obs["joint_states"] = rng.normal(size=(length, 7))
            for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                obs[camera] = rng.integers(0, 255, (length, 8, 6, 3), np.uint8)
            obs["agentview_depth"] = rng.random((length, 8, 6, 1), np.float32)
    return path


@pytest.mark.parametrize("published", [True, False])
def test_libero_hdf5(tmp_path: Path, published: bool) -> None:
    path = demonstrations(tmp_path / "d/KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5", published=published, gap=True)
    for place in (path.parent, path):
        dataset = open_dataset(place)
        assert dataset.format == "libero_hdf5" and dataset.fps == (25 if published else 20)
        assert [episode.length for episode in dataset.episodes] == [4, 5, 3]
        assert dataset.tasks == ["put the cup there" if published else "turn on the stove"]
        with h5py.File(path) as file:
            for i, demo in enumerate(("demo_0", "demo_2", "demo_10")):
                stored = file["data"][demo]
                np.testing.assert_array_equal(dataset.vectors("action", i), stored["actions"][()].astype(np.float32))
                state = np.concatenate([stored["obs/ee_states"], stored["obs/gripper_states"]], axis=1)
                np.testing.assert_array_equal(dataset.vectors("state", i), state.astype(np.float32))
                for name, key in (("image", "agentview_rgb"), ("wrist_image", "eye_in_hand_rgb")):
                    frame = dataset.frame(name, i, 2)
                    np.testing.assert_array_equal(frame, stored["obs"][key][2][::-1, ::-1])
        # Depth is no picture: one channel of floats.
        assert dataset.cameras == ["agentview_rgb", "eye_in_hand_rgb"]
        turned = open_dataset(place, transform="libero").vectors("action", 0)[:, -1]
        np.testing.assert_array_equal(turned, 1 - np.clip(dataset.vectors("action", 0)[:, -1], 0, 1))


def test_broken_hdf5(tmp_path: Path) -> None:
    path = demonstrations(tmp_path / "put_it_demo.hdf5", published=False)
    with h5py.File(path, "a") as file:
        del file["data/demo_1/obs/agentview_rgb"]
        file["data/demo_1/obs/agentview_rgb"] = np.zeros((4, 8, 6, 3), np.uint8)
    with pytest.raises(DatasetError, match="demo_1 has 5 actions, but obs/agentview_rgb 4"):
        open_dataset(tmp_path)
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            for camera in ("agentview", "eye_in_hand"):
                del demo[f"obs/{camera}_rgb"]
                demo[f"obs/{camera}_image"] = np.zeros((len(demo["actions"]), 8, 6, 3), np.uint8)
    with pytest.raises(DatasetError, match=r"demo_0 has the images obs/agentview_image, .* no other HDF5 is read"):
        open_dataset(tmp_path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DatasetError, match=r"put_it_demo.hdf5: cannot read"):
        open_dataset(tmp_path)


def test_a_task_that_changes_within_an_episode(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path / "data"
    shutil.copytree(DATA / "pi_libero/data", root)
    path = root / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("task_index")
    changed = table.set_column(place, "task_index", pa.array([1] * 4 + [0] * 6, pa.int64()))
    pq.write_table(changed, path)
    lines = [json.loads(line) for line in (root / "meta/episodes.jsonl").read_text().splitlines()]
    tasks = [json.loads(line)["task"] for line in (root / "meta/tasks.jsonl").read_text().splitlines()]
    lines[0]["tasks"] = tasks
    (root / "meta/episodes.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    dataset = open_dataset(root)
    assert [dataset.task(0, t) for t in range(10)] == [tasks[1]] * 4 + [tasks[0]] * 6
    assert dataset.episodes[0].task == tasks[1]
