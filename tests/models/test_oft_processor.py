"""Prompts, action tokens, pixels and batches are those of the published processor."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from maps_ray.models import CheckpointError, load_processor
from maps_ray.models.images import ImageTransform
from maps_ray.models.openvla_oft.tokens import ActionTokenizer, PromptTokenizer


@pytest.mark.parametrize("name", ["square56", "wide", "big"])
def test_pixels_of_the_published_processor(oft_fixtures: Path, name: str) -> None:
    raw = json.loads((oft_fixtures / "checkpoint/preprocessor_config.json").read_text())
    stored = np.load(oft_fixtures / "preprocess.npz")
    pixels = ImageTransform.from_config(raw)(stored[f"image_{name}"])
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, stored[f"pixel_values_{name}"], rtol=0, atol=1e-6)


def test_action_tokens_of_the_published_tokenizer(oft_fixtures: Path) -> None:
    stored = np.load(oft_fixtures / "action_tokenizer.npz")
    tokenizer = ActionTokenizer(32000)
    np.testing.assert_array_equal(tokenizer.encode(stored["values"]), stored["token_ids"])
    np.testing.assert_allclose(tokenizer.decode(stored["decode_ids"]), stored["decode_values"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("strips", [False, True])
def test_prompt_ids_of_the_published_tokenizer(oft_fixtures: Path, strips: bool) -> None:
    """With the pieces of one recorded prompt at Llama's ids; a tokenizer that drops the last space gets it back."""
    stored = json.loads((oft_fixtures / "llama2_tokenization.json").read_text())["prompts"]
    expected = stored["In: What action should the robot take to open the middle drawer of the cabinet?\nOut: "]
    pieces = "<s> ▁In : ▁What ▁action ▁should ▁the ▁robot ▁take ▁to ▁open ▁the ▁middle ▁draw er ▁of ▁the ▁cabinet ?"
    vocabulary = [(f"<{id_}>", -100.0) for id_ in range(32000)]
    for piece, id_ in zip([*pieces.split(), "\n", "Out", ":", "▁"], expected, strict=True):
        vocabulary[id_] = (piece, -1.0)
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    if strips:
        tokenizer.normalizer = normalizers.Strip(left=False, right=True)
    assert list(PromptTokenizer(tokenizer, bos=1).encode("open the MIDDLE drawer of the Cabinet")) == expected


def test_batch_of_the_published_collator(oft_fixtures: Path, oft_checkpoint: Path, tmp_path: Path) -> None:
    """Ids, labels, masks and pixels of two samples with different prompts, given the recorded prompt ids."""
    stored = np.load(oft_fixtures / "case_img2_proprio_pad2.npz")
    folder = shutil.copytree(oft_checkpoint, tmp_path / "checkpoint")
    words = {"<unk>": 0} | {f"<{id_}>": id_ for id_ in range(1, 32000)}
    Tokenizer(models.WordLevel(words, "<unk>")).save(str(folder / "tokenizer.json"))
    processor = load_processor(folder)
    prompts = {
        str(instruction): tuple(ids[labels == -100][: np.argmax(labels != -100)].tolist())
        for instruction, ids, labels in zip(
            stored["in_instructions"], stored["in_input_ids"], stored["in_labels"], strict=True
        )
    }
    object.__setattr__(processor.prompts, "encode", prompts.__getitem__)
    batch = processor.collate(
        [
            processor.encode(str(instruction), list(images), proprio, actions)
            for instruction, images, proprio, actions in zip(
                stored["in_instructions"], stored["in_images"], stored["in_proprio"], stored["in_actions"], strict=True
            )
        ]
    )
    for name in ("input_ids", "labels", "attention_mask", "proprio", "actions"):
        assert batch[name].numpy().dtype == stored[f"in_{name}"].dtype
        np.testing.assert_array_equal(batch[name].numpy(), stored[f"in_{name}"], err_msg=name)
    assert batch["pixel_values"].shape == (2, 12, 56, 56)


