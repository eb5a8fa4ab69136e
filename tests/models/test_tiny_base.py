"""The bundled tiny base: complete, small, and better than the same network without its pretraining."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from maps_ray.models import create_policy, describe, load_policy, load_processor
from maps_ray.models.files.formats import read_json
from maps_ray.models.openvla_oft.tiny import TOKENIZER_SIZE, tiny_config, tiny_preprocessor_config
from maps_ray.proximity.stack import assign
from tiny_base.batches import Vocabulary
from tiny_base.objective import Evaluation, evaluate
from tiny_base.pretrain import held_out_batches
from tiny_base.scenes import read_scenes

ROOT = Path(__file__).parents[2]
BASE = ROOT / "jobs" / "assets" / "tiny_base"
SCENES = ROOT / "tests" / "fixtures" / "scenes"


def test_the_folder_is_small_and_complete() -> None:
    assert {path.name for path in BASE.iterdir()} >= {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
    }
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 12e6


def test_the_stack_covers_it_and_nothing_is_wrong_with_it() -> None:
    info = describe(BASE, num_images=2, use_proprio=True)
    assert info.problems == []
    assert info.dtype == "bfloat16"
    assert set(info.fresh_modules) == {"action_head", "proprio_projector"}
    assert len(assign(info.stack, info.parameters)) == len(info.parameters)
    pretrained = [layer.name for layer in info.stack if layer.pretrained]
    assert pretrained == [
        *(f"dinov2.{block}" for block in range(4)),
        *(f"siglip.{block}" for block in range(4)),
        "projector",
        *(f"language.{layer}" for layer in range(5)),
    ]


def test_it_was_made_by_the_code_beside_it() -> None:
    assert read_json(BASE / "config.json") == tiny_config()
    assert read_json(BASE / "preprocessor_config.json") == tiny_preprocessor_config()
    policy = load_policy(BASE, num_images=2, use_proprio=True)
    pretrained = sum(
        parameter.numel()
        for name, parameter in policy.named_parameters()
        if not name.startswith(("action_head.", "proprio_projector."))
    )
    assert 2e6 <= pretrained <= 6e6


def test_its_tokenizer_follows_the_vocabulary_rule_and_takes_any_text() -> None:
    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    assert tokenizer.token_to_id("<s>") == 1
    assert tokenizer.token_to_id("</s>") == 2
    assert tokenizer.token_to_id("<action_255>") == TOKENIZER_SIZE - 1
    assert tokenizer.token_to_id("<PAD>") == TOKENIZER_SIZE == tiny_config()["pad_token_id"]
    known = tokenizer.encode("In: What action should the robot take to pick up the bbq sauce?\nOut: ")
    tokens = " ".join(token.strip("▁") for token in known.tokens if token.strip("▁\n"))
    assert tokens == "<s> in : what action should the robot take to pick up the bbq sauce ? out :"
    odd = "Öffne 李's <s> drawer </s> <action_003>!"
    ids = tokenizer.encode(odd).ids
    assert 0 not in ids
    assert max(ids) < TOKENIZER_SIZE - 256
    assert ids.count(1) == 1
    assert tokenizer.decode(ids) == f"<s> {odd.lower()}"


def test_a_black_and_a_white_image_give_different_actions() -> None:
    policy = load_policy(BASE, dtype=torch.float32, num_images=2, use_proprio=True).eval()
    processor = load_processor(BASE)
    samples = [
        processor.encode("pick up the milk", [np.full((128, 128, 3), value, np.uint8)] * 2, np.zeros(8))
        for value in (0, 255)
    ]
    with torch.no_grad():
        black, white = policy(**processor.collate(samples)).actions
    assert (black - white).abs().max() > 1e-3


@pytest.fixture(scope="module")
def evaluations() -> tuple[Evaluation, Evaluation]:
    """Of the base, and of random weights, on pictures that pretraining never saw."""
    scenes = read_scenes(SCENES, held_out=1.0)
    vocabulary = Vocabulary(Tokenizer.from_file(str(BASE / "tokenizer.json")), scenes.names)
    policies = load_policy(BASE), create_policy(tiny_config())
    found = []
    for policy in policies:
        batches = held_out_batches(scenes, vocabulary, policy, questions_each=24)
        found.append(evaluate(policy.eval(), batches, vocabulary))
    return found[0], found[1]


def test_it_knows_what_is_where(evaluations: tuple[Evaluation, Evaluation]) -> None:
    base, random = evaluations
    assert base.answer_loss < 0.7 * random.answer_loss
    assert base.naming > random.naming + 0.4
    assert base.pointing > random.pointing + 0.25
    for kind in ("where", "offset", "carry", "reach_for"):
        better, worse = base.scores[kind].error, random.scores[kind].error
        assert better is not None and worse is not None
        assert better < 0.8 * worse
