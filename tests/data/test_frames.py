from __future__ import annotations

import errno
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from squares_data import Recorded

from maps_ray.data import DatasetError, LeRobotDataset, frames
from maps_ray.data.frames import FrameStore

CAMERAS = ["observation.images.image", "observation.images.wrist_image"]


def test_every_step_of_every_episode_has_its_own_frame(squares: Recorded) -> None:
    dataset = LeRobotDataset.open(squares.root)
    store = FrameStore(dataset, CAMERAS, range(9))
    for camera, originals in zip(CAMERAS, squares.images.values(), strict=True):
        stacked = np.concatenate(originals).astype(np.int16)
        row = 0
        for episode in dataset.episodes:
            for step in range(episode.length):
                read = store.frame(camera, episode.index, step)
                assert read.shape == (32, 48, 3) and read.dtype == np.uint8
                distance = np.abs(stacked - read).mean(axis=(1, 2, 3))
                assert distance.argmin() == row
                assert distance[row] < 6
                row += 1


def test_only_the_needed_videos_are_decoded_and_only_once(
    squares: Recorded, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = LeRobotDataset.open(squares.root)
    FrameStore(dataset, CAMERAS[:1], [0, 1])
    assert len(list(cache.glob("*/frames.npy"))) == 1

    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} decoded again")

    monkeypatch.setattr(frames, "decode", refuse)
    FrameStore(dataset, CAMERAS[:1], [0, 1])
    with pytest.raises(AssertionError, match="decoded again"):
        FrameStore(dataset, CAMERAS[:1], [8])
    assert not list(cache.glob("*.partial"))


def test_a_changed_video_is_decoded_again(copy: Path) -> None:
    dataset = LeRobotDataset.open(copy)
    before = FrameStore(dataset, CAMERAS[:1], [0]).frame(CAMERAS[0], 0, 0).copy()
    video = dataset.episodes[0].spans[CAMERAS[0]].path
    video.write_bytes(dataset.episodes[0].spans[CAMERAS[1]].path.read_bytes())
    after = FrameStore(dataset, CAMERAS[:1], [0]).frame(CAMERAS[0], 0, 0)
    assert np.abs(after.astype(int) - before).mean() > 10


def test_frames_are_read_only_and_pickle_without_their_content(squares: Recorded) -> None:
    store = FrameStore(LeRobotDataset.open(squares.root), CAMERAS, range(9))
    frame = store.frame(CAMERAS[0], 3, 2)
    with pytest.raises(ValueError, match="read-only"):
        frame[0] = 0
    dumped = pickle.dumps(store)
    assert len(dumped) < 50_000
    np.testing.assert_array_equal(pickle.loads(dumped).frame(CAMERAS[0], 3, 2), frame)


def test_two_processes_at_once_share_one_cache(squares: Recorded, cache: Path) -> None:
    code = f"""
from maps_ray.data import LeRobotDataset
from maps_ray.data.frames import FrameStore
dataset = LeRobotDataset.open({str(squares.root)!r})
input()
store = FrameStore(dataset, {CAMERAS!r}, range(9))
steps = [(e.index, t) for e in dataset.episodes for t in range(e.length)]
print(sum(int(store.frame(c, *step).sum()) for c in {CAMERAS!r} for step in steps))
"""
    pipe = subprocess.PIPE
    workers = [subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    sums = {worker.communicate(timeout=60)[0] for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0]
    assert len(sums) == 1 and int(sums.pop()) > 0
    assert len(list(cache.glob("*/frames.npy"))) == 6
    assert not list(cache.glob("*.partial"))


def test_an_interrupted_decoding_leaves_nothing_behind(
    squares: Recorded, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = LeRobotDataset.open(squares.root)

    def stop(*_: object) -> list[float]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(frames, "_write_frames", stop)
        with pytest.raises(KeyboardInterrupt):
            FrameStore(dataset, CAMERAS[:1], [0])
    assert not [path for path in cache.iterdir() if path.is_dir()]
    FrameStore(dataset, CAMERAS[:1], [0])


def test_a_full_disk_names_the_cache_and_the_way_out(
    squares: Recorded, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> list[float]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(frames, "_write_frames", full)
    with pytest.raises(DatasetError, match=r"disk full .* MAPS_RAY_CACHE") as error:
        FrameStore(LeRobotDataset.open(squares.root), CAMERAS, [0])
    assert str(cache) in str(error.value)


def test_a_cache_that_cannot_be_made(squares: Recorded, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="set MAPS_RAY_CACHE"):
        FrameStore(LeRobotDataset.open(squares.root), CAMERAS, [0], tmp_path / "file" / "cache")
