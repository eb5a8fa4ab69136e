"""What both MiniVLA policies share: images and text to hidden states.

Sequence: `[<|im_start|>][patches of image 1][image 2]..[proprio][rest of the prompt][actions][stop]`.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from maps_ray.models.attention import Attention
from maps_ray.models.files.weights import BaseTensors
from maps_ray.models.minivla.config import PolicyConfig
from maps_ray.models.minivla.language import LanguageBackbone, TiedEmbedding
from maps_ray.models.minivla.processor import Processor
from maps_ray.models.minivla.tensors import checkpoint_key, published_name, stack
from maps_ray.models.minivla.vision import FusedVisionBackbone, Projector
from maps_ray.models.policy import BasePolicy
from maps_ray.models.slots import splice, splice_mask
from maps_ray.proximity.stack import StackLayer


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
