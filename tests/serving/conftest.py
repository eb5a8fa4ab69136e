"""One very small policy, and one start of Ray Serve, for all tests of serving."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ray import serve
from s3_gate import s3_server
from serving_data import SIZES, STATISTICS, TOKEN
from small_policy import write_base

from maps_ray.models import create_policy, save_policy
from maps_ray.ray_connection import connected
from maps_ray.run_copies import run_at
from maps_ray.run_storage import RunStorage
from maps_ray.serving.actions import Limits
from maps_ray.serving.options import ServeOptions
from maps_ray.serving.server import start


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small policy with two cameras and proprioception, random weights."""
    base = tmp_path_factory.mktemp("base")
    config = write_base(base, ["pick up the red bowl"])
    weights = create_policy(config, seed=1, **SIZES).state_dict()
    out = base / "trained"
    save_policy(weights, base, out, dtype=torch.float32, statistics=STATISTICS, trained_for=SIZES)
    return out


@pytest.fixture(scope="module")
def url(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Ends with the tests that use it: the replica holds CPUs that the tests of training need."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ServeOptions(
        port=port, token=TOKEN, max_body_bytes=200_000, cpus=0.5, dtype="float32", batch=4, limits=Limits((1000.0,))
    )
    # A bare `ray.init` would look for a token file once another Ray of this process had a token in the environment.
    with s3_server("policies"), connected():
        RunStorage("s3://policies").upload_folder(checkpoint, "trained")
        # As the command takes one from an object store.
        with run_at("s3://policies/trained", tmp_path_factory.mktemp("scratch")) as folder:
            yield start(folder, options)
            serve.shutdown()
