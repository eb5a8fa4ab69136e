"""The fused vision backbone: DINOv2 and SigLIP patch features side by side, and the projector behind them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maps_ray.models.openvla_oft.config import PolicyConfig, TowerConfig
from maps_ray.models.openvla_oft.layout import projector_sizes
from maps_ray.models.torchvision_import import ensure_torchvision

ensure_torchvision()
from timm.models.vision_transformer import VisionTransformer  # noqa: E402


class VisionTower(VisionTransformer):
    """A timm vision transformer that gives the patch features of its last block but one.

    The features have no final norm and no class or register tokens; so the last block, the norm and the attention pool
    get no gradient. The parameters held by the tower itself (position embedding, class token) are used inside its own
    `forward`, where ZeRO-3 gathers them.
    """

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(**config.timm_kwargs())

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) -> patch features (N, patches, width)."""
        features: list[Tensor] = self.forward_intermediates(
            images, indices=[len(self.blocks) - 2], output_fmt="NLC", stop_early=True, intermediates_only=True
        )
        return features[0]


class FusedVisionBackbone(nn.Module):
    """DINOv2 (`featurizer`, first in the concatenation) and SigLIP (`fused_featurizer`)."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.featurizer = VisionTower(config.dinov2)
        self.fused_featurizer = VisionTower(config.siglip)

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
        features = torch.cat([self.featurizer(images[:, :3]), self.fused_featurizer(images[:, 3:])], dim=-1)
        return features.reshape(batch, -1, features.shape[-1])


class Projector(nn.Module):
    """Patch features -> the language model's embedding space."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        vision, inner, hidden = projector_sizes(config)
        self.fc1 = nn.Linear(vision, inner)
        self.fc2 = nn.Linear(inner, hidden)
        self.fc3 = nn.Linear(hidden, hidden)
        self.activation = nn.GELU()

    def forward(self, features: Tensor) -> Tensor:
        """(..., vision width) -> (..., hidden)."""
        return self.fc3(self.activation(self.fc2(self.activation(self.fc1(features)))))
