"""Sizes of a VQ action tokenizer, from its `config.json`. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.files.formats import read_json


@dataclass(frozen=True)
class VQConfig:
    """Sizes of a VQ action tokenizer, named as in its published `config.json`."""

    input_dim_h: int
    """Actions of a chunk."""
    input_dim_w: int
    """Dimensions of an action."""
    n_latent_dims: int = 512
    vqvae_n_embed: int = 256
    """Codes of each codebook."""
    vqvae_groups: int = 7
    """Codebooks, and so tokens of a chunk."""
    act_scale: float = 1.0
    """Actions are divided by it before they are encoded."""

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> VQConfig:
        """Reads the contents of `config.json`; fields that only training used are ignored.

        Raises:
            CheckpointError: a size is missing or out of range.
        """
        try:
            config = cls(**{field.name: raw[field.name] for field in fields(cls) if field.name in raw})
        except TypeError as error:
            raise CheckpointError(f"config.json of the VQ action tokenizer: {error}") from None
        for name, value in asdict(config).items():
            if not isinstance(value, int | float) or value <= 0:
                raise CheckpointError(f"config.json of the VQ action tokenizer: {name} = {value!r}: must be positive")
        return config

    def to_dict(self) -> dict[str, object]:
        """The published `config.json`: sizes, and the arguments that only its loader looks at."""
        loader = {"eval": False, "device": "cpu", "load_dir": None, "encoder_loss_multiplier": 1.0}
        return {**asdict(self), **loader}


def read_vq_config(folder: Path) -> VQConfig:
    """Sizes of the tokenizer in `folder`.

    Raises:
        CheckpointError: no such folder, or no readable configuration.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is missing: MiniVLA-VQ needs a VQ action tokenizer there; train one with jobs/train_vq.py"
        )
    return VQConfig.from_dict(read_json(folder / "config.json"))
