"""The loop without Ray: what a step waits for, what it does not apply, what checkpoints made behind it bring back."""

from __future__ import annotations

from typing import Any

import loop_runs
import pytest
from run_specs import MakeSpec

from maps_ray.spec import RunSpec
from maps_ray.tracking.history import read_history
from maps_ray.tracking.tracker import Tracker
from maps_ray.training.checkpoint import complete_checkpoints, read_manifest

# Name -> fields of `training`.
RUNS: dict[str, dict[str, Any]] = {
    "again 1": {"zero_stage": 1, "precision": "bf16", "gradient_accumulation": 2},
    "again 2": {"zero_stage": 2, "precision": "bf16"},
    "again 3": {"zero_stage": 3, "clip_norm": 0.01},
    "waits": {"log_every": 4, "checkpoint_every": 100},
    "spoiled 2": {"log_every": 8, "checkpoint_every": 2},
    "spoiled 3": {"log_every": 8, "checkpoint_every": 2, "zero_stage": 3},
    "storage": {"checkpoint_every": 2, "max_steps": 7},
}


@pytest.fixture(scope="module")
def specs(make_spec: MakeSpec) -> dict[str, RunSpec]:
    made = {}
    for name, fields in RUNS.items():
        training = {"max_steps": 8, "checkpoint_every": 4, "keep_checkpoints": 3, **fields}
        spec = make_spec(name.replace(" ", "-"), training=training)
        Tracker.create(spec.run_dir, uri="sqlite:///unused.db", experiment="e", run_name=spec.name, ship=False)
        made[name] = spec
    return made


@pytest.fixture(scope="module")
def found(specs: dict[str, RunSpec]) -> dict[str, Any]:
    from processes import in_processes

    return dict(in_processes(2, loop_runs.all_of_it, specs))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(
    found: dict[str, Any], specs: dict[str, RunSpec], stage: int
) -> None:
    result = found[f"again {stage}"]
    assert result["first"]["status"] == result["second"]["status"] == "finished"
    assert result["second"]["start_step"] == 4
    assert len(result["expected"]) == 3 and result["found"] == result["expected"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_ranks_together_read_each_number_once(found: dict[str, Any], specs: dict[str, RunSpec], stage: int) -> None:
    folder = specs[f"again {stage}"].run_dir / "checkpoints" / "step-00000004"
    files = read_manifest(folder)["files"]
    stored = sum(size for name, size in files.items() if name.endswith(".safetensors"))
    # Weights and two moments in fp32; the headers are the rest.
    assert 0.8 * stored < 4 * sum(found[f"again {stage}"]["read"]) < stored


def test_a_step_reads_the_step_before_it_and_waits_for_nothing_else(found: dict[str, Any]) -> None:
    waits = found["waits"]
    assert len(waits) == 8
    # The first has none before it; the fourth and the last are log steps.
    for step in (2, 3, 5, 6, 7):
        # On a CPU the pulls, where there are any, are read too: they are at hand. On a GPU they are not read.
        assert waits[step - 1] in (["tolist"], ["tolist", "tolist"]), waits[step - 1]


def test_every_loss_is_recorded_once_with_its_step(specs: dict[str, RunSpec], found: dict[str, Any]) -> None:
    history = read_history(specs["waits"].run_dir).metrics
    assert [step for step, _ in history["train/loss"]] == list(range(1, 9))
    for part in ("data", "forward", "backward", "optimizer"):
        assert [step for step, _ in history[f"train/{part}_seconds"]] == [4, 8]
        assert all(seconds > 0 for _, seconds in history[f"train/{part}_seconds"])
    assert history["train/peak_memory_gib"][-1][1] > 0.1
    assert history["train/tokens_per_second"][-1][1] > 0
    saved = read_history(specs["again 2"].run_dir).metrics
    assert {step for step, _ in saved["train/checkpoint_seconds"]} == {4, 8}
    assert {4}.issubset(step for step, _ in saved["train/checkpoint_write_seconds"])


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_that_is_not_finite_is_not_applied(found: dict[str, Any], specs: dict[str, RunSpec], stage: int) -> None:
    result = found[f"spoiled {stage}"]
    assert result["status"] == "failed"
    assert result["message"].startswith("the loss is inf in step 4; the last checkpoint, ")
    # Neither the step itself nor any that was queued after it.
    assert result["moved"][:3] == [True] * 3 and not any(result["moved"][3:])
    kept = complete_checkpoints(specs[f"spoiled {stage}"].run_dir / "checkpoints")
    assert [folder.name for folder in kept] == ["step-00000002"]


def test_storage_that_breaks_is_told_at_the_next_steps(found: dict[str, Any]) -> None:
    result = found["storage"]
    assert result["status"] == "failed"
    assert result["message"].startswith("cannot write the checkpoint of step 4 under ")
    assert "no earlier one exists" in result["message"] and "Free some space" in result["message"]
