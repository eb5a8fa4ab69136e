"""The names of DeepSpeed that the rooms rely on are in the installed one."""

from __future__ import annotations

import inspect
import re
from types import ModuleType

import deepspeed.runtime.bf16_optimizer
import deepspeed.runtime.engine
import deepspeed.runtime.zero.partition_parameters
import deepspeed.runtime.zero.stage3
import deepspeed.runtime.zero.stage_1_and_2
import pytest

from maps_ray.proximity.zero import deepspeed_engine as names

ZERO = "_global_grad_norm", "dp_process_group", "param_groups", "optimizer"
KINDS = {
    names.Stage12Optimizer: deepspeed.runtime.zero.stage_1_and_2,
    names.BF16Optimizer: deepspeed.runtime.bf16_optimizer,
    names.Stage3Optimizer: deepspeed.runtime.zero.stage3,
    names.Engine: deepspeed.runtime.engine,
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_name_is_there(kind: type) -> None:
    source = inspect.getsource(KINDS[kind])
    own = {name for name in (*inspect.get_annotations(kind), *vars(kind)) if not name.startswith("__")}
    if kind is not names.Engine:
        own |= {*ZERO, "is_invalid_grad_norm"}
    own = {name for name in own if not name.startswith(("_abc", "_is_"))}
    missing = {name for name in own if not re.search(rf"\b{name}\b", source)}
    assert len(own) > 5
    assert not missing


def test_what_is_replaced_is_there() -> None:
    module: ModuleType = deepspeed.runtime.zero.partition_parameters
    for name in (
        *("_convert_to_zero_parameters", "_convert_to_deepspeed_param", "_aligned_size"),
        *("_partition_rank", "_partition_world_size"),
    ):
        assert hasattr(module.Init, name) or name in inspect.getsource(module), name
