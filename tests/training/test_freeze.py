"""A frozen module keeps its weights to the bit, the others move."""

from __future__ import annotations

import pytest
import torch

from maps_ray.models import load_policy
from maps_ray.tracking.spool import read_history
from maps_ray.training.train import train


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_frozen_weights_do_not_move(ray_session, make_spec, stage):
    spec = make_spec(
        f"frozen-{stage}", training={"zero_stage": stage}, proximity={"freeze": ["siglip"], "lambda_max": 1.0}
    )
    result = train(spec, progress=False)
    assert result.status == "finished"
    trained, start = (
        load_policy(path, dtype=torch.float32, num_images=2, use_proprio=True)
        for path in (result.final, spec.model.checkpoint)
    )
    towers = {name: p for name, p in start.named_parameters() if name.startswith("vision_backbone")}
    moved = {name.split(".")[1] for name, p in towers.items() if not torch.equal(p, trained.get_parameter(name))}
    assert moved == {"featurizer"}
    drift = read_history(spec.run_dir).metrics
    assert {value for _, value in drift["drift/siglip"]} == {0.0} and drift["drift/dinov2"][-1][1] > 0
