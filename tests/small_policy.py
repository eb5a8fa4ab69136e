"""A very small OpenVLA-OFT with random weights, for tests of the rooms above the models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from maps_ray.files import write_json
from maps_ray.models.openvla_oft.tiny import build_tokenizer, tiny_config, tiny_preprocessor_config
from maps_ray.spec import RunSpec

SIZES = {"num_images": 2, "use_proprio": True, "chunk": 8, "action_dim": 7, "proprio_dim": 8}


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


def write_finished_run(spec: RunSpec, base: Path, step: int, **saved: Any) -> None:
    """A run that has finished: its base's weights moved at random, with spec and fingerprint.

    Args:
        spec: of the run; its folder is made.
        base: checkpoint that it started from.
        step: of the weights.
        **saved: more for `save_policy`.
    """
    import torch

    from maps_ray.evaluation.rollouts.checkpoint import fingerprint
    from maps_ray.models import load_policy, save_policy
    from maps_ray.training.run_folder import write_spec

    policy = load_policy(base, seed=1, **SIZES)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    spec.run_dir.mkdir(parents=True)
    final = spec.run_dir / "final"
    save_policy(policy.state_dict(), base, final, dtype=torch.float32, trained_for=SIZES, step=step, **saved)
    write_spec(spec)
    write_json(spec.run_dir / "base.json", {"checkpoint": str(base), "fingerprint": fingerprint(base)})
