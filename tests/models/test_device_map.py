"""Policies onto devices: the same weights and actions as loaded plainly, and maps that cannot be."""

from __future__ import annotations

import json

import pytest
import torch
from small_policy import write_base

from maps_ray.models import CheckpointError, create_policy, load_policy, save_policy
from maps_ray.models.device_map import load_for_use, place

SIZES = {"num_images": 2, "use_proprio": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    config = write_base(folder, ("open the drawer",))
    save_policy(create_policy(config, seed=1, **SIZES).state_dict(), folder, folder / "whole", dtype=torch.bfloat16)
    return folder / "whole"


def answer(policy):
    generator = torch.Generator().manual_seed(0)
    slots = policy.config.action_slots
    ids = torch.full((2, 8 + slots + 1), 3)
    labels = torch.full_like(ids, -100)
    labels[:, 8:-1] = policy.config.action_token_begin + 1
    side = policy.config.image_size
    with torch.no_grad():
        return policy(
            pixel_values=torch.rand(2, 12, side, side, generator=generator),
            input_ids=ids,
            labels=labels,
            attention_mask=torch.ones_like(ids, dtype=torch.bool),
            proprio=torch.rand(2, 8, generator=generator),
        ).actions


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        "cpu",
        json.dumps({"vision_backbone": "cpu", "projector": "cpu", "language_model": "cpu", "": "cpu"}),
        json.dumps({"max_memory": {"cpu": "1GiB"}}),
    ],
)
def test_actions_are_those_of_a_policy_loaded_plainly(checkpoint, device_map):
    if torch.cuda.is_available() and device_map == "auto":
        pytest.skip("another device gives other bits")
    plain = load_policy(checkpoint, dtype=torch.float32, **SIZES).eval()
    policy = load_for_use(checkpoint, dtype=torch.float32, device_map=device_map, **SIZES)
    assert policy.deferred == frozenset() and policy.runs_on == torch.device("cpu") and not policy.training
    assert torch.equal(answer(policy), answer(plain))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(policy.state_dict()[name], tensor), name
    # Nothing is a view of the file any more.
    next(policy.parameters()).data.add_(1)


def test_accelerates_hooks_move_inputs_through_the_policys_own_code(checkpoint):
    plain = load_policy(checkpoint, dtype=torch.float32, **SIZES).eval()
    policy = load_policy(checkpoint, dtype=torch.float32, deferred=True, **SIZES).eval()
    parts = dict.fromkeys([name for name, _ in policy.named_children()], "cpu")
    assert torch.equal(answer(place(policy, parts, torch.float32, hooks=True)), answer(plain))


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("tpu", "must be cpu, cuda or cuda:N"),
        ("meta", "must be cpu, cuda or cuda:N"),
        ("cuda:99", "this machine has .* GPUs"),
        ("{", "no JSON"),
        ('{"visoin": "cpu"}', "no module is named 'visoin'; the policy has vision_backbone"),
        ('{"vision_backbone": "cpu"}', "leaves parts out"),
        ('{"max_memory": {"cpu": "1KiB"}}', "fits neither"),
    ],
)
def test_a_map_that_cannot_be_says_why(checkpoint, device_map, message):
    with pytest.raises(CheckpointError, match=message):
        load_for_use(checkpoint, dtype=torch.float32, device_map=device_map, **SIZES)
