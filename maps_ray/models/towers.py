"""Sizes of a vision tower. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from maps_ray.models.checkpoint_faults import CheckpointError


@dataclass(frozen=True)
class TowerConfig:
    """One vision tower; the fields are keyword arguments of timm's `VisionTransformer`."""

    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    init_values: float | None = None
    class_token: bool = True
    reg_tokens: int = 0
    no_embed_class: bool = False
    global_pool: str = "token"
    act_layer: str | None = None

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return (self.img_size // self.patch_size) ** 2

    @property
    def prefix_tokens(self) -> int:
        return int(self.class_token) + self.reg_tokens

    @property
    def mlp_dim(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)

    def timm_kwargs(self) -> dict[str, object]:
        return {**asdict(self), "num_classes": 0}


# Architectures behind `timm_model_ids` of published checkpoints, by the part of the id before the weights' tag.
STOCK_TOWERS: dict[str, dict[str, object]] = {
    "vit_large_patch14_reg4_dinov2": {
        "patch_size": 14,
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        "init_values": 1e-5,
        "reg_tokens": 4,
        "no_embed_class": True,
    },
    "vit_so400m_patch14_siglip_224": {
        "patch_size": 14,
        "embed_dim": 1152,
        "depth": 27,
        "num_heads": 16,
        "mlp_ratio": 3.7362,
        "class_token": False,
        "global_pool": "map",
    },
}


def check_tower(name: str, tower: TowerConfig) -> None:
    """Raises `CheckpointError`, naming the tower `name`, for sizes with which timm or the policy would fail."""
    if not isinstance(tower.img_size, int) or tower.img_size % tower.patch_size:
        raise CheckpointError(
            f"config.json: {name}: img_size = {tower.img_size!r}: must be a multiple of the patch size "
            f"{tower.patch_size}"
        )
    if tower.embed_dim % tower.num_heads:
        raise CheckpointError(
            f"config.json: {name}: embed_dim = {tower.embed_dim}: must be a multiple of num_heads = {tower.num_heads}"
        )
    if tower.depth < 2:
        raise CheckpointError(f"config.json: {name}: depth = {tower.depth}: features come from the last block but one")
    pools = ("token", "map", "") if tower.class_token else ("map", "")
    if tower.global_pool not in pools:
        raise CheckpointError(
            f"config.json: {name}: global_pool = {tower.global_pool!r}: must be one of {pools} where class_token is "
            f"{tower.class_token}"
        )
