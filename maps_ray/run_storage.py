"""A run's or a sweep's folder on an object store: `s3://`, `gs://` and what else fsspec knows.

An object store has no folders to rename and no files to append to. An object is there whole or not at all; so what
makes a group of them count, such as a checkpoint's manifest, is written last. Each node keeps a local copy of what it
works on (`cluster.scratch`); this module carries files between the two, and asks again for minutes where the store is
overloaded or out of reach. Credentials and endpoints come from the environment, see `maps_ray.data.storage`, which is
imported when the first object is asked for: every command imports this module for its arguments.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psutil

from maps_ray.files import replaced
from maps_ray.spec import ClusterSpec, Problem, RunSpec
from maps_ray.spec.paths import scratch_folder

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from pyarrow.fs import FileSystem

PATIENCE_S = 300.0
"""How long an object store may fail before a run gives up; its training goes on meanwhile."""
ASK_S = 8.0
"""The same for a command that only looks."""
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 15.0
_TRANSFERS = 8
# What a transfer of a whole file or a request may take on a slow network; then it is made again.
_ANSWER_S = 60
# botocore follows a redirect to another region for ever where the answer does not say to which.
_REGION = ("permanentredirect", "authorizationheadermalformed", "illegallocationconstraint", "recursionerror")
_KEY = ("invalidaccesskeyid", "signaturedoesnotmatch", "invalidtoken", "expiredtoken")
Value = TypeVar("Value")


class StorageError(RuntimeError):
    """The object store does not take or give something; the message says what, why, and what to do."""


class NotThere(StorageError):
    """No such object, or no such bucket."""


class RunStorage:
    """A folder on an object store. Cheap to make and to pickle; connections are made in each process when first used.

    Args:
        address: `s3://bucket/folder`.
        patience_s: how long to ask again where the store fails.
    """

    def __init__(self, address: str, patience_s: float = PATIENCE_S) -> None:
        self.address = address.rstrip("/")
        self.patience_s = patience_s
        self._files: tuple[int, AbstractFileSystem] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": None}

    def at(self, name: str) -> str:
        """Address of an object in the folder."""
        return f"{self.address}/{name}" if name else self.address

    def inside(self, name: str) -> RunStorage:
        """A folder in this one."""
        return RunStorage(self.at(name), self.patience_s)

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        try:
            return bool(self._ask(name, lambda files, path: files.info(path))["type"] == "file")
        except NotThere:
            return False

    def read(self, name: str) -> bytes:
        """An object's content.

        Raises:
            NotThere: no such object.
            StorageError: no access, or a store that fails again and again.
        """
        return self._ask(name, lambda files, path: bytes(files.cat_file(path)))

    def files(self, folder: str = "") -> dict[str, int]:
        """All objects below a folder, by name relative to it and in order, with their sizes."""
        try:
            listed = self._ask(folder, lambda files, path: files.find(path, detail=True))
        except NotThere:
            return {}
        prefix = self.at(folder).split("://", 1)[1] + "/"
        sizes = {name.split("://", 1)[-1]: int(facts["size"] or 0) for name, facts in listed.items()}
        # `find` gives an object of the folder's own name, too.
        return {name.removeprefix(prefix): size for name, size in sorted(sizes.items()) if name.startswith(prefix)}

    def write(self, name: str, content: bytes) -> None:
        """Puts an object, in place of one of that name; a reader sees the old one or the new one."""
        self._ask(name, lambda files, path: files.pipe_file(path, content))

    def upload(self, source: Path, name: str) -> None:
        """Puts a file, in parts where it is large."""
        self._ask(name, lambda files, path: files.put_file(str(source), path))

    def upload_folder(self, source: Path, folder: str, last: tuple[str, ...] = ()) -> None:
        """Puts all files of a local folder, those named `last` after the others, and removes what it has not."""
        names = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
        stale = [name for name in self.files(folder) if name not in names]
        for group in ([name for name in names if name not in last], [name for name in last if name in names]):
            _side_by_side(lambda name: self.upload(source / name, f"{folder}/{name}"), group)
        for name in stale:
            self.remove(f"{folder}/{name}")

    def fetch(self, name: str, to: Path) -> None:
        """Copies an object into a local file, which is there whole or not at all.

        Raises:
            NotThere: no such object.
            StorageError: no access, a store that fails again and again, or no room.
        """
        try:
            with full_scratch_named(to.parent, self.at(name), lambda: self._size(name)):
                to.parent.mkdir(parents=True, exist_ok=True)
                with replaced(to, shared=True) as partial:
                    self._ask(name, lambda files, path: files.get_file(path, str(partial)))
        except OSError as error:
            raise StorageError(f"{self.at(name)}: cannot be copied to {to.parent} ({error})") from None

    def fetch_folder(
        self, folder: str, to: Path, wanted: Callable[[str, int], bool] = lambda name, size: True
    ) -> list[str]:
        """Copies the objects below a folder that are wanted, by name and size; returns their names.

        Raises:
            StorageError: as `fetch`. Where they have no room together, nothing is copied.
        """
        sizes = {name: size for name, size in self.files(folder).items() if wanted(name, size)}
        # Those of an earlier time make room for the new ones.
        needed = sum(sizes.values()) - sum(path.stat().st_size for name in sizes if (path := to / name).is_file())
        if needed > _free(to):
            raise StorageError(no_room(to, self.at(folder), needed))
        _side_by_side(lambda name: self.fetch(f"{folder}/{name}".lstrip("/"), to / name), list(sizes))
        return list(sizes)

    def remove(self, name: str) -> None:
        """Removes an object; nothing happens where there is none."""
        try:
            self._ask(name, lambda files, path: files.rm_file(path))
        except NotThere:
            return

    def remove_folder(self, folder: str, first: str = "") -> None:
        """Removes all objects below a folder, the one named `first` before the others."""
        names = list(self.files(folder))
        for name in sorted(names, key=lambda name: name != first):
            self.remove(f"{folder}/{name}")

    def copy_folder(self, source: str, to: str, last: str) -> None:
        """Copies objects within the store, the one named `last` after the others.

        Raises:
            NotThere: the source has none of that name.
        """
        names = [name for name in self.files(source) if name != last]
        _side_by_side(lambda name: self._copy(f"{source}/{name}", f"{to}/{name}"), names)
        self._copy(f"{source}/{last}", f"{to}/{last}")

    def _size(self, name: str) -> int:
        return int(self._ask(name, lambda files, path: files.info(path))["size"])

    def _copy(self, source: str, to: str) -> None:
        self._ask(source, lambda files, path: files.cp_file(path, self.at(to)))

    def arrow(self) -> tuple[str, FileSystem]:
        """The folder as Ray's libraries take it: its path, and pyarrow's file system around fsspec's."""
        import fsspec
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        protocol, _, path = self.address.partition("://")
        options: dict[str, object] = {"skip_instance_cache": True, "use_listings_cache": False}
        if protocol in ("s3", "s3a"):
            # Ray's libraries ask once: here botocore asks again for them.
            options["config_kwargs"] = {"retries": {"total_max_attempts": 10, "mode": "standard"}}
        return path, PyFileSystem(FSSpecHandler(fsspec.filesystem(protocol, **options)))

    def require_writable(self) -> None:
        """Writes an object, reads it back and removes it.

        Raises:
            StorageError: that cannot be done, with the remedy.
        """
        probe = RunStorage(self.address, ASK_S)
        name, content = f".maps_ray-{uuid.uuid4().hex}", b"maps_ray looks whether it can write here"
        probe.write(name, content)
        try:
            if probe.read(name) != content or name not in probe.files():
                raise StorageError(f"{self.address}: what was written is not what is read; choose another store")
        finally:
            probe.remove(name)

    def _ask(self, name: str, act: Callable[[AbstractFileSystem, str], Value]) -> Value:
        """Asks the store, again after a while where it is overloaded or the network fails."""
        from maps_ray.data.storage import first_line, is_passing

        where, wait, deadline, tries = self.at(name), _FIRST_WAIT_S, time.monotonic() + self.patience_s, 0
        while True:
            tries += 1
            try:
                return act(self._connected(), where)
            except Exception as error:
                fault = _meaning(where, error)
                if fault is None and _is_local(error):
                    raise
                if fault is None and (time.monotonic() + wait > deadline or not is_passing(error)):
                    fault = StorageError(
                        f"{where}: the object store fails after {tries} tries ({first_line(error)}); look after it, or "
                        "after the endpoint (AWS_ENDPOINT_URL) and the network"
                    )
                if fault is not None:
                    raise fault from None
            # By chance, so that workers that failed together do not all come back at once.
            time.sleep(wait * random.uniform(1, 1.5))
            wait = min(2 * wait, _LONGEST_WAIT_S)

    def _connected(self) -> AbstractFileSystem:
        """fsspec's file system, one for each process: connections do not survive a fork."""
        if self._files is None or self._files[0] != os.getpid():
            import fsspec

            from maps_ray.data.dataset_error import DatasetError
            from maps_ray.data.storage import require_protocol

            protocol = self.address.split("://", 1)[0]
            try:
                require_protocol(protocol, self.address)
            except DatasetError as error:
                raise StorageError(str(error)) from None
            # No listing from before: what other nodes write must be seen. An instance of its own, for `retries` below
            # would hold for all that share one.
            options: dict[str, object] = {"skip_instance_cache": True, "use_listings_cache": False}
            if protocol in ("s3", "s3a"):
                quick = self.patience_s < _ANSWER_S
                answer = min(self.patience_s, _ANSWER_S)
                options["config_kwargs"] = {
                    "connect_timeout": min(answer, 10),
                    "read_timeout": answer,
                    "retries": {"total_max_attempts": 1 if quick else 3, "mode": "standard"},
                }
            files = fsspec.filesystem(protocol, **options)
            if hasattr(files, "retries"):
                # Its own loop knows no deadline; this module's has one.
                files.retries = 1
            self._files = os.getpid(), files
        return self._files[1]


