"""Samples of a processor -> one batch, padded on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100
"""Label of a position that no loss looks at."""

Sample = dict[str, NDArray[Any]]


def collate(samples: Sequence[Mapping[str, NDArray[Any]]], pad: int) -> dict[str, Tensor]:
    """Samples -> the keyword arguments of a policy's `forward`.

    Args:
        samples: `pixel_values`, `input_ids` and `labels` (L,), and perhaps `proprio` and `actions`.
        pad: id behind the end of shorter samples.

    Returns:
        the same stacked, and `attention_mask` (B, L) bool: False wherever `input_ids` is `pad`. Published collators do
        so too, also where a sequence itself ends with that id, as MiniVLA's do.

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
    batch = {"input_ids": ids, "labels": labels, "attention_mask": ids != pad}
    for key in ("pixel_values", "proprio", "actions"):
        having = [sample[key] for sample in samples if key in sample]
        if having and len(having) < len(samples):
            raise ValueError(f"{len(having)} of {len(samples)} samples have {key}: all or none must")
        if having:
            batch[key] = np.stack(having)
    return {key: torch.from_numpy(value) for key, value in batch.items()}
