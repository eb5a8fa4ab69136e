"""Names, shapes and order of a policy's layers, from its sizes alone. No torch.

The stack: DINOv2 blocks, SigLIP blocks, projector, language layers, then the new modules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from maps_ray.models.checkpoint_faults import Shape
from maps_ray.models.sizes import DecoderText, TowerConfig
from maps_ray.proximity.stack import StackLayer

Shapes = dict[str, Shape]


def linear(name: str, out_features: int, in_features: int, bias: bool = True) -> Shapes:
    """A linear layer."""
    shapes: Shapes = {f"{name}.weight": (out_features, in_features)}
    return shapes | {f"{name}.bias": (out_features,)} if bias else shapes


def norm(name: str, size: int) -> Shapes:
    """A LayerNorm."""
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def tower_shapes(prefix: str, tower: TowerConfig) -> Shapes:
    """A vision tower under timm's names."""
    dim = tower.embed_dim
    positions = tower.patches + (0 if tower.no_embed_class else tower.prefix_tokens)
    shapes: Shapes = {
        "pos_embed": (1, positions, dim),
        "patch_embed.proj.weight": (dim, 3, tower.patch_size, tower.patch_size),
        "patch_embed.proj.bias": (dim,),
    }
    if tower.class_token:
        shapes["cls_token"] = (1, 1, dim)
    if tower.reg_tokens:
        shapes["reg_token"] = (1, tower.reg_tokens, dim)
    for block in range(tower.depth):
        name = f"blocks.{block}"
        shapes |= norm(f"{name}.norm1", dim) | norm(f"{name}.norm2", dim)
        shapes |= linear(f"{name}.attn.qkv", 3 * dim, dim) | linear(f"{name}.attn.proj", dim, dim)
        shapes |= linear(f"{name}.mlp.fc1", tower.mlp_dim, dim) | linear(f"{name}.mlp.fc2", dim, tower.mlp_dim)
        if tower.init_values is not None:
            shapes |= {f"{name}.ls1.gamma": (dim,), f"{name}.ls2.gamma": (dim,)}
    shapes |= norm("norm", dim)
    if tower.global_pool == "map":
        shapes["attn_pool.latent"] = (1, 1, dim)
        shapes |= linear("attn_pool.q", dim, dim) | linear("attn_pool.kv", 2 * dim, dim)
        shapes |= linear("attn_pool.proj", dim, dim) | norm("attn_pool.norm", dim)
        shapes |= linear("attn_pool.mlp.fc1", tower.mlp_dim, dim) | linear("attn_pool.mlp.fc2", dim, tower.mlp_dim)
    return {prefix + key: shape for key, shape in shapes.items()}


