"""Every policy and processor has what `contracts` says, and a policy reads the processor of its own kind."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maps_ray.models import Policy, Processor, load_policy
from maps_ray.models.minivla.tiny import write_tiny

NAMES = ("openvla_oft", "minivla_oft", "minivla_vq", "vla_adapter")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("contracts")
    write_tiny(root / "oft", "oft")
    write_tiny(root / "vq", "vq")
    tiny = Path(__file__).parents[2] / "jobs" / "assets" / "tiny_base"
    return {"openvla_oft": tiny, "minivla_oft": root / "oft", "minivla_vq": root / "vq", "vla_adapter": root / "oft"}


def members(protocol: Any) -> set[str]:
    named = {name for name in vars(protocol) if not name.startswith("_") or name == "__call__"}
    return named | set(protocol.__annotations__)


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_and_its_processor_have_what_other_rooms_use(folders: dict[str, Path], name: str) -> None:
    policy = load_policy(folders[name], name=name)
    assert {"stack", "read_anchor", "predict", "deferred", "config", "read_processor"} <= members(Policy)
    assert not [member for member in members(Policy) if not hasattr(policy, member)]
    processor = pickle.loads(pickle.dumps(policy.read_processor(folders[name])))
    assert {"encode", "collate", "pad", "prompts"} <= members(Processor)
    assert not [member for member in members(Processor) if not hasattr(processor, member)]
    assert len(processor.prompts.encode("open the drawer")) > 3
    # What it makes is what the policy reads: a VLA-Adapter that starts from a MiniVLA has places for its own queries.
    image = np.zeros((40, 40, 3), np.uint8)
    sample = processor.encode(
        "open the drawer", [image], None, np.zeros((policy.config.chunk, policy.config.action_dim))
    )
    assert policy(**processor.collate([sample])).loss.isfinite()


def test_a_policy_that_was_loaded_from_another_kind_of_folder_predicts_with_its_own_processor(
    folders: dict[str, Path],
) -> None:
    folder = folders["vla_adapter"]
    vector = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 7, "min": [-1.0] * 7, "max": [1.0] * 7}
    (folder / "dataset_statistics.json").write_text(json.dumps({"demos": {"action": vector}}))
    policy = load_policy(folder, name="vla_adapter")
    actions = policy.predict([np.zeros((40, 40, 3), np.uint8)], "open the drawer")
    assert actions.shape == (8, 7) and np.isfinite(actions).all()
