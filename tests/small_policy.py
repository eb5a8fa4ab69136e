"""A very small OpenVLA-OFT with random weights, for tests of the rooms above the models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from maps_ray.models.openvla_oft.tiny import build_tokenizer, tiny_config, tiny_preprocessor_config


def write_base(folder: Path, sentences: Iterable[str]) -> dict[str, Any]:
    """Writes all of a base model but its weights: 2 + 2 vision blocks and 2 language layers of width 32, 28 pixels.

    Returns:
        its configuration, for `create_policy`.
    """
    config, processor = tiny_config(), tiny_preprocessor_config()
    for tower in ("featurizer", "fused_featurizer"):
        config["vision_kwargs"][tower] |= {"embed_dim": 32, "depth": 2}
    config["vision_kwargs"]["img_size"] = 28
    config["image_sizes"] = [28, 28]
    config["text_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    processor |= {"input_sizes": [[3, 28, 28]] * 2}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    build_tokenizer(sentences).save(str(folder / "tokenizer.json"))
    return config
