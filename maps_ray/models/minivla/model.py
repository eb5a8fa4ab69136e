"""The two MiniVLA policies: tokens one after another (VQ), or a whole chunk in one pass (OFT)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from maps_ray.models.collate import IGNORED
from maps_ray.models.decoder import Attention, run_both_ways, slot_states, splice, splice_mask
from maps_ray.models.files.weights import BaseTensors
from maps_ray.models.minivla.backbone import MiniVLA
from maps_ray.models.minivla.config import PolicyConfig
from maps_ray.models.minivla.vq import VQActionTokenizer
from maps_ray.models.openvla_oft.heads import L1ActionHead, ProprioProjector, append_proprio
from maps_ray.models.torchvision_import import ensure_torchvision

ensure_torchvision()
from transformers import DynamicCache  # noqa: E402


class VQOutput(NamedTuple):
    """What one forward pass of MiniVLA-VQ gives. A named tuple, so that ZeRO-3 finds the tensors in it."""

    loss: Tensor | None
    """Mean cross entropy of the labelled tokens, fp32 scalar; None where there are none."""
    actions: Tensor | None
    """(B, chunk, action_dim) fp32, normalised, decoded from generated tokens; None in training mode."""
    tokens: Tensor | None
    """(B, tokens) int64: the generated ids; None in training mode."""
    hidden: Tensor
    """(B, S, hidden): the language model's last hidden states; rows at padding mean nothing."""
    projected: Tensor
    """(B, images * patches, hidden): the image tokens."""


class OFTOutput(NamedTuple):
    """What one forward pass of MiniVLA-OFT gives. A named tuple, so that ZeRO-3 finds the tensors in it."""

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


class MiniVLAVQ(MiniVLA):
    """Causal language model that writes a chunk as VQ tokens (MiniVLA)."""

    def __init__(
        self,
        config: PolicyConfig,
        action_tokenizer: VQActionTokenizer,
        attention: Attention = "sdpa",
        base: BaseTensors | None = None,
    ) -> None:
        """As `MiniVLA`, with the tokenizer that decodes what the policy generates."""
        super().__init__(config, attention, base)
        self.action_tokenizer = action_tokenizer

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        actions: Tensor | None = None,
    ) -> VQOutput:
        """The loss and, in evaluation mode, the actions that the policy generates.

        Args:
            pixel_values: (B, 6 * images, H, W) float, normalised for both towers.
            input_ids: (B, L) int64: prompt, action tokens, stop tokens, padding on the right.
            attention_mask: (B, L) bool or 0/1, False at padding.
            labels: (B, L) int64, the tokens to learn; all else is ignored. Generation sees what stands before them.
            actions: (B, chunk, action_dim) normalised; only their shape is checked, the labels hold their codes.

        Raises:
            ValueError: a shape that does not fit the configuration.
        """
        self.chunk_shape(len(input_ids), actions)
        projected = self.encode_images(pixel_values)
        hidden = self.run_causal(projected, self.embedding(input_ids), attention_mask)
        loss = None if labels is None else self._loss(hidden, labels)
        if self.training:
            return VQOutput(loss, None, None, hidden, projected)
        prompt = attention_mask.bool()
        if labels is not None:
            prompt = prompt & ((labels != IGNORED).cumsum(dim=1) == 0)
        tokens = self._generate(projected, input_ids, prompt)
        return VQOutput(loss, self.action_tokenizer.decode(tokens), tokens, hidden, projected)

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor | None:
        """Cross entropy of each labelled token, predicted from the position before it.

        Logits are made for these few positions only: over all of them they would take more memory than the model.
        """
        targets = labels[:, 1:]
        labelled = targets != IGNORED
        states = hidden[:, hidden.shape[1] - labels.shape[1] : -1][labelled]
        if not len(states):
            return None
        logits = self.language_logits(states)
        return functional.cross_entropy(logits.float(), targets[labelled])

    @torch.no_grad()
    def _generate(self, projected: Tensor, input_ids: Tensor, prompt: Tensor) -> Tensor:
        """The likeliest token at each of the action positions behind the prompt (B, L) bool; (B, tokens) int64.

        Prompts of a batch differ in length. The cache holds them padded on the right; each new token takes the
        position after its own prompt, and attention leaves the padding out.
        """
        model = self.llm_backbone.llm.model
        mask = splice_mask(prompt, projected.shape[1])
        rows = torch.arange(len(mask), device=mask.device)
        length = mask.sum(dim=1)
        cache = DynamicCache(config=model.config)
        embeddings = splice(projected, self.embedding(input_ids))
        # Padding stands on the right: plain positions, which these are, are each prompt's own.
        hidden = model(inputs_embeds=embeddings, attention_mask=mask, past_key_values=cache, use_cache=True)
        last = hidden.last_hidden_state[rows, length - 1]
        tokens = []
        for step in range(self.action_tokenizer.tokens):
            tokens.append(self.language_logits(last).argmax(dim=-1))
            if step == self.action_tokenizer.tokens - 1:
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            hidden = model(
                inputs_embeds=self.embedding(tokens[-1])[:, None],
                attention_mask=mask,
                position_ids=(length + step)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            last = hidden.last_hidden_state[:, -1]
        return torch.stack(tokens, dim=1)


class MiniVLAOFT(MiniVLA):
    """MiniVLA's backbone with OFT's decoding: a head reads the zeroed slots.

    Sequence: `[<|im_start|>][patches][proprio][prompt][chunk * action_dim zeroed action slots]`, attended causally as
    in the authors' released code. With the mask `bidirectional` every position attends to all, and stop tokens follow.
    The hidden state that predicts a slot is the one before it (arXiv 2502.19645).
    """

    def __init__(self, config: PolicyConfig, attention: Attention = "sdpa", base: BaseTensors | None = None) -> None:
        """As `MiniVLA`."""
        super().__init__(config, attention, base)
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
    ) -> OFTOutput:
        """Predicts a chunk of actions and, given the true ones, the loss: see `contracts.Policy`."""
        slots = labels > self.config.action_token_begin
        self.chunk_shape(len(labels), actions)
        projected = self.encode_images(pixel_values)
        patches = append_proprio(projected, self.proprio_projector, proprio, self.config.proprio_dim)
        text = self.embedding(input_ids).masked_fill(slots[..., None], 0)
        if self.config.attention_mask == "causal":
            hidden = self.run_causal(patches, text, attention_mask)
        else:
            attended = splice_mask(attention_mask, patches.shape[1])
            model, embeddings = self.llm_backbone.llm.model, splice(patches, text)
            # Dense in training alone: what a robot gets must not depend on who shares its batch, not by a bit.
            hidden = run_both_ways(model, embeddings, attended, self.attention, dense=self.training)
        action_hidden = slot_states(hidden, slots, self.config.action_slots)
        predicted = self.action_head(action_hidden)
        # In fp32; the published code takes the mean in bf16, and so rounds it to 8 bits.
        loss = None if actions is None else functional.l1_loss(predicted.float(), actions.float())
        return OFTOutput(loss, predicted, action_hidden, hidden, projected)
