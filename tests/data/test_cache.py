"""The bounded cache over fsspec's local file system, named by a protocol so that it counts as an object store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import pytest

from maps_ray.data import DatasetError
from maps_ray.data.cache import FileCache, cache_folder
from maps_ray.data.storage import Storage
from maps_ray.spec import CacheSpec

SIZE = 1000


@pytest.fixture
def store(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.mp4").write_bytes(bytes([number]) * SIZE)
    return folder


def uri(store: Path, number: int) -> str:
    return f"local://{store}/{number}.mp4"


def held(folder: Path) -> set[int]:
    return {path.read_bytes()[0] for path in (folder / "files").glob("*.mp4")}


def test_a_file_is_fetched_once(store: Path, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 10 * SIZE)
    first = cache(uri(store, 3))
    assert first is not None and first.read_bytes() == bytes([3]) * SIZE and first.suffix == ".mp4"
    inode = first.stat().st_ino
    assert FileCache(tmp_path / "cache", 10 * SIZE)(uri(store, 3)) == first and first.stat().st_ino == inode
    # Replaced at the store: another file.
    (store / "3.mp4").write_bytes(b"x" * SIZE)
    os.utime(store / "3.mp4", (1, 1))
    again = FileCache(tmp_path / "cache", 10 * SIZE)(uri(store, 3))
    assert again is not None and again != first and again.read_bytes() == b"x" * SIZE


def test_the_files_used_longest_ago_make_place(store: Path, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 3 * SIZE + 10)
    for number in (0, 1, 2, 0, 3):
        assert cache(uri(store, number)) is not None
        time.sleep(0.02)
    assert held(tmp_path / "cache") == {0, 2, 3}


def test_a_file_that_is_open_can_be_read_when_it_made_place(store: Path, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", SIZE + 10)
    path = cache(uri(store, 0))
    assert path is not None
    with path.open("rb") as file:
        cache(uri(store, 1))
        assert not path.exists() and file.read() == bytes([0]) * SIZE


def test_a_file_without_room_is_left_to_ranged_reads(store: Path, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", SIZE - 1)
    assert cache(uri(store, 0)) is None
    source = Storage(f"local://{store}", cache).path_or_file("0.mp4")
    assert not isinstance(source, Path) and source.read() == bytes([0]) * SIZE


@pytest.mark.parametrize("renamed", [True, False])
def test_an_unfinished_file_that_another_process_takes_away(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: bool
) -> None:
    cache, read = FileCache(tmp_path / "cache", 10 * SIZE), Storage.read

    def read_while_it_goes(storage: Storage, name: str, start: int = 0, stop: int | None = None) -> bytes:
        (unfinished,) = (tmp_path / "cache" / "files").glob("*.part")
        data = read(storage, name, start, stop)
        if renamed:  # as by a process that wrote the same, on a file system without locks
            unfinished.rename(unfinished.with_suffix(""))
        else:
            unfinished.unlink()
        return data

    monkeypatch.setattr(Storage, "read", read_while_it_goes)
    if renamed:
        fetched = cache(uri(store, 3))
        assert fetched is not None and fetched.read_bytes() == bytes([3]) * SIZE
    else:
        with pytest.raises(DatasetError, match="cannot write the cache"):
            cache(uri(store, 3))


def test_the_index_counts(store: Path, tmp_path: Path) -> None:
    (tmp_path / "cache" / "index").mkdir(parents=True)
    (tmp_path / "cache" / "index" / "action.npy").write_bytes(b"0" * SIZE)
    cache = FileCache(tmp_path / "cache", 3 * SIZE + 10)
    for number in range(4):
        assert cache(uri(store, number)) is not None
        time.sleep(0.02)
    assert held(tmp_path / "cache") == {2, 3}


def _fetch_all(folder: str, store: str, seed: int) -> list[int]:
    largest = 0
    cache = FileCache(Path(folder), 3 * SIZE + 10)
    for turn in range(40):
        number = (turn * 5 + seed * 3) % 8
        path = cache(f"local://{store}/{number}.mp4")
        if path is not None:
            # It may make place before it is opened.
            with suppress(FileNotFoundError):
                assert path.read_bytes() == bytes([number]) * SIZE
        sizes = []
        for found in (Path(folder) / "files").iterdir():
            try:
                sizes.append(found.stat().st_size)
            except FileNotFoundError:
                continue
        largest = max(largest, sum(sizes))
    return [largest]


def test_processes_share_it_and_never_take_more_than_its_room(store: Path, tmp_path: Path) -> None:
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_fetch_all, str(tmp_path / "cache"), str(store), seed) for seed in range(3)]
        largest = max(job.result(timeout=120)[0] for job in jobs)
    assert 0 < sum(path.stat().st_size for path in (tmp_path / "cache" / "files").iterdir()) <= 3 * SIZE + 10
    # A listing is no snapshot: a file may be counted that made place for the next one meanwhile.
    assert largest <= 6 * SIZE
    assert not list((tmp_path / "cache" / "files").glob("*.part"))


FETCHING = """
import sys, time
from pathlib import Path
from maps_ray.data import cache
from maps_ray.data.storage import Storage
read = Storage.read
def slow(self, name, start=0, stop=None):
    print("fetching", flush=True)
    time.sleep(60)
Storage.read = slow
cache.FileCache(Path(sys.argv[1]), 3010)(sys.argv[2])
"""


def test_what_a_killed_process_left_is_removed(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-c", FETCHING, str(folder), uri(store, 0)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "fetching\n"
    cache = FileCache(folder, 3 * SIZE + 10)
    # While it lives its room is taken, and its file is its own.
    assert [path.stat().st_size for path in (folder / "files").glob("*.part")] == [SIZE]
    for number in (1, 2, 3):
        assert cache(uri(store, number)) is not None
        time.sleep(0.02)
    assert held(folder) == {2, 3}
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert cache(uri(store, 4)) is not None
    assert held(folder) == {2, 3, 4} and not list((folder / "files").glob("*.part"))
    assert cache(uri(store, 0)) is not None


def test_a_folder_that_cannot_be_written_is_named(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=r"file/cache: cannot write the cache .* data\.cache\.folder"):
        FileCache(tmp_path / "file" / "cache", 10 * SIZE)(uri(store, 0))
    with pytest.raises(DatasetError, match=r"9\.mp4"):
        FileCache(tmp_path / "cache", 10 * SIZE)(uri(store, 9))


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MAPS_RAY_CACHE", str(tmp_path / "named"))
    assert cache_folder(CacheSpec()) == tmp_path / "named"
    assert cache_folder(CacheSpec(folder=tmp_path / "told")) == tmp_path / "told"
    monkeypatch.delenv("MAPS_RAY_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(CacheSpec()) == tmp_path / ".cache" / "maps_ray"
