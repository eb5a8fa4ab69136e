"""Names of the metrics that a run records, each once: loops write them, plots, tables and objectives read them."""

from __future__ import annotations

LOSS = "train/loss"
LEARNING_RATE = "train/learning_rate"
GRADIENT_NORM = "train/grad_norm"
SAMPLES_PER_SECOND = "train/samples_per_second"
TOKENS_PER_SECOND = "train/tokens_per_second"
"""Positions of the language model, over all workers."""
MODEL_FLOPS_UTILISATION = "train/mfu"
PEAK_MEMORY_GIB = "train/peak_memory_gib"
CHECKPOINT_SECONDS = "train/checkpoint_seconds"
"""For which training stands still."""
CHECKPOINT_WRITE_SECONDS = "train/checkpoint_write_seconds"
"""That the write behind training takes."""

DRIFT = "drift/"
"""Followed by a module: distance of its weights from their anchors, as a share of the anchors' norm."""
PROJECTION_RATE = "projection_rate/"
"""Followed by a module: the share of its tensors that the last step projected."""
EVALUATION = "eval/"
"""Followed by a split: what was measured on it."""
ROLLOUT = "rollout/"
"""What rollouts gave, success rates among it."""


def part_seconds(part: str) -> str:
    """Seconds that a part of a step takes: `data`, `forward`, `backward`, `optimizer`."""
    return f"train/{part}_seconds"


def action_error(split: str, name: str) -> str:
    """An L1 error of predicted actions on a split, such as `action_l1`."""
    return f"{EVALUATION}{split}/{name}"


def success(of: str) -> str:
    """The success rate of a suite, or of a side: `id` changes nothing, `ood` changes something."""
    return f"{ROLLOUT}{of}/success"
