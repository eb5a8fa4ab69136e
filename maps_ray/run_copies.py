"""Local copies of what lies on an object store, for commands that look at a run or sweep there, or work on it.

An argument that names a run may be an address; what a command reads of it is fetched into this node's scratch,
checkpoints never. Some copies go with the command (`run_at`), others stay (`fetched`): those that a command adds to, or
that an interrupted one goes on from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maps_ray.run_storage import ASK_S, RunStorage, StorageError, make_scratch, work_folder
from maps_ray.spec import Problem, SpecError
from maps_ray.spec.paths import home, is_address, mirror_folder, scratch_folder

# Folders that no reader of a run or sweep asks for.
_UNREAD = "checkpoints|kept|given|workers"
_WEIGHTS = (".safetensors", ".pt", ".bin")


def fetched(address: str, scratch: Path | None = None, without: str = "", weights: bool = True) -> Path:
    """The local copy of a run's or a sweep's folder on an object store, fetched now, without its checkpoints; of a spec
    there, the file. It lies apart from what a driver on this node works on.

    Args:
        address: of the folder or spec.
        scratch: as `cluster.scratch`.
        without: names of further folders that are not fetched, as a regular expression has them: `final|tune`.
        weights: whether files of weights are fetched, too.

    Raises:
        SpecError: nothing is there, or it cannot be read.
    """
    folder = mirror_folder(address.rstrip("/"), _fetched_root(scratch))
    try:
        make_scratch(scratch)
        _fetch(address, folder, without, weights)
    except StorageError as error:
        raise SpecError([Problem("RUN", address, str(error))]) from None
    return folder


@contextmanager
def run_at(place: str, scratch: Path | None = None, field: str = "RUN", without: str = "") -> Iterator[Path]:
    """A run or checkpoint as a folder: a path as it is; of an address, a copy that goes when the block ends;
    one of a command that was killed goes with the next.

    Args:
        place: as `run_argument` gives it.
        scratch: as `cluster.scratch`.
        field: that names it, for messages.
        without: as in `fetched`.

    Raises:
        SpecError: nothing is at the address, or it cannot be read; and what the block raises, with the address in place
            of the copy's path, which means nothing to who gave an address.
    """
    if not is_address(place):
        yield Path(place)
        return
    address = place.rstrip("/")
    try:
        with work_folder(scratch) as room:
            folder = room / address.rpartition("/")[2]
            _fetch(address, folder, without)
            try:
                yield folder
            except SpecError as error:
                said = [(p.field, p.value, p.message.replace(str(folder), address)) for p in error.problems]
                raise SpecError(
                    Problem(name, str(value).replace(str(folder), address) if isinstance(value, str) else value, text)
                    for name, value, text in said
                ) from None
    except StorageError as error:
        raise SpecError([Problem(field, address, str(error))]) from None


def run_argument(text: str) -> str:
    """An argument of the command line that names a run or a checkpoint: an address, or a path with `~` replaced.

    Raises:
        ValueError: no home folder is known.
    """
    return text if is_address(text) else str(home(text))


def fetched_argument(text: str) -> Path:
    """An argument of the command line that names a spec, or a run that is added to: a path, or what is fetched from an
    address.

    Raises:
        ValueError: no home folder is known.
        SpecError: nothing is at the address.
    """
    return fetched(text) if is_address(text) else home(text)


def address_of(folder: Path) -> str | None:
    """What a folder is a copy of that `fetched` has made, or lies in; None for others."""
    root = _fetched_root(None).resolve()
    if not folder.resolve().is_relative_to(root):
        return None
    protocol, *parts = folder.resolve().relative_to(root).parts
    return f"{protocol}://{'/'.join(parts)}"


def records_argument(text: str) -> Path:
    """The same of a run of which only the records are read."""
    return fetched(text, without="final|rollouts") if is_address(text) else home(text)


def _fetched_root(scratch: Path | None) -> Path:
    return scratch_folder(scratch) / "fetched"


def _fetch(address: str, folder: Path, without: str = "", weights: bool = True) -> None:
    """Brings a folder up to an object store's.

    Raises:
        StorageError: nothing is there, or it cannot be read.
    """
    address = address.rstrip("/")
    storage = RunStorage(address, ASK_S)
    if address.endswith((".yaml", ".yml")):
        storage.fetch("", folder)
        return
    left = re.compile(rf"(^|/)({'|'.join(filter(None, (_UNREAD, without)))})/")

    def wanted(name: str) -> bool:
        return not left.search(name) and (weights or not name.endswith(_WEIGHTS))

    names: set[str] = set()

    def lacking(name: str, size: int) -> bool:
        if not wanted(name):
            return False
        names.add(name)
        path = folder / name
        # Rollouts of these weights may have been made here, and be ahead of those there: their files only grow.
        return not (name.startswith("rollouts/") and path.is_file() and path.stat().st_size >= size)

    storage.fetch_folder("", folder, lacking)
    if not names:
        raise StorageError(f"nothing is there: no object begins with {address}/")
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        # What was not looked for may be in use by another command.
        if path.is_file() and name not in names and wanted(name) and not name.startswith("rollouts/"):
            path.unlink(missing_ok=True)
