from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from squares_data import Recorded

from maps_ray.data import DatasetError
from maps_ray.data.video import VideoReader, decode


@pytest.fixture(scope="module")
def video(squares: Recorded) -> Path:
    return squares.root / "videos/observation.images.image/chunk-000/file-000.mp4"


@pytest.fixture(scope="module")
def whole(video: Path) -> list[tuple[float, np.ndarray]]:
    return list(decode(video))


def test_frames_at_random_are_those_of_the_whole_file(video: Path, whole: list[tuple[float, np.ndarray]]) -> None:
    rng = np.random.default_rng(0)
    reader = VideoReader(video)
    for row in [*rng.integers(0, len(whole), 80), *range(len(whole)), *reversed(range(len(whole)))]:
        time, expected = whole[row]
        np.testing.assert_array_equal(reader.frame(time, 0.02), expected)
    reader.close()


def test_an_open_file_is_read_too(video: Path, whole: list[tuple[float, np.ndarray]]) -> None:
    with video.open("rb") as file:
        reader = VideoReader(file, "s3://bucket/file-000.mp4")
        np.testing.assert_array_equal(reader.frame(whole[17][0], 0.02), whole[17][1])
        with pytest.raises(DatasetError, match=r"s3://bucket/file-000\.mp4: no frame at 100\.000 s"):
            reader.frame(100, 0.02)
        np.testing.assert_array_equal(reader.frame(whole[3][0], 0.02), whole[3][1])


def test_times_between_frames_and_broken_files_are_refused(video: Path, tmp_path: Path) -> None:
    reader = VideoReader(video)
    with pytest.raises(DatasetError, match=r"no frame at 0\.125 s"):
        reader.frame(0.125, 0.02)
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:400])
    with pytest.raises(DatasetError, match=r"cut\.mp4: unreadable video"):
        VideoReader(tmp_path / "cut.mp4")
    with pytest.raises(DatasetError, match=r"gone\.mp4"):
        VideoReader(tmp_path / "gone.mp4")
