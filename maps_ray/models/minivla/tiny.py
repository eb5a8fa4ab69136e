"""The tiny MiniVLA: the same architecture at under a million parameters, with random weights and a small tokenizer."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from maps_ray.files import write_json
from maps_ray.models.minivla.checkpoint import create_policy, save_policy
from maps_ray.models.minivla.config import ACTION_TOKENS, Kind, VQConfig
from maps_ray.models.minivla.folder import VQ_FOLDER
from maps_ray.models.minivla.tokens import END_OF_TEXT, END_OF_TURN, SYSTEM
from maps_ray.models.minivla.vq import ActionVQ, save_vq

IMAGE_SIZE = 56
TOKENIZER_SIZE = 768
"""Ids of the tokenizer, the last 256 of them action tokens."""

_SPECIAL = (END_OF_TEXT, "<|im_start|>", END_OF_TURN)
_CHARACTERS = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'\"-_()<>[]{}/\\|&%$#@+=*^~`\n"
_PROMPT_WORDS = f"system user assistant {SYSTEM} What action should the robot take to"


def tiny_config(kind: Kind) -> dict[str, object]:
    """The `config.json` of the tiny model."""
    tower = {"patch_size": 14, "embed_dim": 48, "depth": 3, "num_heads": 3}
    return {
        "model_type": f"minivla_{kind}",
        "img_size": IMAGE_SIZE,
        "dino_kwargs": {**tower, "no_embed_class": True, "reg_tokens": 4, "init_values": 1.0},
        "siglip_kwargs": {**tower, "class_token": False, "global_pool": "map"},
        "qwen_config": {
            "model_type": "qwen2",
            "vocab_size": TOKENIZER_SIZE + 32,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
            # Qwen's 0.02 suits a width of 896; at a width of 64 layers would start close to the identity.
            "initializer_range": 0.05,
        },
        "len_tokenizer": TOKENIZER_SIZE,
    }


def build_tokenizer(sentences: Iterable[str] = ()) -> Tokenizer:
    """A tokenizer of whole words, with letters for everything else, and Qwen's special tokens.

    Args:
        sentences: their words become tokens.

    Raises:
        ValueError: the sentences have more words than the tokenizer has ids.
    """
    words = {f"▁{word}" for text in (*sentences, _PROMPT_WORDS) for word in re.findall(r"[A-Za-z']+", text)}
    words |= {word.lower() for word in words}
    room = TOKENIZER_SIZE - ACTION_TOKENS - len(_SPECIAL) - len(_CHARACTERS) - 1
    if len(words) > room:
        raise ValueError(f"the sentences bring the tokenizer to {len(words)} words; it has room for {room}")
    # Scores are log probabilities: one word beats its letters; fillers never match text.
    pieces = [("<unk>", -1e5), *((character, -20.0) for character in _CHARACTERS)]
    pieces += [(word, -5.0) for word in sorted(words)]
    pieces += [(f"<unused_{number:03d}>", -1e5) for number in range(room - len(words))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([*_SPECIAL, *(f"<|extra_{number}|>" for number in range(ACTION_TOKENS))])
    return tokenizer


def write_tiny(
    out: Path, kind: Kind, sentences: Iterable[str] = (), *, chunk: int = 8, action_dim: int = 7, seed: int = 0
) -> None:
    """Writes a checkpoint folder of the tiny model with random bf16 weights, without head or proprio projector.

    Args:
        out: new folder.
        kind: `vq` also gets an untrained VQ tokenizer.
        sentences: instructions of the data, for the tokenizer.
        chunk, action_dim: of the data.
        seed: of the weights.

    Raises:
        CheckpointError: `out` exists and is not empty.
        ValueError: the sentences have too many words.
    """
    policy = create_policy(tiny_config(kind), chunk=chunk, action_dim=action_dim, seed=seed)
    state = {name: tensor for name, tensor in policy.state_dict().items() if not name.startswith("action_head.")}
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        write_json(base / "config.json", tiny_config(kind))
        build_tokenizer(sentences).save(str(base / "tokenizer.json"))
        if kind == "vq":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                vq = ActionVQ(VQConfig(chunk, action_dim, n_latent_dims=32, vqvae_n_embed=64))
            save_vq(vq, base / VQ_FOLDER)
        save_policy(state, base, out, kind=kind, dtype=torch.bfloat16)
