"""What a run reads, by content: a base checkpoint and a data set are the same wherever they lie.

A fingerprint maps each file to its size and a hash: of small files and metadata as a whole, of a safetensors file's
header, and of a few blocks spread over any large file, so that weights that were trained on in place are seen too. It
takes seconds for 7 billion parameters. Times of files, and files that nothing reads (documents, hidden ones), do not
count. An object store is read like a folder, by ranges: a data set that was moved there, or back, is still the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from maps_ray.data.storage import Storage
from maps_ray.models.hub import local_copy
from maps_ray.spec import RunSpec

Fingerprint = dict[str, str]
"""File, relative to the folder -> size and hash."""

_WHOLE = 1 << 20
_BLOCK = 1 << 16
_BLOCKS = 8
# Of more files than these, some are known by their size alone.
_LARGE_FILES, _SMALL_FILES = 256, 4096
# An object store answers many requests at once, each after a while.
_REQUESTS = 16
_UNREAD = (".md", ".log", ".lock", ".tmp", ".partial")


def fingerprints(spec: RunSpec) -> dict[str, Fingerprint]:
    """Field of the spec -> fingerprint of what lies there.

    Raises:
        DatasetError: a file cannot be read.
    """
    return {field: fingerprint(path) for field, path in input_paths(spec).items()}


def input_paths(spec: RunSpec) -> dict[str, str]:
    """Field of the spec -> where it says that an input lies."""
    data = {f"{spec.data.field(n)}.path": source.path for n, source in enumerate(spec.data.resolved())}
    return {"model.checkpoint": str(spec.model.checkpoint), **data}


def without_places(spec: RunSpec) -> dict[str, object]:
    """The spec as plain data, without where its inputs lie."""
    plain = spec.model_dump(mode="json")
    del plain["model"]["checkpoint"], plain["data"]["path"], plain["data"]["cache"]
    for source in plain["data"]["sources"] or ():
        del source["path"]
    return plain


def fingerprint(place: str) -> Fingerprint:
    """Of a folder, here, on an object store or on the Hub, or of a file; empty where there is nothing.

    Raises:
        DatasetError: a file cannot be read.
        HubError: no such repository, or no copy of it.
    """
    place = local_copy(place)
    if Path(place).is_file():
        place, _, name = str(Path(place).absolute()).rpartition("/")
        storage = Storage(place)
        return {"": _hash(storage, name, storage.size(name))}
    storage = Storage(place)
    sizes = {name: size for name, size in storage.files().items() if _is_read(name)}
    large = [name for name, size in sizes.items() if size > _WHOLE]
    small = [name for name, size in sizes.items() if size <= _WHOLE]
    hashed = {*large[:: -(-len(large) // _LARGE_FILES) or 1], *small[:: -(-len(small) // _SMALL_FILES) or 1]}

    def known(name: str) -> str:
        return _hash(storage, name, sizes[name]) if name in hashed else str(sizes[name])

    with ThreadPoolExecutor(1 if storage.local else _REQUESTS) as pool:
        return dict(zip(sizes, pool.map(known, sizes), strict=True))


def difference(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """How two fingerprints differ, in words with the first files; None when they are equal."""
    parts = []
    for what, names in (
        ("missing", before.keys() - now.keys()),
        ("new", now.keys() - before.keys()),
        ("changed", {name for name in before.keys() & now.keys() if before[name] != now[name]}),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            parts.append(f"{len(names)} {what} ({shown})" if shown else f"it is {what}")
    return "; ".join(parts) or None


def _is_read(name: str) -> bool:
    *folders, file = name.split("/")
    hidden = file.startswith(".") or any(folder.startswith((".", "__")) for folder in folders)
    return not hidden and not file.endswith(_UNREAD)


def _hash(storage: Storage, name: str, size: int) -> str:
    """Size and 64 bits of SHA-256."""
    digest = hashlib.sha256()
    if size <= _WHOLE:
        digest.update(storage.read(name))
    else:
        if name.endswith(".safetensors"):
            length = storage.read(name, 0, 8)
            digest.update(length + storage.read(name, 8, min(8 + int.from_bytes(length, "little"), size)))
        for block in range(_BLOCKS):
            # The last block ends with the file: there a Parquet or MP4 file has its index.
            start = block * (size - _BLOCK) // (_BLOCKS - 1)
            digest.update(storage.read(name, start, start + _BLOCK))
    return f"{size}-{digest.hexdigest()[:16]}"
