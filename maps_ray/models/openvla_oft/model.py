"""The OpenVLA-OFT policy: images, proprioception and an instruction in, a chunk of actions out in one pass.

Sequence: `[BOS][patches of image 1][image 2]..[proprio][prompt][chunk * action_dim zeroed action slots][</s>]`,
attended bidirectionally. The hidden state that predicts a slot is the one before it (arXiv 2502.19645). A diffusion
head puts its step as one more token behind the proprioception, and the noisy actions into the slots.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from maps_ray.models.collate import IGNORED
from maps_ray.models.decoder import Attention, run_both_ways, slot_states, splice, splice_mask
from maps_ray.models.files.weights import BaseTensors
from maps_ray.models.openvla_oft.backbone import FusedVisionBackbone, Projector, build_language_model
from maps_ray.models.openvla_oft.config import PolicyConfig
from maps_ray.models.openvla_oft.diffusion import (
    DIFFUSION_STEPS,
    DiffusionActionHead,
    NoisyActionProjector,
    denoise,
    noise_schedule,
    time_token,
)
from maps_ray.models.openvla_oft.heads import L1ActionHead, ProprioProjector, append_proprio
from maps_ray.models.openvla_oft.processor import Processor
from maps_ray.models.openvla_oft.tensors import checkpoint_key, stack
from maps_ray.models.openvla_oft.tokens import decode_ids
from maps_ray.models.policy import BasePolicy
from maps_ray.proximity.stack import StackLayer


class PolicyOutput(NamedTuple):
    """What one forward pass gives. A named tuple, so that ZeRO-3 finds the tensors in it."""

    loss: Tensor | None
    """fp32 scalar, None without `actions`: mean absolute error over the chunk of the L1 head, mean squared error of the
    noise of the diffusion head, cross entropy of action and stop tokens of discrete actions."""
    actions: Tensor
    """(B, chunk, action_dim), normalised. Of a diffusion head in training mode, the clean actions estimated from one
    noise level; in evaluation mode, and without `actions`, they are denoised step by step."""
    action_hidden: Tensor
    """(B, chunk * action_dim, hidden): the hidden states that the head reads."""
    hidden: Tensor
    """(B, S, hidden): the language model's last hidden states; rows at padding mean nothing."""
    projected: Tensor
    """(B, images * patches, hidden): the image tokens."""


class _Inputs(NamedTuple):
    """What the language model reads."""

    tokens: Tensor
    """(B, L, hidden), zero in the action slots."""
    slots: Tensor
    """(B, L) bool."""
    attended: Tensor
    """(B, L) bool, False at padding."""
    patches: Tensor
    """(B, P, hidden): image tokens, then proprioception."""
    images: Tensor
    """(B, images * patches, hidden): the image tokens alone."""


