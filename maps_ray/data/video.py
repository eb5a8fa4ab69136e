"""MP4: encoding whole episodes, single frames at random, decoding whole files, and a check that decodes nothing."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np

from maps_ray.data.dataset_error import DatasetError
from maps_ray.files import remedy


class VideoEncoder:
    """Writes episodes one after another into one MP4; each episode starts with a key frame.

    Args:
        path: file to create.
        size: (height, width) in pixels, both even (yuv420p).
        fps: frames per second.
        crf: x264 quality; lower is better and larger.
        gop: frames between key frames at most; short groups make random access cheap.
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: int, crf: int = 24, gop: int = 10) -> None:
        height, width = size
        if height % 2 or width % 2:
            raise DatasetError(f"{path}: yuv420p video needs an even height and width, got {height}x{width}")
        self._size = size
        self._fps = fps
        # The index at the front: of an object store one range then tells where frames lie.
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "faststart"})
        # `forced-idr`: else the picture type asked for below makes an I frame, at which a decoder cannot start anew.
        options = {"crf": str(crf), "g": str(gop), "preset": "slow", "forced-idr": "1"}
        self._stream = self._container.add_stream("libx264", rate=Fraction(fps), options=options)
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        # One thread makes the bytes a function of the frames alone.
        self._stream.codec_context.thread_count = 1
        self.frames = 0

    def write(self, images: np.ndarray) -> None:
        """Appends one episode: uint8 (T, H, W, 3), RGB."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (*self._size, 3):
            wanted = f"(T, {self._size[0]}, {self._size[1]}, 3)"
            raise DatasetError(f"images must be uint8 {wanted}, got {images.dtype} {images.shape}")
        for step, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = self.frames
            frame.time_base = Fraction(1, self._fps)
            if step == 0:
                frame.pict_type = av.video.frame.PictureType.I
            self._container.mux(self._stream.encode(frame))
            self.frames += 1

    def close(self) -> None:
        """Flushes the encoder and completes the file."""
        self._container.mux(self._stream.encode())
        self._container.close()


@dataclass(frozen=True)
class VideoFacts:
    """What an MP4 says of itself."""

    frames: int
    height: int
    width: int
    rate: float | None
    """Frames a second, on average."""
    times: np.ndarray
    """When each frame is shown, in seconds, ascending; empty where the header does not list them."""


def probe(source: str | Path | BinaryIO, name: str | None = None) -> VideoFacts:
    """Reads a video's header and the position of its last frames, without decoding.

    Args:
        source: a path, or an open binary file that can seek.
        name: what errors call it; `source` by default.

    Raises:
        DatasetError: missing or unreadable file, no video stream, or a file cut short.
    """
    path = str(name or source)
    is_path = isinstance(source, (str, Path))
    if is_path and not Path(source).is_file():  # type: ignore[arg-type]
        raise DatasetError(f"{path}: video file is missing")
    try:
        with av.open(str(source) if is_path else source) as container:
            if not container.streams.video:
                raise DatasetError(f"{path}: holds no video stream")
            stream = container.streams.video[0]
            context = stream.codec_context
            facts = VideoFacts(stream.frames, context.height, context.width, _rate(stream), _times(stream))
            if stream.frames and stream.duration:
                # The index at the front of the file survives a cut; the last group of pictures does not.
                container.seek(stream.duration, stream=stream, backward=True)
            # The last one is empty: it flushes decoders.
            packets = [packet for packet in container.demux(stream) if packet.size]
    except (av.FFmpegError, OSError) as error:
        raise DatasetError(f"{path}: unreadable or truncated video ({error}); {remedy(path)}") from None
    size = Path(source).stat().st_size if is_path else source.seek(0, 2)  # type: ignore[arg-type, union-attr]
    if not packets or any(packet.is_corrupt or (packet.pos or 0) + packet.size > size for packet in packets):
        raise DatasetError(f"{path}: video is truncated ({size} bytes on disk); fetch or write it again")
    return facts if facts.frames else replace(facts, frames=len(packets))


def _times(stream: av.VideoStream) -> np.ndarray:
    """The header lists when frames are decoded. Those of a video of one rate are shown as far apart, the first one at
    `start_time`."""
    # Some are decoded for others alone, and not shown: a video that was cut without encoding it again has such.
    times = np.array([entry.timestamp for entry in stream.index_entries if not entry.is_discard], np.float64)
    # A file in fragments says no number of frames, and lists those of its first ones.
    if stream.start_time is None or not len(times) or not stream.frames:
        return np.empty(0)
    return (np.sort(times) - times.min() + stream.start_time) * float(stream.time_base)


def _rate(stream: av.VideoStream) -> float | None:
    return float(stream.average_rate) if stream.average_rate else None


def decode(path: Path) -> Iterator[tuple[float, np.ndarray]]:
    """All frames of a video in display order as (time in seconds, uint8 (H, W, 3) RGB).

    Raises:
        DatasetError: the file cannot be decoded to its end.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            # One conversion context for all frames; a new one for each would take five times as long as decoding.
            reformatter = av.video.reformatter.VideoReformatter()
            for frame in container.decode(stream):
                yield float(frame.time), reformatter.reformat(frame, format="rgb24").to_ndarray()
    except (av.FFmpegError, OSError, IndexError) as error:
        raise DatasetError(f"{path}: cannot decode ({error}); fetch or write it again") from None


