"""What a policy says can get no gradient is what gets none, and a pass of OpenVLA-OFT waits for no device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loop_runs
import policy_runs
import pytest

from maps_ray.models.decoder import padding_known
from maps_ray.models.minivla.tiny import write_tiny

VARIANTS: dict[str, dict[str, Any]] = {
    "l1": {},
    "discrete": {"head": "discrete"},
    "film": {"film": True},
    "lora": {"lora": {"rank": 2}},
    "vq": {"name": "minivla_vq", "use_proprio": False},
    "minivla": {"name": "minivla_oft"},
}


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("minivla") / "vq"
    write_tiny(root, "vq")
    return {"openvla_oft": base, "minivla": root}


@pytest.mark.parametrize("name", VARIANTS)
def test_idle_parameters_are_those_without_a_gradient(folders: dict[str, Path], name: str) -> None:
    fields = VARIANTS[name]
    small = fields.get("name", "openvla_oft") == "openvla_oft"
    checkpoint = folders["openvla_oft" if small else "minivla"]
    spec = policy_runs.make_spec({"checkpoint": str(checkpoint), **fields}, 2, chunk=4 if small else 8)
    policy, batch = policy_runs.load(spec), policy_runs.batch(spec, 0)
    with loop_runs.Waits() as waits, padding_known(True):
        policy(**batch).loss.backward()
    # transformers looks at the mask of a causal model by itself.
    assert not small or not waits.found
    trained = {key: parameter for key, parameter in policy.named_parameters() if parameter.requires_grad}
    without = {key for key, parameter in trained.items() if parameter.grad is None}
    assert without and without == policy.idle_parameters() & trained.keys()
