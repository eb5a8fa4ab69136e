"""An mp4 of the first success and the first failure of each task."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from maps_ray.data.video import VideoEncoder
from maps_ray.evaluation.rollouts.plan import Episode
from maps_ray.evaluation.rollouts.protocol import EpisodeResult
from maps_ray.files import replaced

# One frame for each replan, so a chunk of 8 actions of LIBERO's 20 per second passes in half its time.
_FPS = 5


class Videos:
    """The videos of one evaluation, in `out/videos/<suite>/`.

    First means the lowest initial state, not the first to end: how many simulators run changes nothing.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out / "videos"

    def wants(self, episode: Episode) -> bool:
        """Whether frames of an episode that has not run yet can be of use."""
        return any(self._is_first(episode, outcome) for outcome in ("success", "failure"))

    def keep(self, result: EpisodeResult) -> Path | None:
        """Writes the episode's video if it is the first of its kind, in place of a later one's."""
        outcome, episode = "success" if result.success else "failure", result.episode
        if not result.frames or not self._is_first(episode, outcome):
            return None
        earlier = self._find(episode, outcome)
        folder = self.folder / episode.suite
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"task{episode.task:02d}-{outcome}-state{episode.initial_state:03d}.mp4"
        images = np.stack(result.frames)
        # yuv420p has one colour for two pixels each way.
        height, width = (side - side % 2 for side in images.shape[1:3])
        with replaced(path) as partial:
            encoder = VideoEncoder(partial, (height, width), _FPS, crf=20)
            encoder.write(images[:, :height, :width])
            encoder.close()
        for old in earlier:
            if old != path:
                old.unlink()
        return path

    def all(self) -> list[Path]:
        """The videos that there are."""
        return sorted(self.folder.glob("*/*.mp4"))

    def _find(self, episode: Episode, outcome: str) -> list[Path]:
        return list((self.folder / episode.suite).glob(f"task{episode.task:02d}-{outcome}-state*.mp4"))

    def _is_first(self, episode: Episode, outcome: str) -> bool:
        matches = (re.search(r"-state(\d+)\.mp4$", path.name) for path in self._find(episode, outcome))
        return all(episode.initial_state < int(match.group(1)) for match in matches if match)
