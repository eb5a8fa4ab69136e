"""Any data set that can be read -> a LeRobotDataset v3: `maps-ray data convert`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.formats import KINDS, Dataset, open_dataset
from maps_ray.data.transforms import NOOP, noops
from maps_ray.data.writer import LeRobotWriter
from maps_ray.files import write_json

_RECORD = "meta/conversion.json"
_EPISODES_PER_FILE = 50
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    episodes: int
    left_out: int
    """Episodes without a sentence or a step."""


def convert(
    path: str,
    out: Path,
    *,
    split: str = "train",
    transform: str | None = None,
    action: str | None = None,
    state: str | None = None,
    fps: float | None = None,
    drop_noops: bool = False,
    episodes_per_file: int = _EPISODES_PER_FILE,
    progress: Progress = lambda done, total: None,
) -> Converted:
    """Writes the episodes in their order; goes on where an interrupted conversion of the same content stopped.

    Frames are encoded as H.264, so they are near the stored ones, not equal. Episodes without a sentence are left out:
    training skips them.

    Args:
        path: folder or address.
        out: folder to write.
        split, transform, action, state: as `open_dataset`; vectors are written as the transform makes them.
        fps: control steps per second where the data set does not say.
        drop_noops: leave out steps whose action does nothing, by the rule of openvla-oft's regeneration script; the
            script replays what is left in the simulator, which this does not.
        episodes_per_file: committed together.
        progress: called with episodes done and in all.

    Raises:
        DatasetError: it cannot be read or written, or `out` holds something else.
    """
    dataset = open_dataset(path, split, transform, action=action, state=state)
    rate = fps or dataset.fps
    # `fps` of LeRobot's info.json is a whole number.
    if not rate or rate != int(rate):
        raise DatasetError(
            f"{path}: the control rate is {rate or 'not recorded'}; name a whole number of steps per second with --fps"
        )
    kept = [episode.index for episode in dataset.episodes if episode.length and _has_sentences(dataset, episode.index)]
    if not kept or not dataset.cameras:
        raise DatasetError(f"{path}: has {len(kept)} episodes with a sentence and {len(dataset.cameras)} cameras")
    options = {"transform": transform, "action": action, "state": state, "fps": rate, "drop_noops": drop_noops}
    _begin(out, {"source": dataset.fingerprint(), "split": split, **options})
    # Slashes part the names of columns in meta/episodes: `stats/<feature>/<kind>`.
    cameras = {dataset.short_name(key).replace("/", "."): key for key in dataset.cameras}
    sizes = {name: dataset.frame(key, kept[0], 0).shape[:2] for name, key in cameras.items()}
    with LeRobotWriter(
        out,
        cameras={name: (int(height), int(width)) for name, (height, width) in sizes.items()},
        state_names=[f"state_{i}" for i in range(dataset.width("state"))],
        action_names=[f"action_{i}" for i in range(dataset.width("action"))],
        fps=int(rate),
        robot_type="unknown",
        episodes_per_file=episodes_per_file,
        append=True,
    ) as writer:
        for index in kept[writer.total_episodes :]:
            progress(writer.total_episodes, len(kept))
            steps = _steps(dataset, index, drop_noops)
            images = {
                name: np.stack([dataset.frame(key, index, int(step)) for step in steps])
                for name, key in cameras.items()
            }
            vectors = {kind: dataset.vectors(kind, index)[steps] for kind in KINDS}
            tasks = [dataset.task(index, int(step)) for step in steps]
            source = {"source": dataset.episodes[index].name}
            writer.add_episode(tasks, images, vectors["state"], vectors["action"], source)
    progress(len(kept), len(kept))
    return Converted(len(kept), len(dataset.episodes) - len(kept))


def _begin(out: Path, plan: dict[str, object]) -> None:
    """Records what is converted; a folder that stands there must have been begun by the same."""
    if not out.exists() or not any(out.iterdir()):
        (out / _RECORD).parent.mkdir(parents=True, exist_ok=True)
        write_json(out / _RECORD, plan, durable=False)
        return
    try:
        begun = json.loads((out / _RECORD).read_text(encoding="utf-8"))
        changed = [name for name, value in plan.items() if begun.get(name) != value]
    except (OSError, ValueError, AttributeError):
        raise DatasetError(f"{out}: is not empty, and no conversion was begun there; name another folder") from None
    if changed:
        raise DatasetError(
            f"{out}: was begun by a conversion with another {', '.join(changed)}; name another folder, or remove it"
        )


def _steps(dataset: Dataset, index: int, drop_noops: bool) -> np.ndarray:
    steps = np.arange(dataset.episodes[index].length)
    if not drop_noops:
        return steps
    kept = steps[~noops(dataset.vectors("action", index))]
    if not len(kept):
        raise DatasetError(f"{dataset.path}: {dataset.episodes[index].name} has no action beyond {NOOP:g}")
    return kept


def _has_sentences(dataset: Dataset, index: int) -> bool:
    return all(dataset.task(index, step).strip() for step in range(dataset.episodes[index].length))
