"""Decoded frames on disk, memory-mapped: each video is decoded once per node, and shared by all its workers.

The cache is `$MAPS_RAY_CACHE` or `~/.cache/maps_ray/frames`. It may be deleted at any time when no run uses it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from maps_ray.data.errors import DatasetError
from maps_ray.data.lerobot import LeRobotDataset, Span, read_parquet
from maps_ray.data.video import decode, probe

_FORMAT = 1


def cache_folder() -> Path:
    """`$MAPS_RAY_CACHE`, or `~/.cache/maps_ray/frames`."""
    chosen = os.environ.get("MAPS_RAY_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "maps_ray" / "frames"


class FrameStore:
    """Random access to the frames of some episodes; decodes what the cache lacks when it is made.

    Args:
        dataset: an opened data set.
        cameras: camera keys.
        episodes: those whose frames will be asked for.
        cache: folder; `cache_folder()` by default.

    Raises:
        DatasetError: a video is missing, cannot be decoded, holds too few frames, or the disk is full.
    """

    def __init__(
        self, dataset: LeRobotDataset, cameras: list[str], episodes: Iterable[int], cache: Path | None = None
    ) -> None:
        folder = cache or cache_folder()
        self._rows: dict[tuple[str, int], tuple[Path, np.ndarray]] = {}
        self._open: dict[Path, np.ndarray] = {}
        wanted = sorted(set(episodes))
        for camera in cameras:
            is_video = dataset.features[camera]["dtype"] == "video"
            entries: dict[Path, tuple[Path, np.ndarray]] = {}
            for index in wanted:
                episode = dataset.episodes[index]
                span = episode.spans[camera]
                if span.path not in entries:
                    entry = _entry(folder, span.path, camera, is_video)
                    entries[span.path] = entry, np.load(entry / "times.npy")
                entry, times = entries[span.path]
                step = 1 / dataset.fps if is_video else 1.0
                self._rows[camera, index] = entry, _rows(times, span, episode.length, step, index)

    def frame(self, camera: str, episode: int, step: int) -> np.ndarray:
        """The frame seen before action `step` of an episode: read-only uint8 (H, W, 3), RGB."""
        entry, rows = self._rows[camera, episode]
        if entry not in self._open:
            self._open[entry] = np.load(entry / "frames.npy", mmap_mode="r")
        return np.asarray(self._open[entry][rows[step]])

    def __getstate__(self) -> dict[str, object]:
        # A memory map would be pickled as its whole content.
        return {**self.__dict__, "_open": {}}


def _rows(times: np.ndarray, span: Span, length: int, step: float, episode: int) -> np.ndarray:
    """Row of each of an episode's steps: the frame nearest in time, at most half a step away."""
    asked = span.start + np.arange(length) * step
    right = np.clip(np.searchsorted(times, asked), 1, max(len(times) - 1, 1))
    left = right - 1
    nearest = left if len(times) == 1 else np.where(asked - times[left] <= times[right] - asked, left, right)
    nearest = np.broadcast_to(nearest, asked.shape)
    off = np.abs(times[nearest] - asked)
    if off.max() > step / 2:
        raise DatasetError(
            f"{span.path}: no frame at {asked[off.argmax()]:.3f} s, needed by episode {episode}, step {off.argmax()}; "
            f"the video has {len(times)} frames up to {times[-1]:.3f} s: it is truncated or does not match the data"
        )
    return nearest


def _entry(cache: Path, source: Path, camera: str, is_video: bool) -> Path:
    """The cache folder of one file's frames, decoded if need be; safe when several processes ask at once."""
    if not source.is_file():
        raise DatasetError(f"{source}: file is missing")
    stat = source.stat()
    identity = f"{_FORMAT}|{source.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{camera}"
    entry = cache / hashlib.sha256(identity.encode()).hexdigest()[:24]
    if entry.is_dir():
        return entry
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(entry.with_suffix(".lock"), "w") as lock:
            # Whoever comes second waits here and then finds the entry; where the file system has no locks, both decode
            # and the rename decides.
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                    raise
            if not entry.is_dir():
                _fill(entry, source, camera, is_video)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DatasetError(
                f"{cache}: disk full while decoding {source.name}; free space there, or name another folder in "
                "MAPS_RAY_CACHE"
            ) from None
        raise DatasetError(f"{cache}: cannot write the frame cache ({error}); set MAPS_RAY_CACHE") from None
    return entry


def _fill(entry: Path, source: Path, camera: str, is_video: bool) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".partial", dir=entry.parent))
    try:
        total = probe(source).frames if is_video else None
        frames = decode(source) if is_video else _stored_images(source, camera)
        times = _write_frames(partial / "frames.npy", source, frames)
        if total is not None and len(times) != total:
            raise DatasetError(f"{source}: {len(times)} of {total} frames can be decoded; fetch or write it again")
        np.save(partial / "times.npy", np.asarray(times))
        try:
            os.rename(partial, entry)
        except OSError:
            if not entry.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_frames(path: Path, source: Path, frames: Iterator[tuple[float, np.ndarray]]) -> list[float]:
    """Streams frames into a `.npy` file; returns their times. Plain writes, because a full disk under a memory map
    kills the process."""
    times: list[float] = []
    shape: tuple[int, ...] = ()
    with open(path, "wb") as file:
        # The header states the number of frames, known at the end only: it is padded to a fixed length.
        file.write(_header(0, (0, 0, 3)))
        for time, frame in frames:
            if times and frame.shape != shape:
                raise DatasetError(f"{source}: frame {len(times)} has shape {frame.shape}, earlier ones {shape}")
            shape = frame.shape
            times.append(time)
            file.write(np.ascontiguousarray(frame).data)
        if not times:
            raise DatasetError(f"{source}: holds no frame")
        file.seek(0)
        file.write(_header(len(times), shape))
    return times


def _header(frames: int, shape: tuple[int, ...]) -> bytes:
    """A `.npy` header of 128 bytes for uint8 (frames, *shape)."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({frames}, {', '.join(map(str, shape))}), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


def _stored_images(path: Path, camera: str) -> Iterator[tuple[float, np.ndarray]]:
    """Frames of a camera kept as encoded images in the data file; their time is their row."""
    for row, image in enumerate(read_parquet(path, [camera])[camera].to_pylist()):
        if not image or not image.get("bytes"):
            raise DatasetError(f"{path}: row {row} of {camera} holds no image bytes")
        yield float(row), np.asarray(Image.open(io.BytesIO(image["bytes"])).convert("RGB"))
