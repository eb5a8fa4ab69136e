"""VLA-Adapter computes what the published code computes, keeps its files bit by bit, and starts from a MiniVLA."""

from __future__ import annotations

import json
import lzma
import math
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save_file
from test_minivla_export import STATISTICS
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from maps_ray.models import CheckpointError, describe, export_policy, load_policy, load_processor, save_policy
from maps_ray.models.activations import checkpoint_blocks
from maps_ray.models.files.weights import look_at_weights
from maps_ray.models.lora import add_adapters
from maps_ray.models.minivla.tiny import write_tiny
from maps_ray.models.openvla_oft.tensors import parameter_name
from maps_ray.models.vla_adapter import tensors
from maps_ray.models.vla_adapter.bridge import BridgeAttention
from maps_ray.models.vla_adapter.config import PolicyConfig
from maps_ray.proximity.schedule import tensor_strengths
from maps_ray.proximity.stack import assign
from maps_ray.spec import ProximitySpec

FIXTURES = Path(__file__).parents[1] / "fixtures" / "vla_adapter_tiny"
TOLERANCE = 3e-5
# The sentence's words and what Qwen2.5's tokenizer makes of the prompt; its only word of two tokens is " Qwen".
PIECES = r"<\|\w+\|>| Q|wen| ?[A-Za-z]+|\n|[.,?]"


def arrays(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / name))


def weights(name: str) -> dict[str, Tensor]:
    return load(lzma.decompress((FIXTURES / f"{name}.safetensors.xz").read_bytes()))


def prompt_tokenizer() -> Tokenizer:
    case = arrays("predict_pro.npz")
    vocabulary = {f"<|extra_{number}|>": 151665 + number for number in range(256)}
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    pieces = [piece for piece, _ in split.pre_tokenize_str(str(case["in_prompt"]))]
    vocabulary |= dict(zip(pieces, case["in_prompt_ids"][0].tolist(), strict=True)) | {"<|endoftext|>": 151643}
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "<unk>": 0}, "<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens([name for name in vocabulary if name.startswith("<|")])
    return tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published code's tiny policy, with the configuration that says its sizes."""
    folder = tmp_path_factory.mktemp("vla_adapter") / "checkpoint"
    folder.mkdir()
    shutil.copy(FIXTURES / "config.json", folder / "config.json")
    prompt_tokenizer().save(str(folder / "tokenizer.json"))
    model = weights("model")
    rows, ids = model.pop("embed_rows"), model.pop("embed_row_ids")
    model[tensors.EMBEDDING] = torch.zeros(151936, 32, dtype=torch.bfloat16)
    model[tensors.EMBEDDING][ids] = rows
    save_file(model, folder / "model.safetensors")
    for name in ("action_head", "proprio_projector"):
        save_file(weights(name), folder / f"{name}--100_checkpoint.safetensors")
    (folder / "dataset_statistics.json").write_text(json.dumps(STATISTICS))
    return folder


@pytest.fixture(scope="module")
def case() -> dict[str, np.ndarray]:
    return arrays("case_pro_train_pad2.npz")


@pytest.fixture(scope="module")
def batch(case: dict[str, np.ndarray]) -> dict[str, Tensor]:
    names = ("pixel_values", "input_ids", "attention_mask", "labels", "proprio", "actions")
    return {name: torch.from_numpy(case[f"in_{name}"]) for name in names}