def run_storage(spec: RunSpec) -> RunStorage | None:
    """Where a run's folder is on an object store; None where it lies in a folder that all nodes see."""
    return None if isinstance(spec.cluster.storage, Path) else RunStorage(spec.run_place)


def storage_problems(cluster: ClusterSpec) -> list[Problem]:
    """What is wrong with an object store, found out by writing to it, and with this node's scratch folder."""
    if isinstance(cluster.storage, Path):
        return []
    problems = []
    try:
        RunStorage(cluster.storage).require_writable()
    except StorageError as error:
        problems.append(Problem("cluster.storage", cluster.storage, str(error)))
    try:
        make_scratch(cluster.scratch)
    except StorageError as error:
        problems.append(Problem("cluster.scratch", str(scratch_folder(cluster.scratch)), str(error)))
    return problems


def make_scratch(chosen: Path | None) -> Path:
    """The scratch folder of this node, made for this user alone where it is not there.

    Raises:
        StorageError: it cannot be written, or is another user's.
    """
    folder = scratch_folder(chosen)
    remedy = "choose another folder in cluster.scratch or MAPS_RAY_SCRATCH"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise StorageError(f"{folder} cannot be written; {remedy}")
        # Temporary files are everybody's: another user may have made a folder of this name first.
        if chosen is None and folder.stat().st_uid != os.getuid():
            raise StorageError(f"{folder} belongs to another user; {remedy}")
    except OSError as error:
        raise StorageError(f"{folder} cannot be made ({error}); {remedy}") from None
    return folder


