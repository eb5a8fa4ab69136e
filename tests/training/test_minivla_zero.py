"""MiniVLA trains under ZeRO 1 to 3 with the strengths of its own stack, as one process on whole tensors would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import policy_runs
import pytest

from maps_ray.models.minivla.tiny import write_tiny
from maps_ray.spec import RunSpec

pytestmark = pytest.mark.slow


def make_spec(folder: Path, name: str, stage: int, strength: float = 2.0) -> RunSpec:
    kind = name.removeprefix("minivla_")
    model = {"name": name, "checkpoint": str(folder / kind), "use_proprio": kind == "oft"}
    return policy_runs.make_spec(model, stage, strength)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("minivla_zero")
    for kind in ("vq", "oft"):
        write_tiny(root / kind, kind)
    return root


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """All of it in one pair of processes: they take longer to start than to train."""
    from processes import in_processes

    names = ("minivla_oft", "minivla_vq")
    specs = {f"{name} {stage}": make_spec(folder, name, stage) for name in names for stage in (1, 2, 3)}
    specs["free"] = make_spec(folder, "minivla_oft", 2, strength=0.0)
    return in_processes(2, policy_runs.trials, specs)


@pytest.mark.parametrize("name", ["minivla_oft", "minivla_vq"])
def test_weights_equal_those_of_one_process(folder: Path, runs, name: str) -> None:
    expected = policy_runs.reference(make_spec(folder, name, 1))
    start = dict(policy_runs.load(make_spec(folder, name, 1)).named_parameters())
    for stage in (1, 2, 3):
        found = runs[f"{name} {stage}"]
        # Adam divides tiny gradients by their own size, and so magnifies the last bits in which the sums differ.
        assert policy_runs.error(found["weights"], expected, start) < 1e-3, stage
        assert found["losses"][-1] < found["losses"][0]
        assert found["actions"].shape == (4, 8, 7) and found["actions"].isfinite().all()


def test_the_schedule_holds_the_front_of_the_stack(runs) -> None:
    held, free = runs["minivla_oft 2"]["statistics"], runs["free"]["statistics"]
    assert held["projection_rate/dinov2"] > 0.2 and free["projection_rate/dinov2"] == 0
    ratios = {module: held[f"drift/{module}"] / free[f"drift/{module}"] for module in ("dinov2", "language")}
    assert ratios["dinov2"] < 0.9 and ratios["dinov2"] < ratios["language"]
    assert "drift/action_head" not in held and "drift/proprio_projector" not in held
