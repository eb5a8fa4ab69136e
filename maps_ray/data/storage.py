"""Reads the files of a data set wherever they lie: a local folder, or an object store through fsspec.

`s3://` needs nothing more, `gs://` the extra `gcs`. Credentials and endpoints come from the environment, as boto3 and
gcloud take them (`AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, ...), and
fsspec's own settings hold: `FSSPEC_S3_ANON=true` reads public buckets. Reads are ranged: what is asked for is fetched.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from maps_ray.data.dataset_error import DatasetError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from fsspec import AbstractFileSystem

Fetch = Callable[[str], Path | None]
"""Gives a local copy of a file of an object store: a bounded cache; None where it has no room."""
Value = TypeVar("Value")

_TRIES = 5
# Words, for fsspec's back ends and their transports raise errors of their own, without a common class.
_PASSING = (
    *("429", "500", "502", "503", "504", "slow", "reduce your", "timeout", "timed out", "unavailable", "busy"),
    *("connect", "internalerror", "internal error", "incomplete", "endpoint", "reset by peer"),
)
_FIRST_WAIT_S = 0.25
_SMALL = 32 * 2**20
_SAMPLED_FILES = 2048
_SAMPLED_BYTES = 16 * 1024
# An object store answers many requests at once, each after a while.
_REQUESTS = 16
_BLOCK = 8 * 1024
_BLOCKS_KEPT = 64


class Storage:
    """One folder, read-only. Cheap to make and to pickle; connections are made in each process when first used.

    Args:
        root: path, or `file://`, `s3://bucket/folder`, `gs://bucket/folder` and what else fsspec knows.
        fetch: for files that are read as a whole; they are read by ranges without it.

    Raises:
        DatasetError: a protocol that fsspec does not know.
    """

    def __init__(self, root: str | Path, fetch: Fetch | None = None) -> None:
        text = os.fspath(root)
        if text.startswith("file://"):
            text = text.removeprefix("file://")
        self.protocol = text.split("://", 1)[0] if "://" in text else "file"
        self.local: Path | None = Path(text).expanduser() if self.protocol == "file" else None
        self.root = str(self.local) if self.local is not None else text.rstrip("/")
        self.fetch = fetch
        self._files: tuple[int, AbstractFileSystem] | None = None
        if self.local is None:
            # At once, so that a spec is refused before a worker starts.
            require_protocol(self.protocol, self.root)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": None}

    def at(self, name: str) -> str:
        """Path or address of a file, as messages show it.

        Raises:
            DatasetError: the name leads out of the folder.
        """
        if leads_out(name):
            raise DatasetError(f"{self.root}: {name!r} leads out of the data set; it must lie inside")
        return f"{self.root}/{name}" if name else self.root

    def exists(self) -> bool:
        """Whether the folder, or file, itself is there; an object store has no folders, and says yes.

        Raises:
            DatasetError: no access.
        """
        return self.local is None or self._local("", Path.exists)

    def is_file(self, name: str) -> bool:
        """Whether there is such a file.

        Raises:
            DatasetError: no access.
        """
        if self.local is not None:
            return self._local(name, Path.is_file)
        return self._ask(name, _is_file)

    def size(self, name: str) -> int:
        """In bytes.

        Raises:
            DatasetError: no such file, or no access.
        """
        if self.local is not None:
            return self._local(name, lambda path: path.stat().st_size)
        return self._ask(name, lambda remote, path: int(remote.size(path)))

    def facts(self, name: str) -> dict[str, Any]:
        """What the store says of a file: `size`, and what tells its content from an earlier one.

        Raises:
            DatasetError: no such file, or no access.
        """
        return self._ask(name, lambda remote, path: dict(remote.info(path)))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start .. stop - 1 of a file, or all of it.

        Raises:
            DatasetError: no such file, no access, or an object store that fails again and again.
        """
        if self.local is not None:
            return self._local(name, lambda path: _read_local(path, start, stop))
        if stop is not None and stop <= start:
            return b""
        return self._ask(name, lambda remote, path: bytes(remote.cat_file(path, start=start, end=stop)))

    def text(self, name: str) -> str:
        """A file's text.

        Raises:
            DatasetError: as `read`, or bytes that are not UTF-8.
        """
        try:
            return self.read(name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DatasetError(f"{self.at(name)}: not UTF-8 text ({error}); fetch or write it again") from None

    def files(self, folder: str = "") -> dict[str, int]:
        """All files below a folder, by name relative to the root and in order, with their sizes; none where there is
        no such folder. Hidden ones are left out: `.git`, `.cache`, `.DS_Store`, macOS's `._*` beside each file.

        Raises:
            DatasetError: no access.
        """
        start = self.at(folder)
        if self.local is not None:
            return dict(sorted(_walk(start, f"{folder}/" if folder else "")))
        listed = self._ask(folder, lambda remote, path: _find(remote, path))
        prefix = self.root.split("://", 1)[1].rstrip("/") + "/"
        sizes = {
            name.split("://", 1)[-1].removeprefix(prefix): int(facts["size"] or 0) for name, facts in listed.items()
        }
        return {name: size for name, size in sorted(sizes.items()) if not re.search(r"(^|/)\.", name)}

    def open(self, name: str) -> BinaryIO:
        """A file to read and seek in; of an object store, what is read is fetched.

        Raises:
            DatasetError: no such file, or no access.
        """
        if self.local is not None:
            return self._local(name, lambda path: path.open("rb"))
        # For `read` to give as many bytes as are asked for; by one byte, because `_Ranges` has blocks of its own.
        return io.BufferedReader(_Ranges(self, name), 1)

    def path_or_file(self, name: str) -> Path | BinaryIO:
        """What libraries that read a whole file are given: its path, a fetched copy of it, or the open file."""
        if self.local is not None:
            # For its error alone: libraries say less of a file that is missing.
            self.size(name)
            return Path(self.at(name))
        fetched = self.fetch(self.at(name)) if self.fetch is not None else None
        return fetched if fetched is not None else self.open(name)

    def _local(self, name: str, act: Callable[[Path], Value]) -> Value:
        path = Path(self.at(name))
        try:
            return act(path)
        except FileNotFoundError:
            raise DatasetError(f"{path}: file is missing; fetch or write it again") from None
        except (OSError, ValueError) as error:
            raise DatasetError(f"{path}: cannot read ({error})") from None

    def _ask(self, name: str, act: Callable[[AbstractFileSystem, str], Value]) -> Value:
        """Asks the object store, again after a while where it is overloaded or the network fails."""
        where = self.at(name)
        wait = _FIRST_WAIT_S
        for left in reversed(range(_TRIES)):
            try:
                return act(self._remote(), where)
            except FileNotFoundError:
                raise DatasetError(f"{where}: not found (404); check bucket and key") from None
            except PermissionError as error:
                raise DatasetError(
                    f"{where}: access denied (403: {first_line(error)}); check the credentials in the environment and "
                    "what they may read"
                ) from None
            except Exception as error:
                if no_credentials(error):
                    raise DatasetError(
                        f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE "
                        "(gs: GOOGLE_APPLICATION_CREDENTIALS), or FSSPEC_S3_ANON=true for a public bucket"
                    ) from None
                if "CERTIFICATE_VERIFY_FAILED" in f"{error} {error.__cause__}":
                    raise DatasetError(
                        f"{where}: the endpoint's certificate is not trusted ({first_line(error)}); set AWS_CA_BUNDLE "
                        "to the file of its authority"
                    ) from None
                if not left or not is_passing(error):
                    tries = f" after {_TRIES} tries" if not left else ""
                    raise DatasetError(f"{where}: cannot read{tries} ({first_line(error)})") from None
            # Apart, so that processes that were refused together do not come back together.
            time.sleep(wait * random.uniform(1, 1.5))
            wait *= 2
        raise AssertionError("unreachable")

    def _remote(self) -> AbstractFileSystem:
        """fsspec's file system, one for each process: connections do not survive a fork."""
        if self._files is None or self._files[0] != os.getpid():
            import fsspec

            self._files = os.getpid(), fsspec.filesystem(self.protocol)
        return self._files[1]


def content(storage: Storage, sizes: Mapping[str, int]) -> Iterator[str | bytes]:
    """What tells the content of files without a pass over terabytes: their names and sizes, and all bytes of a small
    data set; of a large one the beginning and the end of many files, where headers, checksums and the bounds of
    columns stand."""
    yield from (f"{name} {size}" for name, size in sizes.items())
    parts = [(name, 0, size) for name, size in sizes.items()]
    if sum(sizes.values()) > _SMALL:
        stride = -(-len(parts) // _SAMPLED_FILES)
        parts = [
            (name, max(start, 0), min(start + _SAMPLED_BYTES, size))
            for name, _, size in parts[::stride]
            for start in (0, size - _SAMPLED_BYTES)
        ]
    with ThreadPoolExecutor(1 if storage.local is not None else _REQUESTS) as pool:
        yield from pool.map(lambda part: storage.read(*part), parts)


def digest(parts: Iterable[str | bytes]) -> str:
    """SHA-256 over parts, each with its length."""
    total = hashlib.sha256()
    for part in parts:
        # A name that is no UTF-8 comes with surrogates for its bytes.
        data = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        # Else "ab" and "c" would be the same as "a" and "bc".
        total.update(f"{len(data)}:".encode())
        total.update(data)
    return total.hexdigest()


def leads_out(name: str) -> bool:
    """Whether a name, of metadata that may come from anywhere, is of a file outside the data set's folder."""
    parts = name.replace("\\", "/").split("/")
    return (not parts[0] and len(parts) > 1) or ".." in parts or "://" in name or "\0" in name


class _Ranges(io.RawIOBase):
    """A file of an object store. Small reads are served from a few blocks, so that a header does not cost a request
    for each of its fields; large ones are fetched as they are asked for."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name
        self._size = storage.size(name)
        self._place = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._place + len(view), self._size)
        if stop <= self._place:
            return 0
        data = self._bytes(self._place, stop)
        view[: len(data)] = data
        self._place += len(data)
        return len(data)

    def _bytes(self, start: int, stop: int) -> bytes:
        if stop - start >= _BLOCK:
            return self._storage.read(self._name, start, stop)
        first, last = start // _BLOCK, (stop - 1) // _BLOCK
        whole = b"".join(self._block(number) for number in range(first, last + 1))
        return whole[start - first * _BLOCK : stop - first * _BLOCK]

    def _block(self, number: int) -> bytes:
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        data = self._storage.read(self._name, number * _BLOCK, min((number + 1) * _BLOCK, self._size))
        self._blocks[number] = data
        while len(self._blocks) > _BLOCKS_KEPT:
            self._blocks.popitem(last=False)
        return data


def require_protocol(protocol: str, root: str) -> None:
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise DatasetError(
            f"{root}: unknown protocol {protocol!r}; give a path, file://, s3:// or gs:// and what fsspec knows"
        ) from None
    except ImportError as error:
        remedy = "pip install 'maps_ray[gcs]'" if protocol in ("gs", "gcs") else str(error)
        raise DatasetError(f"{root}: {protocol}:// needs another package: {remedy}") from None


def _is_file(remote: AbstractFileSystem, path: str) -> bool:
    # fsspec's own `isfile` answers no where access is denied.
    try:
        return bool(remote.info(path)["type"] == "file")
    except FileNotFoundError:
        return False


def _find(remote: AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    try:
        return dict(remote.find(path, detail=True))
    except FileNotFoundError:
        return {}


def _walk(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Names below the prefix, and sizes. Plain strings: there may be a hundred thousand."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise DatasetError(f"{folder}: cannot list ({error})") from None
    for entry in entries:
        if entry.name.startswith("."):
            continue
        # Links are followed: the Hub's cache shows its files by them.
        if entry.is_dir():
            yield from _walk(entry.path, f"{prefix}{entry.name}/")
        elif entry.is_file():
            yield prefix + entry.name, entry.stat().st_size


def _read_local(path: Path, start: int, stop: int | None) -> bytes:
    with path.open("rb", buffering=0) as file:
        if start:
            file.seek(start)
        if stop is None:
            return file.readall()
        data = bytearray(max(stop - start, 0))
        view, done = memoryview(data), 0
        while done < len(data):
            # One call gives 2 GiB at most (Linux, read(2)).
            count = file.readinto(view[done:])
            if not count:
                break
            done += count
        return bytes(view[:done])


def no_credentials(error: BaseException) -> bool:
    names = {type(cause).__name__ for cause in _causes(error)}
    return bool(names & {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "ProfileNotFound"})


def is_passing(error: BaseException) -> bool:
    """Whether to try again: overload, a server's fault, a connection that failed."""
    text = " ".join(f"{type(cause).__name__}: {cause}" for cause in _causes(error)).lower()
    return any(sign in text for sign in _PASSING)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
