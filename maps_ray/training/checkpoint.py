"""Checkpoints that count only when they are complete.

    <run>/checkpoints/step-00000100/
      rank-00000.safetensors   what rank 0 holds: slices of fp32 weights, moments and, where kept, averaged weights
      rank-00000.json          where these slices lie in their tensors, and the rank's RNG states
      ...
      manifest.json            step, world size, run spec, tracking identity, and the size of every other file

`shelf` has where they lie, and how they come to count there; `state` what is in them and how it is read back. The files
name tensors, not ranks: a slice is a range of one flattened parameter. So a checkpoint can be read by any number of
workers and under any ZeRO stage, and nothing in it is a pickle. Anchors are not stored; `bind` has cut them from the
base weights before `load_state`.

Training stands still only for the copy into host buffers (`Snapshot`); a thread on each rank writes them (`Saver`).
Every rank writes its own part; when all have said that their part is on disk, or on the object store, rank 0 commits
them with the manifest. A kill, a full disk or a lost node at any moment leaves the earlier checkpoints as they were.
Pruning comes after the commit.

Why not Ray Train's own checkpoints: `ray.train.report` returns before its controller has committed anything (it polls
every 2 s), so a worker killed right after a report would start again from an older state; and Ray's storage knows a
checkpoint by the controller's snapshot, not by its content, so it could not be resumed by another cluster. Ray restarts
the workers; where they continue is read from the shared storage folder.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from maps_ray.run_storage import StorageError
from maps_ray.training.claims import Fence, overtaken
from maps_ray.training.ranks import RanksError, gloo_group, on_all_ranks
from maps_ray.training.run_faults import CheckpointError, OvertakenError, TrainingError
from maps_ray.training.shelf import FORMAT, FolderShelf, Manifest, Shelf, Write, newest
from maps_ray.training.state import Snapshot, State, load_state

if TYPE_CHECKING:
    from maps_ray.proximity.zero.deepspeed_engine import Engine

_log = logging.getLogger(__name__)


def save_checkpoint(
    shelf: Shelf | Path,
    step: int,
    write: Write,
    manifest: Manifest,
    keep: int,
    group: dist.ProcessGroup | None = None,
    fence: Fence | None = None,
    before: Callable[[], None] = lambda: None,
) -> Path | str:
    """Makes one checkpoint; every rank calls it.

    Args:
        shelf: of the run's checkpoints; a folder, on storage that all ranks share, is one.
        step: optimizer steps done.
        write: writes this rank's files into the folder given and returns them.
        manifest: what rank 0 adds to the manifest.
        keep: how many checkpoints stay, this one included.
        group: what the ranks agree over, as in `on_all_ranks`.
        fence: the run as the driver has claimed it; none where nobody has.
        before: called on rank 0 before the checkpoint counts.

    Returns:
        The checkpoint's folder or address.

    Raises:
        CheckpointError: on every rank alike, when any rank could not write; the earlier checkpoints are untouched.
        OvertakenError: on every rank alike, when another driver has taken the run over; nothing was committed.
    """
    on = FolderShelf(shelf) if isinstance(shelf, Path) else shelf
    first, attempt = dist.get_rank() == 0, ""
    try:
        attempt = on_all_ranks(lambda: on.attempt() if first else "", group)[0]
        sizes: dict[str, int] = {}
        for part in on_all_ranks(lambda: on.put(step, attempt, write), group):
            sizes.update(part)
        content: Manifest = {
            **Manifest(format=FORMAT, step=step, world_size=dist.get_world_size()),
            **manifest,
            **Manifest(claim=fence.token if fence else None, files=sizes),
        }

        def commit() -> str | None:
            if not first:
                return None
            # What the run has recorded goes first: steps before a checkpoint that counts are not done again. The fence
            # comes last, for as short a time as may be to the commit; `Fence.accepts` settles the rest.
            before()
            fault = fence.fault() if fence else None
            if fault is None:
                on.commit(step, attempt, content)
            return fault

        fault = on_all_ranks(commit, group)[0]
    except RanksError as error:
        if first:
            on.discard(step, attempt)
        raise _explain(error, step, on) from None
    if fault is not None:
        if first:
            on.discard(step, attempt)
        raise OvertakenError(overtaken(fault))
    if first:
        try:
            # A driver that was overtaken just now must not remove what the other one has gone on from.
            if fence is None or fence.fault() is None:
                on.prune(keep)
        except StorageError as error:
            # No fault of the run: the new checkpoint counts, and the next prune removes them.
            _log.warning("old checkpoints stay for now: %s", error)
    name = f"step-{step:08d}"
    return shelf / name if isinstance(shelf, Path) else on.place(name)


def newest_manifest(shelf: Shelf) -> tuple[str, Manifest] | None:
    """Name and manifest of the checkpoint that a run goes on from; None when there is none yet. Every rank calls it.

    Raises:
        CheckpointError: on every rank alike, when it cannot be read.
    """
    first = dist.get_rank() == 0
    # Rank 0 decides: where storage is cached, another rank may not see the newest one yet.
    name = on_all_ranks(lambda: newest(shelf) if first else None)[0]
    if name is None:
        return None
    try:
        manifest = on_all_ranks(lambda: shelf.manifest(name) if first else None)[0]
    except RanksError as error:
        raise CheckpointError(str(error)) from None
    assert manifest is not None
    return name, manifest


def restore(
    engine: Engine, shelf: Shelf, checkpoint: tuple[str, Manifest], global_batch_size: int, idle: Collection[str]
) -> None:
    """Brings an engine to the state of a checkpoint, as `load_state` does; every rank calls it.

    Args:
        engine: with the run's binding.
        shelf: of the run's checkpoints.
        checkpoint: as `newest_manifest` gives it.
        global_batch_size: samples of an optimizer step of the run that goes on.
        idle: as in `load_state`.

    Raises:
        TrainingError: on every rank alike, when it cannot be read or is of a run with another global batch.
    """
    name, manifest = checkpoint
    place, step = shelf.place(name), manifest["step"]
    # Where training is in the data is one number, step x global batch: under another it would repeat or skip samples.
    if manifest["position"] != step * global_batch_size:
        raise TrainingError(
            f"{place} was made with another global batch: the next sample is {manifest['position']}, "
            f"not {step} x {global_batch_size}"
        )
    saved, files = int(manifest["world_size"]), manifest["files"]
    try:
        load_state(engine, (shelf, name), saved, dist.get_rank(), dist.get_world_size(), idle, files)
    except CheckpointError as error:
        raise TrainingError(
            f"cannot go on from the newest checkpoint: {error}; if it is spoilt, remove its folder to use the one "
            "before"
        ) from None


def newest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint in the folder `root`; None when there is none."""
    checkpoints = complete_checkpoints(root)
    return checkpoints[0] if checkpoints else None


