"""The fused vision backbone of MiniVLA, and the projector behind it, under their published names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maps_ray.models.minivla.config import PolicyConfig
from maps_ray.models.openvla_oft.tensors import projector_sizes
from maps_ray.models.vision_tower import VisionTower


class FusedVisionBackbone(nn.Module):
    """DINOv2 (first in the concatenation) and SigLIP."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.dino_featurizer = VisionTower(config.dinov2)
        self.siglip_featurizer = VisionTower(config.siglip)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Patch features of all images of each sample.

        Args:
            pixel_values: (B, 6 * images, H, W); of each image the three channels normalised for DINOv2, then the three
                for SigLIP.

        Returns:
            (B, images * patches, DINOv2 width + SigLIP width), images one after the other.
        """
        batch, _, height, width = pixel_values.shape
        images = pixel_values.reshape(-1, 6, height, width)
        features = torch.cat([self.dino_featurizer(images[:, :3]), self.siglip_featurizer(images[:, 3:])], dim=-1)
        return features.reshape(batch, -1, features.shape[-1])


class Projector(nn.Module):
    """Patch features -> the language model's embedding space."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        vision, inner, hidden = projector_sizes(config)
        self.projector = nn.Sequential(
            nn.Linear(vision, inner), nn.GELU(), nn.Linear(inner, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(..., vision width) -> (..., hidden)."""
        return self.projector(features)
