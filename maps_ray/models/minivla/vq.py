"""The VQ action tokenizer: a chunk of actions as one code of each residual codebook (VQ-BeT, arXiv 2403.03181)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from maps_ray.files import write_json
from maps_ray.models.checkpoint_faults import CheckpointError, refuse_shape_faults, shape_faults
from maps_ray.models.files.formats import MappedTensors, read_header
from maps_ray.models.files.weights import new_folder, read_pt, refuse_not_finite, write_tensors
from maps_ray.models.minivla.config import VQConfig, read_vq_config

_WIDTH = 128


class _MLP(nn.Module):
    """Two hidden layers with ReLU, then a linear layer."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(in_width, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH), nn.ReLU())
        self.fc = nn.Linear(_WIDTH, out_width)

    def forward(self, values: Tensor) -> Tensor:
        return self.fc(self.encoder(values))


class Codebook(nn.Module):
    """Code vectors with the running means that training keeps of them."""

    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor
    initted: Tensor

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        # Names and shapes of `EuclideanCodebook` in vector_quantize_pytorch, which published files come from: the first
        # axis counts codebooks, `initted` is a float.
        self.register_buffer("embed", torch.randn(1, codes, width) / width**0.5)
        self.register_buffer("embed_avg", self.embed.clone())
        self.register_buffer("cluster_size", torch.zeros(1, codes))
        self.register_buffer("initted", torch.zeros(1))

    def nearest(self, values: Tensor) -> Tensor:
        """(N, width) -> index of the nearest code vector, (N,) int64."""
        return torch.cdist(values, self.embed[0]).argmin(dim=-1)


class _Layer(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self._codebook = Codebook(config.vqvae_n_embed, config.n_latent_dims)


class _ResidualQuantizer(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer(config) for _ in range(config.vqvae_groups)])

    def codebooks(self) -> Iterator[Codebook]:
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            yield layer._codebook


class ActionVQ(nn.Module):
    """Encoder, residual codebooks and decoder; parameter names are the published ones."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        size = config.input_dim_h * config.input_dim_w
        self.encoder = _MLP(size, config.n_latent_dims)
        self.decoder = _MLP(config.n_latent_dims, size)
        self.vq_embedding = _ResidualQuantizer(config)

    @property
    def codebooks(self) -> list[Codebook]:
        return list(self.vq_embedding.codebooks())

    def latent(self, actions: Tensor) -> Tensor:
        """Normalised actions (N, chunk, dim) -> encoder output (N, latent)."""
        return self.encoder((actions / self.config.act_scale).flatten(1))

    def quantize(self, latent: Tensor) -> Tensor:
        """(N, latent) -> codes (N, groups) int64; each codebook takes what the ones before it left over."""
        codes = []
        for codebook in self.codebooks:
            codes.append(codebook.nearest(latent))
            latent = latent - codebook.embed[0, codes[-1]]
        return torch.stack(codes, dim=1)

    def look_up(self, codes: Tensor) -> Tensor:
        """Codes (N, groups) -> sum of their vectors (N, latent)."""
        vectors = [codebook.embed[0, codes[:, group]] for group, codebook in enumerate(self.codebooks)]
        return torch.stack(vectors).sum(dim=0)

    def decode(self, latent: Tensor) -> Tensor:
        """(N, latent) -> normalised actions (N, chunk, dim)."""
        actions = self.decoder(latent) * self.config.act_scale
        return actions.reshape(-1, self.config.input_dim_h, self.config.input_dim_w)


class VQActionTokenizer:
    """Chunks of actions <-> token ids; no module, so that no engine trains or shards it. Runs in fp32 on the CPU.

    The token of code `c` is `last_id - c`, whatever its codebook: the position says which one.
    """

    def __init__(self, model: ActionVQ, last_id: int) -> None:
        self.model = model.float().cpu().eval().requires_grad_(False)
        self.last_id = last_id
        """Greatest id of an action token."""

    @property
    def config(self) -> VQConfig:
        return self.model.config

    @property
    def tokens(self) -> int:
        """Tokens of one chunk."""
        return self.config.vqvae_groups

    @torch.no_grad()
    def encode(self, actions: Tensor) -> Tensor:
        """Normalised actions (N, chunk, dim) -> ids (N, tokens) int64."""
        return self.last_id - self.model.quantize(self.model.latent(actions.float()))

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Ids (N, tokens) -> normalised actions (N, chunk, dim) fp32 on the ids' device; ids out of range clip."""
        codes = (self.last_id - ids.cpu()).clamp(0, self.config.vqvae_n_embed - 1)
        return self.model.decode(self.model.look_up(codes)).to(ids.device)


def load_vq(folder: Path) -> ActionVQ:
    """Reads `config.json` and `model.safetensors`, or `checkpoints/model.pt` as published.

    Raises:
        CheckpointError: a file is missing, corrupt or of another shape, or holds NaN or infinities.
    """
    # Building it draws random weights, which must not move the caller's generator.
    with torch.random.fork_rng(devices=[]):
        model = ActionVQ(read_vq_config(folder))
    file, published = folder / "model.safetensors", folder / "checkpoints" / "model.pt"
    if file.is_file():
        infos = read_header(file)
        mapped = MappedTensors(infos)
        state = {key: mapped.read(key).clone() for key in infos}
    elif published.is_file():
        parts = read_pt(published)
        names = ("encoder", "decoder", "vq_embedding")
        if not isinstance(parts, dict) or not all(isinstance(parts.get(name), dict) for name in names):
            raise CheckpointError(f"{published}: expected dictionaries {', '.join(names)}")
        state = {f"{name}.{key}": tensor for name in names for key, tensor in parts[name].items()}
    else:
        raise CheckpointError(f"{folder} has neither model.safetensors nor checkpoints/model.pt")
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    stored = {key: tuple(tensor.shape) for key, tensor in state.items()}
    refuse_shape_faults(f"{folder}: VQ action tokenizer", shape_faults(expected, stored))
    refuse_not_finite(str(folder), state)
    model.load_state_dict(state)
    return model


def save_vq(model: ActionVQ, out: Path) -> None:
    """Writes a folder that `load_vq` reads back, with the weights also in the published form.

    Raises:
        CheckpointError: `out` exists and is not empty.
    """
    state = model.state_dict()
    with new_folder(out) as folder:
        write_json(folder / "config.json", model.config.to_dict())
        write_tensors(state, folder / "model.safetensors", torch.float32)
        (folder / "checkpoints").mkdir()
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = tensor
        torch.save(parts, folder / "checkpoints" / "model.pt")