@contextmanager
def full_scratch_named(folder: Path, what: str, needed: Callable[[], int] | None = None) -> Iterator[None]:
    """Says of a disk that is full where it is, what was to be there, and what to do.

    Args:
        folder: in this node's scratch; what the block had begun to write is gone when it fails.
        what: is written, for the message.
        needed: gives the bytes that it takes, where that is known.

    Raises:
        StorageError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if not _is_full(error):
            raise
        raise StorageError(no_room(folder, what, needed() if needed is not None else None)) from None


def no_room(folder: Path, what: str, needed: int | None = None) -> str:
    """What is said where something has no room in this node's scratch.

    Args:
        folder: where it was to be.
        what: it is.
        needed: its bytes, where that is known.
    """
    takes = "" if needed is None else f" and it takes {needed / 2**20:,.1f} MiB"
    return (
        f"{what}: no room in {folder}, where {_free(folder) / 2**20:,.1f} MiB are free{takes}: free some space there, "
        "or name a folder on a larger disk in cluster.scratch or MAPS_RAY_SCRATCH"
    )


def _free(folder: Path) -> int:
    """Bytes that may still be written below a folder, which need not be there yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


@contextmanager
def work_folder(chosen: Path | None) -> Iterator[Path]:
    """An empty folder in this node's scratch, removed at the end; first those of processes that were killed are."""
    root = make_scratch(chosen) / "work"
    root.mkdir(exist_ok=True)
    own = psutil.Process()
    for left in root.iterdir():
        # From the right: a host's name may have dashes.
        host, pid, began = [*left.name.rsplit("-", 3), "", "", ""][:3]
        if host == socket.gethostname() and not _lives(pid, began):
            shutil.rmtree(left, ignore_errors=True)
    folder = root / f"{socket.gethostname()}-{own.pid}-{int(own.create_time())}-{uuid.uuid4().hex[:6]}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lives(pid: str, began: str) -> bool:
    try:
        return abs(psutil.Process(int(pid)).create_time() - int(began)) <= 1
    except (psutil.Error, ValueError):
        return False


