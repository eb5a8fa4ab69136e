"""Checkpoints for the model tests: the published code's tiny one, and one made here."""

from __future__ import annotations

import copy
import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import minivla_data
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from maps_ray import models as rooms
from maps_ray.models.openvla_oft.film_file import file_key

FIXTURES = Path(__file__).parents[1] / "fixtures" / "oft_tiny"

SMALL: dict[str, Any] = {
    "model_type": "openvla",
    "timm_model_ids": ["none", "none"],
    "image_sizes": [28, 28],
    "vision_kwargs": {
        "img_size": 28,
        "featurizer": {
            "patch_size": 14,
            "embed_dim": 16,
            "depth": 3,
            "num_heads": 2,
            "init_values": 1.0,
            "reg_tokens": 4,
            "no_embed_class": True,
        },
        "fused_featurizer": {
            "patch_size": 14,
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 2,
            "class_token": False,
            "global_pool": "map",
        },
    },
    "n_action_bins": 16,
    "pad_to_multiple_of": 4,
    "pad_token_id": 64,
    "text_config": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 68,
        "pad_token_id": 64,
    },
}
PREPROCESSOR = {
    "image_resize_strategy": "resize-naive",
    "input_sizes": [[3, 28, 28], [3, 28, 28]],
    "interpolations": ["bicubic", "bicubic"],
    "means": [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]],
    "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]],
}
TEXT = "In : What action should the robot take to pick up place red bowl cup ? Out"


@pytest.fixture(scope="session")
def oft_fixtures() -> Path:
    return FIXTURES


@pytest.fixture(scope="session")
def oft_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published code's tiny checkpoint, put together from its parts."""
    folder = tmp_path_factory.mktemp("oft") / "checkpoint"
    shutil.copytree(FIXTURES / "checkpoint", folder)
    weights = load_file(FIXTURES / "model_sparse.safetensors")
    rows, ids = weights.pop("embed_rows"), weights.pop("embed_row_ids")
    embedding = torch.zeros(32064, 64, dtype=torch.bfloat16)
    embedding[ids.long()] = rows
    weights["language_model.model.embed_tokens.weight"] = embedding
    high, low = np.frombuffer(lzma.decompress((FIXTURES / "lm_head.xz").read_bytes()), np.uint8).reshape(2, 32064, 64)
    head = torch.from_numpy((high.astype(np.uint16) << 8 | low).view(np.int16)).view(torch.bfloat16)
    weights["language_model.lm_head.weight"] = head
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def film_checkpoint(oft_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with FiLM, in the file that OFT saves its towers in."""
    folder = shutil.copytree(oft_checkpoint, tmp_path_factory.mktemp("film") / "checkpoint")
    towers = {key: value for key, value in load_file(folder / "model.safetensors").items() if "vision_backbone" in key}
    towers |= load_file(FIXTURES / "film_only.safetensors")
    torch.save({file_key(key): value for key, value in towers.items()}, folder / "vision_backbone--100_checkpoint.pt")
    return folder


@pytest.fixture
def small_config() -> dict[str, Any]:
    """Configuration of a policy with unequal sizes everywhere, grouped keys and 2 x 2 patches."""
    return copy.deepcopy(SMALL)


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint of that policy with proprio, with random weights and a tokenizer of whole words."""
    base = tmp_path_factory.mktemp("small") / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(SMALL))
    (base / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    words = {"<unk>": 0, **{word: 3 + i for i, word in enumerate(TEXT.split())}}
    # The rest, and the action tokens behind them: ids up to 63.
    words |= {f"<{id_}>": id_ for id_ in range(64) if id_ not in words.values()}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(base / "tokenizer.json"))
    policy = rooms.create_policy(SMALL, dtype=torch.bfloat16, use_proprio=True, seed=1)
    out = base.parent / "checkpoint"
    statistics = {"small": {"num_transitions": 5}}
    rooms.save_policy(policy.state_dict(), base, out, dtype=torch.bfloat16, step=7, statistics=statistics)
    return out


@pytest.fixture(scope="session")
def small_batch(small_checkpoint: Path) -> dict[str, torch.Tensor]:
    """Two samples of different length, two images each."""
    processor = rooms.load_processor(small_checkpoint)
    rng = np.random.default_rng(0)
    samples = [
        processor.encode(
            sentence,
            list(rng.integers(0, 256, (2, 32, 40, 3), dtype=np.uint8)),
            rng.uniform(-1, 1, 8),
            rng.uniform(-1, 1, (8, 7)),
        )
        for sentence in ("pick up the red bowl", "place cup")
    ]
    return processor.collate(samples)


@pytest.fixture(scope="session")
def minivla_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published code's tiny MiniVLA-VQ."""
    folder = tmp_path_factory.mktemp("minivla") / "checkpoint"
    minivla_data.write_checkpoint(folder)
    return folder
