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
from run_specs import MakeSpec
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


def taken_back(result: TrainResult, steps: int, make_spec: MakeSpec) -> RunSpec:
    """A copy of a finished run as it stood at its checkpoint of `steps`."""
    spec = load_spec(Path(result.run_dir) / "spec.yaml")
    storage = make_spec().cluster.storage
    shutil.copytree(result.run_dir, storage / spec.name)
    (storage / spec.name / "result.json").unlink()
    for later in (storage / spec.name / "checkpoints").iterdir():
        if int(later.name.removeprefix("step-")) > steps:
            shutil.rmtree(later)
    spec = spec.model_copy(update={"cluster": spec.cluster.model_copy(update={"storage": storage})})
    write_spec(spec)
    return spec


def resume(spec: RunSpec, workers: int) -> TrainResult:
    cluster = spec.cluster.model_copy(update={"workers": workers})
    return train(spec.model_copy(update={"cluster": cluster}), resume=True, progress=False)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.name}/{name}": tensor.float()
        for path in sorted(Path(folder).glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_near(one: TrainResult, other: TrainResult, base: Path) -> None:
    """Nearer to each other than a thousandth of the way that training went."""
    start, found, expected = weights(base), weights(str(one.final)), weights(str(other.final))
    moved = sum((expected[name] - start[name]).square().sum().item() for name in start) ** 0.5
    apart = sum((expected[name] - found[name]).square().sum().item() for name in expected) ** 0.5
    assert moved > 0.1
    assert apart < 1e-3 * moved


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_workers(undisturbed: Undisturbed, make_spec: MakeSpec, base: Path) -> None:
    expected = undisturbed(zero_stage=2)
    result = resume(taken_back(expected, 55, make_spec), workers=1)
    assert result.start_step == 55 and result.step == 60
    assert_near(result, expected, base)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("workers", [(1, 2), (2, 1)])
def test_other_numbers_of_workers(
    ray_session: None, make_spec: MakeSpec, base: Path, stage: int, workers: tuple[int, int]
) -> None:
    training = {"max_steps": 20, "checkpoint_every": 10, "zero_stage": stage, "batch_size": 4 // workers[0]}
    expected = train(make_spec(training=training, cluster={"workers": workers[0]}), progress=False)
    result = resume(taken_back(expected, 10, make_spec), workers[1])
    assert result.start_step == 10
    assert_near(result, expected, base)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bit_equal(ray_session: None, make_spec: MakeSpec, stage: int, precision: str) -> None:
    fields = {"zero_stage": stage, "precision": precision, "gradient_accumulation": 2, "clip_norm": 0.5}
    expected = train(make_spec(training={"max_steps": 20, "checkpoint_every": 10, **fields}), progress=False)
    result = resume(taken_back(expected, 10, make_spec), workers=2)
    assert result.start_step == 10
    found, wanted = weights(str(result.final)), weights(str(expected.final))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
