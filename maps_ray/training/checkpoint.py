"""Checkpoints that count only when they are complete.

    <run>/checkpoints/step-00000100/
      rank-00000.safetensors   what rank 0 holds: slices of fp32 weights and moments (`state`)
      rank-00000.json          where these slices lie in their tensors, and the rank's RNG states
      ...
      manifest.json            step, world size, run spec, tracking identity, and the size of every other file

Every rank writes its own part into a hidden folder; when all have said that their part is on disk, rank 0 writes the
manifest and renames the folder. A kill, a full disk or a lost node at any moment leaves the earlier checkpoints as
they were. Pruning comes after the rename.

Why not Ray Train's own checkpoints: `ray.train.report` returns before its controller has committed anything (it polls
every 2 s), so a worker killed right after a report would start again from an older state; and Ray's storage knows a
checkpoint by the controller's snapshot, not by its content, so it could not be resumed by another cluster. Ray restarts
the workers; where they continue is read from the shared storage folder.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from maps_ray.training.errors import CheckpointError
from maps_ray.training.together import TogetherError, together

FORMAT = 1
_FOLDER = re.compile(r"step-(\d{8})")
_log = logging.getLogger(__name__)


def save_checkpoint(
    root: Path, step: int, write: Callable[[Path], list[Path]], manifest: dict[str, Any], keep: int
) -> Path:
    """Makes one checkpoint; every rank calls it.

    Args:
        root: folder of the run's checkpoints, on storage that all ranks share.
        step: optimizer steps done.
        write: writes this rank's files into the folder given and returns them.
        manifest: what rank 0 adds to the manifest.
        keep: how many checkpoints stay, this one included.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on every rank alike, when any rank could not write; the earlier checkpoints are untouched.
    """
    final = root / f"step-{step:08d}"
    partial = root / f".{final.name}.partial"
    first = dist.get_rank() == 0
    try:
        together(lambda: _fresh(partial) if first else None)
        sizes: dict[str, int] = {}
        for part in together(lambda: _written(write(partial))):
            sizes.update(part)
        content = {"format": FORMAT, "step": step, "world_size": dist.get_world_size(), **manifest, "files": sizes}
        together(lambda: _commit(partial, final, content) if first else None)
    except TogetherError as error:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise _explain(error, step, root) from None
    if first:
        for old in complete_checkpoints(root)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def newest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint below `root`; None when there is none."""
    checkpoints = complete_checkpoints(root)
    return checkpoints[0] if checkpoints else None


def complete_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints, newest first; one whose files are missing or cut is left out, with a warning."""
    if not root.is_dir():
        return []
    folders = sorted((p for p in root.iterdir() if _FOLDER.fullmatch(p.name)), reverse=True)
    return [folder for folder in folders if _is_complete(folder)]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or another version of this package wrote it.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read checkpoint {folder}: {error}") from None
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {folder} has format {manifest.get('format')}, this package reads {FORMAT}")
    return dict(manifest)


def _is_complete(folder: Path) -> bool:
    try:
        files = read_manifest(folder)["files"]
        cut = [name for name, size in files.items() if (folder / name).stat().st_size != size]
    except (CheckpointError, OSError, KeyError) as error:
        _log.warning("checkpoint %s is not complete and is not used: %s", folder, error)
        return False
    if cut:
        _log.warning("checkpoint %s is not used: %s changed their size", folder, ", ".join(cut[:10]))
    return not cut


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _written(paths: list[Path]) -> dict[str, int]:
    for path in paths:
        _sync(path)
    return {path.name: path.stat().st_size for path in paths}


def _commit(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    path = partial / "manifest.json"
    path.write_text(json.dumps(manifest))
    _sync(path)
    _sync(partial)
    # Only a folder that no reader accepts can be in the way: a complete one is never written again.
    shutil.rmtree(final, ignore_errors=True)
    os.rename(partial, final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: TogetherError, step: int, root: Path) -> CheckpointError:
    last = newest_checkpoint(root)
    kept = f"the last complete one stays: {last}" if last else "no earlier one exists"
    return CheckpointError(
        f"cannot write the checkpoint of step {step} under {root} ({error}); {kept}. "
        "Free some space or mend the storage, then continue with --resume"
    )
