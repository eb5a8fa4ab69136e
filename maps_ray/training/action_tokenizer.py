"""Trains the VQ action tokenizer of MiniVLA-VQ on the demonstrations of a run spec, as training normalises them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maps_ray.data import Demonstrations
from maps_ray.models.minivla.config import VQConfig
from maps_ray.models.minivla.vq import save_vq
from maps_ray.models.minivla.vq_training import VQTraining, reconstruction_error, train_vq
from maps_ray.spec import DataSpec


@dataclass(frozen=True)
class TokenizerReport:
    """What came out, in normalised actions."""

    chunks: dict[str, int]
    """Split -> number of chunks; the tokenizer learns from `train` alone."""
    errors: dict[str, float]
    """Split -> mean absolute reconstruction error."""


def train_action_tokenizer(
    spec: DataSpec,
    out: Path,
    *,
    groups: int = 7,
    codes: int = 256,
    latent: int = 512,
    training: VQTraining | None = None,
    report: Callable[[int, float], None] = lambda step, error: None,
) -> TokenizerReport:
    """Trains on the train split and writes a folder for a MiniVLA-VQ checkpoint.

    Args:
        spec: `data` of the run spec; its chunk, normalisation and splits are those of the policy's training.
        out: new folder, `vq` in the checkpoint.
        groups, codes, latent: codebooks (tokens of a chunk), codes of each (256 at most, MiniVLA's action tokens) and
            width of the latent.
        training: the course of training.
        report: called with step and reconstruction error now and then.

    Raises:
        SpecError, DatasetError: the data cannot be used.
        CheckpointError: `out` exists and is not empty, or a size is out of range.
    """
    demonstrations = Demonstrations(spec, use_proprio=False)
    chunks = {split: action_chunks(demonstrations, split) for split in demonstrations.splits}
    sizes = {"n_latent_dims": latent, "vqvae_n_embed": codes, "vqvae_groups": groups}
    width = demonstrations.action_dim
    config = VQConfig.from_dict({"input_dim_h": spec.chunk, "input_dim_w": width, **sizes})
    model = train_vq(chunks["train"], config, training or VQTraining(), report)
    save_vq(model, out)
    return TokenizerReport(
        {split: len(values) for split, values in chunks.items()},
        {split: reconstruction_error(model, values) for split, values in chunks.items()},
    )


def action_chunks(demonstrations: Demonstrations, split: str) -> Tensor:
    """The chunks that training shows of a split, (N, chunk, dim) float32; videos are not read.

    Raises:
        DatasetError: no episode is as long as a chunk.
    """
    chunks = []
    for part in demonstrations.samples(split).parts:
        for episode in part.episodes:
            windows = np.lib.stride_tricks.sliding_window_view(part.actions(episode), demonstrations.spec.chunk, axis=0)
            chunks.append(windows.transpose(0, 2, 1))
    return torch.from_numpy(np.concatenate(chunks))
