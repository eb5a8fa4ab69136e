"""Trains a VQ action tokenizer on chunks of actions (VQ-BeT, arXiv 2403.03181).

Encoder and decoder follow the reconstruction error; the code vectors are running means of what falls to them, and a
code that nothing falls to is moved to a residual of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from maps_ray.models.minivla.config import VQConfig
from maps_ray.models.minivla.vq import ActionVQ, Codebook

_COMMITMENT = 0.02
"""Weight of the distance to the codes. More of it draws the latents together before the codes have spread."""
_DEAD = 1e-2
"""A code is dead when the running count of what falls to it is below this."""
_REPORTS = 20


@dataclass(frozen=True)
class VQTraining:
    """How long and how fast."""

    steps: int = 5000
    batch_size: int = 512
    learning_rate: float = 1e-3
    """Of Adam; falls linearly to 0."""
    decay: float = 0.8
    """Of the codebooks' running means."""
    seed: int = 0


def train_vq(
    chunks: Tensor,
    config: VQConfig,
    training: VQTraining,
    report: Callable[[int, float], None] = lambda step, error: None,
) -> ActionVQ:
    """Trains a tokenizer; the same chunks and seed give the same one.

    Args:
        chunks: (N, chunk, dim) float32, normalised.
        config: sizes; the first two must be those of `chunks`.
        training: the course of training.
        report: called with step and mean absolute reconstruction error, about twenty times.

    Raises:
        ValueError: chunks of another shape, none, or values that are not finite.
    """
    expected = (config.input_dim_h, config.input_dim_w)
    if chunks.ndim != 3 or tuple(chunks.shape[1:]) != expected or not len(chunks):
        raise ValueError(f"chunks have shape {list(chunks.shape)}, expected [N > 0, {expected[0]}, {expected[1]}]")
    if not chunks.isfinite().all():
        raise ValueError("chunks hold values that are not finite")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = ActionVQ(config)
        _train(model, chunks.float(), training, report)
    return model.eval()


@torch.no_grad()
def reconstruction_error(model: ActionVQ, chunks: Tensor) -> float:
    """Mean absolute difference between chunks (N, chunk, dim) and what their codes decode to."""
    decoded = model.decode(model.look_up(model.quantize(model.latent(chunks.float()))))
    return (decoded - chunks).abs().mean().item()


def _train(model: ActionVQ, chunks: Tensor, training: VQTraining, report: Callable[[int, float], None]) -> None:
    trained = [*model.encoder.parameters(), *model.decoder.parameters()]
    optimizer = torch.optim.Adam(trained, lr=training.learning_rate)
    every = max(1, training.steps // _REPORTS)
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * (1 - step / training.steps)
        batch = chunks[torch.randint(len(chunks), (min(training.batch_size, len(chunks)),))]
        latent = model.latent(batch)
        quantized, commitment = _quantize(model, latent, training.decay)
        # The gradient passes the codebooks as if they were not there.
        decoded = model.decode(latent + (quantized - latent).detach())
        error = functional.l1_loss(decoded, batch)
        optimizer.zero_grad()
        (error + _COMMITMENT * commitment).backward()
        optimizer.step()
        if step % every == 0 or step == training.steps - 1:
            report(step, error.item())


def _quantize(model: ActionVQ, latent: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """The quantized latent, and how far encoder outputs are from their codes; moves the codebooks."""
    residual, quantized = latent, torch.zeros_like(latent)
    commitment = latent.new_zeros(())
    for codebook in model.codebooks:
        _initialise(codebook, residual.detach())
        codes = codebook.nearest(residual.detach())
        vectors = codebook.embed[0, codes]
        commitment = commitment + functional.mse_loss(residual, vectors)
        _move(codebook, residual.detach(), codes, decay)
        residual, quantized = residual - vectors, quantized + vectors
    return quantized, commitment


def _initialise(codebook: Codebook, values: Tensor) -> None:
    if codebook.initted.item():
        return
    codes = codebook.embed.shape[1]
    # On the data, where `kmeans_init` of vector_quantize_pytorch begins too; `initted` is its mark.
    codebook.embed[0] = values[torch.randint(len(values), (codes,))]
    codebook.embed_avg.copy_(codebook.embed)
    # Mean and count begin as if each code had seen its one value.
    codebook.cluster_size.fill_(1.0)
    codebook.initted.fill_(1.0)


def _move(codebook: Codebook, values: Tensor, codes: Tensor, decay: float) -> None:
    chosen = functional.one_hot(codes, codebook.embed.shape[1]).to(values.dtype)
    codebook.cluster_size[0].lerp_(chosen.sum(dim=0), 1 - decay)
    codebook.embed_avg[0].lerp_(chosen.T @ values, 1 - decay)
    dead = codebook.cluster_size[0] < _DEAD
    if dead.any():
        fresh = values[torch.randint(len(values), (int(dead.sum()),))]
        codebook.embed_avg[0, dead] = fresh
        codebook.cluster_size[0, dead] = 1.0
    # A new tensor: the old one is still part of the graph of this step.
    codebook.embed = codebook.embed_avg / codebook.cluster_size[..., None]
