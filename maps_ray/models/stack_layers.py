"""Layers of a stack for modules made of numbered blocks."""

from __future__ import annotations

from maps_ray.proximity.stack import StackLayer


def tower_layers(module: str, prefix: str, depth: int, block: str = r"blocks\.{}\..+") -> list[StackLayer]:
    """The blocks of a vision tower whose parameter names match `prefix` and then timm's names."""
    first, last = r"patch_embed\..+|pos_embed|cls_token|reg_token", r"norm\..+|attn_pool\..+"
    return block_layers(module, prefix, depth, block, first=first, last=last)


def block_layers(
    module: str, prefix: str, depth: int, block: str, *, first: str, last: str, halves: bool = False
) -> list[StackLayer]:
    """One layer for each block.

    Args:
        module: name of the module; layers are `module.0`, `module.1`, ...
        prefix: regular expression that every parameter name of the module begins with.
        depth: number of blocks.
        block: regular expression of the rest of a block's names, with `{}` for the block's number.
        first: of what comes before the first block and belongs to it.
        last: of what comes after the last block and belongs to it.
        halves: also name each half of the module, `module_early` (one block more where the number is odd) and
            `module_late`.
    """
    layers = []
    for index in range(depth):
        owned = [block.format(index)]
        owned += [first] if index == 0 else []
        owned += [last] if index == depth - 1 else []
        modules: tuple[str, ...] = (module,)
        if halves:
            modules += (f"{module}_early" if index < (depth + 1) // 2 else f"{module}_late",)
        layers.append(StackLayer(f"{module}.{index}", modules, f"{prefix}({'|'.join(owned)})"))
    return layers
