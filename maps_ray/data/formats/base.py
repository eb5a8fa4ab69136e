"""What every format gives: episodes in file order, their vectors, their frames, their sentences."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np

from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.storage import Storage
from maps_ray.data.transforms import Transform, as_steps
from maps_ray.spec import nearest

Value = TypeVar("Value")
_OF_PARENTS: list[object] = []
"""What forked processes inherited; never closed here."""


class Handles(Generic[Value]):
    """The values used last. Pickled it is empty, and a forked process starts with none: two processes that share a
    file's position would read each other's bytes.

    Args:
        most: values kept.
        close: what to do with one that is dropped.
    """

    def __init__(self, most: int, close: Callable[[Value], None] | None = None) -> None:
        self._most, self._close = most, close
        self._start()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made when it is not there."""
        with self.held(key, make) as value:
            return value

    @contextmanager
    def held(self, key: Hashable, make: Callable[[], Value]) -> Iterator[Value]:
        """As `get`, for the length of a block: no other thread drives the value out, and closes it, meanwhile."""
        if self._pid != os.getpid():
            # Not even dropped: a decoder would wait for its threads, which the fork left behind.
            _OF_PARENTS.append(self._kept)
            self._start()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = make()
            self._kept.move_to_end(key)
            while len(self._kept) > self._most:
                self._drop()
            yield self._kept[key]

    def peek(self, key: Hashable) -> Value | None:
        """The value of a key if it is there."""
        return self._kept.get(key) if self._pid == os.getpid() else None

    def clear(self) -> None:
        """Drops all values."""
        if self._pid == os.getpid():
            while self._kept:
                self._drop()

    def _drop(self) -> None:
        value = self._kept.popitem(last=False)[1]
        if self._close is not None:
            self._close(value)

    def _start(self) -> None:
        self._pid = os.getpid()
        self._kept: OrderedDict[Hashable, Value] = OrderedDict()
        # Re-entrant: who holds a value may ask for another.
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, object]:
        return {"_most": self._most, "_close": self._close}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._start()


Kind = Literal["action", "state"]
KINDS: tuple[Kind, ...] = ("action", "state")
Scan = Callable[["Dataset", Sequence[str]], Sequence[object]]
"""Gives `[dataset.scan(shard) for shard in shards]`, computed in any way: in threads, on Ray, from a cache."""


@dataclass(frozen=True)
class Episode:
    """One demonstration."""

    index: int
    """Its place in `Dataset.episodes`."""
    task: str
    """The instruction; where it changes within the episode, the first. May be empty."""
    length: int
    """Steps T, after the transform."""
    name: str
    """What messages call it."""
    extra: Mapping[str, object] = field(default_factory=dict)
    """What the writer recorded about the episode."""


@dataclass(frozen=True)
class Names:
    """Names of features where a data set's own differ from the usual ones; None: found by the usual names."""

    action: str | None = None
    state: str | None = None
    cameras: Mapping[str, str] = field(default_factory=dict)
    """Name asked for -> camera as stored."""


def scan_in_threads(dataset: Dataset, shards: Sequence[str]) -> list[object]:
    """Looks through the shards of a data set, several at once: reading waits for the disk or the network."""
    if len(shards) < 2:
        return [dataset.scan(shard) for shard in shards]
    with ThreadPoolExecutor(min(len(shards), 32 if dataset.storage.local is None else 8)) as pool:
        return list(pool.map(dataset.scan, shards))