def decoder_shapes(prefix: str, text: DecoderText, *, biased: Collection[str] = ()) -> Shapes:
    """Embedding, layers and final norm of a Llama-like decoder, as transformers names them.

    Args:
        prefix: of every name, for instance `language_model.model.`.
        text: the decoder's configuration with all sizes filled in.
        biased: which of `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj` have a bias.
    """
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    queries = text["num_attention_heads"] * text["head_dim"]
    keys = text["num_key_value_heads"] * text["head_dim"]
    projections = {
        "self_attn": {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        | {"o_proj": (hidden, queries)},
        "mlp": {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)},
    }
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (text["vocab_size"], hidden), f"{prefix}norm.weight": (hidden,)}
    for layer in range(text["num_hidden_layers"]):
        name = f"{prefix}layers.{layer}"
        for part, linears in projections.items():
            for projection, (rows, columns) in linears.items():
                shapes |= linear(f"{name}.{part}.{projection}", rows, columns, projection in biased)
        shapes[f"{name}.input_layernorm.weight"] = (hidden,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (hidden,)
    return shapes


def with_modules(shapes: Shapes, modules: Mapping[str, Shapes]) -> Shapes:
    """`shapes`, and behind them the tensors of the modules that have files of their own, under the policy's names."""
    return shapes | {f"{module}.{key}": shape for module, tensors in modules.items() for key, shape in tensors.items()}


def policy_layers(
    depths: tuple[int, int, int],
    towers: tuple[str, str],
    language: str,
    *,
    tower_block: str = r"blocks\.{}\..+",
    head: str | None = None,
    new: Iterable[str] = (),
) -> list[StackLayer]:
    """The layers of a policy in forward order (MAPS, section 3).

    What comes before a module's first block belongs to that block, what comes after its last block to the last: the
    embedding, which may also be the output head, belongs to the first language layer. New modules are learned for the
    task at hand and have no pretrained weights to stay near, also where a checkpoint brings them along. Adapters belong
    to the layer that they adapt.

    Args:
        depths: blocks of DINOv2, SigLIP and the language model.
        towers: regular expressions that all parameter names of DINOv2 and of SigLIP begin with.
        language: of the language model.
        tower_block: of the rest of a tower block's names, with `{}` for the block's number.
        head: of the rest of an output head's names, where it has weights of its own.
        new: names of the modules without pretrained weights.
    """
    layers = tower_layers("dinov2", towers[0], depths[0], tower_block)
    layers += tower_layers("siglip", towers[1], depths[1], tower_block)
    layers.append(StackLayer("projector", ("projector",), r"projector\..+"))
    layers += block_layers(
        "language",
        language,
        depths[2],
        r"model\.layers\.{}\..+",
        first=r"model\.embed_tokens\..+",
        last=r"model\.norm\..+",
        head=head,
        halves=True,
    )
    return layers + [StackLayer(name, (name,), rf"{name}\..+", False) for name in new]


def tower_layers(module: str, prefix: str, depth: int, block: str = r"blocks\.{}\..+") -> list[StackLayer]:
    """The blocks of a vision tower whose parameter names match `prefix` and then timm's names."""
    first, last = r"patch_embed\..+|pos_embed|cls_token|reg_token", r"norm\..+|attn_pool\..+"
    return block_layers(module, prefix, depth, block, first=first, last=last)


def block_layers(
    module: str,
    prefix: str,
    depth: int,
    block: str,
    *,
    first: str,
    last: str,
    halves: bool = False,
    head: str | None = None,
) -> list[StackLayer]:
    """One layer for each block.

    Args:
        module: name of the module; layers are `module.0`, `module.1`, ...
        prefix: regular expression that every parameter name of the module begins with.
        depth: number of blocks.
        block: regular expression of the rest of a block's names, with `{}` for the block's number.
        first: of what comes before the first block and belongs to it.
        last: of what comes after the last block and belongs to it.
        halves: of a language model: also name each half of it, `module_early` (one block more where the number is odd)
            and `module_late`, and the groups by which the authors of MAPS freeze: `module_all_but_last`, all blocks but
            the last; `module_last`, the last block with `first` and `head`; `module_norm`, which is `last`.
        head: of an output head, which belongs to the last block.
    """
    layers = []
    for index in range(depth):
        own = block.format(index)
        before = [first] if index == 0 else []
        after = [last, *([head] if head else [])] if index == depth - 1 else []
        modules: tuple[str, ...] = (module,)
        groups: list[tuple[str, list[str]]] = []
        if halves:
            modules += (f"{module}_early" if index < (depth + 1) // 2 else f"{module}_late",)
            of_last = [*before, *([own, *after[1:]] if index == depth - 1 else [])]
            groups = [
                (f"{module}_all_but_last", [own] if index < depth - 1 else []),
                (f"{module}_last", of_last),
                (f"{module}_norm", after[:1]),
            ]
        layers.append(
            StackLayer(
                f"{module}.{index}",
                modules,
                f"{prefix}({'|'.join([own, *before, *after])})",
                groups=tuple((name, f"{prefix}({'|'.join(owned)})") for name, owned in groups if owned),
            )
        )
    return layers
