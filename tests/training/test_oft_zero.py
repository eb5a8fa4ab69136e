"""LoRA, FiLM and the other heads train under ZeRO 1 to 3 as one process on whole tensors would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import policy_runs
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
    return policy_runs.make_spec({"checkpoint": str(base), **VARIANTS[name]}, stage, chunk=4)


@pytest.fixture(scope="module")
def runs(base: Path) -> dict[str, dict[str, Any]]:
    """All of it in one pair of processes: they take longer to start than to train."""
    from processes import in_processes

    return in_processes(
        2,
        policy_runs.trials,
        {f"{name} {stage}": variant(base, name, stage) for name in VARIANTS for stage in STAGES[name]},
    )


# The noise of the diffusion head is drawn anew in each process.
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "diffusion"])
def test_weights_equal_those_of_one_process(base: Path, runs, name: str) -> None:
    expected = policy_runs.reference(variant(base, name, 1))
    start = dict(policy_runs.load(variant(base, name, 1)).named_parameters())
    for stage in STAGES[name]:
        # Adam divides tiny gradients by their own size, and so magnifies the last bits in which the sums differ.
        assert policy_runs.error(runs[f"{name} {stage}"]["weights"], expected, start) < 2e-3, stage


@pytest.mark.parametrize("name", ["lora", "lora film"])
def test_adapters_and_new_modules_move_and_nothing_else(base: Path, runs, name: str) -> None:
    start = {key: value.detach() for key, value in policy_runs.load(variant(base, name, 1)).named_parameters()}
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
