"""One run from spec to trained weights, and the ways it can fail."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_specs import LONG, MakeSpec
from safetensors.torch import load_file, save_file

from maps_ray.models import load_policy
from maps_ray.spec import load_spec
from maps_ray.tracking.spool import read_history
from maps_ray.training.checkpoint import complete_checkpoints, read_manifest
from maps_ray.training.loop import learning_rate
from maps_ray.training.offline import error_on
from maps_ray.training.run_faults import TrainingError
from maps_ray.training.train import TrainResult, train

Undisturbed = Callable[..., TrainResult]


def test_a_run_leaves_weights_checkpoints_and_records(undisturbed: Undisturbed) -> None:
    result = undisturbed(zero_stage=2)
    run_dir = Path(result.run_dir)
    spec = load_spec(run_dir / "spec.yaml")
    assert result.status == "finished" and result.step == LONG["max_steps"]
    assert json.loads((run_dir / "result.json").read_text())["metrics"] == result.metrics

    history = read_history(run_dir).metrics
    assert [step for step, _ in history["train/loss"]] == list(range(1, 61))
    losses = [loss for _, loss in history["train/loss"]]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    rates = [learning_rate(step, spec.training) for step in range(60)]
    assert [rate for _, rate in history["train/learning_rate"]] == pytest.approx(rates)
    for module in ("dinov2", "siglip", "projector", "language"):
        assert [step for step, _ in history[f"drift/{module}"]] == list(range(2, 61, 2))
        assert 0 < history[f"drift/{module}"][-1][1] < 1
        assert all(0 <= rate <= 1 for _, rate in history[f"projection_rate/{module}"])

    splits = json.loads((run_dir / "evaluation.json").read_text())[-1]["splits"]
    assert splits["held_out"]["samples"] == 10 and list(splits["ood"]["tasks"]) == ["open the drawer"]
    assert history["eval/ood/action_l1"][-1] == (60, splits["ood"]["action_l1"])

    newest = complete_checkpoints(run_dir / "checkpoints")
    assert [path.name for path in newest] == ["step-00000060", "step-00000055"]
    manifest = read_manifest(newest[0])
    assert manifest["position"] == 60 * 4
    assert manifest["tracking"] == json.loads((run_dir / "tracking" / "run.json").read_text())["run_key"]
    assert manifest["spec"] == spec.model_dump(mode="json")

    trained = load_policy(str(result.final), dtype=torch.float32, num_images=2, use_proprio=True)
    assert trained.fresh_modules == ()
    base = load_policy(spec.model.checkpoint, dtype=torch.float32, num_images=2, use_proprio=True)
    # DINOv2 stands first in the order and is held, the last language layer is free.
    moved = {name: (p - base.get_parameter(name)).norm().item() for name, p in trained.named_parameters()}
    assert moved["projector.fc1.weight"] > 0 and math.isfinite(sum(moved.values()))


def test_the_error_on_other_demonstrations_is_what_the_run_itself_recorded(undisturbed: Undisturbed) -> None:
    run_dir = Path(undisturbed(zero_stage=2).run_dir)
    spec = load_spec(run_dir / "spec.yaml")
    recorded = json.loads((run_dir / "evaluation.json").read_text())[-1]["splits"]["ood"]
    found = error_on(run_dir, spec.data.path, spec.data.splits.ood)
    assert found["episodes"].keys() == recorded["episodes"].keys() and found["samples"] == recorded["samples"]
    for name in ("action_l1", "position_l1", "rotation_l1", "gripper_l1"):
        assert found[name] == pytest.approx(recorded[name], rel=1e-5)


def test_a_finished_run_is_not_run_again(undisturbed: Undisturbed) -> None:
    result = undisturbed(zero_stage=2)
    began = time.monotonic()
    assert train(load_spec(Path(result.run_dir) / "spec.yaml"), resume=True) == result
    assert time.monotonic() - began < 2


def test_more_workers_than_the_cluster_can_give(ray_session: None, make_spec: MakeSpec) -> None:
    began = time.monotonic()
    spec = make_spec(cluster={"workers": 99, "start_timeout_s": 600})
    for _ in range(2):
        # Nothing is left that would have to be resumed or removed first.
        with pytest.raises(TrainingError, match=r"cluster.workers = 99: they need 99 CPUs .*can never give more than"):
            train(spec, progress=False)
    assert time.monotonic() - began < 10


def test_a_cluster_that_is_busy_is_waited_for_no_longer_than_allowed(ray_session: None, make_spec: MakeSpec) -> None:
    import ray

    busy = ray.util.placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    ray.get(busy.ready())
    try:
        with pytest.raises(
            TrainingError, match=r"cluster.start_timeout_s = 1: no room for 2 workers .*free now: 0 CPU"
        ):
            train(make_spec(cluster={"start_timeout_s": 1}), progress=False)
    finally:
        ray.util.remove_placement_group(busy)


@pytest.mark.slow
def test_a_base_with_weights_that_are_not_finite(
    ray_session: None, make_spec: MakeSpec, base: Path, tmp_path: Path
) -> None:
    spoilt = Path(shutil.copytree(base, tmp_path / "spoilt"))
    tensors = load_file(spoilt / "model.safetensors")
    tensors["projector.fc1.bias"][0] = math.inf
    save_file(tensors, spoilt / "model.safetensors")
    with pytest.raises(TrainingError, match=r"cannot be loaded: .*values that are not finite in projector\.fc1\.bias"):
        train(make_spec(model={"checkpoint": spoilt}), progress=False)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_at_once(ray_session: None, make_spec: MakeSpec) -> None:
    spec = make_spec(training={"learning_rate": 1e30, "clip_norm": 0, "checkpoint_every": 1, "schedule": "constant"})
    with pytest.raises(TrainingError, match=r"in step 2; the last checkpoint, .*step-00000001, is sound\. Try a lower"):
        train(spec, progress=False)
    assert [path.name for path in complete_checkpoints(spec.run_dir / "checkpoints")] == ["step-00000001"]
    assert read_history(spec.run_dir).status == "FAILED"