class VideoReader:
    """Single frames of one video by their time, each at the cost of its group of pictures.

    Frames asked for in ascending order are decoded once each: the decoder goes on where it stands instead of seeking.
    The file stays open until `close`; a reader is for one process.

    Args:
        source: a path, or an open binary file that can seek, such as fsspec gives for an object store.
        name: what errors call it; `source` by default.

    Raises:
        DatasetError: missing or unreadable file, or no video stream.
    """

    def __init__(self, source: str | Path | BinaryIO, name: str | None = None) -> None:
        self.name = str(name or source)
        try:
            self._container = av.open(str(source) if isinstance(source, (str, Path)) else source)
            stream = self._container.streams.video[0]
        except (av.FFmpegError, OSError, IndexError) as error:
            raise DatasetError(f"{self.name}: unreadable video ({error}); {remedy(self.name)}") from None
        if stream.codec_context is None:
            raise DatasetError(f"{self.name}: unreadable video (no known codec); fetch or write it again")
        # Frames of a few hundred pixels decode faster in one thread, and every loader process has one core.
        stream.codec_context.thread_count = 1
        self._stream = stream
        self._time_base = float(stream.time_base)
        self._keys = [entry.timestamp for entry in stream.index_entries if entry.is_keyframe]
        # One conversion context for all frames; a new one for each would take five times as long as decoding.
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._last: av.VideoFrame | None = None
        self.frames: int = stream.frames
        """As the header says; 0 where it does not."""
        self.rate = _rate(stream)
        """Frames a second, on average; None where the header does not say."""

    def frame(self, time: float, tolerance: float) -> np.ndarray:
        """The frame at a time: uint8 (H, W, 3), RGB.

        Args:
            time: in seconds.
            tolerance: in seconds, less than half the distance of two frames: the frame lies within it.

        Raises:
            DatasetError: the video has no such frame, or cannot be decoded.
        """
        asked, off = time / self._time_base, tolerance / self._time_base
        try:
            if self._last is None or not self._is_ahead(self._last.pts, asked, off):
                self._seek(asked, off)
            while self._last is not None and self._last.pts < asked - off:
                self._last = next(self._frames, None)
            if self._last is None or self._last.pts > asked + off:
                raise DatasetError(
                    f"{self.name}: no frame at {time:.3f} s; the video is truncated or does not match the data: "
                    "fetch or write it again"
                )
            # One thread: handing out the rows of so small a picture takes longer than to convert it.
            return np.asarray(self._reformatter.reformat(self._last, format="rgb24", threads=1).to_ndarray())
        except (av.FFmpegError, OSError) as error:
            self._last = None
            raise DatasetError(f"{self.name}: cannot decode ({error}); fetch or write it again") from None

    def close(self) -> None:
        self._last = None
        self._frames = iter(())
        self._container.close()

    def _is_ahead(self, here: float, asked: float, off: float) -> bool:
        """Whether decoding on from where the reader stands is the shortest way: no later key frame lies between."""
        if here > asked + off:
            return False
        return bisect_right(self._keys, here) == bisect_right(self._keys, asked + off)

    def _seek(self, asked: float, off: float) -> None:
        """Stands on a frame at or before the one asked for."""
        # Key frames are found by the time at which they are decoded, which comes before the one at which they are
        # shown: where the first one is too late, the one before it is not.
        # From the far end of the tolerance: rounded, the time asked for may lie before a key frame that is the frame
        # itself.
        start = round(asked + off)
        for _ in range(3):
            self._container.seek(start, stream=self._stream, backward=True)
            self._frames = self._container.decode(self._stream)
            self._last = next(self._frames, None)
            if self._last is None or self._last.pts <= asked + off:
                return
            before = bisect_right(self._keys, start) - 2
            if before < 0:
                return
            start = self._keys[before]
