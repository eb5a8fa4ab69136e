"""LoRA, FiLM and the other heads train under ZeRO 1 to 3 as one process on whole tensors would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oft_runs
import pytest
import torch

from maps_ray.models.lora import is_adapter
from maps_ray.spec import RunSpec

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 2, "alpha": 4}},
    "lora film": {"lora": {"rank": 2, "targets": ["q_proj", "qkv", "fc1"]}, "film": True},
    "discrete": {"head": "discrete"},
    "diffusion": {"head": "diffusion"},
}
STAGES = {"lora": (1, 2, 3), "lora film": (3,), "discrete": (2,), "diffusion": (3,)}


def variant(base: Path, name: str, stage: int) -> RunSpec:
    return RunSpec.model_validate(
        {
            "name": "oft",
            "model": {"checkpoint": str(base), **VARIANTS[name]},
            "data": {"path": "unused", "chunk": 4},
            # A strength above 1 projects from the second step on.
            "proximity": {"lambda_max": 2.0},
            "training": {
                "zero_stage": stage,
                "batch_size": 2,
                "precision": "fp32",
                "clip_norm": 0,
                "learning_rate": 1e-3,
                "max_steps": oft_runs.STEPS,
            },
        }
    )


@pytest.fixture(scope="module")
def runs(base: Path) -> dict[str, dict[str, Any]]:
    """All of it in one pair of processes: they take longer to start than to train."""
    from processes import in_processes

    return in_processes(
        2,
        oft_runs.trials,
        {f"{name} {stage}": variant(base, name, stage) for name in VARIANTS for stage in STAGES[name]},
    )


# The noise of the diffusion head is drawn anew in each process.
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "diffusion"])
def test_weights_equal_those_of_one_process(base: Path, runs, name: str) -> None:
    expected = oft_runs.reference(variant(base, name, 1))
    start = dict(oft_runs.load(variant(base, name, 1)).named_parameters())
    moved = torch.stack([(expected[key] - start[key]).norm() for key in expected]).norm().item()
    for stage in STAGES[name]:
        weights = runs[f"{name} {stage}"]["weights"]
        assert weights.keys() == expected.keys()
        error = torch.stack([(weights[key] - expected[key]).norm() for key in expected]).norm().item()
        # Adam divides tiny gradients by their own size, and so magnifies the last bits in which the sums differ.
        assert error < 2e-3 * moved, stage


@pytest.mark.parametrize("name", ["lora", "lora film"])
def test_adapters_and_new_modules_move_and_nothing_else(base: Path, runs, name: str) -> None:
    start = {key: value.detach() for key, value in oft_runs.load(variant(base, name, 1)).named_parameters()}
    new = ("action_head.", "proprio_projector.")
    for stage in STAGES[name]:
        moved = {key for key, value in runs[f"{name} {stage}"]["weights"].items() if not torch.equal(value, start[key])}
        assert all(is_adapter(key) or key.startswith(new) or ".scale." in key or ".shift." in key for key in moved)
        assert any(".lora_B." in key for key in moved) and any(key.startswith(new) for key in moved)
        assert any(".scale." in key for key in moved) == ("film" in name)
    # The schedule reaches the adapters, most at the front of the stack.
    statistics = runs[f"{name} 3"]["statistics"]
    assert statistics["projection_rate/dinov2"] > 0


@pytest.mark.parametrize("name", VARIANTS)
def test_actions_come_out(runs, name: str) -> None:
    for stage in STAGES[name]:
        actions = runs[f"{name} {stage}"]["actions"]
        assert actions.shape == (4, 4, 7) and actions.isfinite().all()
