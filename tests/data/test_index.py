"""The index: computed once, in parallel, whole or not at all."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from squares_data import Recorded

from maps_ray.data import DatasetError, Demonstrations, check_data, open_dataset, storage
from maps_ray.data.index import Index, NotIndexed
from maps_ray.spec import DataSpec


def test_vectors_are_those_of_the_reader(squares: Recorded, tmp_path: Path) -> None:
    index = Index(tmp_path)
    dataset = open_dataset(squares.root, scan=index.scan)
    vectors = index.vectors(dataset, ("action", "state"))
    assert len(pickle.dumps(vectors)) < 2000
    for episode in range(9):
        np.testing.assert_array_equal(vectors.episode("action", episode), squares.actions[episode])
        np.testing.assert_array_equal(vectors.episode("state", episode), squares.states[episode])
    np.testing.assert_array_equal(
        vectors.select("state", [7, 2]), np.concatenate([squares.states[7], squares.states[2]])
    )
    assert vectors.fault("action", range(9)) is None


def test_a_second_run_reads_nothing_again_from_a_copy_too(
    squares: Recorded, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spec(path: Path) -> DataSpec:
        return DataSpec(path=path, chunk=4, cache={"folder": tmp_path / "cache"})

    first = Demonstrations(spec(squares.root), use_proprio=True)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}

    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    kind = type(first.sources[0].dataset)
    monkeypatch.setattr(kind, "scan", refuse)
    monkeypatch.setattr(kind, "stored", refuse)
    again = Demonstrations(spec(copy), use_proprio=True)
    assert again.statistics["copy"].to_dict() == first.statistics["data"].to_dict()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("kept", [0, 0.5])
def test_what_a_loss_of_power_cut_short_is_computed_again(squares: Recorded, tmp_path: Path, kept: float) -> None:
    spec = DataSpec(path=squares.root, chunk=4, cache={"folder": tmp_path})
    whole = Demonstrations(spec, use_proprio=True)
    # Read now: what is mapped from a file must not be cut off.
    actions = whole.samples("train")[0].actions
    assert check_data(spec) == []
    paths = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert {path.suffix for path in paths} == {".json", ".npy", ".sound"}
    for path in paths:
        before = path.read_bytes()
        path.write_bytes(before[: int(kept * len(before))])
        assert check_data(spec) == []
        again = Demonstrations(spec, use_proprio=True)
        assert again.statistics["data"].to_dict() == whole.statistics["data"].to_dict()
        np.testing.assert_array_equal(again.samples("train")[0].actions, actions)
        assert path.read_bytes() == before


def test_names_that_are_no_utf8(copy: Path) -> None:
    (copy / "meta" / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"")
    assert check_data(DataSpec(path=copy, chunk=4)) == []


def test_a_change_in_one_of_very_many_files_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As of a large data set.
    monkeypatch.setattr(storage, "_SMALL", 0)
    sizes = {f"episode_{number:06d}.parquet": 40_000 for number in range(1200)}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))

    def told() -> str:
        return storage.digest(storage.content(storage.Storage(tmp_path), sizes))

    before = told()
    for name, place in (("episode_000777.parquet", 16_000), ("episode_001001.parquet", 39_999)):
        (tmp_path / name).write_bytes(bytes(place) + b"1" + bytes(40_000 - place - 1))
        assert told() != before
        (tmp_path / name).write_bytes(bytes(40_000))
    assert told() == before


def test_other_content_has_another_index(copy: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    spec = DataSpec(path=copy, chunk=4, cache={"folder": tmp_path / "cache"})
    before = Demonstrations(spec, use_proprio=True)
    path = copy / "data/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0]["action"][0] = 100.0
    pq.write_table(pa.Table.from_pylist(rows), path)
    after = Demonstrations(spec, use_proprio=True)
    assert len(list((tmp_path / "cache/index").iterdir())) == 2
    assert before.statistics["copy"].action.max[0] < 100
    assert after.statistics["copy"].action.max[0] == 100


def test_what_was_not_finished_is_not_used(squares: Recorded, tmp_path: Path) -> None:
    program = """
import os, sys
from maps_ray.data import index
from maps_ray.data import Demonstrations
from maps_ray.spec import DataSpec
write = index._write_vectors
def killed(dataset, kind, path, report):
    write(dataset, kind, path, report)
    os.kill(os.getpid(), 9)
index._write_vectors = killed
Demonstrations(DataSpec(path=sys.argv[1], chunk=4, cache={"folder": sys.argv[2]}), use_proprio=True)
"""
    done = subprocess.run([sys.executable, "-c", program, str(squares.root), str(tmp_path)], check=False)
    assert done.returncode == -9
    assert not [path for path in tmp_path.rglob("action.npy") if ".unfinished" not in str(path)]
    spec = DataSpec(path=squares.root, chunk=4, cache={"folder": tmp_path})
    statistics = Demonstrations(spec, use_proprio=True).statistics["data"]
    assert statistics.num_transitions == sum(map(len, squares.actions))
    assert not list(tmp_path.rglob(".unfinished*"))


def test_a_folder_that_cannot_be_written_is_named(squares: Recorded, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    spec = DataSpec(path=squares.root, cache={"folder": tmp_path / "file" / "cache"})
    with pytest.raises(DatasetError, match=r"cannot write the index .* data\.cache\.folder or MAPS_RAY_CACHE"):
        Demonstrations(spec, use_proprio=True)
    (problem,) = check_data(spec)
    assert "data.cache.folder" in problem.message


def test_many_shards_are_left_to_the_cluster(
    squares: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maps_ray.data.index._SHARDS_AT_ONCE", 2)
    spec = DataSpec(path=squares.root, chunk=4, cache={"folder": tmp_path})
    with pytest.raises(NotIndexed):
        open_dataset(squares.root, scan=Index(tmp_path, patient=False).scan)
    assert check_data(spec, patient=False) == []
    # The fault shows once somebody has looked.
    spec = spec.model_copy(update={"chunk": 99})
    assert check_data(spec, patient=False) == []
    assert [problem.field for problem in check_data(spec)] == ["data.chunk"]
    assert [problem.field for problem in check_data(spec, patient=False)] == ["data.chunk"]
