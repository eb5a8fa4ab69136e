"""What a data set holds, and what is odd about it: `maps-ray data inspect`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.formats import KINDS, Dataset, Episode, Kind, open_dataset
from maps_ray.data.transforms import resolve

Progress = Callable[[int, int], None]
_SHORT = 8
"""Steps of a usual chunk."""
_TASKS_SHOWN = 20


@dataclass(frozen=True)
class Camera:
    """One camera of a data set."""

    height: int
    width: int
    black_episodes: int
    """Whose first frame is black from edge to edge."""


@dataclass(frozen=True)
class VectorFacts:
    """Actions or states; lists have an entry for each dimension."""

    feature: str
    width: int
    min: list[float]
    max: list[float]
    mean: list[float]
    constant: list[int]
    """Dimensions that never change."""
    not_finite: int
    """Values that are NaN or infinite; left out of the ranges."""


@dataclass(frozen=True)
class Inspection:
    """See `inspect`."""

    path: str
    format: str
    splits: list[str]
    split: str
    transform: str | None
    episodes: int
    frames: int
    shortest: int
    longest: int
    fps: float | None
    bytes: int
    features: dict[str, int | None]
    cameras: dict[str, Camera]
    vectors: dict[str, VectorFacts]
    tasks: dict[str, int]
    """Sentence -> episodes that begin with it."""
    odd: list[str]
    """What to look at before training; empty when nothing is."""

    def to_dict(self) -> dict[str, object]:
        """As JSON values."""
        return asdict(self)


def inspect(
    path: str, split: str = "train", transform: str | None = None, progress: Progress = lambda done, total: None
) -> Inspection:
    """Looks through all vectors and texts of a data set, and at the first and last frame of each camera.

    Args:
        path: folder or address.
        split: as `open_dataset`.
        transform: as `open_dataset`.
        progress: called with episodes done and in all.

    Raises:
        DatasetError: it cannot be opened; what can be read around is told in `odd`.
    """
    dataset = open_dataset(path, split, transform)
    episodes, odd = dataset.episodes, []
    if not episodes:
        raise DatasetError(f"{path}: split {split} holds no episode")
    lengths = [episode.length for episode in episodes]
    vectors: dict[str, VectorFacts] = {}
    for kind in KINDS:
        try:
            feature = dataset.feature(kind)
        except DatasetError as error:
            odd.append(str(error))
            continue
        facts, faults = _vectors(dataset, kind, feature, progress)
        odd += faults
        if facts is not None:
            vectors[kind] = facts
            odd += _oddities(kind, facts)
    cameras: dict[str, Camera] = {}
    for name in dataset.cameras:
        fault = dataset.frame_fault(name, range(len(episodes)))
        try:
            first = dataset.frame(name, 0, 0) if lengths[0] else None
            dataset.frame(name, len(episodes) - 1, lengths[-1] - 1)
            black = sum(not dataset.frame(name, e.index, 0).any() for e in _some(episodes) if e.length)
        except (DatasetError, IndexError) as error:
            odd.append(fault or str(error))
            continue
        if fault:
            odd.append(fault)
        if first is not None:
            cameras[name] = Camera(first.shape[0], first.shape[1], black)
        if black:
            odd.append(f"{name}: black in {black} of {len(_some(episodes))} episodes that were looked at")
    tasks = {task: 0 for task in dataset.tasks}
    for episode in episodes:
        tasks[episode.task] += 1
    empty = tasks.get("", 0)
    if empty:
        odd.append(f"{empty} of {len(episodes)} episodes have no sentence; training leaves them out")
    short = sum(length < _SHORT for length in lengths)
    if short:
        odd.append(f"{short} of {len(episodes)} episodes have fewer than {_SHORT} steps, the usual data.chunk")
    if dataset.fps is None:
        odd.append("the format does not record the control rate (fps)")
    chosen = resolve(transform)
    return Inspection(
        path,
        dataset.format,
        dataset.stored_splits(),
        split,
        chosen.name if chosen else None,
        len(episodes),
        sum(lengths),
        min(lengths),
        max(lengths),
        dataset.fps,
        sum(dataset.storage.files().values()),
        dict(dataset.features()),
        cameras,
        vectors,
        tasks,
        list(dict.fromkeys(odd)),
    )


def lines(inspection: Inspection) -> list[str]:
    """For people."""
    rate = f"{inspection.fps:g} fps" if inspection.fps else "fps unknown"
    told = [
        f"{inspection.path}",
        f"  format      {inspection.format}, split {inspection.split} of {', '.join(inspection.splits)}"
        + (f", transform {inspection.transform}" if inspection.transform else ""),
        f"  episodes    {inspection.episodes} of {inspection.shortest} to {inspection.longest} steps, "
        f"{inspection.frames} frames, {rate}",
        f"  size        {inspection.bytes / 2**20:,.1f} MiB",
    ]
    told += [f"  camera      {name}: {camera.width} x {camera.height}" for name, camera in inspection.cameras.items()]
    told.append("  features    " + ", ".join(f"{name} ({width})" for name, width in inspection.features.items()))
    for kind, facts in inspection.vectors.items():
        told.append(f"  {kind:<11} {facts.feature} ({facts.width})")
        told += [
            f"    {i:>3}       {low:>10.4g} .. {high:<10.4g} mean {mean:.4g}"
            for i, (low, high, mean) in enumerate(zip(facts.min, facts.max, facts.mean, strict=True))
        ]
    told.append(f"  tasks       {len(inspection.tasks)}")
    told += [f"    {count:>5}     {task or '(none)'}" for task, count in list(inspection.tasks.items())[:_TASKS_SHOWN]]
    if len(inspection.tasks) > _TASKS_SHOWN:
        told.append(f"    ... and {len(inspection.tasks) - _TASKS_SHOWN} more (--json shows all)")
    return told + [f"  odd         {fault}" for fault in inspection.odd]


def _vectors(dataset: Dataset, kind: Kind, feature: str, progress: Progress) -> tuple[VectorFacts | None, list[str]]:
    low = high = None
    total, count, bad, faults = np.zeros(0), 0, 0, []
    for episode in dataset.episodes:
        progress(episode.index + 1, len(dataset.episodes))
        try:
            values = dataset.vectors(kind, episode.index).astype(np.float64)
        except DatasetError as error:
            faults.append(str(error))
            continue
        finite = np.isfinite(values)
        wrong = int((~finite).sum())
        if wrong and not bad:
            faults.append(dataset.finite_fault(kind, [episode.index]) or "")
        bad += wrong
        values = values[finite.all(axis=1)]
        if not len(values):
            continue
        if low is None or high is None:
            low, high, total = values.min(0), values.max(0), np.zeros(values.shape[1])
        low, high = np.minimum(low, values.min(0)), np.maximum(high, values.max(0))
        total, count = total + values.sum(0), count + len(values)
    if low is None or high is None:
        return None, faults[:5]
    constant = np.flatnonzero(low == high).tolist()
    mean = total / count
    facts = VectorFacts(feature, len(low), low.tolist(), high.tolist(), mean.tolist(), constant, bad)
    more = [f"{len(faults) - 5} more episodes with faults in {feature}"] if len(faults) > 5 else []
    return facts, faults[:5] + more


def _oddities(kind: str, facts: VectorFacts) -> list[str]:
    told = []
    if facts.not_finite:
        told.append(f"{facts.feature}: {facts.not_finite} values are NaN or infinite")
    for dimension in facts.constant:
        told.append(
            f"{facts.feature}: dimension {dimension} is always {facts.min[dimension]:g}: the policy sees and gives 0 "
            f"for it ({kind})"
        )
    return told


def _some(episodes: Sequence[Episode], most: int = 64) -> list[Episode]:
    """Evenly spaced episodes."""
    places = np.linspace(0, len(episodes) - 1, min(len(episodes), most)).round().astype(int)
    return [episodes[place] for place in places]
