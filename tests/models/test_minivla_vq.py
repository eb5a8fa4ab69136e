"""The VQ action tokenizer learns chunks, is saved and read, and refuses what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from minivla_data import write_vq

from maps_ray.models import CheckpointError
from maps_ray.models.minivla.config import VQConfig
from maps_ray.models.minivla.vq import ActionVQ, VQActionTokenizer, load_vq, save_vq
from maps_ray.models.minivla.vq_training import VQTraining, reconstruction_error, train_vq

SIZES = VQConfig(8, 7, n_latent_dims=16, vqvae_n_embed=32, vqvae_groups=4)


def swings(count: int, seed: int) -> torch.Tensor:
    """Smooth chunks: sines of random height and phase, a quarter turn apart in the dimensions, and a gripper."""
    generator = torch.Generator().manual_seed(seed)
    phase, height, gripper = (torch.rand(count, 1, 1, generator=generator) for _ in range(3))
    chunks = height * torch.sin(6.3 * phase + 0.4 * torch.arange(8)[:, None] + 1.6 * torch.arange(7))
    chunks[..., 6] = (gripper[..., 0] > 0.5).float()
    return chunks


@pytest.fixture(scope="module")
def trained() -> tuple[ActionVQ, list[float]]:
    errors: list[float] = []
    model = train_vq(
        swings(2000, 0), SIZES, VQTraining(steps=400, batch_size=128), lambda _, error: errors.append(error)
    )
    return model, errors


def test_reconstruction_error_falls_and_more_codebooks_help(trained) -> None:
    model, errors = trained
    unseen = swings(500, 1)
    spread = (unseen - unseen.mean(dim=0)).abs().mean().item()
    error = reconstruction_error(model, unseen)
    assert error < 0.3 * spread and errors[-1] < 0.3 * errors[0]
    # Each further codebook brings the decoded chunks nearer.
    with torch.no_grad():
        codes = model.quantize(model.latent(unseen))
        vectors = [codebook.embed[0, codes[:, group]] for group, codebook in enumerate(model.codebooks)]
        coarse = [(model.decode(sum(vectors[: count + 1])) - unseen).abs().mean().item() for count in range(4)]
    assert coarse == sorted(coarse, reverse=True) and coarse[0] > 1.5 * error
    assert all(len(codes[:, group].unique()) > 16 for group in range(4))


def test_training_is_deterministic_and_leaves_the_generator() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    training = VQTraining(steps=3, batch_size=16, seed=5)
    first, again = (train_vq(swings(100, 0), SIZES, training).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_saved_tokenizer_is_read_back_in_both_forms(trained, tmp_path: Path) -> None:
    model, _ = trained
    save_vq(model, tmp_path / "vq")
    chunks = swings(20, 2)
    ids = VQActionTokenizer(model, 999).encode(chunks)
    assert ids.shape == (20, 4) and ids.max() <= 999 and ids.min() >= 999 - 31
    read = VQActionTokenizer(load_vq(tmp_path / "vq"), 999)
    assert torch.equal(read.encode(chunks), ids)
    (tmp_path / "vq" / "model.safetensors").unlink()
    published = VQActionTokenizer(load_vq(tmp_path / "vq"), 999)
    assert torch.equal(published.encode(chunks), ids)
    assert torch.equal(published.decode(ids), read.decode(ids))


def test_chunks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[100, 8, 7\], expected \[N > 0, 5, 7\]"):
        train_vq(swings(100, 0), VQConfig(5, 7), VQTraining(steps=1))
    with pytest.raises(ValueError, match="not finite"):
        train_vq(swings(100, 0).log(), SIZES, VQTraining(steps=1))


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "vq"
    with pytest.raises(CheckpointError, match="MiniVLA-VQ needs a VQ action tokenizer"):
        load_vq(folder)
    write_vq(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_latent_dims": 16}))
    with pytest.raises(CheckpointError, match=r"encoder.fc.weight: expected \[16, 128\], found \[32, 128\]"):
        load_vq(folder)
    (folder / "config.json").write_text(json.dumps({**config, "vqvae_groups": 0}))
    with pytest.raises(CheckpointError, match="vqvae_groups = 0: must be positive"):
        load_vq(folder)
    (folder / "config.json").write_text(json.dumps({"input_dim_h": 8}))
    with pytest.raises(CheckpointError, match="input_dim_w"):
        load_vq(folder)
