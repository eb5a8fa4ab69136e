"""From `data` of a run spec to the samples of each split."""

from __future__ import annotations

from collections.abc import Iterable

from maps_ray.data.errors import DatasetError
from maps_ray.data.formats import KINDS, Dataset, Kind, open_dataset
from maps_ray.data.normalize import action_mask, gripper_from_libero
from maps_ray.data.samples import Samples
from maps_ray.data.splits import select_all
from maps_ray.data.statistics import DatasetStatistics, compute
from maps_ray.spec import DataSpec, Problem, SpecError


class Demonstrations:
    """The data of one run: opened, split, with the statistics of its train split.

    Args:
        spec: `data` of the run spec.
        use_proprio: whether the policy sees `observation.state`.
        statistics: those to normalise by, for instance of a checkpoint; of the train split by default.

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
    ) -> None:
        self.spec = spec
        self.dataset = open_dataset(spec.path)
        self.splits = select_all(self.dataset, spec.splits)
        """Split name (`train`, and `held_out`, `ood` where given) -> episode indices."""
        for feature in KINDS[: 1 + use_proprio]:
            fault = self.dataset.finite_fault(feature, _union(self.splits.values()))
            if fault:
                raise DatasetError(fault)
        self.statistics = statistics or self._train_statistics(use_proprio)

    def samples(self, split: str) -> Samples:
        """The samples of a split; frames are read when asked for."""
        return Samples(self.dataset, self.splits[split], self.spec, self.statistics)

    def _train_statistics(self, use_proprio: bool) -> DatasetStatistics:
        train = self.splits["train"]
        actions = [self.dataset.vectors("action", index) for index in train]
        if self.spec.gripper == "libero":
            actions = [gripper_from_libero(episode) for episode in actions]
        proprio = [self.dataset.vectors("state", index) for index in train] if use_proprio else None
        return compute(actions, proprio, action_mask(self.dataset.width("action"), self.spec.gripper))


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
        dataset = open_dataset(spec.path)
    except DatasetError as error:
        return [Problem("data.path", str(spec.path), str(error))]
    problems: list[Problem] = []
    cameras = []
    for name in spec.cameras:
        try:
            cameras.append(dataset.camera_key(name))
        except DatasetError as error:
            problems.append(Problem("data.cameras", name, str(error)))
    features: list[Kind] = []
    for feature, expected in list(zip(KINDS, (action_dim, proprio_dim), strict=True))[: 1 + use_proprio]:
        try:
            width = dataset.width(feature)
        except DatasetError as error:
            problems.append(Problem("data.path", str(spec.path), str(error)))
            continue
        if expected not in (None, width):
            name = dataset.feature(feature)
            message = f"{name} has {width} dimensions, the policy has {expected}; train a matching checkpoint"
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
    faults += [dataset.frame_fault(camera, used) for camera in cameras]
    if "action" in features and not any(faults) and spec.gripper == "libero":
        lowest = min(float(dataset.vectors("action", index)[:, -1].min()) for index in used)
        if lowest >= 0:
            message = f"the last action dimension never goes below {lowest:g}, LIBERO's is -1 when open; use 'none'"
            problems.append(Problem("data.gripper", spec.gripper, message))
    return problems + [Problem("data.path", str(spec.path), fault) for fault in faults if fault]


def _vector_fault(dataset: Dataset, feature: Kind, episodes: list[int]) -> str | None:
    try:
        return dataset.finite_fault(feature, episodes)
    except DatasetError as error:
        return str(error)


def _union(splits: Iterable[list[int]]) -> list[int]:
    return sorted({index for episodes in splits for index in episodes})
