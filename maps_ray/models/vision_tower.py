"""A vision transformer that gives patch features, with or without modulation by language."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maps_ray.models.sizes import TowerConfig
from maps_ray.models.torchvision_import import ensure_torchvision

ensure_torchvision()
# Behind the call: timm imports torchvision.
from timm.models.vision_transformer import Block, VisionTransformer  # noqa: E402


class FiLMBlock(Block):
    """A block whose tokens are scaled and shifted by the language between attention and MLP (FiLM, arXiv 1709.07871).

    One scale and one shift for each channel, from the mean of the language embeddings: x (1 + scale) + shift.
    """

    def __init__(self, dim: int, *args: object, language_width: int, **kwargs: object) -> None:
        super().__init__(dim, *args, **kwargs)
        self.scale = nn.Linear(language_width, dim)
        self.shift = nn.Linear(language_width, dim)

    def forward(self, x: Tensor, language: Tensor) -> Tensor:
        """Tokens (N, T, dim) and language (N, language_width) -> (N, T, dim)."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        x = x * (1 + self.scale(language)[:, None]) + self.shift(language)[:, None]
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class VisionTower(VisionTransformer):
    """A timm vision transformer that gives the patch features of its last block but one.

    The features have no final norm and no class or register tokens; so the last block, the norm and the attention pool
    get no gradient. The parameters held by the tower itself (position embedding, class token) are used inside its own
    `forward`, where ZeRO-3 gathers them.
    """

    def __init__(self, config: TowerConfig, language_width: int | None = None) -> None:
        """Random weights.

        Args:
            config: sizes.
            language_width: of what FiLM is conditioned on; none builds blocks without FiLM.
        """
        film = {} if language_width is None else {"block_fn": partial(FiLMBlock, language_width=language_width)}
        super().__init__(**config.timm_kwargs(), **film)
        # timm has initialised every linear layer as a transformer's.
        for block in self.blocks if film else ():
            block.scale.reset_parameters()
            block.shift.reset_parameters()

    def idle_modules(self) -> list[str]:
        """Parts that the features do not depend on."""
        known = {name for name, _ in self.named_children()}
        return [f"blocks.{len(self.blocks) - 1}", *(name for name in ("norm", "fc_norm", "attn_pool") if name in known)]

    def forward(self, images: Tensor, language: Tensor | None = None) -> Tensor:
        """Patch features.

        Args:
            images: (N, 3, H, W) normalised.
            language: (N, language_width) where the tower has FiLM.

        Returns:
            (N, patches, width).
        """
        condition = () if language is None else (language,)
        # As timm's `forward_features` begins (1.0, private there); its `get_intermediate_layers`, which upstream uses,
        # has no place for the language.
        tokens = self.norm_pre(self._pos_embed(self.patch_embed(images)))
        for block in self.blocks[:-1]:
            if self.grad_checkpointing and self.training:
                tokens = checkpoint(block, tokens, *condition, use_reentrant=False)
            else:
                tokens = block(tokens, *condition)
        return tokens[:, self.num_prefix_tokens :]
