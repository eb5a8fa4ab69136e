"""MiniVLA-OFT as its authors run it: causal attention, their sequence, their faults only where asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import minivla_data
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from maps_ray.models import CheckpointError, load_policy, load_processor, save_policy
from maps_ray.models.minivla.tensors import published_name
from maps_ray.models.minivla.tiny import write_tiny

FIXTURES = Path(__file__).parents[1] / "fixtures" / "maps_released" / "minivla_oft_tiny"
TOLERANCE = {"rtol": 0, "atol": 2e-5}
FAULTS = ["evaluation_token"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The authors' tiny model: the native base of MiniVLA-VQ, with head and proprio projector beside it."""
    folder = tmp_path_factory.mktemp("released") / "checkpoint"
    minivla_data.write_checkpoint(folder)
    weights = load_file(folder / "model.safetensors")
    extra = load_file(FIXTURES / "extra_embed_rows.safetensors")
    weights[minivla_data.EMBEDDING][extra["embed_row_ids"]] = extra["embed_rows"].to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors")
    shutil.rmtree(folder / "vq")
    for file in FIXTURES.glob("*_checkpoint.safetensors"):
        shutil.copy(file, folder)
    shutil.copy(FIXTURES / "predict_img2_proprio.dataset_statistics.json", folder / "dataset_statistics.json")
    return folder


def read_case(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / f"{name}.npz"))


def load(checkpoint: Path, images: int, **options: Any):
    return load_policy(checkpoint, name="minivla_oft", num_images=images, use_proprio=images == 2, **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("case", "images"), [("case_img1", 1), ("case_img2_proprio_pad2", 2)])
def test_forward_and_gradients(checkpoint: Path, case: str, images: int, attention: Any) -> None:
    data = read_case(case)
    policy = load(checkpoint, images, attention=attention)
    inputs = {name[3:]: torch.from_numpy(data[name]) for name in data if name[3:] in
              ("pixel_values", "input_ids", "labels", "attention_mask", "actions", "proprio")}  # fmt: skip
    out = policy(**inputs)
    torch.testing.assert_close(out.actions, torch.from_numpy(data["out_predicted_actions"]), **TOLERANCE)
    if "out_actions_hidden_states" in data:
        torch.testing.assert_close(out.action_hidden, torch.from_numpy(data["out_actions_hidden_states"]), **TOLERANCE)
    else:
        torch.testing.assert_close(out.hidden, torch.from_numpy(data["out_last_hidden_states"]), **TOLERANCE)
    assert out.loss.item() == pytest.approx(data["out_loss"].item(), abs=2e-6)
    out.loss.backward()
    norms = json.loads((FIXTURES / f"{case}.gradnorms.json").read_text())
    found = {published_name(name): parameter.grad for name, parameter in policy.named_parameters()}
    checked = 0
    for name, norm in norms.items():
        own = name.removeprefix("module.")
        if own not in found:
            continue
        checked += 1
        assert (
            (found[own] is None or not found[own].any())
            if norm is None
            else (found[own].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-9))
        ), name
    assert checked > 100


def test_batches_of_the_training_transform(checkpoint: Path) -> None:
    for case in ("case_img1", "case_img2_proprio_pad2"):
        data = read_case(case)
        processor = load_processor(checkpoint, name="minivla_oft")
        image = np.zeros((56, 56, 3), np.uint8)
        samples = [
            processor.encode(str(sentence), [image], None, actions)
            for sentence, actions in zip(data["in_instructions"], data["in_actions"], strict=True)
        ]
        batch = processor.collate(samples)
        for name in ("input_ids", "labels", "attention_mask"):
            assert np.array_equal(batch[name], data[f"in_{name}"]), name


def test_evaluation_with_their_extra_token(checkpoint: Path) -> None:
    data = read_case("predict_img2_proprio")
    policy = load(checkpoint, 2, released_faults=FAULTS)
    codec = policy.ready_codec()
    proprio = codec.units.proprio.normalize(data["in_proprio_raw"])
    np.testing.assert_allclose(proprio, data["in_proprio_normalized"], atol=1e-6)
    sample = codec.encode(
        [np.zeros((64, 64, 3), np.uint8)] * 2, "Put the white mug on the left plate", data["in_proprio_raw"]
    )
    assert np.array_equal(sample["input_ids"], data["out_full_input_ids"][0])
    sample["pixel_values"] = data["in_pixel_values"][0]
    actions = policy.predict_batch([sample])[0]
    np.testing.assert_allclose(actions, data["out_actions"], rtol=0, atol=2e-5)
    # Without the fault the sequence is that of training, and the actions are others.
    plain = load(checkpoint, 2)
    sample = plain.ready_codec().encode(
        [np.zeros((64, 64, 3), np.uint8)] * 2, "put the white mug on the left plate", data["in_proprio_raw"]
    )
    assert len(sample["input_ids"]) == 45 + 56 and 29871 not in sample["input_ids"]
    sample["pixel_values"] = data["in_pixel_values"][0]
    assert 0.01 < np.abs(plain.predict_batch([sample])[0] - data["out_actions"]).mean() < 1


