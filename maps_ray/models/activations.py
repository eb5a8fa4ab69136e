"""Activations that are computed again for the gradients, in place of being kept."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from maps_ray.models.torchvision_import import ensure_torchvision
from maps_ray.models.vision_tower import VisionTower

ensure_torchvision()
from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: E402


def checkpoint_blocks(modules: Iterable[nn.Module]) -> None:
    """Keeps of each vision block and language layer inside `modules` its input alone."""
    for module in modules:
        if isinstance(module, VisionTower):
            module.set_grad_checkpointing(True)
        elif isinstance(module, GradientCheckpointingLayer):
            # Not by the language model's own method: it would also mark the embedding's output for gradients.
            module.gradient_checkpointing = True
            # What its `__call__` reads (private in transformers 5.23). Reentrant checkpointing would give no gradients
            # where the input needs none: behind frozen towers or under LoRA.
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
