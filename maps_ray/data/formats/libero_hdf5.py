"""LIBERO's HDF5: one file a task, as published and as openvla-oft's regeneration script writes it.

Images are the simulator's buffer, which is upside down: they are turned by 180 degrees, as RLDS and the bundled
demonstrations store them. The state is `ee_states` (6) and `gripper_states` (2). The published form records an
observation after its action, the regenerated one before; both are given as they are stored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, TypeVar

import h5py
import numpy as np

from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.formats.base import Dataset, Episode, Handles, Names
from maps_ray.data.storage import Storage, content, digest
from maps_ray.data.transforms import Transform
from maps_ray.files import remedy
from maps_ray.spec import nearest

SUFFIXES = (".hdf5", ".h5")
_FILES_KEPT = 8
_VECTORS: Mapping[str, tuple[str, ...]] = {
    "action": ("actions",),
    "state": ("obs/ee_states", "obs/gripper_states"),
    "joint_state": ("obs/joint_states",),
}
"""Feature -> data sets of a demonstration that make it, side by side."""
# LIBERO's `control_freq` where nobody sets another.
_FPS = 20.0
Value = TypeVar("Value")


class LiberoHdf5(Dataset):
    """See `Dataset`.

    Args:
        files: those to read, in order.
    """

    format = "libero_hdf5"

    def __init__(
        self, storage: Storage, files: Sequence[str], split: str, transform: Transform | None, names: Names
    ) -> None:
        super().__init__(storage, split, transform, names)
        if split != "train":
            raise DatasetError(f"{self.path}: no split {split!r}; {nearest(split, ['train'])}")
        self.fps = _FPS
        self._files = list(files)
        self._demos: tuple[tuple[str, str, int], ...] = ()
        self._widths: dict[str, int | None] = {}
        self.cameras = []
        self._open: Handles[h5py.File] = Handles(_FILES_KEPT, _close)
        self._tables: Handles[np.ndarray] = Handles(16)

    @property
    def shards(self) -> list[str]:
        return list(self._files)

    def scan(self, shard: str) -> object:
        """{"task", "fps", "cameras", "widths", "demos": [[name, steps], ...]} of a file."""
        return self._use(shard, lambda file: self._look(shard, file))

    def assemble(self, scans: Sequence[Any]) -> None:
        demos: list[tuple[str, str, int]] = []
        episodes: list[Episode] = []
        for shard, facts in zip(self._files, scans, strict=True):
            first = scans[0]
            for fact in ("cameras", "widths"):
                if facts[fact] != first[fact]:
                    raise DatasetError(
                        f"{self.storage.at(shard)}: {fact} {facts[fact]}, those of {self._files[0]} are {first[fact]}; "
                        "keep files that differ in folders of their own"
                    )
            for name, steps in facts["demos"]:
                label = f"episode {len(demos)} ({name} of {shard})"
                episodes.append(Episode(len(demos), facts["task"], self._steps(steps), label, {"demo": name}))
                demos.append((shard, name, steps))
        self._demos, self.episodes = tuple(demos), tuple(episodes)
        self.cameras, self._widths = list(scans[0]["cameras"]), dict(scans[0]["widths"])
        self.fps = scans[0]["fps"]

    def features(self) -> Mapping[str, int | None]:
        return self._widths

    def stored(self, names: Sequence[str], index: int) -> dict[str, np.ndarray]:
        return {name: self._vectors(name, index) for name in names}

    def stored_frame(self, camera: str, index: int, step: int) -> np.ndarray:
        shard, demo, _ = self._demos[index]
        image = self._use(shard, lambda file: file[f"data/{demo}/obs/{camera}"][step])
        return np.ascontiguousarray(image[::-1, ::-1])

    def stored_task(self, index: int, step: int) -> str:
        return self.episodes[index].task

    def close(self) -> None:
        self._open.clear()
        self._tables.clear()

    def fingerprint(self) -> str:
        sizes = {name: self.storage.size(name) for name in self._files}
        return digest([self.format, *content(self.storage, sizes)])

    def _look(self, shard: str, file: h5py.File) -> dict[str, object]:
        where = self.storage.at(shard)
        if "data" not in file or not isinstance(file["data"], h5py.Group):
            raise DatasetError(f"{where}: no group 'data'; this is no LIBERO file")
        group = file["data"]
        # By number: HDF5 gives demo_10 before demo_2.
        names = sorted((name for name in group if re.fullmatch(r"demo_\d+", name)), key=lambda name: int(name[5:]))
        if not names:
            raise DatasetError(f"{where}: no demo_0, demo_1, ... in 'data'")
        demos, cameras, widths = [], None, None
        for name in names:
            found: dict[str, h5py.Dataset] = {}
            group[name].visititems(
                # h5py stops at whatever is not None, which `update` returns.
                lambda path, item, to=found: to.update({path: item}) if hasattr(item, "shape") else None
            )
            shapes = {path: item.shape for path, item in found.items()}
            if "actions" not in shapes:
                raise DatasetError(f"{where}: {name} has no actions")
            steps = shapes["actions"][0]
            # Depth has one channel, in floats.
            pictures = [path for path, item in found.items() if item.shape[3:] == (3,) and item.dtype == np.uint8]
            seen = sorted(path[4:] for path in pictures if re.fullmatch(r"obs/[^/]+_rgb", path))
            if pictures and not seen:
                # robomimic's, for one, stand upright: turned, nobody would see it but the policy.
                raise DatasetError(
                    f"{where}: {name} has the images {', '.join(pictures)}; LIBERO's are called obs/agentview_rgb and "
                    "the like, and no other HDF5 is read: convert it to LeRobot's format"
                )
            made = {
                feature: sum(shapes[part][1] for part in parts)
                for feature, parts in _VECTORS.items()
                if all(len(shapes.get(part, ())) == 2 for part in parts)
            }
            used = [f"obs/{camera}" for camera in seen] + [part for f in made for part in _VECTORS[f]]
            uneven = [f"{part} {shapes[part][0]}" for part in used if shapes[part][0] != steps]
            if uneven:
                raise DatasetError(f"{where}: {name} has {steps} actions, but {', '.join(uneven)}; write it again")
            if (cameras, widths) not in ((None, None), (seen, made)):
                raise DatasetError(f"{where}: {name} has {seen} and {made}, {names[0]} {cameras} and {widths}")
            cameras, widths = seen, made
            demos.append([name, steps])
        text, fps = _said(group.attrs, shard, where)
        return {"task": text, "fps": fps, "cameras": cameras, "widths": widths, "demos": demos}

    def _vectors(self, name: str, index: int) -> np.ndarray:
        shard, demo, _ = self._demos[index]

        def read() -> np.ndarray:
            parts = self._use(shard, lambda file: [file[f"data/{demo}/{part}"][()] for part in _VECTORS[name]])
            return np.concatenate([np.asarray(part, np.float32) for part in parts], axis=1)

        return self._tables.get((shard, demo, name), read)

    def _use(self, shard: str, act: Callable[[h5py.File], Value]) -> Value:
        where = self.storage.at(shard)

        def connect() -> h5py.File:
            return h5py.File(self.storage.path_or_file(shard), "r")

        try:
            with self._open.held(shard, connect) as file:
                return act(file)
        except DatasetError:
            raise
        except (OSError, KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise DatasetError(f"{where}: cannot read ({error}); {remedy(where)}") from None


def hdf5_files(storage: Storage) -> list[str]:
    """HDF5 files of a folder and those below it, in order."""
    return [name for name in storage.files() if name.endswith(SUFFIXES)]


def task_of_file_name(name: str) -> str:
    """`KITCHEN_SCENE3_put_it_there_demo.hdf5` -> `put it there`."""
    words = PurePosixPath(name).stem.removesuffix("_demo").split("_")
    scenes = [place for place, word in enumerate(words) if "SCENE" in word]
    return " ".join(words[scenes[0] + 1 :] if scenes else words)


def _said(attributes: Mapping[str, Any], shard: str, where: str) -> tuple[str, float]:
    """Sentence and control rate, from the attributes where the file has them."""
    try:
        problem = json.loads(attributes["problem_info"]) if "problem_info" in attributes else {}
        environment = json.loads(attributes["env_args"]) if "env_args" in attributes else {}
    except (ValueError, TypeError) as error:
        raise DatasetError(f"{where}: attributes of 'data' are no JSON ({error})") from None
    said = problem.get("language_instruction") if isinstance(problem, dict) else None
    # LIBERO's own readers join it, for it may be a list.
    text = "".join(said) if isinstance(said, list) and all(isinstance(part, str) for part in said) else said
    options = environment.get("env_kwargs") if isinstance(environment, dict) else None
    rate = options.get("control_freq") if isinstance(options, dict) else None
    fps = float(rate) if isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 < rate < 10_000 else _FPS
    return (text if isinstance(text, str) and text.strip() else task_of_file_name(shard)), fps


def _close(file: h5py.File) -> None:
    file.close()
