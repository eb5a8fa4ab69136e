"""Where a run's checkpoints lie: in a folder that all nodes see, or on an object store.

    <run>/checkpoints/step-00000100/
      rank-00000.safetensors, rank-00000.json, ...
      manifest.json

In a folder, every rank writes its part into a hidden folder, which the last act renames. An object store renames
nothing: every rank writes its part to its node's scratch and uploads it under a name that no other attempt has
(`rank-00000.safetensors-ATTEMPT`), and the manifest, which names the objects, is put last. Either way a checkpoint is
there when its manifest is, with all the files of the sizes that it gives; and it counts when the run's driver at that
time still had the run (`claims`).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypedDict, cast

from maps_ray.files import seen, sync
from maps_ray.run_storage import NotThere, RunStorage, StorageError, full_scratch_named
from maps_ray.training.claims import LAG_S, Fence
from maps_ray.training.run_faults import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
# Of one width, so that names sort as steps do.
_FOLDER = re.compile(r"step-(\d{8})")
_LOOK_S = 0.5
_log = logging.getLogger(__name__)

Write = Callable[[Path], list[Path]]
"""Writes a rank's files into a folder and returns them."""


Opened = Callable[[str], Path]


class Manifest(TypedDict, total=False):
    """What makes a checkpoint count, as JSON. Those of earlier versions lack `claim`."""

    format: int
    step: int
    """Optimizer steps done."""
    world_size: int
    """Number of workers that wrote it."""
    spec: dict[str, object]
    """The run spec, resolved."""
    position: int
    """The next sample of the endless sequence."""
    tracking: str | None
    """The run's key for MLflow."""
    metrics: dict[str, float]
    """The last value of each."""
    claim: str | None
    """Token of the driver that the run belonged to."""
    files: dict[str, int]
    """Every other file, with its size in bytes."""


class Shelf(Protocol):
    """The checkpoints of one run. Ranks call `put`, the first rank alone what changes the shelf."""

    def complete(self) -> list[str]:
        """Names of the checkpoints that count, newest first."""

    def manifest(self, name: str) -> Manifest:
        """Raises `CheckpointError` when it cannot be read, or another version of this package wrote it."""

    def place(self, name: str) -> str:
        """Path or address, for messages."""

    def attempt(self) -> str:
        """A word for one attempt at a checkpoint, to be given to `put` and `commit`; clears what earlier ones left."""

    def put(self, step: int, attempt: str, write: Write) -> dict[str, int]:
        """Has a rank's files written; returns their names and sizes."""

    def commit(self, step: int, attempt: str, manifest: Manifest) -> None:
        """Makes a checkpoint count; only what stands in the way of none is there already."""

    def discard(self, step: int, attempt: str) -> None:
        """Removes what an attempt has put."""

    def prune(self, keep: int) -> None:
        """Removes all but the newest checkpoints."""

    def open(self, name: str) -> AbstractContextManager[Opened]:
        """A context in which a file of a checkpoint, by its name, is a local path; see `Opened`."""


def newest(shelf: Shelf) -> str | None:
    """The newest checkpoint that counts; None when there is none."""
    names = shelf.complete()
    return names[0] if names else None


def step_of(name: str) -> int:
    """Optimizer steps done in a checkpoint, by its name."""
    return int(name.removeprefix("step-"))


class FolderShelf:
    """Checkpoints in a folder that all nodes see."""

    def __init__(self, root: Path, fence: Fence | None = None) -> None:
        self._root, self._fence = root, fence
        self._cleared = False

    def complete(self) -> list[str]:
        if not self._root.is_dir():
            return []
        names = sorted((p.name for p in self._root.iterdir() if _FOLDER.fullmatch(p.name)), reverse=True)
        return [name for name in names if self._is_complete(name)]

    def manifest(self, name: str) -> Manifest:
        return _read_manifest((self._root / name / MANIFEST).read_bytes, self.place(name))

    def place(self, name: str) -> str:
        return str(self._root / name)

    def attempt(self) -> str:
        # Once: later leftovers are this process's own, and `discard` has them. Those of a kill have no owner any more.
        if not self._cleared and self._root.is_dir():
            for left in self._root.glob(".step-*.partial"):
                shutil.rmtree(left, ignore_errors=True)
        self._cleared = True
        return uuid.uuid4().hex[:8]

    def put(self, step: int, attempt: str, write: Write) -> dict[str, int]:
        partial = self._partial(step, attempt)
        # By every rank: a folder that another node has made may not be seen yet.
        partial.mkdir(parents=True, exist_ok=True)
        paths = write(partial)
        # Before the manifest: after a loss of power it must name no file that is not there.
        for path in paths:
            sync(path)
        return {path.name: path.stat().st_size for path in paths}

    def commit(self, step: int, attempt: str, manifest: Manifest) -> None:
        partial, final = self._partial(step, attempt), self._root / _name(step)
        path = partial / MANIFEST
        path.write_text(json.dumps(manifest))
        sync(path)
        # The names in a folder are data of the folder: without this a loss of power may keep the rename, and none of
        # the files.
        sync(partial)
        # Only a folder that no reader accepts can be in the way: a complete one is never written again.
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        # And the rename is data of the folder above.
        sync(self._root)

    def discard(self, step: int, attempt: str) -> None:
        shutil.rmtree(self._partial(step, attempt), ignore_errors=True)

    def prune(self, keep: int) -> None:
        for old in self.complete()[keep:]:
            shutil.rmtree(self._root / old, ignore_errors=True)

    @contextmanager
    def open(self, name: str) -> Iterator[Opened]:
        """Waits for files that another node has just written; their names are the manifest's."""

        def path_of(file: str) -> Path:
            path = self._root / name / file
            seen(path, LAG_S)
            return path

        yield path_of

    def _partial(self, step: int, attempt: str) -> Path:
        return self._root / f".{_name(step)}.{attempt}.partial"

    def _is_complete(self, name: str) -> bool:
        folder = self._root / name
        try:
            manifest = self.manifest(name)
            cut = [file for file, size in manifest["files"].items() if (folder / file).stat().st_size != size]
        except (CheckpointError, OSError, KeyError) as error:
            _log.warning("checkpoint %s is not complete and is not used: %s", folder, error)
            return False
        return _counts(self._fence, manifest, cut, str(folder))