def close(actual: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_forward_and_gradients(checkpoint: Path, batch, case, attention: str) -> None:
    policy = load_policy(checkpoint, attention=attention)
    assert policy.fresh_modules == () and policy.config.bridge == "pro" and policy.config.queries == 64
    noise = torch.from_numpy(case["in_noise"])
    out = policy(**batch, noise=noise)
    close(out.projected.detach(), case["out_projected_patches"])
    mask = case["out_multimodal_attention_mask"]
    close(out.hidden.detach()[mask], case["out_hidden_states"][1][mask])
    close(out.action_hidden.detach(), case["out_policy_input"][:, 1, 32:])
    close(out.actions.detach(), case["out_predicted_actions"])
    close(out.loss.item(), case["out_loss"])
    out.loss.backward()
    norms = {parameter_name(key): norm for key, norm in json.loads((FIXTURES / "gradnorms.json").read_text()).items()}
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    assert gradients.keys() == norms.keys()
    for name, norm in norms.items():
        gradient = gradients[name]
        assert (gradient is None) == (norm is None), name
        if gradient is not None:
            assert gradient.norm().item() == pytest.approx(norm, rel=1e-3, abs=TOLERANCE), name
    close(policy.action_queries.weight.grad, case["grad:action_queries.weight"])


def test_evaluation_path_and_prompt(checkpoint: Path) -> None:
    """The published evaluation puts other ids at the queries and a stop behind them: neither changes an action."""
    stored = arrays("predict_pro.npz")
    policy = load_policy(checkpoint).eval()
    processor = load_processor(checkpoint)
    sentence = "Put the white mug on the LEFT plate"
    assert list(processor.prompts.encode(sentence)) == stored["in_prompt_ids"][0].tolist()
    sample = processor.encode(sentence, [np.zeros((56, 56, 3), np.uint8)] * 2, stored["in_proprio_normalized"])
    made = processor.collate([sample]) | {"pixel_values": torch.from_numpy(stored["in_pixel_values"])}
    ids = torch.cat([torch.from_numpy(stored["in_prompt_ids"]), torch.full((1, 64), 1), torch.tensor([[2]])], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -65:-1] = 151400
    published = {**made, "input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        ours, theirs = policy(**made), policy(**published)
    close(theirs.hidden, stored["out_last_hidden_states"])
    for out in (ours, theirs):
        close(out.actions[0], stored["out_normalized_actions"])


def test_original_bridge_is_one_softmax_over_three_sources_by_shared_projections() -> None:
    """Against a loop over heads and queries, written from the description."""
    torch.manual_seed(0)
    config = config_of(bridge="original", policy_heads=4)
    block = BridgeAttention(config)
    nn.init.constant_(block.gating_factor, 0.7)
    tokens, action, task = (torch.randn(2, length, 32) for length in (3, 5, 4))
    found = block(tokens, action, task)
    sources = torch.cat([tokens, action, task], dim=1)
    scale = torch.tensor([1.0] * 8 + [math.tanh(0.7)] * 4)
    queries, keys, values = (
        module(states) for module, states in ((block.q_proj, tokens), (block.k_proj, sources), (block.v_proj, sources))
    )
    mixed = torch.zeros_like(tokens)
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        scores = torch.einsum("btc,bsc->bts", queries[..., part], keys[..., part]) / math.sqrt(8) * scale
        mixed[..., part] = scores.softmax(-1) @ values[..., part]
    torch.testing.assert_close(found, block.ffn(block.o_proj(mixed) + tokens), rtol=0, atol=1e-6)


def config_of(**changed: Any) -> PolicyConfig:
    return PolicyConfig.from_dict({**json.loads((FIXTURES / "config.json").read_text()), **changed}, num_images=2)


@pytest.mark.parametrize(("bridge", "parameters"), [("pro", 217_864_223), ("original", 102_129_695)])
def test_full_size_keys(bridge: str, parameters: int) -> None:
    raw = {
        "model_type": "openvla",
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "image_sizes": [224, 224],
        "text_config": {
            "model_type": "qwen2",
            **{"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
            **{"num_attention_heads": 14, "num_key_value_heads": 2},
        },
        "bridge": bridge,
    }
    config = PolicyConfig.from_dict(raw, num_images=2, use_proprio=True)
    assert (config.task_tokens, config.queries, config.action_token_begin) == (512, 64, 151386)
    shapes = tensors.action_head_shapes(config)
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters
    stored = json.loads((FIXTURES / "real_keys.json").read_text())
    for key, shape in stored[f"action_head ({bridge})"]["keys"].items():
        assert list(shapes[key.removeprefix("module.")]) == shape
    assert len(shapes) == stored[f"action_head ({bridge})"]["tensors"]
    assert tensors.query_shapes(config) == {"action_queries.weight": (64, 896)}


def test_stack_and_anchors(checkpoint: Path) -> None:
    policy, info = load_policy(checkpoint), describe(checkpoint)
    names = dict(policy.named_parameters())
    assert {name: tuple(tensor.shape) for name, tensor in names.items()} == info.parameters and not info.problems
    owners = assign(policy.stack(), names)
    assert [layer.name for layer in policy.stack()] == [layer.name for layer in info.stack]
    new = {owner.name for owner in owners.values() if not owner.pretrained}
    assert new == {"action_queries", "proprio_projector", "action_head"}
    for name, owner in owners.items():
        anchor = policy.read_anchor(name)
        assert (anchor is not None) == owner.pretrained, name
        assert anchor is None or torch.equal(anchor.float(), names[name])


def test_training_draws_noise_and_evaluation_none(checkpoint: Path, batch) -> None:
    policy = load_policy(checkpoint)
    torch.manual_seed(0)
    first, second = policy(**batch).actions, policy(**batch).actions
    assert not torch.equal(first, second)
    policy.eval()
    assert torch.equal(policy(**batch).actions, policy(**batch).actions)


def test_every_input_reaches_the_actions_and_ids_at_the_queries_do_not(checkpoint: Path, batch) -> None:
    policy = load_policy(checkpoint).eval()
    before = policy(**batch).actions
    for name, change in {
        "pixel_values": lambda value: value[:, 6:].add_(1.0),
        "proprio": lambda value: value.add_(1.0),
        "input_ids": lambda value: value[:, 30].fill_(198),
    }.items():
        inputs = {key: value.clone() for key, value in batch.items()}
        change(inputs[name])
        assert (policy(**inputs).actions - before).abs().max() > 1e-6, name
    ids = batch["input_ids"].masked_fill(batch["labels"] > policy.config.action_token_begin, 5)
    assert torch.equal(policy(**{**batch, "input_ids": ids}).actions, before)


def test_checkpointed_activations_give_the_same_gradients(checkpoint: Path, batch, case) -> None:
    noise, found = torch.from_numpy(case["in_noise"]), []
    for kept in (True, False):
        policy = load_policy(checkpoint)
        if not kept:
            checkpoint_blocks(policy.modules())
        policy(**batch, noise=noise).loss.backward()
        found.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(gradient, found[1][name], atol=1e-7) for name, gradient in found[0].items())


@pytest.mark.parametrize("queries", [64, 56])
def test_export_and_back_bit_by_bit(checkpoint: Path, tmp_path: Path, queries: int) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "changed")
    model = load_file(folder / "model.safetensors")
    model["action_queries.weight"] = model["action_queries.weight"][:queries].clone()
    save_file(model, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    del raw["queries"]  # published configurations do not say it
    (folder / "config.json").write_text(json.dumps(raw))
    before = load_policy(folder, dtype=torch.bfloat16).state_dict()
    saved = tmp_path / "saved"
    save_policy(before, folder, saved, dtype=torch.bfloat16, step=9)
    assert json.loads((saved / "config.json").read_text())["model_type"] == "vla_adapter"
    out = export_policy(saved, tmp_path / "out", "vla-adapter")
    assert (
        not list(out.glob("*_checkpoint.safetensors"))
        and json.loads((out / "config.json").read_text())["model_type"] == "openvla"
    )
    assert all(key.startswith("module.") for key in torch.load(out / "action_head--9_checkpoint.pt"))
    # As the hub has them: no step in the names, and the embedding once more as the head.
    (out / "action_head--9_checkpoint.pt").rename(out / "action_head--checkpoint.pt")
    (out / "proprio_projector--9_checkpoint.pt").rename(out / "proprio_projector--checkpoint.pt")
    model = load_file(out / "model.safetensors")
    save_file({**model, tensors.TIED_HEAD: model[tensors.EMBEDDING].clone()}, out / "model.safetensors")
    for place in (saved, out):
        policy = load_policy(place, dtype=torch.bfloat16)
        assert policy.config.queries == queries and policy.config.use_proprio
        after = policy.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    head = torch.load(out / "action_head--checkpoint.pt")
    head["module.model.fc2.bias"][0] = torch.nan
    torch.save(head, out / "action_head--checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"action_head--checkpoint\.pt: values that are not finite"):
        look_at_weights(out, 0)


def test_training_starts_from_a_minivla(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    write_tiny(base, "oft", ["open the drawer"])
    sizes: dict[str, Any] = {"name": "vla_adapter", "num_images": 2, "use_proprio": True}
    info, policy = describe(base, **sizes), load_policy(base, **sizes)
    assert info.name == "vla_adapter" and not info.problems
    assert set(policy.fresh_modules) == {"action_queries", "action_head", "proprio_projector"}
    assert not policy.action_queries.weight.any()
    source = load_policy(base, name="minivla_oft").state_dict()
    state = policy.state_dict()
    assert torch.equal(state["projector.fc2.weight"], source["projector.projector.2.weight"])
    assert torch.equal(
        state["vision_backbone.featurizer.blocks.1.ls2.gamma"],
        source["vision_backbone.dino_featurizer.blocks.1.ls2.gamma"],
    )
    deferred = load_policy(base, deferred=True, **sizes)
    for name in deferred.deferred:
        assert torch.equal(deferred.read_anchor(name).float(), state[name])
    processor = load_processor(base, name="vla_adapter")
    samples = [
        processor.encode(text, list(np.zeros((2, 60, 60, 3), np.uint8)), np.zeros(8), np.zeros((8, 7)))
        for text in ("open the drawer", "open the wide drawer")
    ]
    assert policy(**processor.collate(samples)).loss.isfinite()
    trained_for = {"num_images": 2, "use_proprio": True, "chunk": 8, "action_dim": 7, "normalization": "q01_q99"}
    save_policy(
        state, base, out, dtype=torch.float32, statistics=STATISTICS, trained_for=trained_for | {"images": "plain"}
    )
    trained = load_policy(out)
    assert all(torch.equal(value, state[name]) for name, value in trained.state_dict().items())
    actions = trained.predict([np.zeros((64, 64, 3), np.uint8)] * 2, "open the drawer", [0.5] * 8)
    assert actions.shape == (8, 7) and np.isfinite(actions).all()


def test_adapters_train_beside_queries_and_policy(checkpoint: Path, batch, tmp_path: Path) -> None:
    policy = add_adapters(load_policy(checkpoint), 4, 8.0)
    owners = assign(policy.stack(), dict(policy.named_parameters()))
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert all(("lora_" in name) == owners[name].pretrained for name in trained)
    assert {owners[name].name for name in trained} >= {
        "action_queries",
        "action_head",
        "proprio_projector",
        "language.23",
    }
    policy(**batch).loss.backward()
    save_policy(policy.state_dict(), checkpoint, tmp_path / "out", dtype=torch.float32, lora_alpha=8.0)
    assert not load_policy(tmp_path / "out").fresh_modules


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bridge": "both"}, "bridge = 'both'"),
        ({"queries": 0}, "queries = 0"),
        ({"policy_heads": 5}, "policy_heads = 5"),
        ({"text_config": {"model_type": "llama"}}, "qwen2"),
        ({"timm_model_ids": ["a", "b"], "image_sizes": [1, 1], "dino_kwargs": None}, "dino_kwargs"),
    ],
)
def test_bad_configuration(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_of(**changed)


def test_bad_files(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="describes vla_adapter, not minivla_oft"):
        load_policy(checkpoint, name="minivla_oft")
    folder = shutil.copytree(checkpoint, tmp_path / "head")
    head = load_file(folder / "action_head--100_checkpoint.safetensors")
    head["module.model.fc2.weight"] = head["module.model.fc2.weight"][:6].clone()
    save_file(head, folder / "action_head--100_checkpoint.safetensors")
    with pytest.raises(CheckpointError, match=r"fc2\.weight"):
        load_policy(folder)
    model = load_file(folder / "model.safetensors")
    save_file({**model, tensors.TIED_HEAD: model[tensors.EMBEDDING] + 1}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="tied"):
        load_policy(folder)


def test_bad_input(checkpoint: Path, batch) -> None:
    policy = load_policy(checkpoint)
    with pytest.raises(ValueError, match="proprio is missing"):
        policy(**{**batch, "proprio": None})
    with pytest.raises(RuntimeError, match="must mark 64 slots"):
        policy(**{**batch, "labels": torch.full_like(batch["labels"], -100)})


@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_strengths_by_published_names(checkpoint: Path, recipe: Literal["paper", "released"]) -> None:
    """24 language layers, 2 blocks a tower and, in the paper's count, the projector between them."""
    info = describe(checkpoint)
    proximity = ProximitySpec(recipe=recipe, lambda_max=2.0)
    dimensions = {name: len(shape) for name, shape in info.parameters.items()}
    owners = assign(info.stack, dimensions)
    found = tensor_strengths(info.stack, owners, dimensions, proximity, info.published_name)
    first = found["vision_backbone.featurizer.blocks.0.attn.qkv.weight"]
    last = found["language_model.model.layers.23.mlp.up_proj.weight"]
    projector = found["projector.fc2.weight"]
    if recipe == "paper":
        assert (first, last) == (2.0, 0.0) and projector == pytest.approx(2.0 * (1 - 4 / 28))
    else:
        assert first == 2.0 and last == pytest.approx(2.0 * (1 - 27 / 29))
        assert projector == found[tensors.EMBEDDING] == pytest.approx(2.0 * (1 - 28 / 29))
        assert found["language_model.model.layers.0.self_attn.q_proj.bias"] == 0
    new = [name for name in found if name.startswith(("action_", "proprio_projector."))]
    assert len(new) == 1 + 560 + 4 and not any(found[name] for name in new)
