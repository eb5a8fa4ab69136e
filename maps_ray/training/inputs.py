"""What a run reads, by content: a base checkpoint and a data set are the same wherever they lie.

A fingerprint maps each file to its size and a hash: of small files and metadata as a whole, of a safetensors file's
header, and of a few blocks spread over any large file, so that weights that were trained on in place are seen too. It
takes seconds for 7 billion parameters. Times of files, and files that nothing reads (documents, hidden ones), do not
count.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maps_ray.spec import RunSpec

Fingerprint = dict[str, str]
"""File, relative to the folder -> size and hash."""

_WHOLE = 1 << 20
_BLOCK = 1 << 16
_BLOCKS = 8
# Of more large files than this, some are known by their size alone.
_LARGE_FILES = 256
_UNREAD = (".md", ".log", ".lock", ".tmp", ".partial")


def fingerprints(spec: RunSpec) -> dict[str, Fingerprint]:
    """Field of the spec -> fingerprint of what lies there.

    Raises:
        OSError: a file cannot be read.
    """
    return {field: fingerprint(path) for field, path in input_paths(spec).items()}


def input_paths(spec: RunSpec) -> dict[str, str]:
    """Field of the spec -> where it says that an input lies."""
    data = {f"{spec.data.field(n)}.path": source.path for n, source in enumerate(spec.data.resolved())}
    return {"model.checkpoint": str(spec.model.checkpoint), **data}


def without_places(spec: RunSpec) -> dict[str, Any]:
    """The spec as plain data, without where its inputs lie."""
    plain = spec.model_dump(mode="json")
    del plain["model"]["checkpoint"], plain["data"]["path"], plain["data"]["cache"]
    for source in plain["data"]["sources"] or ():
        del source["path"]
    return plain


def fingerprint(place: str) -> Fingerprint:
    """Of a folder or a file; of a URI, which is the same only under the same name, that name."""
    if "://" in place:
        return {"": place}
    root = Path(place)
    if root.is_file():
        return {"": _hash(root, root.stat().st_size, sampled=True)}
    sizes = {str(path.relative_to(root)): path.stat().st_size for path in _files(root)}
    large = [name for name, size in sizes.items() if size > _WHOLE]
    step = -(-len(large) // _LARGE_FILES) or 1
    sampled = set(large[::step])
    return {name: _hash(root / name, size, name in sampled) for name, size in sizes.items()}


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


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted(names):
            if not name.startswith(".") and not name.endswith(_UNREAD):
                yield Path(folder, name)


def _hash(path: Path, size: int, sampled: bool) -> str:
    """Size and 64 bits of SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _WHOLE:
            digest.update(file.read())
        elif sampled:
            if path.suffix == ".safetensors":
                length = file.read(8)
                digest.update(length + file.read(min(int.from_bytes(length, "little"), size)))
            for block in range(_BLOCKS):
                # The last block ends with the file: there a Parquet or MP4 file has its index.
                file.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return f"{size}-{digest.hexdigest()[:16]}"