class OpenVLAOFT(BasePolicy):
    """The policy. `load_policy` and `create_policy` build it."""

    config: PolicyConfig

    def __init__(self, config: PolicyConfig, attention: Attention = "sdpa", base: BaseTensors | None = None) -> None:
        """Random weights, or none inside `torch.device("meta")`.

        Args:
            config: sizes.
            attention: `sdpa`, or `eager` to look at attention weights.
            base: the checkpoint that the policy starts from, for `read_anchor`.

        Raises:
            ImportError: a diffusion head without diffusers.
        """
        super().__init__(config, attention, base)
        self.vision_backbone = FusedVisionBackbone(config)
        self.projector = Projector(config)
        self.language_model = build_language_model(config, attention)
        self.proprio_projector = ProprioProjector(config) if config.use_proprio else None
        self.noisy_action_projector = NoisyActionProjector(config) if config.head == "diffusion" else None
        self.action_head: L1ActionHead | DiffusionActionHead | None = None
        if config.head == "l1":
            self.action_head = L1ActionHead(config)
        elif config.head == "diffusion":
            self.action_head = DiffusionActionHead(config)
            # The policy is built on `meta`; the schedule's numbers are in no checkpoint.
            with torch.device("cpu"):
                self.noise_schedule = noise_schedule()

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        proprio: Tensor | None = None,
        actions: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> PolicyOutput:
        """Predicts a chunk of actions and, given the true ones, the loss: see `contracts.Policy`.

        Args:
            noise: (B, chunk, action_dim) fp32 for a diffusion head; drawn from torch's generator when left out.
        """
        # What is ignored is -100, and the stop token is below the action tokens.
        slots = labels > self.config.action_token_begin
        expected = self.chunk_shape(len(labels), actions)
        inputs = self._embed(pixel_values, input_ids, attention_mask, slots, proprio)
        if self.config.head == "diffusion":
            return self._diffuse(inputs, actions, noise)
        hidden = self._run(inputs)
        action_hidden = slot_states(hidden, slots, self.config.action_slots)
        if self.config.head == "discrete":
            predicted = self._decode_tokens(action_hidden).reshape(expected)
            loss = self._token_loss(hidden, labels) if actions is not None else None
            return PolicyOutput(loss, predicted, action_hidden, hidden, inputs.images)
        assert self.action_head is not None
        regressed: Tensor = self.action_head(action_hidden)
        # In fp32; the published code takes the mean in bf16, and so rounds it to 8 bits.
        loss = functional.l1_loss(regressed.float(), actions.float()) if actions is not None else None
        return PolicyOutput(loss, regressed, action_hidden, hidden, inputs.images)

    def _embed(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        slots: Tensor,
        proprio: Tensor | None,
    ) -> _Inputs:
        """All that the language model reads, the action slots zeroed."""
        tokens = self.embed_tokens(input_ids, slots)
        language = None
        if self.config.film:
            # The mean over all that is no action: BOS, stop token and padding count, as in the published code.
            language = tokens.sum(dim=1) / (tokens.shape[1] - self.config.action_slots)
        images = self.encode_images(pixel_values, language)
        patches = append_proprio(images, self.proprio_projector, proprio, self.config.proprio_dim)
        return _Inputs(tokens, slots, attention_mask.bool(), patches, images)

    def _run(self, inputs: _Inputs) -> Tensor:
        """The language model's last hidden states (B, L + patches, hidden)."""
        tokens, patches, attended = inputs.tokens, inputs.patches, inputs.attended
        return self.run_language(splice(patches, tokens), splice_mask(attended, patches.shape[1]))

    def _decode_tokens(self, action_hidden: Tensor) -> Tensor:
        """The likeliest token of each slot as a normalised value, (B, chunk * action_dim) fp32."""
        ids = self.language_logits(action_hidden).argmax(dim=-1)
        return decode_ids(ids, self.config.tokenizer_size, self.config.action_bins)

    def _token_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of the labelled tokens, fp32."""
        targets = labels[:, 1:]
        # The state before a token predicts it; logits of the other positions would only take memory.
        states = hidden[:, hidden.shape[1] - labels.shape[1] : -1][targets != IGNORED]
        return functional.cross_entropy(self.language_logits(states).float(), targets[targets != IGNORED])

    def _diffuse(self, inputs: _Inputs, actions: Tensor | None, noise: Tensor | None) -> PolicyOutput:
        """One noise level with its loss in training, a denoised chunk otherwise."""
        states: list[tuple[Tensor, Tensor]] = []

        def predict(noisy: Tensor, steps: Tensor) -> Tensor:
            assert self.action_head is not None and self.noisy_action_projector is not None
            time = time_token(steps, inputs.patches.shape[-1])[:, None].to(inputs.patches.dtype)
            noisy_tokens = self.noisy_action_projector(noisy).to(inputs.tokens.dtype)
            hidden = self._run(
                inputs._replace(
                    tokens=inputs.tokens.masked_scatter(inputs.slots[..., None], noisy_tokens),
                    patches=torch.cat([inputs.patches, time], dim=1),
                )
            )
            action_hidden = slot_states(hidden, inputs.slots, self.config.action_slots)
            states[:] = [(action_hidden, hidden)]
            predicted: Tensor = self.action_head(action_hidden)
            return predicted

        batch, device = len(inputs.tokens), inputs.tokens.device
        if noise is None:
            noise = torch.randn(batch, self.config.chunk, self.config.action_dim, device=device)
        loss, estimate = None, None
        if actions is not None:
            # One for each chunk, not for each action, as `sample_noisy_actions` upstream.
            steps = torch.randint(0, DIFFUSION_STEPS, (batch,), device=device)
            clean = actions.float()
            noisy = self.noise_schedule.add_noise(clean, noise, steps)
            predicted = predict(noisy, steps).float()
            loss = functional.mse_loss(predicted, noise)
            # DDIM's estimate of the clean actions (arXiv 2010.02502, eq. 9), clipped as the scheduler's own steps clip
            # it.
            kept = self.noise_schedule.alphas_cumprod.to(device)[steps][:, None, None]
            estimate = ((noisy - (1 - kept).sqrt() * predicted) / kept.sqrt()).clamp(-1, 1)
        if estimate is None or not self.training:
            estimate = denoise(self.noise_schedule, noise, predict, DIFFUSION_STEPS)
        return PolicyOutput(loss, estimate, *states[0], inputs.images)

    def encode_images(self, pixel_values: Tensor, language: Tensor | None = None) -> Tensor:
        """Image tokens.

        Args:
            pixel_values: (B, 6 * images, H, W).
            language: (B, hidden), what FiLM is conditioned on; None without FiLM.

        Returns:
            (B, images * patches, hidden).
        """
        self.check_pixels(pixel_values)
        return self.projector(self.vision_backbone(pixel_values.to(self._dtype), language))

    def embed_tokens(self, input_ids: Tensor, slots: Tensor) -> Tensor:
        """Token embeddings (B, L, hidden), zero where `slots` (B, L) is True."""
        return self.language_model.model.embed_tokens(input_ids).masked_fill(slots[..., None], 0)

    def run_language(self, embeddings: Tensor, attended: Tensor) -> Tensor:
        """Embeddings (B, S, hidden) -> last hidden states, every position attending to all where `attended` (B, S)."""
        # Dense in training alone: what a robot gets must not depend on who shares its batch, not by a bit.
        return run_both_ways(self.language_model.model, embeddings, attended, self.attention, dense=self.training)

    def language_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., hidden) -> vocabulary logits; the continuous head does not need them."""
        logits: Tensor = self.language_model.lm_head(hidden)
        return logits

    def idle_modules(self) -> list[str]:
        # A continuous head reads hidden states; the embedding has a matrix of its own.
        return super().idle_modules() + ([] if self.config.head == "discrete" else ["language_model.lm_head"])

    def read_processor(self, folder: Path) -> Processor:
        return Processor.from_checkpoint(folder, chunk=self.config.chunk, action_dim=self.config.action_dim)

    def stack(self) -> list[StackLayer]:
        return stack(self.config)

    @staticmethod
    def checkpoint_key(name: str) -> str:
        return checkpoint_key(name)

    @property
    def _dtype(self) -> torch.dtype:
        return self.language_model.model.norm.weight.dtype
