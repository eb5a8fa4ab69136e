"""A run with adapters, FiLM and augmentation, from the spec to a checkpoint that predicts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from maps_ray.models import export_policy, load_policy
from maps_ray.spec import SpecError
from maps_ray.training.model_checks import trained_parameters
from maps_ray.training.preflight import check, model_info
from maps_ray.training.train import train


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_run_with_adapters(make_spec, base: Path, tmp_path: Path) -> None:
    spec = make_spec(
        "adapters",
        model={"film": True, "lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj", "qkv"]}},
        data={"augment": True},
        training={"max_steps": 2},
    )
    check(spec)
    train(spec, progress=False)
    final = spec.run_dir / "final"
    stored = json.loads((final / "config.json").read_text())["policy"]
    assert (stored["film"], stored["head"], stored["num_images"], stored["images"]) == (True, "l1", 2, "crop")
    adapter = json.loads((final / "lora_adapter/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["target_modules"]) == (2, 4, ["q_proj", "qkv", "v_proj"])

    # The merged weights are the base's with the adapter in them, and all else of the base is untouched.
    policy, before = load_policy(final), load_policy(base, adapter=final / "lora_adapter", num_images=2)
    for name, tensor in before.state_dict().items():
        if not name.startswith("action_head."):
            torch.testing.assert_close(policy.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name)
    images = [np.zeros((32, 32, 3), np.uint8)] * 2
    actions = policy.predict(images, "open the drawer", np.zeros(8))
    assert actions.shape == (8, 7) and np.isfinite(actions).all()
    exported = load_policy(export_policy(spec.run_dir, tmp_path / "out", "openvla-oft"))
    np.testing.assert_array_equal(exported.predict(images, "open the drawer", np.zeros(8)), actions)


def test_preflight_knows_what_is_trained(make_spec) -> None:
    full, lora = make_spec("full"), make_spec("lora", model={"lora": {"rank": 2}})
    counts = [trained_parameters(spec, model_info(spec)) for spec in (full, lora)]
    assert 0 < counts[1] < counts[0]


def test_preflight_names_unknown_targets(make_spec) -> None:
    with pytest.raises(SpecError) as caught:
        check(make_spec("bad", model={"lora": {"targets": ["q_proj", "k_porj"]}}))
    (problem,) = caught.value.problems
    assert problem.field == "model.lora.targets" and "did you mean 'k_proj'?" in str(problem)