def _side_by_side(act: Callable[[str], None], names: list[str]) -> None:
    if names:
        with ThreadPoolExecutor(min(_TRANSFERS, len(names))) as pool:
            # As a list, which raises what a thread has raised.
            list(pool.map(act, names))


def _is_local(error: BaseException) -> bool:
    """Whether a local file is at fault, and not the store."""
    return _is_full(error) or (isinstance(error, OSError) and error.filename is not None)


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _meaning(where: str, error: BaseException) -> StorageError | None:
    """What a fault means that asking again does not mend; None for others."""
    from maps_ray.data.storage import first_line, no_credentials

    said, bucket = first_line(error), "/".join(where.split("/")[:3])
    lower = f"{type(error).__name__}: {error} {error.__cause__}".lower()
    if isinstance(error, StorageError):
        return error
    if no_credentials(error):
        return StorageError(
            f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE (gs: "
            "GOOGLE_APPLICATION_CREDENTIALS) in the environment of every node"
        )
    if any(sign in lower for sign in _KEY):
        return StorageError(f"{where}: the key is not accepted ({said}); check AWS_ACCESS_KEY_ID and its secret")
    if "certificate_verify_failed" in lower:
        return StorageError(
            f"{bucket}: the endpoint's certificate is not trusted ({said}); set AWS_CA_BUNDLE to the file of its "
            "authority"
        )
    if any(sign in lower for sign in _REGION):
        return StorageError(f"{bucket} lies in another region ({said}); set AWS_DEFAULT_REGION to the bucket's")
    if "bucket does not exist" in lower or "nosuchbucket" in lower:
        return NotThere(f"{bucket}: no such bucket; make it, or correct cluster.storage")
    # Those that fsspec makes of a store's answer name no file; a local one's do.
    if isinstance(error, FileNotFoundError) and error.filename is None:
        return NotThere(f"{where}: not there")
    if isinstance(error, PermissionError) and error.filename is None:
        return StorageError(
            f"{where}: access denied ({said}); check the key in the environment and what it may do here"
        )
    return None