class ObjectShelf:
    """Checkpoints on an object store.

    Args:
        storage: the run's folder there.
        work: folder in this node's scratch, for what is on its way; nothing of a checkpoint stays in it.
        fence: of the run's driver.
    """

    def __init__(self, storage: RunStorage, work: Path, fence: Fence | None = None) -> None:
        self._storage, self._work, self._fence = storage.inside("checkpoints"), work, fence

    def complete(self) -> list[str]:
        listed = self._listed()
        names = sorted((name for name, files in listed.items() if MANIFEST in files), reverse=True)
        return [name for name in names if self._is_complete(name, listed[name])]

    def manifest(self, name: str) -> Manifest:
        return _read_manifest(lambda: self._storage.read(f"{name}/{MANIFEST}"), self.place(name))

    def place(self, name: str) -> str:
        return self._storage.at(name)

    def attempt(self) -> str:
        return uuid.uuid4().hex[:8]

    def put(self, step: int, attempt: str, write: Write) -> dict[str, int]:
        part = f"this worker's part of the checkpoint of step {step}"
        with full_scratch_named(self._work, part), self._room(f"put-{uuid.uuid4().hex[:8]}") as folder:
            sizes = {}
            for path in write(folder):
                name = f"{path.name}-{attempt}"
                sizes[name] = path.stat().st_size
                self._storage.upload(path, f"{_name(step)}/{name}")
                path.unlink()
            return sizes

    def commit(self, step: int, attempt: str, manifest: Manifest) -> None:
        self._storage.write(f"{_name(step)}/{MANIFEST}", json.dumps(manifest).encode())

    def discard(self, step: int, attempt: str) -> None:
        # The fault that led here is what is told; what is left goes with a later prune.
        with suppress(StorageError):
            for name in self._storage.files(_name(step)):
                if name.endswith(f"-{attempt}"):
                    self._storage.remove(f"{_name(step)}/{name}")

    def prune(self, keep: int) -> None:
        """Also of what killed attempts have left up to the newest step; never what a later driver has made."""
        listed, kept = self._listed(), self.complete()[:keep]
        # Beyond the newest one may lie an attempt that is on its way.
        for name in [] if not kept else [name for name in listed if name <= kept[0]]:
            if MANIFEST in listed[name] and self._is_foreign(name):
                continue
            if name in kept:
                used = {MANIFEST, *self.manifest(name)["files"]}
                for file in listed[name].keys() - used:
                    self._storage.remove(f"{name}/{file}")
            else:
                # Killed halfway, it leaves files that no manifest names, and no manifest without its files.
                self._storage.remove_folder(name, first=MANIFEST)

    @contextmanager
    def open(self, name: str) -> Iterator[Opened]:
        with self._room(f"get-{uuid.uuid4().hex[:8]}") as folder:

            def path_of(file: str) -> Path:
                path, deadline = folder / file, time.monotonic() + LAG_S
                while not path.is_file():
                    try:
                        self._storage.fetch(f"{name}/{file}", path)
                    except NotThere:
                        # Another node has just put it, and this one's look at the store may lag.
                        if time.monotonic() > deadline:
                            raise
                        time.sleep(_LOOK_S)
                return path

            yield path_of

    def _is_foreign(self, name: str) -> bool:
        try:
            token = self.manifest(name).get("claim")
        except CheckpointError:
            return False
        return self._fence is not None and not self._fence.knows(token)

    @contextmanager
    def _room(self, name: str) -> Iterator[Path]:
        folder = self._work / name
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _listed(self) -> dict[str, dict[str, int]]:
        """Files of each checkpoint, complete or not, with their sizes."""
        listed: dict[str, dict[str, int]] = {}
        for path, size in self._storage.files().items():
            name, _, file = path.partition("/")
            if _FOLDER.fullmatch(name) and file:
                listed.setdefault(name, {})[file] = size
        return listed

    def _is_complete(self, name: str, listed: dict[str, int]) -> bool:
        try:
            manifest = self.manifest(name)
            cut = [file for file, size in manifest["files"].items() if listed.get(file) != size]
        except (CheckpointError, KeyError) as error:
            _log.warning("checkpoint %s is not complete and is not used: %s", self.place(name), error)
            return False
        return _counts(self._fence, manifest, cut, self.place(name))


def _counts(fence: Fence | None, manifest: Manifest, cut: list[str], place: str) -> bool:
    if cut:
        _log.warning("checkpoint %s is not used: %s changed their size", place, ", ".join(cut[:10]))
        return False
    if fence is not None and not fence.accepts(manifest.get("claim"), int(manifest["step"])):
        _log.warning("checkpoint %s is not used: a driver made it that had lost the run to another one", place)
        return False
    return True


def _read_manifest(read: Callable[[], bytes], place: str) -> Manifest:
    try:
        manifest = json.loads(read())
    except (OSError, ValueError, NotThere) as error:
        raise CheckpointError(f"cannot read checkpoint {place}: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        known = manifest.get("format") if isinstance(manifest, dict) else None
        raise CheckpointError(f"checkpoint {place} has format {known}, this package reads {FORMAT}")
    return cast(Manifest, manifest)


def _name(step: int) -> str:
    return f"step-{step:08d}"
