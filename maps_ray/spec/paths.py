"""Paths in a spec: `~` and variables of the environment, and what a path may hold."""

from __future__ import annotations

import os
import re
from pathlib import Path

# As os.path.expandvars has it, and `$$` for a dollar sign.
_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|(?P<plain>\w+)|\{(?P<braced>[^}]*)\})", re.ASCII)


def expand(text: str) -> str:
    """A path as a spec says it, with `~`, `~user`, `$NAME` and `${NAME}` replaced; `$$` is a dollar sign.

    Raises:
        ValueError: a variable that is not set, a user who is not known, or a character that no path may have here.
    """
    found = _VARIABLE.sub(_value, text)
    # A name that the file system knows as other bytes than UTF-8, or that a line of text can't hold.
    strange = next((character for character in found if character < " " or character == "\x7f"), None)
    if strange is None:
        strange = next((character for character in found if "\ud800" <= character <= "\udfff"), None)
    if strange is not None:
        raise ValueError(f"has the character {strange!r}: rename that folder")
    if found.startswith("~"):
        expanded = os.path.expanduser(found)
        if expanded.startswith("~"):
            raise ValueError(
                f"no home folder is known for {found.split('/')[0]!r}: write the path in full, or set HOME"
            )
        return expanded
    return found


def home(text: str) -> Path:
    """An argument of the command line, where shells leave `~` alone: `--out=~/exports`. They replace variables.

    Raises:
        ValueError: no home folder is known.
    """
    return Path(expand(escape(text)))


def escape(path: str) -> str:
    """What `expand` makes `path` of again."""
    return path.replace("$", "$$")


def unescape(path: str) -> str:
    """What `escape` made of a path, turned back; nothing else is replaced."""
    return path.replace("$$", "$")


def absolute(text: str, base: Path) -> str:
    """A path of a spec, expanded, below `base` where it is relative; a URI stays one.

    Raises:
        ValueError: as `expand`.
    """
    found = expand(text)
    return found if "://" in found else str(base / found)


def _value(match: re.Match[str]) -> str:
    if match["dollar"]:
        return "$"
    name = match["plain"] or match["braced"] or ""
    if name not in os.environ:
        raise ValueError(f"the variable {name!r} is not set in the environment; a dollar sign itself is written $$")
    return os.environ[name]
