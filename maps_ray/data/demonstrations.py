"""From `data` of a run spec to the samples of each split."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from maps_ray.data import layout
from maps_ray.data.errors import DatasetError
from maps_ray.data.frames import FrameStore
from maps_ray.data.lerobot import LeRobotDataset
from maps_ray.data.normalize import action_mask, gripper_from_libero
from maps_ray.data.samples import Samples
from maps_ray.data.splits import select_all
from maps_ray.data.statistics import DatasetStatistics, compute
from maps_ray.data.video import probe
from maps_ray.spec import DataSpec, Problem, SpecError


class Demonstrations:
    """The data of one run: opened, split, with the statistics of its train split.

    Args:
        spec: `data` of the run spec.
        use_proprio: whether the policy sees `observation.state`.
        statistics: those to normalise by, for instance of a checkpoint; of the train split by default.
        cache: folder of decoded frames; `maps_ray.data.frames.cache_folder()` by default.

    Raises:
        SpecError: a split is empty, or two overlap.
        DatasetError: the data cannot be read, or holds NaN.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        use_proprio: bool,
        statistics: DatasetStatistics | None = None,
        cache: Path | None = None,
    ) -> None:
        self.spec = spec
        self.dataset = LeRobotDataset.open(spec.path)
        self.splits = select_all(self.dataset, spec.splits)
        """Split name (`train`, and `held_out`, `ood` where given) -> episode indices."""
        self._cache = cache
        for feature in [layout.ACTION, layout.STATE][: 1 + use_proprio]:
            fault = self.dataset.finite_fault(feature, _union(self.splits.values()))
            if fault:
                raise DatasetError(fault)
        self.statistics = statistics or self._train_statistics(use_proprio)

    def samples(self, split: str) -> Samples:
        """The samples of a split; decodes its videos where the cache lacks them."""
        episodes = self.splits[split]
        cameras = [self.dataset.camera_key(name) for name in self.spec.cameras]
        frames = FrameStore(self.dataset, cameras, episodes, self._cache)
        return Samples(self.dataset, episodes, self.spec, self.statistics, frames)

    def _train_statistics(self, use_proprio: bool) -> DatasetStatistics:
        train = self.splits["train"]
        actions = [self.dataset.vectors(layout.ACTION, index) for index in train]
        if self.spec.gripper == "libero":
            actions = [gripper_from_libero(episode) for episode in actions]
        proprio = [self.dataset.vectors(layout.STATE, index) for index in train] if use_proprio else None
        return compute(actions, proprio, action_mask(self.dataset.width(layout.ACTION), self.spec.gripper))


def check_data(
    spec: DataSpec, *, use_proprio: bool = True, action_dim: int | None = None, proprio_dim: int | None = None
) -> list[Problem]:
    """Everything wrong with the data that can be found without decoding a video; free of torch.

    Args:
        spec: `data` of the run spec.
        use_proprio: whether the policy sees `observation.state`.
        action_dim: dimensions that the policy's head gives; unchecked when None.
        proprio_dim: dimensions that its proprio projector takes; unchecked when None.

    Returns:
        Problems, each with its field; empty when the data can be trained on.
    """
    try:
        dataset = LeRobotDataset.open(spec.path)
    except DatasetError as error:
        return [Problem("data.path", str(spec.path), str(error))]
    problems: list[Problem] = []
    cameras = []
    for name in spec.cameras:
        try:
            cameras.append(dataset.camera_key(name))
        except DatasetError as error:
            problems.append(Problem("data.cameras", name, str(error)))
    features = []
    for feature, expected in [(layout.ACTION, action_dim), (layout.STATE, proprio_dim)][: 1 + use_proprio]:
        try:
            width = dataset.width(feature)
        except DatasetError as error:
            problems.append(Problem("data.path", str(spec.path), str(error)))
            continue
        if expected not in (None, width):
            message = f"{feature} has {width} dimensions, the policy has {expected}; train a matching checkpoint"
            problems.append(Problem("data.path", str(spec.path), message))
        features.append(feature)
    try:
        splits = select_all(dataset, spec.splits)
    except SpecError as error:
        return problems + error.problems
    for name, episodes in splits.items():
        longest = max(dataset.episodes[index].length for index in episodes)
        if longest < spec.chunk:
            message = f"data.splits.{name} has no episode of that many steps, its longest has {longest}"
            problems.append(Problem("data.chunk", spec.chunk, message))
    used = _union(splits.values())
    faults = [_vector_fault(dataset, feature, used) for feature in features]
    faults += [_video_fault(dataset, camera, used) for camera in cameras]
    if layout.ACTION in features and not any(faults) and spec.gripper == "libero":
        lowest = min(float(dataset.vectors(layout.ACTION, index)[:, -1].min()) for index in used)
        if lowest >= 0:
            message = f"the last action dimension never goes below {lowest:g}, LIBERO's is -1 when open; use 'none'"
            problems.append(Problem("data.gripper", spec.gripper, message))
    return problems + [Problem("data.path", str(spec.path), fault) for fault in faults if fault]


def _video_fault(dataset: LeRobotDataset, camera: str, episodes: list[int]) -> str | None:
    """Names the first video that is missing, unreadable, or shorter than its episodes need."""
    if dataset.features[camera]["dtype"] != "video":
        return None
    needed: dict[Path, tuple[int, int]] = {}
    for index in episodes:
        span = dataset.episodes[index].spans[camera]
        end = round(span.start * dataset.fps) + dataset.episodes[index].length
        needed[span.path] = max(needed.get(span.path, (0, 0)), (end, index))
    for path, (end, index) in needed.items():
        try:
            frames = probe(path).frames
        except DatasetError as error:
            return str(error)
        if frames < end:
            return f"{path}: has {frames} frames, episode {index} needs {end}; fetch or write it again"
    return None


def _vector_fault(dataset: LeRobotDataset, feature: str, episodes: list[int]) -> str | None:
    try:
        return dataset.finite_fault(feature, episodes)
    except DatasetError as error:
        return str(error)


def _union(splits: Iterable[list[int]]) -> list[int]:
    return sorted({index for episodes in splits for index in episodes})
