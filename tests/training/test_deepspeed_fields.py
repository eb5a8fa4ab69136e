"""DeepSpeed's own fields change how a step is computed, never what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import policy_runs
import pytest

from maps_ray.spec import RunSpec

CPU = {"device": "cpu", "pin_memory": True}
# The first character is the ZeRO stage.
FIELDS: dict[str, dict[str, Any]] = {
    "1 offloaded": {"offload_optimizer": CPU},
    "2 overlapped": {"overlap_comm": True, "reduce_bucket_size": 5000, "allgather_bucket_size": 5000},
    "2 plain": {"contiguous_gradients": False, "reduce_scatter": False, "overlap_comm": False},
    "2 offloaded": {"offload_optimizer": CPU},
    "3 prefetched": {
        "overlap_comm": True,
        "sub_group_size": 3000,
        "reduce_bucket_size": 5000,
        "stage3_prefetch_bucket_size": 0,
        "stage3_param_persistence_threshold": 100,
        "stage3_max_live_parameters": 10_000,
        "stage3_max_reuse_distance": 0,
    },
    "3 offloaded": {"offload_optimizer": CPU, "offload_param": CPU},
}


def specs(base: Path) -> dict[str, RunSpec]:
    made = {}
    for name, fields in {"1": {}, "2": {}, "3": {}, **FIELDS}.items():
        spec = policy_runs.make_spec({"checkpoint": str(base)}, int(name[0]), chunk=4)
        raw = spec.model_dump(mode="json")
        raw["training"]["deepspeed"] = fields
        made[name] = RunSpec.model_validate(raw)
    return made


@pytest.mark.slow
def test_every_field_leaves_the_weights_as_they_are(base: Path) -> None:
    from processes import in_processes

    found = in_processes(2, policy_runs.trials, specs(base))
    start = dict(policy_runs.load(specs(base)["2"]).named_parameters())
    for name in FIELDS:
        expected = found[name[0]]["weights"]
        assert policy_runs.error(found[name]["weights"], expected, start) < 1e-5, name
        assert found[name]["statistics"] == pytest.approx(found[name[0]]["statistics"], rel=1e-4)
