"""The loop without Ray: what a step waits for, what it does not apply, what checkpoints made behind it bring back."""

from __future__ import annotations

from typing import Any

import loop_runs
import pytest
from run_specs import RIVALS, MakeSpec
from safetensors import safe_open

from maps_ray.spec import RunSpec
from maps_ray.tracking.spool import read_history
from maps_ray.tracking.tracker import Tracker
from maps_ray.training.checkpoint import complete_checkpoints, read_manifest

# Name -> fields of `training`, and other sections by name.
RUNS: dict[str, dict[str, Any]] = {
    "again 1": {"zero_stage": 1, "precision": "bf16", "gradient_accumulation": 2},
    "again 2": {"zero_stage": 2, "precision": "bf16"},
    "again 3": {"zero_stage": 3, "clip_norm": 0.01},
    "again gaussian": {"zero_stage": 2, "model": {"lora": {"rank": 4, "init": "gaussian"}}},
    "again kaiming": {"zero_stage": 3, "model": {"lora": {"rank": 4, "init": "kaiming"}}},
    # Taken back into the steps during which the head trains alone, where radii have not moved yet.
    "again rivals": {**RIVALS["training"], "zero_stage": 2, "proximity": RIVALS["proximity"]},
    "waits": {"log_every": 4, "checkpoint_every": 100},
    "spoiled 2": {"log_every": 8, "checkpoint_every": 2},
    "spoiled 3": {"log_every": 8, "checkpoint_every": 2, "zero_stage": 3},
    "storage": {"checkpoint_every": 2, "max_steps": 7},
}

AGAIN = [name for name in RUNS if name.startswith("again")]


@pytest.fixture(scope="module")
def specs(make_spec: MakeSpec) -> dict[str, RunSpec]:
    made = {}
    for name, fields in RUNS.items():
        sections = {part: fields[part] for part in ("model", "proximity") if part in fields}
        if "model" in sections:
            sections["proximity"] = {"lora_anchor": "init", "lambda_max": 2.0}
        own = {field: value for field, value in fields.items() if field not in sections}
        training = {"max_steps": 8, "checkpoint_every": 4, "keep_checkpoints": 3, **own}
        spec = make_spec(name.replace(" ", "-"), training=training, **sections)
        Tracker.create(spec.run_dir, uri="sqlite:///unused.db", experiment="e", run_name=spec.name, ship=False)
        made[name] = spec
    return made


@pytest.fixture(scope="module")
def found(specs: dict[str, RunSpec]) -> dict[str, Any]:
    from processes import in_processes

    return dict(in_processes(2, loop_runs.all_of_it, specs))


@pytest.mark.parametrize("name", AGAIN)
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(found: dict[str, Any], name: str) -> None:
    result = found[name]
    assert result["first"]["status"] == result["second"]["status"] == "finished"
    assert result["second"]["start_step"] == 4
    # With LoRA the adapters too, beside the weights that they are merged into.
    assert len(result["expected"]) == (4 if "lora_adapter/adapter_model.safetensors" in result["expected"] else 3)
    assert result["found"] == result["expected"]
    # That one holds parameters as well that are not trained any more.
    assert (result["added"] > 0) == (name == "again 2")


@pytest.mark.parametrize("name", AGAIN)
def test_all_ranks_together_read_each_number_once(found: dict[str, Any], specs: dict[str, RunSpec], name: str) -> None:
    folder = specs[name].run_dir / "checkpoints" / "step-00000004"
    files = read_manifest(folder)["files"]
    stored = sum(size for file, size in files.items() if file.endswith(".safetensors"))
    stored -= found[name]["added"]
    # In fp32; the headers are the rest, which of many small adapters are a larger part.
    assert (0.8 if specs[name].model.lora is None else 0.4) * stored < 4 * sum(found[name]["read"]) < stored
    with safe_open(folder / "rank-00000.safetensors", framework="pt") as file:
        kinds = {key.partition("/")[0] for key in file.keys()}  # noqa: SIM118
    # No anchors: those of pretrained weights come from the base, those of adapters from the seed.
    assert kinds == {"weight", "exp_avg", "exp_avg_sq"} | ({"average"} if specs[name].training.ema else set())


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_adapters_are_held_to_their_start_also_after_a_resume(
    found: dict[str, Any], specs: dict[str, RunSpec], init: str
) -> None:
    metrics = read_history(specs[f"again {init}"].run_dir).metrics
    # Drift is counted where an anchor is not zero: of each A, from its start.
    assert {step for step, _ in metrics["drift/dinov2"]} == {2, 4, 6, 8}
    assert all(0 < drift < 0.1 for _, drift in metrics["drift/dinov2"])
    assert any(rate > 0 for step, rate in metrics["projection_rate/dinov2"] if step > 4)
    assert len(found[f"again {init}"]["expected"]) == 4


def test_rivals_train_the_head_alone_and_then_everything(found: dict[str, Any], specs: dict[str, RunSpec]) -> None:
    metrics = read_history(specs["again rivals"].run_dir).metrics
    begin = RIVALS["training"]["freeze_until"]["step"]
    assert {drift for step, drift in metrics["drift/language"] if step <= begin} == {0.0}
    assert all(drift > 0 for step, drift in metrics["drift/language"] if step > begin)
    assert metrics["radius/dinov2"][-1][1] > 0


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
