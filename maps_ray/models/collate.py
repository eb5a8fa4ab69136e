"""Samples of a processor -> one batch, padded on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100
"""Label of a position that no loss looks at."""

Sample = dict[str, NDArray[np.generic]]


def make_sample(
    prompt: Sequence[int],
    answer: NDArray[np.int64],
    pixel_values: NDArray[np.float32],
    proprio: NDArray[np.floating] | None,
    actions: NDArray[np.floating] | None,
    labelled: int = 0,
) -> Sample:
    """One sample of a processor; its labels keep the answer.

    Args:
        prompt: ids.
        answer: ids behind it: action tokens and what ends the sequence.
        pixel_values: (6 * images, height, width).
        proprio, actions: normalised; left out where None.
        labelled: how many of the prompt's last ids the labels keep too.
    """
    ids = np.concatenate([np.asarray(prompt, np.int64), answer])
    labels = ids.copy()
    labels[: len(prompt) - labelled] = IGNORED
    sample: Sample = {"pixel_values": pixel_values, "input_ids": ids, "labels": labels}
    for name, values in (("proprio", proprio), ("actions", actions)):
        if values is not None:
            sample[name] = np.asarray(values, np.float32)
    return sample


def check_chunk(actions: NDArray[np.floating] | None, shape: tuple[int, int]) -> None:
    """Raises `ValueError` where the actions of a sample are no chunk of this shape."""
    if actions is not None and actions.shape != shape:
        raise ValueError(f"actions have shape {list(actions.shape)}, expected {list(shape)}")


def collate(
    samples: Sequence[Mapping[str, NDArray[np.generic]]], pad: int, *, by_length: bool = False
) -> dict[str, Tensor]:
    """Samples -> the keyword arguments of a policy's `forward`.

    Args:
        samples: `pixel_values`, `input_ids` and `labels` (L,), and perhaps `proprio` and `actions`.
        pad: id behind the end of shorter samples.
        by_length: mask what is behind a sample's end alone, also where the sample itself holds the id `pad`.

    Returns:
        the same stacked, and `attention_mask` (B, L) bool: False wherever `input_ids` is `pad`.

    Raises:
        ValueError: no samples, or samples of which only some have proprio or actions.
    """
    if not samples:
        raise ValueError("cannot collate an empty list of samples")
    length = max(len(sample["input_ids"]) for sample in samples)
    ids = np.full((len(samples), length), pad, np.int64)
    labels = np.full((len(samples), length), IGNORED, np.int64)
    for row, sample in enumerate(samples):
        size = len(sample["input_ids"])
        ids[row, :size] = sample["input_ids"]
        labels[row, :size] = sample["labels"]
    # By the id, as published collators do, also where a sequence itself ends with it: MiniVLA's does.
    attended = ids != pad
    if by_length:
        sizes = np.asarray([len(sample["input_ids"]) for sample in samples])
        attended = np.arange(length) < sizes[:, None]
    batch = {"input_ids": ids, "labels": labels, "attention_mask": attended}
    for key in ("pixel_values", "proprio", "actions"):
        having = [sample[key] for sample in samples if key in sample]
        if having and len(having) < len(samples):
            raise ValueError(f"{len(having)} of {len(samples)} samples have {key}: all or none must")
        if having:
            batch[key] = np.stack(having)
    return {key: torch.from_numpy(value) for key, value in batch.items()}
