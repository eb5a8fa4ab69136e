"""What is saved can be read by any number of workers, and the run goes on as if nothing had happened."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeSpec
from safetensors.torch import load_file

from maps_ray.spec import RunSpec, load_spec
from maps_ray.training.run_folder import write_spec
from maps_ray.training.state import rng_state, seed_everything, set_rng_state
from maps_ray.training.train import TrainResult, train

Undisturbed = Callable[..., TrainResult]


def draw() -> tuple[Any, ...]:
    return random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(3).tolist()


def test_generators_go_on_where_they_were() -> None:
    seed_everything(7, rank=1, step=30)
    draw()
    state = rng_state()
    expected = draw()
    seed_everything(8, rank=0, step=0)
    assert draw() != expected
    set_rng_state(state)
    assert draw() == expected


def test_ranks_and_steps_have_seeds_of_their_own() -> None:
    drawn = []
    for rank, step in ((0, 0), (1, 0), (0, 1)):
        seed_everything(7, rank, step)
        drawn.append(draw())
    assert len(set(map(str, drawn))) == 3


def halves(
    make_spec: MakeSpec, workers: tuple[int, int], **training: Any
) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    """A run of 20 steps, the first 10 on one number of workers and the others on another, and its weights."""
    fields = {"max_steps": 10, "checkpoint_every": 10, "schedule": "constant", **training}
    spec = make_spec(training=fields, cluster={"workers": workers[0]})
    train(spec, progress=False)
    return resume(spec, workers[1], max_steps=20)


def resume(spec: RunSpec, workers: int, **training: Any) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    cluster = spec.cluster.model_copy(update={"workers": workers})
    longer = spec.training.model_copy(update=training)
    result = train(spec.model_copy(update={"cluster": cluster, "training": longer}), resume=True, progress=False)
    return result, weights(result)


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return {
        f"{path.name}/{name}": tensor.float()
        for path in sorted(Path(str(result.final)).glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], base: RunSpec) -> None:
    """Nearer to what is expected than a thousandth of the way that training went."""
    start = {
        f"model.safetensors/{k}": t.float() for k, t in load_file(base.model.checkpoint / "model.safetensors").items()
    }
    moved = sum((expected[name] - start[name]).square().sum() for name in start).sqrt()
    apart = sum((expected[name] - found[name]).square().sum() for name in expected).sqrt()
    assert moved > 0.1
    assert apart < 1e-3 * moved


def test_a_run_goes_on_with_fewer_workers(undisturbed: Undisturbed, make_spec: MakeSpec) -> None:
    expected = undisturbed(zero_stage=2)
    # The same run, taken back to the last checkpoint but one.
    spec = load_spec(Path(expected.run_dir) / "spec.yaml")
    copied = make_spec().cluster.storage
    shutil.copytree(expected.run_dir, copied / spec.name)
    for left in ("result.json", "checkpoints/step-00000060"):
        path = copied / spec.name / left
        path.unlink() if path.is_file() else shutil.rmtree(path)
    spec = spec.model_copy(update={"cluster": spec.cluster.model_copy(update={"storage": copied})})
    write_spec(spec)
    result, found = resume(spec, workers=1)
    assert result.start_step == 55 and result.step == 60
    assert_near(found, weights(expected), spec)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("workers", [(1, 2), (2, 1)])
def test_other_numbers_of_workers(ray_session: None, make_spec: MakeSpec, stage: int, workers: tuple[int, int]) -> None:
    batch = {"batch_size": 4 // workers[0]}
    _, found = halves(make_spec, workers, zero_stage=stage, **batch)
    spec = make_spec(
        training={"max_steps": 20, "schedule": "constant", "checkpoint_every": 20, "zero_stage": stage, **batch},
        cluster={"workers": workers[0]},
    )
    assert_near(found, weights(train(spec, progress=False)), spec)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bit_equal(ray_session: None, make_spec: MakeSpec, stage: int, precision: str) -> None:
    fields = {"zero_stage": stage, "precision": precision, "gradient_accumulation": 2, "clip_norm": 0.5}
    _, found = halves(make_spec, (2, 2), **fields)
    spec = make_spec(training={"max_steps": 20, "schedule": "constant", "checkpoint_every": 20, **fields})
    expected = weights(train(spec, progress=False))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
