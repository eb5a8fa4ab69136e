"""The published code's tiny MiniVLA, put together from its parts."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

FIXTURES = Path(__file__).parents[1] / "fixtures" / "minivla_tiny"
EMBEDDING = "llm_backbone|llm.model.embed_tokens.weight"
# How Qwen2.5 cuts the words of the prompts; its only word of two tokens is " Qwen".
PIECES = r"<\|\w+\|>| Q|wen| ?[A-Za-z]+|\n|[.,?]"


def read_json(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / name).read_text())


def read_npz(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(FIXTURES / name))


def backbone_weights() -> dict[str, torch.Tensor]:
    weights = load(lzma.decompress((FIXTURES / "backbone.safetensors.xz").read_bytes()))
    rows, ids = weights.pop("embed_rows"), weights.pop("embed_row_ids")
    weights[EMBEDDING] = torch.zeros(151936, 64, dtype=torch.bfloat16)
    weights[EMBEDDING][ids] = rows
    return weights


def write_vq(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text((FIXTURES / "vq_config.json").read_text())
    save_file(load(lzma.decompress((FIXTURES / "vq.safetensors.xz").read_bytes())), folder / "model.safetensors")


def prompt_tokenizer() -> Tokenizer:
    """The words of the fixture's prompts under the ids that Qwen2.5's tokenizer gives them, and all special tokens."""
    config = read_json("config.json")
    special = [*config["special"], *(f"<|extra_{number}|>" for number in range(256))]
    vocabulary = {f"<|extra_{number}|>": 151665 + number for number in range(256)} | config["special"]
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    for text, ids in zip(config["prompts"]["train"], config["prompts"]["ids_train"], strict=True):
        pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
        vocabulary |= dict(zip(pieces, ids, strict=True))
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "<unk>": 0}, "<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.add_special_tokens(list(dict.fromkeys(special)))
    return tokenizer


def write_checkpoint(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text((FIXTURES / "config.json").read_text())
    prompt_tokenizer().save(str(folder / "tokenizer.json"))
    save_file(backbone_weights(), folder / "model.safetensors")
    write_vq(folder / "vq")


def write_published(folder: Path, **changed: Any) -> Path:
    """The same as the published training code leaves it: a `.pt` with three dictionaries. Returns the file."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text((FIXTURES / "config.json").read_text())
    write_vq(folder / "vq")
    parts: dict[str, Any] = {}
    for key, tensor in backbone_weights().items():
        module, _, name = key.partition("|")
        parts.setdefault(module, {})[name] = tensor
    parts["llm_backbone"]["llm.lm_head.weight"] = parts["llm_backbone"]["llm.model.embed_tokens.weight"]
    for key, value in changed.items():
        parts["llm_backbone"][key.replace("__", ".")] = value
    file = folder / "checkpoints" / "step-000100-epoch-01-loss=0.5000.pt"
    torch.save({"model": parts}, file)
    return file