class Dataset(ABC):
    """An opened data set; `maps_ray.data.open_dataset` makes one.

    Opening reads metadata, then what `scan` needs of each shard: numbers and texts of the steps, no frame. Everything
    else is read when asked for. Pickled, it carries its index and no handle or content.

    Attributes:
        format: for instance `lerobot_v3.0`.
        path: as given.
        split: as given.
        fps: control steps per second; None where neither data set nor transform says so.
        cameras: names as stored.
        episodes: in file order.
        transform: what makes vectors of the stored ones; None for as stored.
        storage: where the files lie.
    """

    format: str
    fps: float | None
    cameras: list[str]
    episodes: tuple[Episode, ...] = ()
    _ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "primary": ("image", "image_0", "agentview_rgb", "rgb_static", "image_primary"),
        "wrist": ("wrist_image", "eye_in_hand_rgb", "rgb_gripper", "hand_image", "image_wrist"),
        "image": ("agentview_rgb", "rgb_static"),
        "wrist_image": ("eye_in_hand_rgb", "rgb_gripper"),
        "left_wrist": ("left_wrist_image",),
        "right_wrist": ("right_wrist_image",),
    }
    """Camera as a spec may call it -> what formats call it, without their prefixes."""

    def __init__(self, storage: Storage, split: str, transform: Transform | None, names: Names) -> None:
        self.storage, self.split, self.transform, self.names = storage, split, transform, names
        self.path = storage.root

    # What a format implements.

    @property
    @abstractmethod
    def shards(self) -> list[str]:
        """Parts that can be scanned alone; known from the metadata."""

    @abstractmethod
    def scan(self, shard: str) -> object:
        """What the index needs of one shard, as JSON values; proves that its rows, times and texts fit together.

        Raises:
            DatasetError: they do not, or the shard cannot be read.
        """

    @abstractmethod
    def assemble(self, scans: Sequence[Any]) -> None:
        """Makes `episodes` from the scans of all shards."""

    @abstractmethod
    def features(self) -> Mapping[str, int | None]:
        """Vector features as stored -> number of dimensions, None where only the data tell."""

    @abstractmethod
    def stored(self, names: Sequence[str], index: int) -> dict[str, np.ndarray]:
        """Vector features of an episode, all its steps as stored: name -> float32 (T, D)."""

    @abstractmethod
    def stored_frame(self, camera: str, index: int, step: int) -> np.ndarray:
        """A frame by its step as stored: uint8 (H, W, 3), RGB, upright."""

    @abstractmethod
    def stored_task(self, index: int, step: int) -> str:
        """The sentence at a step as stored."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Of the content: names, sizes, metadata and headers; the same for a copy at another place."""

    def frame_fault(self, camera: str, episodes: Iterable[int]) -> str | None:
        """The first fault of a camera's frames that can be found without decoding; None when there is none."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Closes what this process opened; the data set can be used on."""

    # What all share.

    def open(self, scan: Scan = scan_in_threads) -> Dataset:
        """Scans and assembles."""
        self.assemble(scan(self, self.shards))
        return self

    def stored_splits(self) -> list[str]:
        """Names of the splits that the data set stores."""
        return ["train"]

    @property
    def tasks(self) -> list[str]:
        """Every task sentence once, in order of appearance."""
        return list(dict.fromkeys(episode.task for episode in self.episodes))

    def task(self, index: int, step: int) -> str:
        """The instruction at a step of an episode."""
        return self.stored_task(index, self._step(index, step))

    def vectors(self, kind: Kind, index: int) -> np.ndarray:
        """Actions or states of one episode: float32 (T, D), as stored or as the transform makes them.

        Raises:
            DatasetError: no such feature, missing or broken file, wrong width, rows that do not match the episode.
        """
        feature = self.feature(kind)
        if self.transform is None:
            return self.stored([feature], index)[feature]
        made = self._transformed(index)
        if kind not in made:
            raise DatasetError(f"{self.path}: transform {self.transform.name} makes no {kind}")
        return made[kind]

    def frame(self, camera: str, index: int, step: int) -> np.ndarray:
        """What a camera saw before action `step` of an episode: uint8 (H, W, 3), RGB, at the stored size.

        Raises:
            DatasetError: no such camera, missing or broken file, no such frame.
        """
        step = self._step(index, step)
        if self.lacks(camera):
            return np.zeros_like(self.stored_frame(self.camera_key("primary"), index, step))
        return self.stored_frame(self.camera_key(camera), index, step)

    def camera_key(self, name: str) -> str:
        """The stored camera that a short, usual or full name means.

        Raises:
            DatasetError: no such camera; names those there are.
        """
        name = self.names.cameras.get(name, name)
        usual = (self.transform.cameras.get(name) if self.transform else None) or ()
        for candidate in (name, *usual, *self._ALIASES.get(name, ())):
            for key in self._with_prefixes(candidate):
                if key in self.cameras:
                    return key
        known = [self.short_name(key) for key in self.cameras]
        raise DatasetError(f"{self.path}: no camera {name!r}; {nearest(name, known) if known else 'it has none'}")

    def feature(self, kind: Kind) -> str:
        """The stored feature that holds actions or states.

        Raises:
            DatasetError: there is none under the usual names, or none of the name given.
        """
        known = list(self.features())
        asked = self.names.action if kind == "action" else self.names.state
        usual = (self.transform.features.get(kind) if self.transform else None) or ()
        for name in (asked,) if asked else (*usual, *_USUAL[kind]):
            for key in (name, f"observation.{name}", f"observation/{name}", f"steps/{name}"):
                if key in known:
                    return key
        for name in (asked,) if asked else _USUAL[kind]:
            if (stored := self.no_vector(name)) is not None:
                raise DatasetError(f"{self.path}: {name!r} is {stored}, and the {kind}s must be vectors of numbers")
        wanted = asked or _USUAL[kind][0]
        raise DatasetError(
            f"{self.path}: no feature {wanted!r}; {nearest(wanted, known) if known else 'it has no vectors'}; "
            f"name the one that holds the {kind}s with data.{kind}"
        )

    def no_vector(self, name: str) -> str | None:
        """What a feature is that is there and no vector of numbers; None for others."""
        return None

    def has(self, kind: Kind) -> bool:
        """Whether there is a feature that holds actions or states."""
        try:
            self.feature(kind)
        except DatasetError:
            return False
        return True

    def width(self, kind: Kind) -> int:
        """Dimensions of actions or states, after the transform.

        Raises:
            DatasetError: no such feature, or it is no vector.
        """
        width = self.features()[self.feature(kind)]
        if width is None or self.transform is not None:
            if not self.episodes:
                raise DatasetError(f"{self.path}: holds no episode")
            return int(self.vectors(kind, 0).shape[1])
        return width

    def finite_fault(self, kind: Kind, episodes: Iterable[int]) -> str | None:
        """Names the first NaN or infinity by episode and frame; None when there is none."""
        for index in episodes:
            values = self.vectors(kind, index)
            bad = np.argwhere(~np.isfinite(values))
            if len(bad):
                step, dimension = (int(i) for i in bad[0])
                value = values[step, dimension]
                return (
                    f"{self.path}: {self.feature(kind)} is {value} in {self.episodes[index].name}, frame {step}, "
                    f"dimension {dimension}"
                )
        return None

    @staticmethod
    def short_name(camera: str) -> str:
        """A camera's name without the prefixes of its format."""
        return camera

    def _with_prefixes(self, name: str) -> Sequence[str]:
        return (name,)

    def lacks(self, camera: str) -> bool:
        """A view that the transform's configuration lists and the data set does not have: black frames."""
        return self.transform is not None and self.transform.cameras.get(camera, ("",)) == ()

    def _step(self, index: int, step: int) -> int:
        episode = self.episodes[index]
        if not 0 <= step < episode.length:
            raise IndexError(f"{self.path}: step {step} of {episode.name}, which has {episode.length}")
        return step + (self.transform.dropped[0] if self.transform else 0)

    def _steps(self, stored: int) -> int:
        """Steps that are left of an episode."""
        return max(stored - sum(self.transform.dropped), 0) if self.transform else stored

    def _transformed(self, index: int) -> dict[str, np.ndarray]:
        assert self.transform is not None
        chosen: dict[str, str] = {"action": self.feature("action")}
        if self.has("state"):
            chosen["state"] = self.feature("state")
        others = [name for name in self.features() if name not in chosen.values()] if self.transform.wants_all else []
        stored = self.stored([*chosen.values(), *others], index)
        given = {name: stored[name] for name in others} | {kind: stored[name] for kind, name in chosen.items()}
        return as_steps(self.transform, given, f"{self.path}: {self.episodes[index].name}")


_USUAL: Mapping[Kind, tuple[str, ...]] = {
    "action": ("action", "actions"),
    "state": ("observation.state", "observation/state", "state", "observation/proprio", "proprio", "qpos"),
}
"""What data sets call actions and states."""
