"""One source of a run's data: opened, indexed, split, with statistics of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np

from maps_ray.data.cache import FileCache, cache_folder
from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.formats import KINDS, Dataset, Kind, open_dataset
from maps_ray.data.index import Index, Report, Vectors
from maps_ray.data.samples import Samples
from maps_ray.data.splits import select_all
from maps_ray.data.statistics import DatasetStatistics, action_mask, compute, gripper_from_libero
from maps_ray.models.hub import HubError, local_copy
from maps_ray.spec import DataSpec, SplitsSpec


def open_source(spec: DataSpec, number: int, report: Report | None = None, patient: bool = True) -> Source:
    """Opens a source of a spec and splits it; reads numbers and texts where the index lacks them, and no frame.

    Args:
        spec: `data` of a run spec.
        number: place among its sources.
        report: told of progress.
        patient: as of `Index`.

    Raises:
        DatasetError: the data cannot be read; or `NotIndexed`.
        SpecError: a split is empty, or two overlap.
    """
    return Source(spec, number, Index(cache_folder(spec.cache), report, patient))


class Source:
    """See `open_source`.

    Attributes:
        name: key of its statistics.
        splits: split -> (stored split, episodes of it).
    """

    def __init__(self, spec: DataSpec, number: int, index: Index) -> None:
        self.spec, self.own, self._number = spec, spec.resolved()[number], number
        self.name, self.weight, self.field = self.own.key, self.own.weight, spec.field(number)
        self.index = index
        self._datasets: dict[str, Dataset] = {}
        self._vectors: dict[tuple[str, Sequence[Kind]], Vectors] = {}
        self.splits = select_all(self.stored, self.own.splits or SplitsSpec(), f"{self.field}.splits")

    def stored(self, split: str) -> Dataset:
        """The data set, opened at a stored split."""
        if split not in self._datasets:
            self._datasets[split] = open_stored(self.spec, self._number, split, self.index)
        return self._datasets[split]

    @property
    def dataset(self) -> Dataset:
        """The data set, opened at the stored split that train is taken from."""
        return self.stored(self.splits["train"][0])

    @property
    def gripper(self) -> str:
        """The convention that holds: a transform has its own."""
        return self.spec.gripper if self.dataset.transform is None else "none"

    def convert(self) -> Callable[[np.ndarray], np.ndarray]:
        """What the gripper convention makes of actions (..., A)."""
        return gripper_from_libero if self.gripper == "libero" else _as_they_are

    def mask(self) -> np.ndarray:
        """bool (A,): action dimensions that are normalised."""
        width = self.dataset.width("action")
        transform = self.dataset.transform
        return transform.action_mask(width) if transform else action_mask(width, self.spec.gripper)

    def cameras(self) -> list[str | None]:
        """`data.cameras` as this data set stores them; None for a view that it lacks."""
        return [self.camera(name) for name in self.spec.cameras]

    def camera(self, name: str) -> str | None:
        """The stored camera that a camera of the spec means, None for a view that the data set lacks.

        Raises:
            DatasetError: no such camera; names those there are.
        """
        asked = self.own.cameras.get(name, name)
        if asked is None or (name not in self.own.cameras and self.dataset.lacks(asked)):
            return None
        return self.dataset.camera_key(asked)

    def vectors(self, split: str, use_proprio: bool) -> Vectors:
        """Actions, and states where the policy reads them, of a stored split."""
        kinds = tuple(KINDS[: 1 + use_proprio])
        if (split, kinds) not in self._vectors:
            self._vectors[split, kinds] = self.index.vectors(self.stored(split), kinds)
        return self._vectors[split, kinds]

    def fault(self, use_proprio: bool) -> str | None:
        """Names the first NaN or infinity of the episodes that are used, if only for the statistics; None when there is
        none."""
        for stored, episodes in (*self.splits.values(), *self._counted()):
            for kind in KINDS[: 1 + use_proprio]:
                broken = self.vectors(stored, use_proprio).fault(kind, episodes)
                if broken is not None:
                    return self.stored(stored).finite_fault(kind, [broken])
        return None

    def statistics(self, use_proprio: bool) -> DatasetStatistics:
        """Over all steps of the train split, those of episodes without a sentence or shorter than a chunk too; and over
        the same selection of what the data set stores as other splits, as the published pipeline has it."""
        selections = self._counted()
        told = [[stored, episodes] for stored, episodes in selections]
        key = hashlib.sha256(json.dumps([told, self.gripper, self.mask().tolist(), use_proprio]).encode())
        first = self.vectors(selections[0][0], use_proprio)
        path = first.folder / f"statistics-{key.hexdigest()[:16]}.json"
        raw = self.index.kept(path, lambda: self._compute(selections, use_proprio).to_dict())
        return DatasetStatistics.from_dict(raw, str(path))

    def steps(self) -> int:
        """Steps that count for the weight of the source in a mixture: those of the statistics."""
        return sum(self.stored(split).episodes[i].length for split, episodes in self._counted() for i in episodes)

    def samples(self, split: str, statistics: DatasetStatistics) -> Samples:
        """The samples of a split; frames are read when asked for.

        Raises:
            DatasetError: no episode gives a sample.
        """
        stored, episodes = self.splits[split]
        return Samples(
            self.stored(stored),
            self.vectors(stored, statistics.proprio is not None),
            episodes,
            cameras=self.cameras(),
            chunk=self.spec.chunk,
            normalization=self.spec.normalization,
            statistics=statistics,
            convert=self.convert(),
        )

    def _counted(self) -> list[tuple[str, list[int]]]:
        """(stored split, episodes) that the statistics are of."""
        stored, episodes = self.splits["train"]
        counted = [(stored, episodes)]
        chosen = (self.own.splits or SplitsSpec()).train
        if chosen.tasks == ["*"] and not chosen.exclude_tasks and chosen.episodes == ":":
            # `make_dataset_from_rlds` of openvla-oft takes statistics over split "all", whatever is trained on.
            for other in self.dataset.stored_splits():
                if other == stored:
                    continue
                try:
                    dataset = self.stored(other)
                except DatasetError as error:
                    raise DatasetError(
                        f"{error}; the statistics are of {other} too, as published, unless splits.train.episodes is 0:"
                    ) from None
                counted.append((other, list(range(len(dataset.episodes)))))
        return counted

    def _compute(self, selections: Sequence[tuple[str, list[int]]], use_proprio: bool) -> DatasetStatistics:
        def rows(kind: Kind) -> np.ndarray:
            parts = [self.vectors(stored, use_proprio).select(kind, episodes) for stored, episodes in selections]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        trajectories = sum(len(episodes) for _, episodes in selections)
        actions = self.convert()(rows("action"))
        return compute(actions, rows("state") if use_proprio else None, self.mask(), trajectories)


def open_stored(spec: DataSpec, number: int, split: str = "train", index: Index | None = None) -> Dataset:
    """Opens the data set of a source at a stored split.

    Raises:
        DatasetError: it cannot be read.
    """
    own, folder = spec.resolved()[number], cache_folder(spec.cache)
    try:
        path = local_copy(own.path)
    except HubError as error:
        raise DatasetError(str(error)) from None
    room = int(spec.cache.max_gib * 2**30)
    return open_dataset(
        path,
        split=split,
        transform=own.transform,
        action=own.action,
        state=own.state,
        fetch=FileCache(folder, room) if room else None,
        scan=(index or Index(folder)).scan,
    )


def _as_they_are(actions: np.ndarray) -> np.ndarray:
    return actions
