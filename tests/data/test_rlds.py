from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlds_data import episode, write

from maps_ray.data import DatasetError, check_data, open_dataset
from maps_ray.data.storage import Storage
from maps_ray.spec import DataSpec

SHARDS = [[5, 3], [7], [2, 9]]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    shards = [[episode(rng, steps, f"move it {steps}") for steps in lengths] for lengths in SHARDS]
    return write(tmp_path_factory.mktemp("rlds") / "set" / "1.0.0", shards)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def read_all(root: Path) -> None:
    dataset = open_dataset(root)
    for one in dataset.episodes:
        dataset.vectors("action", one.index)
        dataset.frame("image", one.index, one.length - 1)


def test_episodes_in_file_order(made: Path) -> None:
    for root in (made, made.parent):
        dataset = open_dataset(root)
        assert [one.length for one in dataset.episodes] == [5, 3, 7, 2, 9]
        assert [one.task for one in dataset.episodes] == [f"move it {n}" for n in (5, 3, 7, 2, 9)]
        assert dataset.episodes[3].extra == {"file_path": "somewhere"} and dataset.fps is None
    rng = np.random.default_rng(0)
    for i, steps in enumerate(n for lengths in SHARDS for n in lengths):
        written = episode(rng, steps, "")
        np.testing.assert_array_equal(dataset.vectors("action", i), written["steps/action"])
        np.testing.assert_array_equal(dataset.vectors("state", i), written["steps/observation/state"])


def test_a_pickled_data_set_reads_the_same(made: Path) -> None:
    dataset = open_dataset(made)
    frame = dataset.frame("image", 4, 8)
    other = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(other.frame("image", 4, 8), frame)
    np.testing.assert_array_equal(other.vectors("state", 2), dataset.vectors("state", 2))


def test_a_frame_costs_its_own_bytes(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(made)
    for index in range(5):
        dataset.frame("image", index, 0)
    sizes: list[int] = []
    read = Storage.read

    def counted(self: Storage, name: str, start: int = 0, stop: int | None = None) -> bytes:
        data = read(self, name, start, stop)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(Storage, "read", counted)
    dataset.frame("image", 0, 4)
    assert len(sizes) == 1 and sizes[0] < 2000


@pytest.mark.parametrize("place", [0, 9, 14, 300, 2500, -2])
def test_every_flipped_byte_is_found(copy: Path, place: int) -> None:
    path = copy / "made-train.tfrecord-00001-of-00003"
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"00001-of-00003: record 0"):
        read_all(copy)


@pytest.mark.parametrize("left", [5, 12, 700, -1, -5])
def test_a_shard_that_is_cut_short(copy: Path, left: int) -> None:
    path = copy / "made-train.tfrecord-00000-of-00003"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(DatasetError, match=r"00000-of-00003: record \d is cut short"):
        open_dataset(copy)


def test_shards_that_are_missing_or_of_another_length(copy: Path) -> None:
    (copy / "made-train.tfrecord-00001-of-00003").unlink()
    with pytest.raises(DatasetError, match=r"00001-of-00003: shard is missing \(1 of 3 of split train\)"):
        open_dataset(copy)
    shutil.copy(copy / "made-train.tfrecord-00000-of-00003", copy / "made-train.tfrecord-00001-of-00003")
    with pytest.raises(DatasetError, match=r"00001-of-00003: holds 2 records, dataset_info.json says 1"):
        open_dataset(copy)


def test_a_split_that_was_not_fetched_and_counts_for_the_statistics(copy: Path) -> None:
    edit(copy / "dataset_info.json", lambda info: info["splits"].append({**info["splits"][0], "name": "val"}))
    spec = {"path": copy, "cameras": ["image"], "chunk": 2, "gripper": "none"}
    (problem,) = check_data(DataSpec(**spec))
    assert "val.tfrecord-00000-of-00003: shard is missing" in problem.message
    assert "the statistics are of val too, as published, unless splits.train.episodes is 0:" in problem.message
    assert check_data(DataSpec(**spec, splits={"train": {"episodes": "0:"}})) == []


def test_features_of_another_version(copy: Path) -> None:
    def narrow(value: Any) -> None:
        steps = value["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
        steps["action"]["tensor"]["shape"]["dimensions"] = ["6"]

    whole = (copy / "features.json").read_text()
    edit(copy / "features.json", narrow)
    with pytest.raises(DatasetError, match=r"action has 35 values, 5 steps of 6 .* another version"):
        read_all(copy)
    older = {"type": "tensorflow_datasets.core.features.features_dict.FeaturesDict", "content": {}}
    (copy / "features.json").write_text(json.dumps(older))
    with pytest.raises(DatasetError, match="another version of tensorflow_datasets"):
        open_dataset(copy)
    (copy / "features.json").write_text(whole.replace('"is_first"', '"first"').replace('"action"', '"command"'))
    with pytest.raises(DatasetError, match="no feature 'action'"):
        read_all(copy)


def test_another_file_format(copy: Path) -> None:
    edit(copy / "dataset_info.json", lambda info: info.update(fileFormat="array_record"))
    with pytest.raises(DatasetError, match="'array_record', this reader knows tfrecord"):
        open_dataset(copy)


@pytest.mark.parametrize("template", ["../{DATASET}", "/etc/passwd", "{SHARD_X_OF_Y", "{0}", "{DATASET.__class__}"])
def test_templates_stay_inside(copy: Path, template: str) -> None:
    edit(copy / "dataset_info.json", lambda info: info["splits"][0].update(filepathTemplate=template))
    with pytest.raises(DatasetError, match=r"inside|filepathTemplate|is missing"):
        open_dataset(copy)


def test_the_newest_version_is_read(copy: Path, tmp_path: Path) -> None:
    root = tmp_path / "versions"
    for version in ("1.0.0", "1.2.0", "1.10.0"):
        shutil.copytree(copy, root / version)
    assert open_dataset(root).path.endswith("1.10.0")


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at] if at else []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [path for key, child in children for path in _paths(child, (*at, key))]


@settings(max_examples=120, deadline=None)
@given(data=st.data(), file=st.sampled_from(["dataset_info.json", "features.json"]), value=JSON)
def test_any_value_in_any_field_is_read_or_refused(made: Path, data: st.DataObject, file: str, value: Any) -> None:
    text = (made / file).read_text()
    try:
        whole = json.loads(text)
        *parents, last = data.draw(st.sampled_from(_paths(whole)))
        inner = whole
        for key in parents:
            inner = inner[key]
        inner[last] = value
        (made / file).write_text(json.dumps(whole))
        with contextlib.suppress(DatasetError):
            read_all(made)
    finally:
        (made / file).write_text(text)