def test_a_slot_is_masked_only_where_their_fault_is_asked_for(checkpoint: Path) -> None:
    actions = np.zeros((8, 7))
    actions[3, 2] = -0.83
    image = np.zeros((56, 56, 3), np.uint8)
    batches = {}
    for faults in ((), ("masked_slot",)):
        processor = load_processor(checkpoint, name="minivla_oft", released_faults=faults)
        sample = processor.encode("put the white mug on the left plate", [image], None, actions)
        batches[faults] = processor.collate([sample])
    assert batches[()]["attention_mask"].all()
    assert torch.equal(batches[()]["input_ids"], batches["masked_slot",]["input_ids"])
    hidden = (~batches["masked_slot",]["attention_mask"]).nonzero()
    assert hidden.tolist() == [[0, 45 + 3 * 7 + 2]]
    policy = load_policy(checkpoint, name="minivla_oft")
    first, second = (policy(**batch).actions[0] for batch in batches.values())
    moved = (first - second).abs().amax(dim=1) > 1e-6
    assert moved.tolist() == [False] * 3 + [True] * 5


def test_attention_is_causal_unless_a_checkpoint_says_otherwise(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", "oft", ["place cup"])
    assert load_policy(tmp_path / "base").config.attention_mask == "causal"
    both = load_policy(tmp_path / "base", attention_mask="bidirectional")
    processors = {mask: load_processor(tmp_path / "base", attention_mask=mask) for mask in ("causal", "bidirectional")}
    rng = np.random.default_rng(0)
    image, actions = rng.integers(0, 256, (56, 56, 3), dtype=np.uint8), rng.uniform(-1, 1, (8, 7))
    for mask, processor in processors.items():
        policy = load_policy(tmp_path / "base", attention_mask=mask)
        batch = processor.collate([processor.encode("place cup", [image], None, actions)])
        slots = batch["labels"] > policy.config.action_token_begin
        assert slots.sum() == 56
        hidden = policy(**batch).hidden
        # What stands at the last prompt token sees the last slot only when attention goes both ways.
        batch["attention_mask"][0, slots[0].nonzero().max()] = False
        last = int(slots[0].int().argmax()) + 16 - 1
        changed = (policy(**batch).hidden - hidden)[0, last].abs().max() > 1e-6
        assert bool(changed) == (mask == "bidirectional")
    # A checkpoint of this package from before, without the entry, attends both ways; one that names it keeps it.
    sizes = {"num_images": 1, "use_proprio": False, "chunk": 8, "action_dim": 7, "proprio_dim": 8}
    save_policy(both.state_dict(), tmp_path / "base", tmp_path / "old", dtype=torch.float32, trained_for=sizes)
    written = json.loads((tmp_path / "old/config.json").read_text())
    assert written["policy"].pop("attention_mask") == "causal"
    (tmp_path / "old/config.json").write_text(json.dumps(written))
    assert load_policy(tmp_path / "old").config.attention_mask == "bidirectional"
    assert load_processor(tmp_path / "old").stop
    named = {**sizes, "attention_mask": "causal", "released_faults": ["masked_slot"]}
    save_policy(both.state_dict(), tmp_path / "base", tmp_path / "new", dtype=torch.float32, trained_for=named)
    config = load_policy(tmp_path / "new").config
    assert config.attention_mask == "causal" and config.released_faults == ("masked_slot",)


def test_what_cannot_be_is_refused(checkpoint: Path, tmp_path: Path, oft_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"attention_mask = 'casual': must be one of causal, bidirectional"):
        load_policy(checkpoint, name="minivla_oft", attention_mask="casual")
    with pytest.raises(CheckpointError, match=r"released_faults = \['masked_slot'\]: the released code is causal"):
        load_policy(checkpoint, name="minivla_oft", attention_mask="bidirectional", released_faults=["masked_slot"])
    with pytest.raises(CheckpointError, match=r"attention_mask = 'causal': openvla_oft is bidirectional"):
        load_policy(oft_checkpoint, attention_mask="causal")
    write_tiny(tmp_path / "tiny", "oft")
    with pytest.raises(CheckpointError, match="vocabulary of 800 ids has no 29871"):
        load_processor(tmp_path / "tiny", released_faults=FAULTS)