def test_prompt_of_another_tokenizer(small_checkpoint: Path) -> None:
    processor = load_processor(small_checkpoint)
    image = np.zeros((28, 28, 3), np.uint8)
    sample = processor.encode("Pick UP", [image], np.zeros(8), np.ones((8, 7)))
    prompt = len(processor.prompts.encode("pick up"))
    # BOS and the words; no word boundary is appended to a prompt of a tokenizer other than Llama's.
    assert sample["input_ids"][:14].tolist() == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 18, 19]
    assert sample["input_ids"][prompt - 2 : prompt].tolist() == [19, 4]
    assert sample["input_ids"][-1] == 2
    assert sample["input_ids"][prompt:-1].tolist() == [64 - 16] * 56
    assert sample["labels"][:prompt].tolist() == [-100] * prompt
    assert sample["labels"][prompt:].tolist() == sample["input_ids"][prompt:].tolist()
    assert len(sample["labels"]) == prompt + 57


def test_inference_has_slots_but_no_actions(small_checkpoint: Path) -> None:
    processor = load_processor(small_checkpoint, chunk=2, action_dim=3)
    batch = processor.collate([processor.encode("pick up", [np.zeros((28, 28, 3), np.uint8)])])
    assert batch.keys() == {"pixel_values", "input_ids", "labels", "attention_mask"}
    assert int((batch["labels"] > 64 - 16 - 1).sum()) == 6


def test_processor_is_picklable(small_checkpoint: Path) -> None:
    processor = load_processor(small_checkpoint)
    copy = pickle.loads(pickle.dumps(processor))
    image = np.full((40, 30, 3), 7, np.uint8)
    samples = [p.encode("place the cup", [image], np.zeros(8), np.zeros((8, 7))) for p in (processor, copy)]
    assert all(np.array_equal(samples[0][key], samples[1][key]) for key in samples[0])
    assert torch.equal(processor.collate(samples)["pixel_values"][0], processor.collate(samples)["pixel_values"][1])


def test_samples_that_do_not_fit(small_checkpoint: Path) -> None:
    processor = load_processor(small_checkpoint)
    image = np.zeros((28, 28, 3), np.uint8)
    with pytest.raises(ValueError, match=r"actions have shape \[4, 7\], expected \[8, 7\]"):
        processor.encode("pick", [image], None, np.zeros((4, 7)))
    with pytest.raises(ValueError, match=r"must be \(H, W, 3\) uint8"):
        processor.encode("pick", [image.astype(np.float32)])
    with pytest.raises(ValueError, match="1 of 2 samples have actions"):
        processor.collate(
            [processor.encode("pick", [image]), processor.encode("pick", [image], None, np.zeros((8, 7)))]
        )
    with pytest.raises(ValueError, match="empty list"):
        processor.collate([])


@pytest.mark.parametrize("size", [30, 69])
def test_tokenizer_of_another_model(small_checkpoint: Path, tmp_path: Path, size: int) -> None:
    folder = shutil.copytree(small_checkpoint, tmp_path / "checkpoint")
    words = {"<unk>": 0} | {f"<{id_}>": id_ for id_ in range(1, size)}
    Tokenizer(models.WordLevel(words, "<unk>")).save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=rf"has {size} ids: the model's action tokens are 48 to 63, .* 68 rows"):
        load_processor(folder)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("preprocessor_config.json", {"image_resize_strategy": "letterbox"}, "must be 'resize-naive'"),
        ("preprocessor_config.json", {"interpolations": ["bicubic", "nearest"]}, "different images"),
        ("preprocessor_config.json", {"interpolations": ["magic", "magic"]}, "unknown interpolation 'magic'"),
        ("preprocessor_config.json", {"means": [[0.5] * 3]}, "missing or malformed field"),
        ("preprocessor_config.json", {"input_sizes": [[3, 56, 56]] * 2}, "the towers take 28 x 28"),
        ("config.json", {"pad_token_id": "none"}, "pad_token_id = 'none'"),
        ("tokenizer.json", None, r"tokenizer\.json is missing"),
        ("tokenizer.json", {"version": "0"}, r"cannot read .*tokenizer\.json"),
    ],
)
def test_folder_that_makes_no_processor(
    small_checkpoint: Path, tmp_path: Path, file: str, changes: dict[str, Any] | None, message: str
) -> None:
    folder = shutil.copytree(small_checkpoint, tmp_path / "checkpoint")
    if changes is None:
        (folder / file).unlink()
    else:
        raw = json.loads((folder / file).read_text()) if file != "tokenizer.json" else {}
        (folder / file).write_text(json.dumps({**raw, **changes}))
    with pytest.raises(CheckpointError, match=message):
        load_processor(folder)
