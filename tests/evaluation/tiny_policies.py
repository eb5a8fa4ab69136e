"""Very small policies with random weights, as finished checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from maps_ray.models import create_policy, save_policy
from maps_ray.models.openvla_oft.tiny import build_tokenizer, tiny_config, tiny_preprocessor_config

SIZES: dict[str, Any] = {"num_images": 2, "use_proprio": True, "chunk": 4}
_RANGE = {"q01": [-1.0] * 8, "q99": [1.0] * 8, "min": [-2.0] * 8, "max": [2.0] * 8}
_ACTION = {name: values[:7] for name, values in _RANGE.items()} | {"mask": [True] * 6 + [False]}
STATISTICS = {"demos": {"action": _ACTION, "proprio": _RANGE}}


def write_policy(folder: Path, seed: int = 1, **sizes: Any) -> Path:
    """A policy with two cameras of 28 pixels and proprioception."""
    folder.mkdir(parents=True)
    config, processor = tiny_config(), tiny_preprocessor_config()
    for tower in ("featurizer", "fused_featurizer"):
        config["vision_kwargs"][tower] |= {"embed_dim": 32, "depth": 2}
    config["vision_kwargs"]["img_size"] = 28
    config["image_sizes"] = [28, 28]
    # 44 is no multiple of 16: rows of a batch are not aligned by the width alone.
    config["text_config"] |= {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2}
    processor |= {"input_sizes": [[3, 28, 28]] * 2}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    build_tokenizer(["pick up the red bowl"]).save(str(folder / "tokenizer.json"))
    sizes = {**SIZES, **sizes}
    weights = create_policy(config, seed=seed, **sizes).state_dict()
    trained_for = {**sizes, "images": "plain", "cameras": ["image", "wrist_image"], "camera_size": 28}
    save_policy(
        weights, folder, folder / "trained", dtype=torch.float32, statistics=STATISTICS, trained_for=trained_for
    )
    return folder / "trained"
