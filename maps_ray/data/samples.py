"""One training sample: what the policy sees at step t, and the actions of the next `chunk` steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maps_ray.data.errors import DatasetError
from maps_ray.data.formats import Dataset
from maps_ray.data.normalize import gripper_from_libero, normalize
from maps_ray.data.statistics import DatasetStatistics
from maps_ray.spec import DataSpec


@dataclass(frozen=True)
class Sample:
    """Inputs and target at one step of one episode."""

    images: list[np.ndarray]
    """Per camera uint8 (H, W, 3), RGB, at the stored resolution."""
    instruction: str
    proprio: np.ndarray | None
    """float32 (D,), normalised."""
    actions: np.ndarray
    """float32 (chunk, A), normalised."""
    episode: int
    step: int


class Samples:
    """All samples of some episodes, by index: episode by episode, the last chunk - 1 steps of each left out.

    Args:
        dataset: an opened data set.
        episodes: their indices.
        spec: cameras, chunk, normalisation and gripper convention.
        statistics: of the train split; with `proprio` if the policy uses it.

    Raises:
        DatasetError: no episode is as long as a chunk.
    """

    def __init__(
        self,
        dataset: Dataset,
        episodes: Sequence[int],
        spec: DataSpec,
        statistics: DatasetStatistics,
    ) -> None:
        self._dataset = dataset
        self._cameras = [dataset.camera_key(name) for name in spec.cameras]
        self._chunk = spec.chunk
        self._actions: dict[int, np.ndarray] = {}
        self._proprio: dict[int, np.ndarray] = {}
        self.episodes: list[int] = []
        starts = [0]
        for index in episodes:
            actions = dataset.vectors("action", index)
            if len(actions) < spec.chunk:
                continue
            if spec.gripper == "libero":
                actions = gripper_from_libero(actions)
            self._actions[index] = normalize(actions, statistics.action, spec.normalization)
            if statistics.proprio is not None:
                state = dataset.vectors("state", index)
                self._proprio[index] = normalize(state, statistics.proprio, spec.normalization)
            self.episodes.append(index)
            starts.append(starts[-1] + len(actions) - spec.chunk + 1)
        if not self.episodes:
            raise DatasetError(f"{dataset.path}: none of {len(episodes)} episodes has {spec.chunk} steps (data.chunk)")
        self._starts = np.asarray(starts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """(episode, step) of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.episodes[place], index - int(self._starts[place])

    def task(self, index: int) -> str:
        """The instruction of a sample, without reading its images."""
        return self._dataset.task(*self.locate(index))

    def __getitem__(self, index: int) -> Sample:
        episode, step = self.locate(index)
        return Sample(
            images=[self._dataset.frame(camera, episode, step) for camera in self._cameras],
            instruction=self._dataset.task(episode, step),
            proprio=self._proprio[episode][step] if self._proprio else None,
            actions=self._actions[episode][step : step + self._chunk],
            episode=episode,
            step=step,
        )
