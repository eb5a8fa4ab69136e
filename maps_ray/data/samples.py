"""One training sample: what the policy sees at step t, and the actions of the next `chunk` steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.formats import Dataset
from maps_ray.data.index import Vectors
from maps_ray.data.statistics import DatasetStatistics, normalize
from maps_ray.models.units import Normalization


@dataclass(frozen=True)
class Sample:
    """Inputs and target at one step of one episode."""

    images: list[np.ndarray]
    """Per camera uint8 (H, W, 3), RGB, at the stored resolution."""
    seen: list[bool]
    """Whether the data set has the view; one that it lacks is black, and is not augmented."""
    instruction: str
    proprio: np.ndarray | None
    """float32 (D,), normalised."""
    actions: np.ndarray
    """float32 (chunk, A), normalised."""
    episode: int
    step: int


class Samples:
    """All samples of some episodes of one data set, by index: episode by episode, the last chunk - 1 steps of each left
    out. Episodes without a sentence and those shorter than a chunk give none, as in the published pipeline.

    Args:
        dataset: an opened data set.
        vectors: its actions and states.
        episodes: their indices.
        cameras: stored cameras, primary first; None for a view that the data set lacks.
        chunk: actions of a sample.
        normalization: what becomes -1 .. 1.
        statistics: of the data set; with `proprio` if the policy uses it.
        convert: what the gripper convention makes of actions (..., A).

    Raises:
        DatasetError: no episode gives a sample.
    """

    def __init__(
        self,
        dataset: Dataset,
        vectors: Vectors,
        episodes: Sequence[int],
        *,
        cameras: Sequence[str | None],
        chunk: int,
        normalization: Normalization,
        statistics: DatasetStatistics,
        convert: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        self._dataset, self._vectors, self._cameras = dataset, vectors, list(cameras)
        self._chunk, self._normalization = chunk, normalization
        self._statistics, self._convert = statistics, convert
        lengths = {index: dataset.episodes[index].length for index in episodes}
        self.episodes = [index for index in episodes if lengths[index] >= chunk and is_labelled(dataset, index)]
        if not self.episodes:
            raise DatasetError(
                f"{dataset.path}: none of {len(episodes)} episodes has both a sentence and {chunk} steps (data.chunk)"
            )
        # No chunk is filled up: `chunk_act_obs` of openvla-oft gives no sample at the last chunk - 1 steps.
        self._starts = np.concatenate([[0], np.cumsum([lengths[i] - chunk + 1 for i in self.episodes])])

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

    def actions(self, episode: int) -> np.ndarray:
        """All actions of an episode, normalised: float32 (T, A)."""
        # The convention first: the statistics are of what it makes.
        raw = self._convert(self._vectors.episode("action", episode))
        return normalize(raw, self._statistics.action, self._normalization)

    def __getitem__(self, index: int) -> Sample:
        episode, step = self.locate(index)
        actions = self._convert(self._vectors.episode("action", episode)[step : step + self._chunk])
        proprio = None
        if self._statistics.proprio is not None:
            state = self._vectors.episode("state", episode)[step]
            proprio = normalize(state, self._statistics.proprio, self._normalization)
        return Sample(
            images=self._images(episode, step),
            seen=[camera is not None for camera in self._cameras],
            instruction=self._dataset.task(episode, step),
            proprio=proprio,
            actions=normalize(actions, self._statistics.action, self._normalization),
            episode=episode,
            step=step,
        )

    def _images(self, episode: int, step: int) -> list[np.ndarray]:
        frames = [None if camera is None else self._dataset.frame(camera, episode, step) for camera in self._cameras]
        black = np.zeros_like(next(image for image in frames if image is not None))
        return [black if image is None else image for image in frames]


class Mixture:
    """The samples of a split of all sources, one source after the other.

    Args:
        parts: source -> its samples.
        shares: probability that a training sample comes from each.
    """

    def __init__(self, parts: dict[str, Samples], shares: Sequence[float]) -> None:
        self.names, self.parts, self.shares = list(parts), list(parts.values()), list(shares)
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in self.parts])])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def sizes(self) -> list[int]:
        """Samples of each source."""
        return [len(part) for part in self.parts]

    @property
    def episodes(self) -> list[int]:
        """Episodes that give samples, by their index in their source; source after source."""
        return [index for part in self.parts for index in part.episodes]

    def index(self, source: int, sample: int) -> int:
        """Place here of a sample of a source."""
        return int(self._starts[source]) + sample

    def locate(self, index: int) -> tuple[int, int]:
        """(source, sample of it)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        source = int(np.searchsorted(self._starts, index, side="right")) - 1
        return source, index - int(self._starts[source])

    def task(self, index: int) -> str:
        """The instruction of a sample, without reading its images."""
        source, sample = self.locate(index)
        return self.parts[source].task(sample)

    def episode(self, index: int) -> str:
        """What results call the episode of a sample: its number, after the source's name where there are several."""
        source, sample = self.locate(index)
        number = str(self.parts[source].locate(sample)[0])
        return number if len(self.parts) == 1 else f"{self.names[source]}/{number}"

    def __getitem__(self, index: int) -> Sample:
        source, sample = self.locate(index)
        return self.parts[source][sample]


def is_labelled(dataset: Dataset, index: int) -> bool:
    """Whether any step of an episode has a sentence."""
    episode = dataset.episodes[index]
    return bool(episode.task.strip()) or any(dataset.task(index, step).strip() for step in range(episode.length))
