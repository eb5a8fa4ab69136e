"""VLA-Adapter trains under ZeRO 1 to 3 with the strengths of its own stack, as one process on whole tensors would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import policy_runs
import pytest

from maps_ray.models.minivla.tiny import write_tiny
from maps_ray.models.vla_adapter import model
from maps_ray.spec import RunSpec


def without_noise(specs: dict[str, RunSpec]) -> dict[str, dict[str, Any]]:
    """The draw of one process on the whole batch is not that of two on its halves."""
    model.NOISE = 0.0
    return policy_runs.trials(specs)


def make_spec(folder: Path, stage: int) -> RunSpec:
    chosen = {"name": "vla_adapter", "checkpoint": str(folder), "use_proprio": True}
    return policy_runs.make_spec(chosen, stage)


@pytest.mark.slow
def test_weights_equal_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from processes import in_processes

    folder = tmp_path / "base"
    write_tiny(folder, "oft")
    monkeypatch.setattr(model, "NOISE", 0.0)
    expected = policy_runs.reference(make_spec(folder, 1))
    start = dict(policy_runs.load(make_spec(folder, 1)).named_parameters())
    runs = in_processes(2, without_noise, {str(stage): make_spec(folder, stage) for stage in (1, 2, 3)})
    for stage, found in runs.items():
        assert policy_runs.error(found["weights"], expected, start) < 1e-3, stage
        assert found["losses"][-1] < found["losses"][0]
        assert found["actions"].shape == (4, 8, 7) and found["actions"].isfinite().all()
        assert found["statistics"]["projection_rate/dinov2"] > 0.2
        assert not [name for name in found["statistics"] if name.endswith(("action_queries", "action_head"))]
