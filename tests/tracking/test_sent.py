"""Records of a worker on another node arrive in the driver's spool whole and once, whatever is lost on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from maps_ray.tracking.spool import Spool, read_history
from maps_ray.tracking.tracker import Item, SentTracker, Tracker, take


def test_what_is_sent_twice_is_there_once(tmp_path: Path) -> None:
    driver = Tracker.create(tmp_path / "run", uri="sqlite:///unused.db", experiment="e", run_name="r", ship=False)
    calls: list[list[Item]] = []

    def send(items: list[Item]) -> None:
        calls.append(items)
        take(Spool(tmp_path / "run"), items)
        if len(calls) in (1, 3):
            raise ConnectionError("the answer was lost")

    sent = SentTracker(driver.run_key, send)
    (tmp_path / "video.mp4").write_bytes(b"\x00" * 5000)
    for step in (1, 2):
        sent.metrics(step, {"train/loss": 1 / step})
    with pytest.raises(ConnectionError):
        sent.flush()
    sent.metrics(3, {"train/loss": 1 / 3})
    sent.flush()
    sent.artifact(tmp_path / "video.mp4", "videos")
    sent.text("table", "tables/one.txt")
    with pytest.raises(ConnectionError):
        sent.flush()
    sent.flush()
    sent.flush()
    assert len(calls) == 4 and len(calls[1]) == 1
    history = read_history(tmp_path / "run")
    assert history.metrics == {"train/loss": [(1, 1.0), (2, 0.5), (3, 1 / 3)]}
    assert history.artifacts["videos/video.mp4"].read_bytes() == b"\x00" * 5000
    assert history.artifacts["tables/one.txt"].read_text() == "table"
    records = [record for _, _, record in Spool(tmp_path / "run").read() if isinstance(record, dict)]
    assert sum(record["kind"] == "metrics" for record in records) == 3
    assert sum(record["kind"] == "artifact" for record in records) == 3  # environment.json among them
