"""The data of runs: indexed on a real cluster, the same when a run goes on, of any format, from several sources."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from older_formats import as_v21
from run_specs import MakeSpec

from maps_ray.data import Batches, Demonstrations, index
from maps_ray.spec import DataSpec, RunSpec, dump, load_spec
from maps_ray.training.progress import read_progress
from maps_ray.training.train import TrainResult, train

FIXTURES = Path(__file__).parents[1] / "fixtures" / "data"


def test_ray_tasks_index_as_one_process_does(
    ray_session: None, demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int, int]] = []

    def load(folder: str) -> Demonstrations:
        spec = DataSpec(path=demonstrations, cache={"folder": tmp_path / folder})
        return Demonstrations(spec, use_proprio=True, report=lambda *what: told.append(what))

    alone = load("alone")
    told.clear()
    monkeypatch.setattr(index, "_SHARDS_WORTH_TASKS", 1)
    monkeypatch.setattr(index, "_EPISODES_WORTH_TASKS", 1)
    parallel = load("ray")
    assert ("scanning shards", 1, 1) in told and told[-1][0] == "reading states" and told[-1][1] == told[-1][2] > 1
    (one,), (other,) = alone.statistics.values(), parallel.statistics.values()
    assert one.to_dict() == other.to_dict()
    files = [sorted(p.relative_to(tmp_path / f) for p in (tmp_path / f).rglob("*.npy")) for f in ("alone", "ray")]
    assert files[0] == files[1] and len(files[0]) == 2
    for name in files[0]:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes()
    # An error of a task is the reader's own.
    broken = tmp_path / "broken"
    shutil.copytree(demonstrations, broken)
    next(broken.glob("data/*/*.parquet")).write_bytes(b"PAR1 nothing")
    with pytest.raises(Exception, match=r"DatasetError|file-000\.parquet") as caught:
        Demonstrations(DataSpec(path=broken, cache={"folder": tmp_path / "ray"}), use_proprio=True)
    assert type(caught.value).__name__ == "DatasetError"


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """RLDS, LeRobot v2.1 with videos, LeRobot v2.0 with PNG: all of LIBERO, two cameras."""
    return [
        {"path": FIXTURES / "libero_spatial/data", "name": "rlds", "transform": "libero"},
        {"path": FIXTURES / "lerobot_v21/data", "name": "videos", "weight": 2, "transform": "libero"},
        {"path": FIXTURES / "pi_libero/data", "name": "png", "transform": "libero"},
    ]


def test_a_mixture_of_three_formats(formats: list[dict[str, object]], tmp_path: Path) -> None:
    spec = DataSpec(sources=formats, cameras=["primary", "wrist"], chunk=4, cache={"folder": tmp_path})
    mixed = Demonstrations(spec, use_proprio=True)
    steps = [source.steps() for source in mixed.sources]
    weighted = np.array(steps) * [1, 2, 1]
    np.testing.assert_allclose(mixed.shares, weighted / weighted.sum())
    assert [one.num_transitions for one in mixed.statistics.values()] == steps
    train_split = mixed.samples("train")
    for source, part in enumerate(train_split.parts):
        sample, dataset = part[3], mixed.sources[source].dataset
        episode, step = part.locate(3)
        assert sample.instruction == dataset.task(episode, step)
        np.testing.assert_array_equal(sample.images[1], dataset.frame("wrist", episode, step))
        # Each by its own statistics.
        own = list(mixed.statistics.values())[source].action
        raw = dataset.vectors("action", episode)[step, 0]
        expected = np.clip(2 * (raw - own.q01[0]) / (own.q99[0] - own.q01[0] + 1e-8) - 1, -1, 1)
        assert abs(sample.actions[0, 0] - expected) < 1e-6


def test_statistics_of_rlds_are_of_all_its_stored_splits(tmp_path: Path) -> None:
    spec = DataSpec(
        path=FIXTURES / "bridge/data",
        transform="bridge",
        cameras=["primary", "wrist"],
        chunk=5,
        cache={"folder": tmp_path},
    )
    bridge = Demonstrations(spec, use_proprio=True)
    (statistics,) = bridge.statistics.values()
    (expected,) = [
        value if "action" in value else next(iter(value.values()))
        for value in [json.loads((FIXTURES / "bridge/expected/statistics.json").read_text())]
    ]
    assert statistics.num_transitions == expected["num_transitions"]
    assert statistics.num_trajectories == expected["num_trajectories"]
    np.testing.assert_allclose(statistics.action.q99, expected["action"]["q99"], atol=1e-6)
    sample = bridge.samples("train")[0]
    assert sample.seen == [True, False] and not sample.images[1].any()


def test_v21_of_a_v3_gives_the_same_batches(demonstrations: Path, tmp_path: Path) -> None:
    def batches(path: Path) -> Batches:
        spec = DataSpec(path=path, cache={"folder": tmp_path / "cache"})
        train_split = Demonstrations(spec, use_proprio=True).samples("train")
        return Batches(train_split, Stack(), seed=4, global_batch_size=8, augment=True)

    one, other = batches(demonstrations), batches(as_v21(demonstrations, tmp_path / "v21"))
    for step in range(6):
        for mine, theirs in zip(one.batch(step), other.batch(step), strict=True):
            np.testing.assert_array_equal(mine, theirs)


class Stack:
    """A processor that keeps what it is given."""

    def encode(self, instruction: str, images: Any, proprio: Any, actions: Any) -> Any:
        return instruction, np.stack(images), proprio, actions

    def collate(self, samples: Any) -> Any:
        return [np.stack(part) for part in zip(*samples, strict=True)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tiny_run_loses_the_same_on_v21(ray_session: None, tmp_path: Path) -> None:
    """jobs/tiny.yaml, a few steps of it."""
    short = ["training.max_steps=3", "training.warmup_steps=1", "training.checkpoint_every=3", "training.log_every=1"]
    short += ["training.batch_size=4", "evaluation.every=0", "evaluation.max_samples=16", "cluster.workers=1"]
    short += [f"cluster.storage={tmp_path}"]
    given = Path(__file__).parents[2] / "jobs"
    made = as_v21(given / "assets" / "libero_demos", tmp_path / "libero_demos")
    first = train(load_spec(given / "tiny.yaml", [*short, "name=v3"]), progress=False)
    second = train(load_spec(given / "tiny.yaml", [*short, "name=v21", f"data.path={made}"]), progress=False)
    names = [name for name in first.metrics if name.startswith(("train/loss", "train/grad_norm", "eval/"))]
    assert len(names) > 4
    assert {name: first.metrics[name] for name in names} == {name: second.metrics[name] for name in names}
    _same_weights(first, second)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_on_a_mixture_goes_on_bit_equal(
    ray_session: None, make_spec: MakeSpec, formats: list[dict[str, object]], tmp_path: Path
) -> None:
    def spec(name: str) -> RunSpec:
        return make_spec(
            name,
            data={"path": None, "sources": formats, "cameras": ["primary", "wrist"], "augment": True, "splits": {}},
            training={"max_steps": 40, "checkpoint_every": 2},
            cluster={"workers": 1},
        )

    expected = train(spec("whole"), progress=False)
    killed = spec("killed")
    (tmp_path / "spec.yaml").write_text(dump(killed))
    code = "import sys; from maps_ray.spec import load_spec; from maps_ray.training.train import TrainResult, train; "
    code += "train(load_spec(sys.argv[1]), progress=False)"
    driver = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "spec.yaml")])
    while read_progress(killed.run_dir).get("step", 0) < 5:
        assert driver.poll() is None
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    found = train(killed, resume=True, progress=False)
    # The workers of a driver that was killed go on for some steps.
    assert 4 <= found.start_step < 40 and found.status == "finished"
    _same_weights(expected, found)
    statistics = json.loads((Path(str(found.final)) / "dataset_statistics.json").read_text())
    assert list(statistics) == ["rlds", "videos", "png"]


def _same_weights(one: TrainResult, other: TrainResult) -> None:
    files = [path.name for path in Path(str(one.final)).glob("*.safetensors")]
    assert files
    for name in files:
        assert Path(str(one.final), name).read_bytes() == Path(str(other.final), name).read_bytes(), name
