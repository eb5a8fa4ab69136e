"""The VQ action tokenizer is trained on what the policy's training sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from maps_ray.data import Demonstrations, LeRobotWriter
from maps_ray.models.minivla.vq import VQActionTokenizer, load_vq
from maps_ray.spec import DataSpec
from maps_ray.training.action_tokenizer import action_chunks

JOB = Path(__file__).parents[2] / "jobs" / "train_vq.py"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four episodes of circles, one of them shorter than a chunk."""
    root = tmp_path_factory.mktemp("circles") / "data"
    names = ["x", "y", "z", "rx", "ry", "rz", "gripper"]
    with LeRobotWriter(root, cameras={"image": (32, 32)}, state_names=["s"], action_names=names) as writer:
        for episode, length in enumerate((40, 30, 6, 20)):
            turn = 0.3 * np.arange(length)[:, None] + episode + np.arange(7)
            actions = np.sin(turn).astype(np.float32)
            actions[:, 6] = np.where(np.arange(length) < length // 2, -1, 1)
            images = {"image": np.zeros((length, 32, 32, 3), np.uint8)}
            writer.add_episode("draw a circle", images, np.zeros((length, 1), np.float32), actions, {"success": True})
    return root


def test_chunks_are_those_of_the_samples(recorded: Path) -> None:
    demonstrations = Demonstrations(DataSpec(path=recorded, cameras=["image"], chunk=8), use_proprio=False)
    chunks = action_chunks(demonstrations, "train").numpy()
    samples = demonstrations.samples("train")
    assert len(chunks) == len(samples) == 33 + 23 + 13
    for index in (0, 32, 33, 68):
        assert np.array_equal(chunks[index], samples[index].actions)


@pytest.mark.slow
def test_the_job_writes_a_tokenizer_and_says_how_good_it_is(recorded: Path, tmp_path: Path) -> None:
    spec = {
        "name": "circles",
        "model": {"name": "minivla_vq", "checkpoint": "nowhere", "use_proprio": False},
        "data": {"path": str(recorded), "cameras": ["image"], "chunk": 8},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    options = ["--codes", "16", "--groups", "3", "--latent", "8", "--steps", "150", "--batch-size", "32"]
    command = [sys.executable, str(JOB), str(tmp_path / "spec.yaml"), "--out", str(tmp_path / "vq"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "train: 69 chunks" in done.stdout
    errors = [float(line.rsplit(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("step ")]
    assert errors[-1] < 0.5 * errors[0]
    tokenizer = VQActionTokenizer(load_vq(tmp_path / "vq"), 767)
    assert tokenizer.tokens == 3
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 1 and "exists already" in again.stderr
