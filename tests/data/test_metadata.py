"""Whatever stands in the metadata of a LeRobotDataset, it is read or refused; never a traceback."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from squares_data import Recorded

from maps_ray.data import DatasetError, open_dataset

DATA = Path(__file__).parents[1] / "fixtures" / "data"
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["{chunk_index:03d}", "{x}", "{", "../x", "/x", "0:5", "a:b", "{video_key.__class__}", "v3.9"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = st.sampled_from(
    [
        lambda n: pa.nulls(n),
        lambda n: pa.nulls(n, pa.int64()),
        lambda n: pa.nulls(n, pa.list_(pa.string())),
        lambda n: pa.array(["seven"] * n),
        lambda n: pa.array([""] * n),
        lambda n: pa.array([-1] * n),
        lambda n: pa.array([2**62] * n),
        lambda n: pa.array([0.5] * n),
        lambda n: pa.array([float("nan")] * n),
        lambda n: pa.array([True] * n),
        lambda n: pa.array([[1, 2]] * n),
        lambda n: pa.array([["a", None]] * n),
        lambda n: pa.array([[]] * n, pa.list_(pa.string())),
        lambda n: pa.array([{"a": 1}] * n),
        lambda n: pa.array([b"\xff"] * n),
        lambda n: pa.array([None, *range(n - 1)], pa.int32()),
        lambda n: pa.array(range(n)).cast(pa.timestamp("ns")),
        lambda n: pa.array(["a"] * n).dictionary_encode(),
    ]
)


@pytest.fixture(scope="module")
def v3(squares: Recorded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("v3") / "data"
    shutil.copytree(squares.root, root)
    return root


@pytest.fixture(scope="module")
def v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("v2") / "data"
    shutil.copytree(DATA / "pi_libero/data", root)
    return root


def read_some(root: Path) -> None:
    dataset = open_dataset(root)
    for episode in dataset.episodes[:2]:
        if not episode.length:
            continue
        dataset.task(episode.index, episode.length - 1)
        for kind in ("action", "state"):
            if dataset.has(kind):
                dataset.vectors(kind, episode.index)
        for camera in dataset.cameras:
            dataset.frame(camera, episode.index, 0)
            dataset.frame_fault(camera, [episode.index])
    dataset.fingerprint()


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at] if at else []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [path for key, child in children for path in _paths(child, (*at, key))]


def _changed(data: st.DataObject, whole: Any, value: Any) -> Any:
    *parents, last = data.draw(st.sampled_from(_paths(whole)))
    inner = whole
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return whole


@settings(max_examples=150, deadline=None)
@given(data=st.data(), value=JSON)
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_any_value_in_any_field_of_info(
    request: pytest.FixtureRequest, version: str, data: st.DataObject, value: Any
) -> None:
    path = request.getfixturevalue(version) / "meta/info.json"
    text = path.read_text()
    try:
        path.write_text(json.dumps(_changed(data, json.loads(text), value)))
        with contextlib.suppress(DatasetError):
            read_some(path.parents[1])
    finally:
        path.write_text(text)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), name=st.sampled_from(["tasks.jsonl", "episodes.jsonl"]), value=JSON)
def test_any_value_in_any_line(v2: Path, data: st.DataObject, name: str, value: Any) -> None:
    path = v2 / "meta" / name
    text = path.read_text()
    try:
        lines = _changed(data, [json.loads(line) for line in text.splitlines()], value)
        path.write_text("\n".join(json.dumps(line) for line in lines))
        with contextlib.suppress(DatasetError):
            read_some(v2)
    finally:
        path.write_text(text)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), column=COLUMNS)
@pytest.mark.parametrize("name", ["episodes/chunk-000/file-001.parquet", "tasks.parquet"])
def test_any_type_in_any_column(v3: Path, name: str, data: st.DataObject, column: Callable[[int], pa.Array]) -> None:
    path = v3 / "meta" / name
    whole = path.read_bytes()
    try:
        table = pq.read_table(path)
        names = [n for n in table.column_names if not n.startswith("stats/")]
        chosen = data.draw(st.sampled_from(names))
        kept = table.drop_columns([chosen])
        if data.draw(st.booleans()):
            kept = kept.append_column(chosen, column(len(table)))
        pq.write_table(kept.replace_schema_metadata(None), path)
        with contextlib.suppress(DatasetError):
            read_some(v3)
    finally:
        path.write_bytes(whole)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), column=COLUMNS)
def test_any_type_in_any_column_of_the_data(v3: Path, data: st.DataObject, column: Callable[[int], pa.Array]) -> None:
    path = v3 / "data/chunk-000/file-000.parquet"
    whole = path.read_bytes()
    try:
        table = pq.read_table(path)
        chosen = data.draw(st.sampled_from(table.column_names))
        pq.write_table(table.set_column(table.column_names.index(chosen), chosen, column(len(table))), path)
        with contextlib.suppress(DatasetError):
            read_some(v3)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["meta/info.json", "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"null", b"[]", b"{}", b"PAR1", b"[" * 100_000])
def test_broken_files(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    with pytest.raises(DatasetError):
        open_dataset(copy)


def test_fps_that_contradicts_timestamps_or_videos(copy: Path) -> None:
    info = copy / "meta/info.json"
    text = info.read_text()
    info.write_text(text.replace('"fps": 20,', '"fps": 10,', 1))
    with pytest.raises(DatasetError, match="fps = 10"):
        open_dataset(copy)
    # Metadata and rows agree on 10 fps, the videos have 20.
    for path in (copy / "data").rglob("*.parquet"):
        table = pq.read_table(path)
        times = pa.array([2 * time for time in table["timestamp"].to_pylist()], pa.float32())
        pq.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", times), path)
    for path in (copy / "meta/episodes").rglob("*.parquet"):
        table = pq.read_table(path)
        for name in [name for name in table.column_names if name.endswith("_timestamp")]:
            values = pa.array([2 * time for time in table[name].to_pylist()])
            table = table.set_column(table.column_names.index(name), name, values)
        pq.write_table(table, path)
    dataset = open_dataset(copy)
    with pytest.raises(DatasetError, match=r"the video has 20 frames a second, .* fps = 10"):
        dataset.frame("image", 0, 0)
    assert "frames a second" in str(dataset.frame_fault("image", [0]))


def test_pictures_by_path(tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(DATA / "pi_libero/data", root)
    good = open_dataset(DATA / "pi_libero/data")
    path = root / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(path)
    cells = []
    for row, cell in enumerate(table["image"].to_pylist()):
        name = f"images/image/episode_000001/frame_{row:06d}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(cell["bytes"])
        cells.append({"bytes": None, "path": name})
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    place = table.column_names.index("image")
    pq.write_table(table.set_column(place, "image", pa.array(cells, kind)), path)
    dataset = open_dataset(root)
    assert (dataset.frame("image", 1, 4) == good.frame("image", 1, 4)).all()
    assert dataset.frame_fault("image", [0, 1]) is None
    name = "images/image/episode_000001/frame_000005.png"
    Image.fromarray(np.full((8, 8), 3000, np.uint16)).save(root / name)
    with pytest.raises(DatasetError, match="more than 8 bits"):
        dataset.frame("image", 1, 5)
    before = dataset.fingerprint()
    for suffix in (".jpg", ".jpeg"):
        (root / "images/image/other").with_suffix(suffix).write_bytes(b"a picture")
        assert open_dataset(root).fingerprint() != before
        before = open_dataset(root).fingerprint()
    (root / cells[3]["path"]).unlink()
    assert "frame_000003.png is missing" in str(dataset.frame_fault("image", [0, 1]))
    cells[2] = {"bytes": None, "path": None}
    pq.write_table(table.set_column(place, "image", pa.array(cells, kind)), path)
    assert "holds no image" in str(open_dataset(root).frame_fault("image", [1]))
    with pytest.raises(DatasetError, match="image in row 2 holds no image"):
        open_dataset(root).frame("image", 1, 2)
    for spoilt in (
        pa.array([{"bytes": b"", "path": None} for _ in cells], kind),
        pa.array([[[0.5]] for _ in cells]),
        pa.array(["images/nothing.png" for _ in cells]),
    ):
        pq.write_table(table.set_column(place, "image", spoilt), path)
        assert "in row 0" in str(open_dataset(root).frame_fault("image", [1]))
