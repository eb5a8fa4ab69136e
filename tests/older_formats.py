"""Demonstrations as an older LeRobotDataset: v3 cut into v2.1 by packets of its videos, so that pixels are the same."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pyarrow.parquet as pq

from maps_ray.data import open_dataset
from maps_ray.data.formats.lerobot_v3 import LeRobotV3


def as_v21(source: Path, root: Path) -> Path:
    """Writes a v2.1 of a v3 of our own writer, whose episodes begin with key frames."""
    dataset = open_dataset(source)
    assert isinstance(dataset, LeRobotV3)
    info = json.loads((source / "meta/info.json").read_text())
    tasks = {task: place for place, task in enumerate(dataset.tasks)}
    lines = []
    for recording, episode in zip(dataset.recordings, dataset.episodes, strict=True):
        number, rows = recording.number, recording.rows
        table = pq.read_table(source / rows.file).slice(rows.first, rows.length)
        path = root / f"data/chunk-000/episode_{number:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = table.set_column(
            table.column_names.index("timestamp"), "timestamp", [[i / info["fps"] for i in range(rows.length)]]
        )
        place = table.column_names.index("task_index")
        pq.write_table(table.set_column(place, "task_index", [[tasks[episode.task]] * rows.length]), path)
        for camera, video in recording.videos.items():
            out = root / f"videos/chunk-000/{camera}/episode_{number:06d}.mp4"
            out.parent.mkdir(parents=True, exist_ok=True)
            _cut(source / video.file, out, video.start, rows.length, info["fps"])
        lines.append({"episode_index": number, "tasks": [episode.task], "length": rows.length})
    meta = root / "meta"
    meta.mkdir()
    (meta / "tasks.jsonl").write_text(
        "".join(json.dumps({"task_index": i, "task": task}) + "\n" for task, i in tasks.items())
    )
    (meta / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    info |= {
        "codebase_version": "v2.1",
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "chunks_size": 1000,
    }
    (meta / "info.json").write_text(json.dumps(info))
    return root


def _cut(source: Path, out: Path, start: float, length: int, fps: float) -> None:
    """Copies the packets of one episode."""
    with av.open(str(source)) as given, av.open(str(out), "w") as made:
        stream = given.streams.video[0]
        copy = made.add_stream_from_template(stream)
        first, stop = (round(time / stream.time_base) for time in (start, start + length / fps))
        for packet in given.demux(stream):
            if packet.pts is not None and first <= packet.pts < stop:
                packet.pts, packet.dts = packet.pts - first, packet.dts - first
                packet.stream = copy
                made.mux(packet)
