"""Files that several processes read and write: replaced as a whole, locked, and lines that a kill cannot spoil."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_LOOK_S = 0.05
_LAG_LOOK_S = 0.5
_LFS = b"version https://git-lfs.github.com/spec/"


@contextmanager
def replaced(path: Path, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """A name to write a file under, which takes the place of `path` when the block ends, and vanishes when it fails.

    A reader sees the old file or the new one, never a part.

    Args:
        path: its folder is there.
        durable: whether the file must outlive a loss of power: it is on disk before it takes its place.
        shared: whether others may write it at the same time: the last one's stays. What a killed writer left is then
            never written over, and stays beside it.
    """
    # Beside it, for a rename reaches no other file system; hidden, so that no pattern takes it for a finished one.
    own = f".{uuid.uuid4().hex[:8]}" if shared else ""
    partial = path.with_name(f".{path.name}{own}.partial")
    try:
        yield partial
        if durable:
            sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes, durable: bool = True, shared: bool = False) -> None:
    """Replaces a file by one with this content, as `replaced`."""
    with replaced(path, durable, shared) as partial:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_json(path: Path, value: object, durable: bool = True, shared: bool = False) -> None:
    """Replaces a file by one that holds a JSON value, indented for a person to read."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", durable, shared)


def read_json(path: Path) -> Any:
    """A file's JSON value, or None when there is no file.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def sync(path: Path) -> None:
    """Waits until a file is on disk; of a folder, the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remedy(path: str | Path, otherwise: str = "fetch or write it again") -> str:
    """What to do about a file that cannot be what its name says: a clone without Git LFS leaves pointers in the place
    of data and weights, and leaves them again."""
    with suppress(OSError, ValueError), open(path, "rb") as file:
        if file.read(len(_LFS)) == _LFS:
            return "it is a pointer of Git LFS and not the file itself: run `git lfs pull` where it was cloned"
    return otherwise


def seen(path: Path, wait_s: float) -> bool:
    """Whether a file is there: at once, or within `wait_s` seconds where another node has just written it.

    Network file systems keep in mind for a while (NFS, EFS: 60 s) that a name was absent.
    """
    deadline = time.monotonic() + wait_s
    while not path.exists():
        if time.monotonic() >= deadline:
            return False
        # Reading the folder has a client of NFS ask the server again (nfs(5), "Directory entry caching").
        with suppress(OSError):
            os.listdir(path.parent)
        time.sleep(_LAG_LOOK_S)
    return True


def append_line(path: Path, record: Mapping[str, object], durable: bool = False) -> None:
    """Adds a JSON object to a file of one a line.

    Args:
        path: made when missing.
        record: the object.
        durable: whether it must outlive a loss of power.
    """
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            # A line that a kill cut short must not swallow this one.
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")
        if durable:
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of one a line, without what a kill cut short; none where there is no file."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def take_lock(file: int | IO[str] | IO[bytes], wait_s: float | None = None) -> bool:
    """Takes the exclusive lock of an open file, which the kernel frees when the file is closed or its process dies.

    Args:
        file: open, or its descriptor.
        wait_s: how long to wait for another holder; none waits for as long as it takes.

    Returns:
        Whether this process may go on as the only one. Where a file system has no locks, it may.
    """
    deadline = None if wait_s is None else time.monotonic() + wait_s
    while True:
        try:
            # Not `lockf`: a process loses POSIX locks when it closes any descriptor of the file (fcntl(2)).
            fcntl.flock(file, fcntl.LOCK_EX if deadline is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if deadline is None or time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_S)
        except OSError as error:
            # Network file systems mounted without a lock daemon (NFS `nolock`, some FUSE).
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
            return True
        else:
            return True


@contextmanager
def file_lock(path: Path, wait_s: float | None) -> Iterator[bool]:
    """The lock of a file that is there for nothing else, made when missing; yields what `take_lock` gives."""
    with path.open("a") as file:
        yield take_lock(file, wait_s)
