"""What both MiniVLA policies share: images and text to hidden states.

Sequence: `[<|im_start|>][patches of image 1][image 2]..[proprio][rest of the prompt][actions][stop]`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maps_ray.models.attention import Attention
from maps_ray.models.minivla.config import PolicyConfig
from maps_ray.models.minivla.language import LanguageBackbone, TiedEmbedding
from maps_ray.models.minivla.layout import checkpoint_key
from maps_ray.models.minivla.stack import stack
from maps_ray.models.minivla.vision import FusedVisionBackbone, Projector
from maps_ray.models.policy_files import BaseTensors
from maps_ray.models.predict import Predicts
from maps_ray.proximity.stack import StackLayer


class MiniVLA(Predicts, nn.Module):
    """Towers, projector and language model."""

    def __init__(self, config: PolicyConfig, attention: Attention = "sdpa", base: BaseTensors | None = None) -> None:
        """Random weights, or none inside `torch.device("meta")`.

        Args:
            config: sizes.
            attention: `sdpa`, or `eager` to look at attention weights.
            base: the checkpoint that the policy starts from, for `read_anchor`.
        """
        super().__init__()
        if attention not in ("sdpa", "eager"):
            raise ValueError(f"attention = {attention!r}: must be 'sdpa' or 'eager'")
        self.config = config
        self.attention: Attention = attention
        self.fresh_modules: tuple[str, ...] = ()
        """Modules that the checkpoint did not bring, with random weights."""
        self.deferred: frozenset[str] = frozenset()
        """Parameters that are still to be filled from `read_anchor`: until then they are NaN and take no memory."""
        self._base = base
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
        size, channels = self.config.image_size, 6 * self.config.num_images
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (channels, size, size):
            raise ValueError(
                f"pixel_values have shape {list(pixel_values.shape)}, expected [B, {channels}, {size}, {size}] for "
                f"{self.config.num_images} image(s)"
            )
        return self.projector(self.vision_backbone(pixel_values.to(self.embedding.weight.dtype)))

    @staticmethod
    def splice(patches: Tensor, text: Tensor) -> Tensor:
        """Puts image tokens (B, P, ...) behind the first token of the text (B, L, ...)."""
        return torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)

    def attended(self, attention_mask: Tensor, patches: int) -> Tensor:
        """(B, L) mask of the text -> (B, L + patches) bool mask of the sequence."""
        mask = attention_mask.bool()
        return self.splice(mask.new_ones(len(mask), patches), mask)

    def language_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., hidden) -> vocabulary logits."""
        logits: Tensor = self.embedding(hidden)
        return logits

    def stack(self) -> list[StackLayer]:
        """The ordered layers for a MAPS schedule; they cover every parameter exactly once."""
        return stack(self.config)

    def close_base(self) -> None:
        """Takes what `read_anchor` has mapped out of memory; it can still be called."""
        if self._base is not None:
            self._base.give_back()

    def read_anchor(self, name: str) -> Tensor | None:
        """The pretrained weights of one parameter, in the checkpoint's dtype.

        Args:
            name: parameter name in this policy.

        Returns:
            A view of the memory-mapped file (copy it before writing), or None for a parameter without pretrained
            weights.
        """
        key = checkpoint_key(name)
        return self._base.read(key) if self._base is not None and key in self._base else None
