"""The parts of the policy under their published names: fused vision towers, projector, language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maps_ray.models.decoder import Attention, FloatBuffers, decoder_options
from maps_ray.models.openvla_oft.config import PolicyConfig
from maps_ray.models.openvla_oft.tensors import projector_sizes
from maps_ray.models.sizes import VisionSizes
from maps_ray.models.torchvision_import import ensure_torchvision
from maps_ray.models.vision_tower import VisionTower


class FusedVisionBackbone(nn.Module):
    """DINOv2 (`featurizer`, first in the concatenation) and SigLIP (`fused_featurizer`)."""

    def __init__(self, config: VisionSizes) -> None:
        super().__init__()
        language = config.text["hidden_size"] if config.film else None
        self.featurizer = VisionTower(config.dinov2, language)
        self.fused_featurizer = VisionTower(config.siglip, language)

    def forward(self, pixel_values: Tensor, language: Tensor | None = None) -> Tensor:
        """Patch features of all images of each sample.

        Args:
            pixel_values: (B, 6 * images, H, W); of each image the three channels normalised for DINOv2, then the three
                for SigLIP.
            language: (B, hidden), what FiLM is conditioned on; None without FiLM.

        Returns:
            (B, images * patches, DINOv2 width + SigLIP width), images one after the other.
        """
        batch, _, height, width = pixel_values.shape
        images = pixel_values.reshape(-1, 6, height, width)
        if language is not None:
            language = language.repeat_interleave(len(images) // batch, dim=0)
        dinov2, siglip = self.featurizer(images[:, :3], language), self.fused_featurizer(images[:, 3:], language)
        features = torch.cat([dinov2, siglip], dim=-1)
        return features.reshape(batch, -1, features.shape[-1])


class Projector(nn.Module):
    """Patch features -> the language model's embedding space."""

    def __init__(self, config: VisionSizes) -> None:
        super().__init__()
        vision, inner, hidden = projector_sizes(config)
        self.fc1 = nn.Linear(vision, inner)
        self.fc2 = nn.Linear(inner, hidden)
        self.fc3 = nn.Linear(hidden, hidden)
        self.activation = nn.GELU()

    def forward(self, features: Tensor) -> Tensor:
        """(..., vision width) -> (..., hidden)."""
        return self.fc3(self.activation(self.fc2(self.activation(self.fc1(features)))))


ensure_torchvision()
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402


class FloatRotaryEmbedding(FloatBuffers, LlamaRotaryEmbedding):
    """Rotary embedding whose frequencies stay fp32."""


def build_language_model(config: PolicyConfig, attention: Attention) -> LlamaForCausalLM:
    """Llama with random weights (normal, standard deviation 0.02), or without storage inside `torch.device("meta")`."""
    text = decoder_options(config.text)
    # `is_causal` here is for the mask that transformers makes where none is given (`create_causal_mask`, 5.23); its
    # attention listens to the argument of each call alone (`run_both_ways`).
    llama = LlamaConfig(**{**text, "use_cache": False, "attn_implementation": attention, "is_causal": False})
    model = LlamaForCausalLM(llama)
    # The policy is built on `meta`, and no checkpoint brings the frequencies: they are computed here.
    with torch.device("cpu"):
        model.model.rotary_emb = FloatRotaryEmbedding(llama)
    return model
