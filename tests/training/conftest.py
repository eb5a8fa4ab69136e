"""A very small policy with random weights, a few synthetic demonstrations, and one Ray cluster for the session."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from run_specs import MakeSpec, long_run

from maps_ray.data import LeRobotWriter
from maps_ray.spec import ClusterSpec, RunSpec, parse

if TYPE_CHECKING:
    from maps_ray.training.train import TrainResult

# Ray is slow to notice a lost worker by default.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
# By default Ray's workers give way to everything else on the machine.
os.environ.setdefault("RAY_worker_niceness", "0")

SENTENCES = ("pick up the red bowl", "pick up the blue cup", "open the drawer")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a very small policy, bf16."""
    import torch
    from small_policy import write_base

    from maps_ray.models import create_policy, save_policy

    folder = tmp_path_factory.mktemp("base")
    config = write_base(folder, SENTENCES)
    weights = create_policy(config, dtype=torch.bfloat16, seed=1).state_dict()
    without_head = {name: tensor for name, tensor in weights.items() if not name.startswith("action_head")}
    save_policy(without_head, folder, folder / "complete", dtype=torch.bfloat16)
    return folder / "complete"


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 tasks x 3 episodes x 12 steps, two cameras of 32 x 32."""
    root = tmp_path_factory.mktemp("data") / "demos"
    random = np.random.default_rng(0)
    cameras = {"image": (32, 32), "wrist_image": (32, 32)}
    names = [f"d{i}" for i in range(8)]
    with LeRobotWriter(root, cameras=cameras, state_names=names, action_names=names[:7]) as writer:
        for task in SENTENCES:
            for _ in range(3):
                images = {name: random.integers(0, 256, (12, 32, 32, 3), np.uint8) for name in cameras}
                actions = random.uniform(-1, 1, (12, 7))
                actions[:, 6] = np.sign(actions[:, 6])
                writer.add_episode(task, images, random.normal(size=(12, 8)), actions)
    return root


@pytest.fixture(scope="session")
def frame_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded frames go to the tests' own folder; Ray's workers inherit the variable."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAPS_RAY_CACHE", str(tmp_path_factory.mktemp("frames")))
        yield


@pytest.fixture(scope="session")
def make_spec(
    base: Path, demonstrations: Path, frame_cache: None, tmp_path_factory: pytest.TempPathFactory
) -> MakeSpec:
    """Makes a spec of the small policy with a storage folder of its own; sections are merged into these defaults."""

    def make(name: str = "run", **sections: dict[str, Any]) -> RunSpec:
        raw: dict[str, dict[str, Any]] = {
            "model": {"checkpoint": base},
            "data": {
                "path": demonstrations,
                "splits": {
                    "train": {"exclude_tasks": ["open*"], "episodes": ":2"},
                    "held_out": {"exclude_tasks": ["open*"], "episodes": "2:"},
                    "ood": {"tasks": ["open*"]},
                },
            },
            "training": {
                "learning_rate": 1e-3,
                "max_steps": 6,
                "batch_size": 2,
                "precision": "fp32",
                "checkpoint_every": 2,
                "log_every": 2,
            },
            "evaluation": {"batch_size": 4, "max_samples": 10},
            "cluster": {"workers": 2, "storage": tmp_path_factory.mktemp("storage"), "start_timeout_s": 60},
        }
        for section, values in sections.items():
            raw[section] = {**raw.get(section, {}), **values}
        return parse(RunSpec, {"name": name, **raw})

    return make


@pytest.fixture(scope="session")
def ray_session(frame_cache: None) -> Iterator[None]:
    """Ray on this machine, with as many CPUs as it has, for all tests that need no cluster of their own."""
    import ray

    from maps_ray.training.cluster import ray_cluster

    with ray_cluster(ClusterSpec()):
        deadline = time.monotonic() + 30
        while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
            assert time.monotonic() < deadline, "what other tests have left in Ray holds CPUs that these tests need"
            time.sleep(0.2)
        yield


@pytest.fixture(scope="session")
def undisturbed(ray_session: None, make_spec: MakeSpec) -> Callable[..., TrainResult]:
    """Runs of `LONG` with nothing in their way, each made once: what a disturbed run must end like.

    With `rivals` they carry along all that `RIVALS` sets.
    """
    from maps_ray.training.train import train

    @cache
    def made(rivals: bool, training: tuple[tuple[str, Any], ...]) -> TrainResult:
        sections = long_run(rivals, **dict(training))
        return train(make_spec("undisturbed", **sections), progress=False)

    return lambda rivals=False, **training: made(rivals, tuple(sorted(training.items())))
