"""The OpenVLA-OFT policy: images, proprioception and an instruction in, a chunk of actions out in one pass.

Sequence: `[BOS][patches of image 1][image 2]..[proprio][prompt][chunk * action_dim zeroed action slots][</s>]`,
attended bidirectionally. The hidden state that predicts a slot is the one before it (arXiv 2502.19645).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from maps_ray.models.attention import Attention, bidirectional_mask
from maps_ray.models.openvla_oft.config import PolicyConfig
from maps_ray.models.openvla_oft.heads import L1ActionHead, ProprioProjector
from maps_ray.models.openvla_oft.language import build_language_model
from maps_ray.models.openvla_oft.layout import checkpoint_key
from maps_ray.models.openvla_oft.stack import stack
from maps_ray.models.openvla_oft.vision import FusedVisionBackbone, Projector
from maps_ray.models.safetensors_files import MappedTensors
from maps_ray.proximity.stack import StackLayer


class PolicyOutput(NamedTuple):
    """What one forward pass gives. A named tuple, so that ZeRO-3 finds the tensors in it."""

    loss: Tensor | None
    """Mean absolute error over the chunk, fp32 scalar; None without `actions`."""
    actions: Tensor
    """(B, chunk, action_dim), normalised."""
    action_hidden: Tensor
    """(B, chunk * action_dim, hidden): the hidden states that the head reads."""
    hidden: Tensor
    """(B, S, hidden): the language model's last hidden states; rows at padding mean nothing."""
    projected: Tensor
    """(B, images * patches, hidden): the image tokens."""


class OpenVLAOFT(nn.Module):
    """The policy. `load_policy` and `create_policy` build it."""

    def __init__(self, config: PolicyConfig, attention: Attention = "sdpa", base: MappedTensors | None = None) -> None:
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
        self.attention = attention
        self.fresh_modules: tuple[str, ...] = ()
        """Modules that the checkpoint did not bring, with random weights."""
        self._base = base
        self.vision_backbone = FusedVisionBackbone(config)
        self.projector = Projector(config)
        self.language_model = build_language_model(config, attention)
        self.action_head = L1ActionHead(config)
        self.proprio_projector = ProprioProjector(config) if config.use_proprio else None

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        proprio: Tensor | None = None,
        actions: Tensor | None = None,
    ) -> PolicyOutput:
        """Predicts a chunk of actions and, given the true ones, the loss.

        Args:
            pixel_values: (B, 6 * images, H, W) float, normalised for both towers.
            input_ids: (B, L) int64: BOS, prompt, action slots, stop token, padding.
            attention_mask: (B, L) bool or 0/1, False at padding.
            labels: (B, L) int64; ids above `config.action_token_begin` mark the action slots, all else is ignored.
            proprio: (B, proprio_dim) normalised; (proprio_dim,) is taken for B = 1.
            actions: (B, chunk, action_dim) normalised.

        Raises:
            ValueError: a shape that does not fit the configuration, or proprio missing or not expected.
            RuntimeError: a row of `labels` does not mark exactly chunk * action_dim slots.
        """
        slots = labels > self.config.action_token_begin
        hidden, projected = self.hidden_states(pixel_values, input_ids, attention_mask, slots, proprio)
        action_hidden = self.slot_states(hidden, slots, self.config.action_slots)
        predicted = self.action_head(action_hidden)
        loss = None
        if actions is not None:
            if actions.shape != predicted.shape:
                raise ValueError(f"actions have shape {list(actions.shape)}, expected {list(predicted.shape)}")
            loss = functional.l1_loss(predicted.float(), actions.float())
        return PolicyOutput(loss, predicted, action_hidden, hidden, projected)

    def hidden_states(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        slots: Tensor,
        proprio: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs towers, projector and language model, without any head.

        Args:
            slots: (B, L) bool; the embeddings there are zeroed.

        Returns:
            The last hidden states (B, L + patches in all, hidden), and the image tokens (B, images * patches, hidden).
        """
        projected = self.encode_images(pixel_values)
        patches = projected
        if proprio is not None and self.proprio_projector is None:
            raise ValueError(
                "proprio was given, but the policy has no proprio projector: load it with use_proprio=True"
            )
        if self.proprio_projector is not None:
            if proprio is None:
                raise ValueError("the policy was loaded with use_proprio=True: proprio is missing")
            token = self.proprio_projector(self._rows_of_proprio(proprio, len(input_ids)).to(projected.dtype))
            patches = torch.cat([projected, token[:, None]], dim=1)
        tokens = self.embed_tokens(input_ids, slots)
        embeddings = torch.cat([tokens[:, :1], patches, tokens[:, 1:]], dim=1)
        attended = attention_mask.bool()
        attended = torch.cat([attended[:, :1], attended.new_ones(patches.shape[:2]), attended[:, 1:]], dim=1)
        return self.run_language(embeddings, attended), projected

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(B, 6 * images, H, W) -> image tokens (B, images * patches, hidden)."""
        size, channels = self.config.image_size, 6 * self.config.num_images
        if tuple(pixel_values.shape[1:]) != (channels, size, size):
            raise ValueError(
                f"pixel_values have shape {list(pixel_values.shape)}, expected [B, {channels}, {size}, {size}] for "
                f"{self.config.num_images} image(s)"
            )
        return self.projector(self.vision_backbone(pixel_values.to(self.projector.fc1.weight.dtype)))

    def embed_tokens(self, input_ids: Tensor, slots: Tensor) -> Tensor:
        """Token embeddings (B, L, hidden), zero where `slots` (B, L) is True."""
        return self.language_model.model.embed_tokens(input_ids).masked_fill(slots[..., None], 0)

    def run_language(self, embeddings: Tensor, attended: Tensor) -> Tensor:
        """Embeddings (B, S, hidden) -> last hidden states, every position attending to all where `attended` (B, S)."""
        mask = bidirectional_mask(attended, embeddings.dtype, self.attention)
        hidden: Tensor = self.language_model.model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
        return hidden

    def slot_states(self, hidden: Tensor, slots: Tensor, count: int) -> Tensor:
        """The hidden states that predict the slots: of each slot the state one position before it.

        Args:
            hidden: (B, S, hidden), from `hidden_states`.
            slots: (B, L) bool, with exactly `count` True in each row, none at BOS.
            count: slots of each row.

        Returns:
            (B, count, hidden) in sequence order.
        """
        # Checked on the device: reading the counts back would make the host wait for it.
        torch._assert_async(
            (slots.sum(dim=1) == count).all(), f"each row of labels must mark {count} slots (chunk * action_dim)"
        )
        positions = slots.int().argsort(dim=1, descending=True, stable=True)[:, :count]
        positions = positions + (hidden.shape[1] - slots.shape[1] - 1)
        return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], positions]

    def language_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., hidden) -> vocabulary logits; the continuous head does not need them."""
        logits: Tensor = self.language_model.lm_head(hidden)
        return logits

    def stack(self) -> list[StackLayer]:
        """The ordered layers for a MAPS schedule; they cover every parameter exactly once."""
        return stack(self.config)

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

    def _rows_of_proprio(self, proprio: Tensor, batch: int) -> Tensor:
        expected = (batch, self.config.proprio_dim)
        rows = proprio[None] if proprio.ndim == 1 and batch == 1 else proprio
        if tuple(rows.shape) != expected:
            raise ValueError(f"proprio has shape {list(proprio.shape)}, expected {list(expected)}")
        return rows
