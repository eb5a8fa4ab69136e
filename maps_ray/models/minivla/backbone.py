"""What both MiniVLA policies share: vision towers, projector and Qwen2.5; images and text to hidden states.

Sequence: `[<|im_start|>][patches of image 1][image 2]..[proprio][rest of the prompt][actions][stop]`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from maps_ray.models.decoder import Attention, FloatBuffers, decoder_options, splice, splice_mask
from maps_ray.models.files.weights import BaseTensors
from maps_ray.models.minivla.config import PolicyConfig
from maps_ray.models.minivla.processor import Processor
from maps_ray.models.minivla.tensors import checkpoint_key, published_name, stack
from maps_ray.models.openvla_oft.tensors import projector_sizes
from maps_ray.models.policy import BasePolicy
from maps_ray.models.sizes import DecoderSizes
from maps_ray.models.torchvision_import import ensure_torchvision
from maps_ray.models.vision_tower import VisionTower
from maps_ray.proximity.stack import StackLayer


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


ensure_torchvision()
from transformers import Qwen2Config, Qwen2Model  # noqa: E402
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding  # noqa: E402


class FloatRotaryEmbedding(FloatBuffers, Qwen2RotaryEmbedding):
    """Rotary embedding whose frequencies stay fp32."""


class TiedEmbedding(nn.Embedding):
    """Token ids -> embeddings, and hidden states -> logits, by one matrix.

    Both go through `forward`, where ZeRO-3 gathers the matrix.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Ids (...) int64 -> (..., hidden); floating-point hidden states (..., hidden) -> logits (..., vocabulary)."""
        return functional.linear(values, self.weight) if values.is_floating_point() else super().forward(values)


class CausalModel(nn.Module):
    """Qwen2 under the name that a causal language model gives it."""

    def __init__(self, config: DecoderSizes, attention: Attention) -> None:
        super().__init__()
        chosen = {
            # Generation asks for its cache itself.
            "use_cache": False,
            "attn_implementation": attention,
            "is_causal": config.causal,
        }
        qwen = Qwen2Config(**{**decoder_options(config.text), **chosen})
        self.model = Qwen2Model(qwen)
        self.model.embed_tokens = TiedEmbedding(qwen.vocab_size, qwen.hidden_size)
        # Qwen2Model has initialised the one that it replaces.
        nn.init.normal_(self.model.embed_tokens.weight, std=qwen.initializer_range)
        # The policy is built on `meta`, and no checkpoint brings the frequencies: they are computed here.
        with torch.device("cpu"):
            self.model.rotary_emb = FloatRotaryEmbedding(qwen)


class LanguageBackbone(nn.Module):
    """The language model under its published name."""

    def __init__(self, config: DecoderSizes, attention: Attention) -> None:
        super().__init__()
        self.llm = CausalModel(config, attention)


class MiniVLA(BasePolicy):
    """Towers, projector and language model."""

    config: PolicyConfig

    def __init__(self, config: PolicyConfig, attention: Attention = "sdpa", base: BaseTensors | None = None) -> None:
        """Random weights, or none inside `torch.device("meta")`.

        Args:
            config: sizes.
            attention: `sdpa`, or `eager` to look at attention weights.
            base: the checkpoint that the policy starts from, for `read_anchor`.
        """
        super().__init__(config, attention, base)
        self.vision_backbone = FusedVisionBackbone(config)
        self.projector = Projector(config)
        self.llm_backbone = LanguageBackbone(config, attention)

    @property
    def embedding(self) -> TiedEmbedding:
        """Token embedding and output head."""
        embedding = self.llm_backbone.llm.model.embed_tokens
        assert isinstance(embedding, TiedEmbedding)
        return embedding

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(B, 6 * images, H, W) -> image tokens (B, images * patches, hidden).

        Raises:
            ValueError: another shape.
        """
        self.check_pixels(pixel_values)
        return self.projector(self.vision_backbone(pixel_values.to(self.embedding.weight.dtype)))

    def run_causal(self, patches: Tensor, text: Tensor, attention_mask: Tensor) -> Tensor:
        """The last hidden states (B, L + patches, hidden) of patches (B, P, hidden) and text (B, L, hidden)."""
        mask = splice_mask(attention_mask, patches.shape[1])
        embeddings = splice(patches, text)
        hidden: Tensor = self.llm_backbone.llm.model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
        return hidden

    def language_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., hidden) -> vocabulary logits."""
        logits: Tensor = self.embedding(hidden)
        return logits

    def read_processor(self, folder: Path) -> Processor:
        config, oft = self.config, self.config.kind == "oft"
        return Processor.from_checkpoint(
            folder,
            kind=config.kind,
            chunk=config.chunk,
            action_dim=config.action_dim,
            attention_mask=config.attention_mask if oft else None,
            released_faults=config.released_faults if oft else None,
        )

    def stack(self) -> list[StackLayer]:
        return stack(self.config)

    @staticmethod
    def checkpoint_key(name: str) -> str:
        return checkpoint_key(name)

    @classmethod
    def published_name(cls, name: str) -> str:
        return published_name(name)
