"""Paths in a spec: `~` and variables of the environment, and what a path may hold."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

# As os.path.expandvars has it, and `$$` for a dollar sign.
_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|(?P<plain>\w+)|\{(?P<braced>[^}]*)\})", re.ASCII)

# NAME_MAX and PATH_MAX of Linux, with room for what a run puts below.
_LONGEST_NAME, _LONGEST_PATH = 255, 3500


def expand(text: str) -> str:
    """A path as a spec says it, with `~`, `~user`, `$NAME` and `${NAME}` replaced; `$$` is a dollar sign.

    Raises:
        ValueError: nothing is left, a variable that is not set, a user who is not known, or a character that no path
            may have here.
    """
    path = _VARIABLE.sub(_value, text)
    if not path:
        raise ValueError("is empty: give a path, or . for this folder")
    # A name that the file system knows as other bytes than UTF-8, or that a line of text can't hold.
    strange = next((character for character in path if character < " " or character == "\x7f"), None)
    if strange is None:
        strange = next((character for character in path if "\ud800" <= character <= "\udfff"), None)
    if strange is not None:
        raise ValueError(f"has the character {strange!r}: rename that folder")
    if path.startswith("~"):
        expanded = os.path.expanduser(path)
        if expanded.startswith("~"):
            raise ValueError(f"no home folder is known for {path.split('/')[0]!r}: write the path in full, or set HOME")
        return expanded
    return path


def is_address(text: str) -> bool:
    """Whether this names something on an object store. What is on the Hub (`hf://`) has a path in its cache."""
    return "://" in text and not text.startswith(("hf://", "file://"))


def home(text: str) -> Path:
    """An argument of the command line, where shells leave `~` alone: `--out=~/exports`. They replace variables.

    Raises:
        ValueError: no home folder is known, or an address.
    """
    if is_address(text):
        raise ValueError(
            f"{text} is an address, and this is read or written on this machine: give a path, and copy between the two "
            "with the store's own tool (aws s3 cp, gcloud storage cp)"
        )
    return Path(expand(escape(text.removeprefix("file://"))))


def output(text: str) -> Path:
    """The same of a file or folder that a command writes.

    Raises:
        ValueError: as `home`, or what is there already does not let it be written.
    """
    given = home(text)
    path = given.absolute()
    try:
        there = next(place for place in (path, *path.parents) if place.exists())
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None
    if there != path and not there.is_dir():
        raise ValueError(f"{there} is a file, and {path} would lie in it: choose another folder")
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{there} cannot be written: choose another folder, or change its permissions")
    return given


def on_this_machine(text: str) -> str:
    """A path that has to be one, without `file://`; a name on the Hub stays.

    Raises:
        ValueError: an address of anything else.
    """
    path = text.removeprefix("file://")
    if "://" in path and not path.startswith("hf://"):
        raise ValueError("is an address, and this must lie on the machine itself: give a path, and copy what is there")
    return path


def escape(path: str) -> str:
    """What `expand` makes `path` of again."""
    return path.replace("$", "$$")


def unescape(path: str) -> str:
    """What `escape` made of a path, turned back; nothing else is replaced."""
    return path.replace("$$", "$")


def absolute(text: str, base: Path) -> str:
    """A path of a spec, expanded, below `base` where it is relative; a URI stays one.

    Raises:
        ValueError: as `expand`, an address that has lost a slash, which would be a folder named `s3:`, or a name that
            no file system takes.
    """
    path = expand(text)
    if lost := re.match(r"file:/{0,2}(?!/)|[A-Za-z][A-Za-z0-9+.-]+:/(?!/)", path):
        protocol = lost[0].rstrip(":/")
        slashes = "///" if protocol == "file" else "//"
        raise ValueError(f"an address has {len(slashes)} slashes: {protocol}:{slashes}{path[lost.end() :]}")
    if "://" in path:
        return path
    path = str(base / path)
    if len(path.encode()) > _LONGEST_PATH or any(len(name.encode()) > _LONGEST_NAME for name in path.split("/")):
        raise ValueError(f"is too long: a name has at most {_LONGEST_NAME} bytes, a path {_LONGEST_PATH}")
    return path


def place(value: object) -> object:
    """A storage folder as a path, or as the address of an object store.

    Raises:
        ValueError: something else, an address without a bucket, or with what would lead out of its folder.
    """
    text = str(value) if isinstance(value, Path | str) else ""
    if not text:
        raise ValueError("must be a folder, or an address such as s3://bucket/runs")
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    if "://" not in text:
        return Path(text)
    protocol, _, rest = text.partition("://")
    parts = rest.rstrip("/").split("/")
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*", protocol) or not all(parts) or {".", ".."} & set(parts):
        raise ValueError("must be a folder, or an address such as s3://bucket/runs, each part of it with a name")
    return f"{protocol}://{'/'.join(parts)}"


def scratch_folder(chosen: Path | None) -> Path:
    """Folder on this node's own disk for what is on its way to or from an object store."""
    if chosen is not None:
        return chosen
    named = os.environ.get("MAPS_RAY_SCRATCH")
    # What sets variables elsewhere than in a shell leaves `~` alone.
    return Path(named).expanduser().absolute() if named else Path(tempfile.gettempdir()) / f"maps_ray-{os.getuid()}"


def mirror_folder(address: str, scratch: Path | None) -> Path:
    """Where this node keeps what it has of a folder on an object store."""
    protocol, _, rest = address.partition("://")
    return scratch_folder(scratch) / protocol / rest


def _value(match: re.Match[str]) -> str:
    if match["dollar"]:
        return "$"
    name = match["plain"] or match["braced"] or ""
    if name not in os.environ:
        raise ValueError(f"the variable {name!r} is not set in the environment; a dollar sign itself is written $$")
    return os.environ[name]
