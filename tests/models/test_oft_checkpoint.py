"""Loading, saving and refusing checkpoint folders."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from maps_ray.models import CheckpointError, create_policy, describe, load_policy, load_weights, save_policy
from maps_ray.models.files.weights import new_folder


@pytest.fixture
def folder(small_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint to damage."""
    return shutil.copytree(small_checkpoint, tmp_path / "checkpoint")


def load(path: Path, **options: Any):
    return load_policy(path, dtype=torch.bfloat16, use_proprio=True, **options)


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def faults(path: Path) -> str:
    """The message with which loading fails; describing says the same."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value) in describe(path, use_proprio=True).problems
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_round_trip_is_exact(small_checkpoint: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    policy = load_policy(small_checkpoint, dtype=dtype, use_proprio=True)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_policy(policy.state_dict(), small_checkpoint, tmp_path / "out", dtype=dtype, step=40)
    again = load_policy(tmp_path / "out", dtype=dtype, use_proprio=True)
    assert equal(policy.state_dict(), again.state_dict())
    assert again.fresh_modules == ()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "action_head--40_checkpoint.safetensors",
        "config.json",
        "dataset_statistics.json",
        "model.safetensors",
        "preprocessor_config.json",
        "proprio_projector--40_checkpoint.safetensors",
        "tokenizer.json",
    ]
    assert "vision_backbone.featurizer.blocks.0.ls1.scale_factor" in load_file(tmp_path / "out/model.safetensors")
    assert json.loads((tmp_path / "out/dataset_statistics.json").read_text()) == {"small": {"num_transitions": 5}}


def test_loaded_weights_are_a_copy(folder: Path) -> None:
    policy = load(folder)
    before = policy.projector.fc1.weight.clone()
    (folder / "model.safetensors").write_bytes(b"\0" * (folder / "model.safetensors").stat().st_size)
    assert torch.equal(policy.projector.fc1.weight, before)


def test_anchors_are_the_stored_weights(small_checkpoint: Path) -> None:
    policy = load_policy(small_checkpoint, dtype=torch.float32, use_proprio=True)
    for name, parameter in policy.named_parameters():
        anchor = policy.read_anchor(name)
        if name.startswith(("action_head.", "proprio_projector.")):
            assert anchor is None
        else:
            assert anchor is not None and anchor.dtype == torch.bfloat16
            assert torch.equal(anchor.float(), parameter), name
    restored = pickle.loads(pickle.dumps(policy))
    assert torch.equal(restored.read_anchor("projector.fc1.weight"), policy.read_anchor("projector.fc1.weight"))


def test_policy_without_checkpoint_has_no_anchor(small_config: dict[str, Any]) -> None:
    policy = create_policy(small_config, dtype=torch.float32)
    assert policy.read_anchor("projector.fc1.weight") is None
    assert policy.fresh_modules == ("dinov2", "siglip", "projector", "language", "action_head")


def test_missing_heads_start_from_the_seed(folder: Path) -> None:
    for path in folder.glob("*--7_checkpoint.*"):
        path.unlink()
    first, again, other = load(folder, seed=1), load(folder, seed=1), load(folder, seed=2)
    assert first.fresh_modules == ("proprio_projector", "action_head")
    assert describe(folder, use_proprio=True).fresh_modules == first.fresh_modules
    assert equal(first.state_dict(), again.state_dict())
    assert not torch.equal(first.action_head.model.fc1.weight, other.action_head.model.fc1.weight)
    assert torch.equal(first.projector.fc1.weight, other.projector.fc1.weight)


def test_heads_stored_as_pt(folder: Path, small_checkpoint: Path) -> None:
    for path in folder.glob("*--7_checkpoint.safetensors"):
        torch.save(load_file(path), path.with_suffix(".pt"))
        path.unlink()
    assert equal(load(folder).state_dict(), load(small_checkpoint).state_dict())
    head = folder / "action_head--7_checkpoint.pt"
    torch.save({**torch.load(head, weights_only=True), "module.model.fc2.bias": torch.zeros(3)}, head)
    assert "model.fc2.bias: expected [7], found [3]" in faults(folder)


def test_pt_with_code_is_refused(folder: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (folder / "action_head--7_checkpoint.safetensors").unlink()
    torch.save({"module.model.fc1.bias": Payload()}, folder / "action_head--7_checkpoint.pt")
    with pytest.raises(CheckpointError, match="never pickled code"):
        load(folder)
    assert not (tmp_path / "ran").exists()
    for content in (b"", b"no archive", b"PK\x03\x04 cut off"):
        (folder / "action_head--7_checkpoint.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cannot read .*action_head--7_checkpoint\.pt"):
            load(folder)


def test_sharded_weights(folder: Path, small_checkpoint: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    keys = sorted(weights)
    shards = {"model-1.safetensors": keys[::2], "model-2.safetensors": keys[1::2]}
    for name, members in shards.items():
        save_file({key: weights[key] for key in members}, folder / name)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    weight_map = {key: name for name, members in shards.items() for key in members}
    index.write_text(json.dumps({"weight_map": weight_map}))
    policy = load(folder)
    assert equal(policy.state_dict(), load(small_checkpoint).state_dict())
    assert torch.equal(policy.read_anchor(keys[1]), weights[keys[1]])
    index.write_text(json.dumps({"weight_map": {**weight_map, keys[0]: "model-2.safetensors"}}))
    assert f"{keys[0]} is not in model-2.safetensors" in faults(folder)
    (folder / "model-2.safetensors").unlink()
    assert "model-2.safetensors" in faults(folder)


def test_weights_that_training_wrote(small_checkpoint: Path) -> None:
    policy = load(small_checkpoint)
    state = {name: tensor + 1 for name, tensor in policy.state_dict().items()}
    load_weights(policy, state)
    assert equal(policy.state_dict(), state)
    wrong = {name: tensor * 0 for name, tensor in state.items()}
    wrong["projector.fc1.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"projector\.fc1\.bias: expected \[160\], found \[3\]"):
        load_weights(policy, wrong)
    assert equal(policy.state_dict(), state)


def test_no_folder_and_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        load(tmp_path)


def test_pointers_of_git_lfs(folder: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json", "preprocessor_config.json"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n")
    faults = describe(folder).problems
    assert len(faults) == 3 and all("run `git lfs pull`" in fault for fault in faults)


@pytest.mark.parametrize(
    ("size", "message"), [(-100, "is truncated"), (4, "cannot hold its header"), (5000, "corrupt"), (0, "corrupt")]
)
def test_truncated_weights(folder: Path, size: int, message: str) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert message in faults(folder)


def test_corrupt_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"x" * 32
    path.write_bytes(content)
    assert "no safetensors header" in faults(folder)
    path.unlink()
    assert "has neither model.safetensors nor" in faults(folder)


def test_wrong_tensors_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "language_model.model.layers.{}.self_attn.q_proj.weight"
    for layer in range(3):
        weight = weights.pop(name.format(layer))
        weights[name.format(layer).replace("q_proj", "q_proj.base_layer")] = weight
        weights[name.format(layer).replace("q_proj", "q_proj.lora_A")] = weight.clone()
    weights["projector.fc2.bias"] = torch.zeros(31, dtype=torch.bfloat16)
    for key in list(weights)[:3]:
        del weights[key]
    save_file(weights, path)
    message = faults(folder)
    lines = message.splitlines()
    assert "13 tensors do not fit" in lines[0]
    assert lines[1].strip() == "projector.fc2.bias: expected [32], found [31]"
    assert "language_model.model.layers.0.self_attn.q_proj.weight: expected [32, 32], found nothing" in message
    assert lines[11].strip() == "... and 3 more"
    assert "a LoRA checkpoint that was not merged" in lines[-1]
    assert len(lines) == 13


def test_weights_of_another_kind(folder: Path) -> None:
    weights = {key: tensor.to(torch.int8) for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    assert "is stored as I8" in faults(folder)


def test_head_that_does_not_fit(folder: Path) -> None:
    path = folder / "action_head--7_checkpoint.safetensors"
    with pytest.raises(CheckpointError, match=r"model\.fc2\.bias: expected \[14\], found \[7\]"):
        load(folder, action_dim=14)
    shutil.copyfile(path, folder / "action_head--9_checkpoint.safetensors")
    assert "files of several steps" in faults(folder)


def test_saving_leaves_nothing_half_done(small_checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    policy = load(small_checkpoint)
    with pytest.raises(CheckpointError, match="exists already"):
        save_policy(policy.state_dict(), small_checkpoint, small_checkpoint, dtype=torch.bfloat16)
    state = policy.state_dict()
    del state["projector.fc1.bias"]
    with pytest.raises(CheckpointError, match=r"projector\.fc1\.bias: expected \[160\], found nothing"):
        save_policy(state, small_checkpoint, tmp_path / "out", dtype=torch.bfloat16)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("maps_ray.models.files.weights.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_policy(policy.state_dict(), small_checkpoint, tmp_path / "out", dtype=torch.bfloat16)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_has_left_goes_with_the_next_one(tmp_path: Path) -> None:
    out = tmp_path / "final"
    killed = (
        "import os, pathlib, signal, sys; from maps_ray.models.files.weights import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1])) as made:\n"
        "    (made / 'model.safetensors').write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", killed, out], check=False).returncode == -signal.SIGKILL
    assert [path.read_bytes() for path in tmp_path.rglob("model.safetensors")] == [b"half"] and not out.exists()
    # Nobody's half: hidden files of others, however they are called.
    for name in (".final.yaml", ".final.partial", ".final-2.abc.partial"):
        (tmp_path / name).touch()
    with new_folder(out) as made:
        (made / "config.json").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(".final-2.abc.partial", ".final.partial", ".final.yaml", "final")
    ]