def complete_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, newest first; one whose files are missing or cut is left out, with a warning."""
    return [root / name for name in FolderShelf(root).complete()]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or another version of this package wrote it.
    """
    return FolderShelf(folder.parent).manifest(folder.name)


def _explain(error: RanksError, step: int, shelf: Shelf) -> CheckpointError:
    try:
        last = newest(shelf)
        kept = f"the last complete one stays: {shelf.place(last)}" if last else "no earlier one exists"
    except StorageError:
        kept = "earlier ones stay"
    return CheckpointError(
        f"cannot write the checkpoint of step {step} under {shelf.place('')} ({error}); {kept}. "
        "Free some space or mend the storage, then continue with --resume"
    )


class Saver:
    """Makes checkpoints behind the training; every rank has one and calls it alike.

    One checkpoint is written at a time: the next waits for it.
    """

    def __init__(
        self,
        shelf: Shelf | Path,
        keep: int,
        committed: Callable[[int, float], None] = lambda step, seconds: None,
        fence: Fence | None = None,
        before: Callable[[], None] = lambda: None,
        timeout_s: float | None = None,
    ) -> None:
        """
        Args:
            shelf, keep, fence, before: as in `save_checkpoint`.
            committed: called in the writing thread with each step whose checkpoint counts from now on, and the seconds
                that writing it took.
            timeout_s: as in `gloo_group`.
        """
        self._shelf = FolderShelf(shelf) if isinstance(shelf, Path) else shelf
        self._keep = keep
        self._fence = fence
        self._before = before
        self._committed = committed
        self._group = gloo_group("saving", timeout_s)
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint is known to have failed; `wait` then says why."""
        return self._error is not None

    def save(self, engine: Engine, step: int, manifest: Manifest) -> None:
        """Copies the state and starts to write it.

        Raises:
            CheckpointError: on every rank alike, when the checkpoint before this one could not be written.
        """
        self.wait()
        # Only now that the last write has ended: the buffers of the snapshot are the same ones.
        state = self._snapshot.take(engine)
        # A daemon: it may wait in a collective for ranks that are gone, and must not keep the process from its end.
        self._thread = threading.Thread(
            target=self._write, args=(state, step, manifest), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Waits until the last checkpoint is complete.

        Raises:
            CheckpointError: on every rank alike, when it could not be written.
        """
        self.close()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits for the writing thread, whatever comes of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, state: State, step: int, manifest: Manifest) -> None:
        began = time.perf_counter()
        rank = dist.get_rank()
        try:
            save_checkpoint(
                self._shelf,
                step,
                lambda folder: state.write(folder, rank),
                manifest,
                self._keep,
                self._group,
                self._fence,
                self._before,
            )
            self._committed(step, time.perf_counter() - began)
        except BaseException as error:
            # For `wait`, on the loop's side: from here it would end the thread alone.
            self._error = error
