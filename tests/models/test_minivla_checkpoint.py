"""MiniVLA checkpoints in every form, what they become when saved, and how broken ones are refused."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from minivla_data import write_published
from safetensors.torch import load_file, save_file

from maps_ray.models import (
    CheckpointError,
    create_policy,
    describe,
    load_policy,
    load_processor,
    load_weights,
    save_policy,
)
from maps_ray.models.files.formats import read_pt_header
from maps_ray.models.minivla.config import PolicyConfig
from maps_ray.models.minivla.tensors import model_shapes
from maps_ray.models.minivla.tiny import build_tokenizer, tiny_config, write_tiny
from maps_ray.proximity.stack import assign


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "run"
    write_published(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    for kind in ("vq", "oft"):
        write_tiny(root / kind, kind, ["open the drawer"])
    return {kind: root / kind for kind in ("vq", "oft")}


def test_published_file_gives_the_same_policy(published: Path, minivla_checkpoint: Path) -> None:
    stored, native = load_policy(minivla_checkpoint), load_policy(published)
    first, second = stored.state_dict(), native.state_dict()
    assert first.keys() == second.keys() and "llm_backbone.llm.lm_head.weight" not in first
    assert all(torch.equal(first[name], second[name]) for name in first)
    for policy in (stored, pickle.loads(pickle.dumps(native))):
        name = "llm_backbone.llm.model.layers.2.self_attn.k_proj.bias"
        anchor = policy.read_anchor(name)
        assert anchor.dtype == torch.bfloat16 and torch.equal(anchor.float(), first[name])
        assert policy.read_anchor("action_head.model.fc1.weight") is None


def test_describe_reads_both_forms_without_torch(published: Path, minivla_checkpoint: Path) -> None:
    code = (
        "import sys; from maps_ray.models import describe\n"
        "for path in sys.argv[1:]:\n"
        "    info = describe(path)\n"
        "    print(info.name, info.dtype, info.image_size, len(info.parameters), len(info.stack), info.problems)\n"
        "assert not {'torch', 'transformers', 'timm'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(minivla_checkpoint), str(published)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "minivla_vq bfloat16 56 173 12 []"
    assert lines[1].startswith("minivla_vq bfloat16 56 173 12 ['") and "tokenizer.json is missing" in lines[1]


@pytest.mark.parametrize(("name", "proprio"), [("minivla_vq", False), ("minivla_oft", False), ("minivla_oft", True)])
def test_stack_covers_every_parameter_once(minivla_checkpoint: Path, name: str, proprio: bool) -> None:
    policy = load_policy(minivla_checkpoint, name=name, use_proprio=proprio)
    info = describe(minivla_checkpoint, name=name, use_proprio=proprio)
    assert info.name == name and info.problems == []
    shapes = {parameter: tuple(tensor.shape) for parameter, tensor in policy.named_parameters()}
    assert shapes == info.parameters and policy.stack() == info.stack
    owners = assign(info.stack, shapes)
    pretrained = [layer.name for layer in info.stack if layer.pretrained]
    towers = [f"dinov2.{i}" for i in range(4)] + [f"siglip.{i}" for i in range(3)]
    assert pretrained == [*towers, "projector", *(f"language.{i}" for i in range(4))]
    assert owners["llm_backbone.llm.model.embed_tokens.weight"].name == "language.0"
    assert owners["llm_backbone.llm.model.norm.weight"].modules == ("language", "language_late")
    fresh = [layer.name for layer in info.stack if not layer.pretrained]
    assert fresh == ["proprio_projector"] * proprio + ["action_head"] * (name == "minivla_oft")
    assert policy.fresh_modules == info.fresh_modules and set(policy.fresh_modules) == set(fresh)
    for parameter, owner in owners.items():
        assert (policy.read_anchor(parameter) is not None) == owner.pretrained


@pytest.mark.parametrize("kind", ["vq", "oft"])
def test_saved_policy_comes_back_bit_by_bit(tiny: dict[str, Path], tmp_path: Path, kind: str) -> None:
    sizes: dict[str, Any] = {"num_images": 2, "use_proprio": kind == "oft"}
    policy = load_policy(tiny[kind], dtype=torch.bfloat16, **sizes)
    state = {name: tensor + 0.125 for name, tensor in policy.state_dict().items()}
    statistics = {"small": {"num_transitions": 5}}
    trained_for = {**sizes, "chunk": 8, "action_dim": 7, "normalization": "q01_q99"}
    out = tmp_path / "out"
    save_policy(state, tiny[kind], out, dtype=torch.bfloat16, step=9, statistics=statistics, trained_for=trained_for)
    again = load_policy(out, dtype=torch.bfloat16)
    assert type(again) is type(policy) and again.fresh_modules == () and again.config == policy.config
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert json.loads((out / "dataset_statistics.json").read_text()) == statistics
    assert load_processor(out).prompts.encode("open the drawer") == load_processor(tiny[kind]).prompts.encode(
        "Open the drawer"
    )
    load_weights(policy, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in policy.state_dict().items())
    with pytest.raises(CheckpointError, match=r"num_images = 3: the checkpoint was trained with 2"):
        load_policy(out, num_images=3)
    with pytest.raises(CheckpointError, match="exists already"):
        save_policy(state, tiny[kind], out, dtype=torch.bfloat16)


def test_header_of_a_pt_file_is_what_torch_reads(published: Path) -> None:
    file = next((published / "checkpoints").glob("*.pt"))
    header, loaded = read_pt_header(file)["model"], torch.load(file, weights_only=True)["model"]
    for module, tensors in loaded.items():
        assert header[module].keys() == tensors.keys()
        for name, tensor in tensors.items():
            info = header[module][name]
            assert info.shape == tuple(tensor.shape) and f"torch.{info.dtype}" == str(tensor.dtype)


def test_pickled_code_is_refused_and_not_run(published: Path, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    folder = tmp_path / "run"
    shutil.copytree(published, folder, ignore=shutil.ignore_patterns("*.pt"))
    torch.save({"model": {"vision_backbone": Touch()}}, folder / "model.pt")
    for use in (load_policy, lambda path: describe(path).problems and pytest.fail(describe(path).problems[0])):
        with pytest.raises((CheckpointError, pytest.fail.Exception), match="never pickled code"):
            use(folder)
    assert not (tmp_path / "ran").exists()


def test_broken_weights_are_refused(published: Path, tmp_path: Path) -> None:
    def problem(folder: Path) -> str:
        found = [text for text in describe(folder).problems if "tokenizer.json" not in text]
        with pytest.raises(CheckpointError) as error:
            load_policy(folder)
        assert found == [str(error.value)]
        return found[0]

    def copy(name: str, weights: bool = True) -> Path:
        ignored = shutil.ignore_patterns() if weights else shutil.ignore_patterns("*.pt")
        return Path(shutil.copytree(published, tmp_path / name, ignore=ignored))

    assert "found: none" in problem(copy("empty", weights=False))
    two = copy("two")
    file = next((two / "checkpoints").glob("*.pt"))
    shutil.copy(file, file.with_name("step-000200.pt"))
    assert "must hold exactly one" in problem(two)
    shutil.copy(file, file.with_name("latest-checkpoint.pt"))
    assert load_policy(two).config.kind == "vq"
    cut = copy("cut")
    file = next((cut / "checkpoints").glob("*.pt"))
    file.write_bytes(file.read_bytes()[:-2000])
    assert "copy it again" in problem(cut)
    write_published(tmp_path / "shape", llm__model__norm__weight=torch.zeros(63))
    assert "llm_backbone|llm.model.norm.weight: expected [64], found [63]" in problem(tmp_path / "shape")
    write_published(tmp_path / "extra", llm__model__lora_A__weight=torch.zeros(2))
    assert "a LoRA checkpoint that was not merged" in problem(tmp_path / "extra")


def test_an_untied_head_is_refused(tmp_path: Path) -> None:
    write_published(tmp_path / "run", llm__lm_head__weight=torch.ones(151936, 64, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match="head is tied"):
        load_policy(tmp_path / "run")


def test_requests_that_do_not_fit_are_refused(tiny: dict[str, Path], small_checkpoint: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"MiniVLA-VQ reads no proprioception", {"use_proprio": True}),
        (r"num_images = 4: must be 1 to 3", {"num_images": 4}),
        (r"head = 'diffusion': MiniVLA has no such part", {"head": "diffusion"}),
        (r"film = True: MiniVLA has no such part", {"film": True}),
        (r"describes minivla_vq, not openvla_oft: set model.name: minivla_vq", {"name": "openvla_oft"}),
        (r"no policy is named 'minivla'; known: openvla_oft, minivla_vq, minivla_oft", {"name": "minivla"}),
    ]
    for message, options in cases:
        for use in (load_policy, describe):
            with pytest.raises(CheckpointError, match=message):
                use(tiny["vq"], **options)
    with pytest.raises(CheckpointError, match="describes openvla_oft, not minivla_oft"):
        describe(small_checkpoint, name="minivla_oft")
    with pytest.raises(CheckpointError, match="encodes chunks of 8 x 7, the data has 5 x 7"):
        load_policy(tiny["vq"], chunk=5)
    assert "set data.chunk" in describe(tiny["vq"], chunk=5).problems[0]
    # The same base can be trained either way, but for tokens it needs a tokenizer of actions.
    assert load_policy(tiny["vq"], name="minivla_oft").fresh_modules == ("action_head",)
    with pytest.raises(CheckpointError, match="needs a VQ action tokenizer"):
        load_policy(tiny["oft"], name="minivla_vq")
    assert "jobs/train_vq.py" in describe(tiny["oft"], name="minivla_vq").problems[0]


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("qwen_config missing", {"qwen_config": None}),
        ("must be 'qwen2'", {"qwen_config": {"model_type": "llama"}}),
        ("head is tied", {"qwen_config": {"tie_word_embeddings": False}}),
        ("hidden_size missing", {"qwen_config": {"hidden_size": None}}),
        ("len_tokenizer = 200: must be more than the 256 action tokens", {"len_tokenizer": 200}),
        (r"dino_kwargs: unknown \['width'\]", {"dino_kwargs": {"width": 3}}),
        ("4 and 16 patches", {"dino_kwargs": {"img_size": 28}}),
    ],
)
def test_broken_configurations_are_refused(message: str, change: dict[str, Any]) -> None:
    config = tiny_config("oft")
    for field, value in change.items():
        if isinstance(value, dict):
            config[field] |= value
            config[field] = {name: entry for name, entry in config[field].items() if entry is not None}
        elif value is None:
            del config[field]
        else:
            config[field] = value
    with pytest.raises(CheckpointError, match=message):
        create_policy(config)


def test_a_tokenizer_of_another_model_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny["oft"], tmp_path / "other"))
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<more_{number}>" for number in range(3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_processor(folder).stop == load_processor(tiny["oft"]).stop
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "len_tokenizer": 760}))
    with pytest.raises(CheckpointError, match="its action tokens are not 504 to 759"):
        load_processor(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="must hold its tokenizer"):
        load_processor(folder)


def test_published_training_configuration_names_the_real_model() -> None:
    """The 0.5 B model with both towers at 224 pixels: sizes from the names alone."""
    config = PolicyConfig.from_dict({"vla": {"base_vlm": "prism-qwen25-extra-dinosiglip-224px+0_5b"}})
    shapes = model_shapes(config)
    assert config.dinov2.patches == 256 and config.action_token_begin == 151664
    assert shapes["projector|projector.0.weight"] == (8704, 2176)
    assert shapes["llm_backbone|llm.model.layers.23.self_attn.v_proj.bias"] == (128,)
    language = sum(math.prod(shape) for key, shape in shapes.items() if key.startswith("llm_backbone|"))
    assert language == 494_032_768
    with pytest.raises(CheckpointError, match="known base models"):
        PolicyConfig.from_dict({"vla": {"base_vlm": "another"}})


def test_safetensors_without_a_tensor_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny["oft"], tmp_path / "short"))
    weights = load_file(folder / "model.safetensors")
    weights.pop("projector|projector.4.bias")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"projector\|projector.4.bias: expected \[64\], found nothing"):
        load_policy(folder)


@pytest.mark.parametrize("kind", ["vq", "oft"])
def test_predict_gives_actions_in_recorded_units(tiny: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder, low, high = tmp_path / "run", [10.0] * 7, [20.0] * 7
    policy = load_policy(tiny[kind])
    entry = {"min": low, "max": high, "q01": low, "q99": high}
    statistics = {"small": {"action": {**entry, "mask": [True] * 6 + [False]}, "num_transitions": 5}}
    trained_for = {"num_images": 1, "normalization": "q01_q99", "images": "plain"}
    save_policy(
        policy.state_dict(), tiny[kind], folder, dtype=torch.float32, statistics=statistics, trained_for=trained_for
    )
    policy = load_policy(folder)
    image = np.full((60, 60, 3), 90, np.uint8)
    actions = policy.predict([image], "open the drawer")
    processor = load_processor(folder)
    policy.eval()
    out = policy(**processor.collate([processor.encode("open the drawer", [image])]))
    normalised = out.actions[0].detach().numpy()
    assert out.loss is None and actions.shape == (8, 7)
    np.testing.assert_allclose(actions[:, :6], 5 * (normalised[:, :6] + 1) + 10, rtol=1e-5)
    np.testing.assert_allclose(actions[:, 6], normalised[:, 6], rtol=1e-5)
