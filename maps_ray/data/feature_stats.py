"""Per-feature statistics as LeRobot keeps them in `meta/stats.json` and `meta/episodes`: of all data, unsplit.

Training does not use them; it normalises by `maps_ray.data.statistics`, which sees the train split only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FeatureStats = dict[str, np.ndarray]
_IMAGES_SAMPLED = 32


def vector_stats(values: np.ndarray) -> FeatureStats:
    """min, max, mean, std over the steps of (T, D) or (T,) values, and their count; each of shape (D,) or (1,)."""
    rows = values.reshape(len(values), -1).astype(np.float64)
    return {
        "min": rows.min(0),
        "max": rows.max(0),
        "mean": rows.mean(0),
        "std": rows.std(0),
        "count": np.array([len(rows)]),
    }


def image_stats(images: np.ndarray) -> FeatureStats:
    """The same for uint8 (T, H, W, 3) frames scaled to 0..1, from evenly spaced frames; each of shape (3, 1, 1)."""
    count = min(len(images), _IMAGES_SAMPLED)
    chosen = images[np.linspace(0, len(images) - 1, count).round().astype(int)]
    stats = vector_stats(chosen.reshape(-1, 3) / 255.0)
    shaped = {kind: value.reshape(3, 1, 1) for kind, value in stats.items() if kind != "count"}
    return {**shaped, "count": np.array([count])}


def aggregate(episodes: Sequence[dict[str, FeatureStats]]) -> dict[str, FeatureStats]:
    """Statistics of all episodes from those of each: exact, by the law of total variance."""
    return {name: _aggregate([episode[name] for episode in episodes]) for name in episodes[0]}


def _aggregate(parts: Sequence[FeatureStats]) -> FeatureStats:
    mean, std = np.stack([part["mean"] for part in parts]), np.stack([part["std"] for part in parts])
    count = np.stack([part["count"] for part in parts]).astype(np.float64)
    weight = count.reshape(len(parts), *[1] * (mean.ndim - 1)) / count.sum()
    total = (weight * mean).sum(0)
    return {
        "min": np.min([part["min"] for part in parts], axis=0),
        "max": np.max([part["max"] for part in parts], axis=0),
        "mean": total,
        "std": np.sqrt((weight * (std**2 + (mean - total) ** 2)).sum(0)),
        "count": count.sum(0).astype(np.int64),
    }
