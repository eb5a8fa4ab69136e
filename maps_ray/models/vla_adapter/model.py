"""VLA-Adapter (arXiv 2509.09372): images, a sentence and action queries through a causal language model to a chunk."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from maps_ray.models.decoder import Attention, slot_positions, splice, splice_mask, states_at
from maps_ray.models.files.weights import BaseTensors
from maps_ray.models.minivla.backbone import CausalModel, TiedEmbedding
from maps_ray.models.openvla_oft.backbone import FusedVisionBackbone, Projector
from maps_ray.models.openvla_oft.heads import ProprioProjector, proprio_token
from maps_ray.models.openvla_oft.tensors import checkpoint_key
from maps_ray.models.policy import BasePolicy
from maps_ray.models.vla_adapter.bridge import BridgePolicy
from maps_ray.models.vla_adapter.config import PolicyConfig
from maps_ray.models.vla_adapter.processor import Processor
from maps_ray.models.vla_adapter.tensors import stack
from maps_ray.proximity.stack import StackLayer

NOISE = 0.02
"""Standard deviation of what the action tokens start from in training; in evaluation they start from zeros."""


class AdapterOutput(NamedTuple):
    """What one forward pass gives. A named tuple, so that ZeRO-3 finds the tensors in it."""

    loss: Tensor | None
    """Mean absolute error over the chunk, fp32 scalar; None without `actions`."""
    actions: Tensor
    """(B, chunk, action_dim), normalised."""
    action_hidden: Tensor
    """(B, queries, hidden): the last layer's states that the policy reads for the action queries."""
    hidden: Tensor
    """(B, S, hidden): the language model's last hidden states; rows at padding mean nothing."""
    projected: Tensor
    """(B, images * patches, hidden): the image tokens."""


class VLAAdapter(BasePolicy):
    """Towers, projector, language model, action queries and the policy that reads every layer.

    Sequence: `[<|im_start|>][patches of image 1][image 2]..[rest of the prompt][action queries]`. Proprioception is no
    token of it: it goes to the policy.
    """

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
        self.language_model = CausalModel(config, attention)
        self.action_queries = nn.Embedding(config.queries, config.text["hidden_size"])
        nn.init.zeros_(self.action_queries.weight)
        self.proprio_projector = ProprioProjector(config) if config.use_proprio else None
        self.action_head = BridgePolicy(config)

    @property
    def embedding(self) -> TiedEmbedding:
        """Token embedding and output head."""
        embedding = self.language_model.model.embed_tokens
        assert isinstance(embedding, TiedEmbedding)
        return embedding

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        proprio: Tensor | None = None,
        actions: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> AdapterOutput:
        """Predicts a chunk of actions and, given the true ones, the loss: see `contracts.Policy`.

        Args:
            noise: (chunk, action_dim * hidden), what the action tokens start from; none draws it in training mode
                from torch's generator, and takes zeros in evaluation mode.
        """
        self.chunk_shape(len(labels), actions)
        self.check_pixels(pixel_values)
        dtype = self.projector.fc1.weight.dtype
        projected = self.projector(self.vision_backbone(pixel_values.to(dtype)))
        slots = labels > self.config.action_token_begin
        embeddings = splice(projected, self._embed(input_ids, slots))
        mask = splice_mask(attention_mask, projected.shape[1])
        # The first entry is the embeddings, the last comes after the final norm.
        entries = self.language_model.model(
            inputs_embeds=embeddings, attention_mask=mask, output_hidden_states=True
        ).hidden_states[1:]
        # From position 0, as published: the first token of the text is in, and the last patch is out.
        task = [states[:, : self.config.task_tokens] for states in entries]
        positions = slot_positions(slots, self.config.queries, embeddings.shape[1])
        action = [states_at(states, positions) for states in entries]
        if noise is None and self.training:
            # One draw for the whole batch, and no parameter: `learnable_random_perturbations` of the published code
            # makes a new one at every call, which no optimizer knows.
            noise = NOISE * torch.randn(self.action_head.shape, device=projected.device)
        token = proprio_token(projected, self.proprio_projector, proprio, self.config.proprio_dim)
        predicted = self.action_head(action, task, token, noise)
        loss = None if actions is None else functional.l1_loss(predicted.float(), actions.float())
        return AdapterOutput(loss, predicted, action[-1], entries[-1], projected)

    def _embed(self, input_ids: Tensor, slots: Tensor) -> Tensor:
        """The text's embeddings (B, L, hidden), with the action queries in place of their slots."""
        # Clamped for the other positions, whose rows are looked up and left aside.
        number = (slots.cumsum(dim=1) - 1).clamp(0, self.config.queries - 1)
        return torch.where(slots[..., None], self.action_queries(number), self.embedding(input_ids))

    def read_processor(self, folder: Path) -> Processor:
        return Processor.from_checkpoint(folder, chunk=self.config.chunk, action_dim=self.config.action_dim)

    def stack(self) -> list[StackLayer]:
        return stack(self.config)

    @staticmethod
    def checkpoint_key(name: str) -> str:
        return checkpoint_key(name)
