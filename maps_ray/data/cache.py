"""A bounded folder of whole files from object stores, shared by all processes of a node.

The files used longest ago make place. Whoever fetches holds a lock on the unfinished file, which the kernel lets go
when the process ends in any way: what a killed process left is found unlocked, and removed by the next one that needs
room.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.storage import Storage
from maps_ray.files import take_lock
from maps_ray.spec import CacheSpec

_PART = 8 * 2**20
_UNFINISHED = ".part"
# What s3fs, gcsfs and others call it: of an entity tag and a time the tag is the surer.
_VERSIONS = ("ETag", "etag", "LastModified", "mtime")


def cache_folder(spec: CacheSpec) -> Path:
    """`data.cache.folder`, else `$MAPS_RAY_CACHE`, else `~/.cache/maps_ray`; without a home, below `/tmp`."""
    chosen = spec.folder or os.environ.get("MAPS_RAY_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    try:
        home = Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"maps_ray-{os.getuid()}"
    return home / ".cache" / "maps_ray"


class FileCache:
    """Fetches files; cheap to make and to pickle.

    Args:
        folder: of the cache; made when first used.
        max_bytes: that the folder takes at most, the index of data sets included.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._names: dict[str, tuple[str, int]] = {}

    def __call__(self, uri: str) -> Path | None:
        """A local copy of a file, complete; None where it does not fit beside what is being fetched.

        A copy may be removed once it is open: its content stays readable until it is closed.

        Raises:
            DatasetError: the file cannot be read, or the folder cannot be written.
        """
        if uri not in self._names:
            parent, _, name = uri.rpartition("/")
            facts = Storage(parent).facts(name)
            size = int(facts["size"])
            # A file that was replaced at the store is another file.
            version = next((str(facts[key]) for key in _VERSIONS if facts.get(key)), "")
            digest = hashlib.sha256(f"{uri}\n{size}\n{version}".encode()).hexdigest()[:32]
            self._names[uri] = digest + Path(name).suffix, size
        name, size = self._names[uri]
        path = self.folder / "files" / name
        if size > self.max_bytes:
            return None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path if _touched(path) else self._fetched(uri, path, size)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = (
                "free space there, or lower data.cache.max_gib" if full else "name another one in data.cache.folder"
            )
            raise DatasetError(f"{self.folder}: cannot write the cache ({error}); {remedy}") from None

    def _fetched(self, uri: str, path: Path, size: int) -> Path | None:
        partial = path.with_name(path.name + _UNFINISHED)
        with _locked(partial) as unfinished:
            try:
                # Another process may have fetched it while this one waited for the lock.
                if _touched(path):
                    return path
                if not self._reserve(unfinished, path.parent, size):
                    return None
                parent, _, name = uri.rpartition("/")
                storage = Storage(parent)
                # By parts, for a file of gigabytes must not lie in memory.
                for start in range(0, size, _PART):
                    os.pwrite(unfinished, storage.read(name, start, min(start + _PART, size)), start)
                # A finished file is trusted by its name: after a crash of the machine its bytes must be there.
                os.fsync(unfinished)
                try:
                    os.replace(partial, path)
                except FileNotFoundError:
                    # Where a file system has no locks, another process may have written and renamed it meanwhile.
                    if not _touched(path):
                        raise
                return path
            finally:
                partial.unlink(missing_ok=True)

    def _reserve(self, unfinished: int, folder: Path, size: int) -> bool:
        """Makes room and takes it: the unfinished file has its full length from now on, and counts with it."""
        with (self.folder / "lock").open("w") as lock:
            take_lock(lock)
            finished: list[tuple[float, int, Path]] = []
            used = _bytes_below(self.folder) - os.fstat(unfinished).st_size
            for entry in os.scandir(folder):
                path = Path(entry.path)
                with suppress(FileNotFoundError):
                    facts = entry.stat()
                    if not entry.name.endswith(_UNFINISHED):
                        finished.append((facts.st_mtime, facts.st_size, path))
                    elif facts.st_ino != os.fstat(unfinished).st_ino and _abandoned(path):
                        used -= facts.st_size
            for _, each, path in sorted(finished):
                if used + size <= self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                used -= each
            if used + size > self.max_bytes:
                return False
            os.truncate(unfinished, size)
        return True


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """An unfinished file that this process alone writes; waits for one that is being written."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # Without locks two processes may write the same; the rename decides.
            take_lock(file)
            # Else it was finished and renamed, or removed, while this process waited: begin anew.
            if _inode(path) == os.fstat(file).st_ino:
                yield file
                return
        finally:
            os.close(file)


def _abandoned(path: Path) -> bool:
    """Removes an unfinished file that nobody writes; says whether there was one."""
    with suppress(OSError):
        file = os.open(path, os.O_RDWR)
        try:
            if take_lock(file, wait_s=0):
                path.unlink()
                return True
        finally:
            os.close(file)
    return False


def _inode(path: Path) -> int | None:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None


def _touched(path: Path) -> bool:
    """Marks a file as used now; whether there is one."""
    try:
        # The time of change stands for that of the last use: file systems are often mounted not to record reads
        # (`noatime`, `relatime`).
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total
