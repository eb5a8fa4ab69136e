"""A vision transformer that gives patch features."""

from __future__ import annotations

from torch import Tensor

from maps_ray.models.torchvision_import import ensure_torchvision
from maps_ray.models.towers import TowerConfig

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
