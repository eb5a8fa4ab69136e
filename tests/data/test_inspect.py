from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from squares_data import Recorded
from typer.testing import CliRunner

from maps_ray.cli import app
from maps_ray.data import DatasetError, open_dataset
from maps_ray.data.convert import convert
from maps_ray.data.inspect import inspect
from maps_ray.data.transforms import noops
from maps_ray.spec import SpecError

DATA = Path(__file__).parents[1] / "fixtures" / "data"


def test_inspecting_every_format_of_the_fixtures() -> None:
    for name, version, episodes in [
        ("bridge", "rlds", 5),
        ("lerobot_v21", "lerobot_v2.1", 6),
        ("pi_libero", "lerobot_v2.0", 2),
    ]:
        found = inspect(str(DATA / name / "data"))
        dataset = open_dataset(DATA / name / "data")
        assert (found.format, found.episodes) == (version, episodes)
        assert found.frames == sum(episode.length for episode in dataset.episodes)
        assert list(found.cameras) == dataset.cameras and all(c.width == 64 for c in found.cameras.values())
        stacked = np.concatenate([dataset.vectors("action", i) for i in range(episodes)])
        np.testing.assert_array_equal(found.vectors["action"].min, stacked.min(0))
        np.testing.assert_array_equal(found.vectors["action"].max, stacked.max(0))


def test_inspect_says_what_is_odd(copy: Path) -> None:
    path = copy / "data/chunk-000/file-001.parquet"
    table = pq.read_table(path)
    rows = table["action"].to_pylist()
    rows[2][3] = float("nan")
    place = table.column_names.index("action")
    pq.write_table(table.set_column(place, "action", [rows]), path)
    video = copy / "videos/observation.images.image/chunk-000/file-002.mp4"
    video.write_bytes(video.read_bytes()[:-400])
    odd = "\n".join(inspect(str(copy)).odd)
    assert "action is nan in episode 4, frame 2, dimension 3" in odd
    assert "observation.state: dimension 7 is always 0.5" in odd
    assert "file-002.mp4: video is truncated" in odd
    bridge = "\n".join(inspect(str(DATA / "bridge/data")).odd)
    assert "1 of 5 episodes have no sentence" in bridge and "image_2: black in 5 of 5" in bridge


def test_inspect_command(squares: Recorded) -> None:
    plain = CliRunner().invoke(app, ["data", "inspect", str(squares.root)])
    assert plain.exit_code == 0 and "lerobot_v3.0" in plain.output and "open the drawer" in plain.output
    as_json = CliRunner().invoke(app, ["data", "inspect", str(squares.root), "--json"])
    assert json.loads(as_json.stdout)["frames"] == sum(map(len, squares.actions))
    refused = CliRunner().invoke(app, ["data", "inspect", str(squares.root / "nowhere")])
    assert isinstance(refused.exception, SpecError) and "no such data set folder" in str(refused.exception)


def test_converted_episodes_are_the_same(tmp_path: Path) -> None:
    source = open_dataset(DATA / "bridge/data", transform="bridge")
    convert(str(DATA / "bridge/data"), tmp_path / "out", transform="bridge")
    made = open_dataset(tmp_path / "out")
    named = [episode for episode in source.episodes if episode.task]
    assert [episode.task for episode in made.episodes] == [episode.task for episode in named]
    assert len(named) == 4 and made.fps == 5
    for new, old in zip(made.episodes, named, strict=True):
        for kind in ("action", "state"):
            np.testing.assert_array_equal(made.vectors(kind, new.index), source.vectors(kind, old.index))
        before, after = source.frame("image_0", old.index, 3), made.frame("image_0", new.index, 3)
        assert np.abs(after.astype(int) - before).mean() < 6


def test_an_interrupted_conversion_goes_on(squares: Recorded, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    convert(str(squares.root), whole, episodes_per_file=2)
    with pytest.raises(KeyboardInterrupt):
        convert(str(squares.root), parts, episodes_per_file=2, progress=stop)
    seen: list[int] = []
    convert(str(squares.root), parts, episodes_per_file=2, progress=lambda done, total: seen.append(done))
    assert min(seen) >= 4
    one, two = open_dataset(whole), open_dataset(parts)
    assert [e.task for e in two.episodes] == [e.task for e in one.episodes] == squares.tasks
    for index in range(9):
        np.testing.assert_array_equal(two.vectors("action", index), one.vectors("action", index))
        np.testing.assert_array_equal(two.vectors("action", index), squares.actions[index])
    with pytest.raises(DatasetError, match="another transform"):
        convert(str(squares.root), parts, transform="libero")
    with pytest.raises(DatasetError, match="no conversion was begun there"):
        convert(str(DATA / "lerobot_v21/data"), squares.root)


def test_converting_asks_for_a_rate_that_is_not_recorded(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="--fps"):
        convert(str(DATA / "libero_spatial/data"), tmp_path / "out")


def test_noops() -> None:
    actions = np.zeros((7, 7))
    actions[:, 6] = [-1, -1, -1, 1, 1, 1, -1]
    actions[2, 0] = 0.5
    actions[5, 1] = 2e-5
    assert noops(actions).tolist() == [True, True, False, False, True, True, False]
