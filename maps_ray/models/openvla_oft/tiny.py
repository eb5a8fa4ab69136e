"""The tiny OpenVLA-OFT: the same architecture at a few million parameters, with a tokenizer of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

TOKENIZER_SIZE = 896
"""Ids of the tokenizer, the last `ACTION_BINS` of them action tokens. The padding token has the next id."""
ACTION_BINS = 256
IMAGE_SIZE = 112

_WIDTH, _HEADS = 128, 4
_PADDED_BY = 64

# Means and standard deviations that the published processor carries: ImageNet's rounded to bfloat16, and 0.5.
IMAGE_STATISTICS = (
    ((0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)),
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
)

_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;?!'\"-_()<>[]{}/\\|&%$#@+=*^~`\n"

# Words of household manipulation, with those of LIBERO's sentences and object names.
_COMMON_WORDS = """
    a about above across action add again akita all alphabet an and any apple are arm at away back bag banana basin
    basket bbq be before behind below beside between big black blue book both bottle bottom bowl box bread brown
    butter by cabinet caddy can carefully carrot carry center cheese chefmate cherries chocolate close cloth coffee
    compartment cookie cookies corn corner counter cream cup cut dark desk dish do does door down drag drainer
    drawer dressing drop each edge egg eggplant eight empty far faucet first five flip floor fold for fork four fridge
    from front fruit fry frying frypan full get give go grab grasp gray green grip gripper half hand handle hang has
    have heat hold hot how in inside into is it item juice ketchup kettle knife large layer left let lid lift light
    line long lower macaroni make many mayo me metal microwave middle milk moka move mug near nearest new next nine
    no not nothing now object of off on one onto open or orange out over pan paper pepper pick picture piece pink
    place plastic plate please popcorn porcelain pot pots pour press pudding pull purple push put rack raise ramekin
    reach red release remove rest rice right rim robot room rotate round salad sauce second see set seven shelf
    short should side silver sink six slide sliding small so soup spoon square stack stick stove straight sweep
    switch table take tap target task ten than that the them then there these thing this three tin to together
    tomato top toward towards towel tower tray turn two under unfold up upper upright upside use vegetable view wall
    what where which while white window wine wipe with wood wooden wrist yellow yes you your zero zone
"""


def tiny_config() -> dict[str, object]:
    """The `config.json` of the tiny model, in OpenVLA's format with the towers' sizes in `vision_kwargs`."""
    tower = {"patch_size": 14, "embed_dim": _WIDTH, "depth": 4, "num_heads": _HEADS}
    return {
        "architectures": ["OpenVLAForActionPrediction"],
        "arch_specifier": "no-align+fused-gelu-mlp",
        "model_type": "openvla",
        "vision_backbone_id": "dinosiglip-tiny-112px",
        "llm_backbone_id": "llama-tiny-pure",
        "timm_model_ids": ["vit_tiny_patch14_reg4_dinov2", "vit_tiny_patch14_siglip"],
        "timm_override_act_layers": [None, None],
        "use_fused_vision_backbone": True,
        "image_resize_strategy": "resize-naive",
        "image_sizes": [IMAGE_SIZE, IMAGE_SIZE],
        "vision_kwargs": {
            "img_size": IMAGE_SIZE,
            "num_classes": 0,
            "featurizer": {**tower, "no_embed_class": True, "reg_tokens": 4, "init_values": 1.0},
            "fused_featurizer": {**tower, "class_token": False, "global_pool": "map"},
        },
        "llm_max_length": 512,
        "n_action_bins": ACTION_BINS,
        "output_projector_states": False,
        "pad_to_multiple_of": _PADDED_BY,
        "pad_token_id": TOKENIZER_SIZE,
        "text_config": {
            "model_type": "llama",
            "hidden_size": _WIDTH,
            "intermediate_size": 344,
            "num_hidden_layers": 5,
            "num_attention_heads": _HEADS,
            "num_key_value_heads": _HEADS,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            # Llama's 0.02 suits a width of 4096; at a width of 128 layers would start close to the identity.
            "initializer_range": 0.05,
            "pad_token_id": TOKENIZER_SIZE,
            "vocab_size": TOKENIZER_SIZE + _PADDED_BY,
        },
        "torch_dtype": "bfloat16",
    }


def tiny_preprocessor_config() -> dict[str, object]:
    """The `preprocessor_config.json` of the tiny model, in OpenVLA's format."""
    size = [IMAGE_SIZE, IMAGE_SIZE]
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "use_fused_vision_backbone": True,
        "input_sizes": [[3, *size]] * 2,
        "interpolations": ["bicubic"] * 2,
        "means": [list(mean) for mean, _ in IMAGE_STATISTICS],
        "stds": [list(std) for _, std in IMAGE_STATISTICS],
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
        "tvf_crop_params": [{"output_size": size}] * 2,
        "tvf_normalize_params": [
            {"inplace": False, "mean": list(mean), "std": list(std)} for mean, std in IMAGE_STATISTICS
        ],
        "tvf_resize_params": [{"antialias": True, "interpolation": 3, "max_size": None, "size": size}] * 2,
    }


def build_tokenizer(sentences: Iterable[str]) -> Tokenizer:
    """A tokenizer of whole words in lower case, with letters and bytes for everything else.

    Layout as in Llama-2's: `<unk>` 0, `<s>` 1 (put before every text), `</s>` 2, bytes 3..258, then words; the last
    256 ids are action tokens, and `<PAD>` follows them.

    Args:
        sentences: their words become tokens, beside a list of common words.

    Raises:
        ValueError: the sentences have more words than the tokenizer has ids.
    """
    controls = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    actions = [f"<action_{number:03d}>" for number in range(ACTION_BINS)]
    characters = ["▁", *_CHARACTERS]
    room = TOKENIZER_SIZE - len(controls) - len(bytes_) - len(characters) - len(actions)
    given = {word for text in sentences for word in re.findall(r"[a-z']+", text.lower())}
    # A word is one token after a space, and `out` also at the start of a prompt's second line.
    words = ["out", *(f"▁{word}" for word in sorted(given.union(_COMMON_WORDS.split())))]
    if len(words) > room:
        raise ValueError(f"the sentences bring the tokenizer to {len(words)} words; it has room for {room}")
    words += [f"<unused_{number:03d}>" for number in range(room - len(words))]
    # Scores are log probabilities: one word beats its letters; names of controls, bytes and actions never match text.
    never = -1e5
    pieces = [(token, never) for token in controls + bytes_]
    pieces += [(character, -20.0) for character in characters]
    pieces += [(word, never if word.startswith("<") else -5.0) for word in words]
    pieces += [(action, never) for action in actions]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<PAD>"])
    return tokenizer
