"""A shared folder whose new names all nodes but their writer see late, as clients of NFS and EFS do.

What is done by path takes place at once, as on the server: a name that exists stays one, whoever renames or removes it,
and who tries to make one that exists is told so, and sees it from then on (a client of NFS drops what it had in mind of
it). Only looks at a new name lag: `open`, `stat`, listings. They are Python's own; libraries that open files beneath
Python see them at once.
"""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class LaggingFolder:
    """Takes the place of Python's file functions in this process, below one folder; several processes may share it.

    Args:
        root: the shared folder.
        names: folder, beside it, that says who wrote which new name when.
        lag_s: how long others do not see a new name.
        node: of this process; `on` changes it.
    """

    def __init__(self, root: Path, names: Path, lag_s: float, node: str) -> None:
        self.root, self.node, self.lag_s, self.hidden = str(root), node, lag_s, 0
        """`hidden`: looks in vain at what is there."""
        self._names = names
        names.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def on(self, node: str) -> Iterator[None]:
        before, self.node = self.node, node
        try:
            yield
        finally:
            self.node = before

    @contextmanager
    def installed(self) -> Iterator[LaggingFolder]:
        self._real: dict[str, Any] = {name: getattr(os, name) for name in _LOOKS | _MAKES | {"open", "scandir"}}
        self._open = builtins.open
        for name in _LOOKS:
            setattr(os, name, self._look(self._real[name]))
        for name in _MAKES:
            setattr(os, name, self._make(self._real[name]))
        os.open, os.scandir = self._os_open, self._scandir  # type: ignore[assignment]
        builtins.open = io.open = self._py_open  # type: ignore[assignment]
        os.listdir = self._listdir  # type: ignore[assignment]
        try:
            yield self
        finally:
            for name, real in self._real.items():
                setattr(os, name, real)
            builtins.open = io.open = self._open

    def _sidecar(self, path: str) -> str:
        return f"{self._names}/{hashlib.sha256(path.encode()).hexdigest()}"

    def _path(self, path: Any) -> str | None:
        """A path below the folder; None for others, and for descriptors."""
        if not isinstance(path, str | os.PathLike):
            return None
        text = os.path.abspath(os.fspath(path))
        return text if text.startswith(self.root + "/") else None

    def _is_hidden(self, path: Any) -> bool:
        text = self._path(path)
        while text is not None and text != self.root:
            try:
                with self._open(self._sidecar(text)) as file:
                    node, at = json.load(file)
            except (FileNotFoundError, ValueError):
                node, at = self.node, 0.0
            if node != self.node and time.time() < at + self.lag_s and self._met_at(text) < at:
                self.hidden += 1
                return True
            text = os.path.dirname(text)
        return False

    def _note(self, path: Any, existed: bool, at: float) -> None:
        text = self._path(path)
        if text is not None:
            name = f"{self._sidecar(text)}.{self.node}" if existed else self._sidecar(text)
            with self._open(name, "w") as file:
                json.dump([self.node, at], file)

    def _require_parent(self, path: Any) -> None:
        """Nothing can be made in a folder that is not seen."""
        if self._path(path) is not None and self._is_hidden(os.path.dirname(os.path.abspath(path))):
            raise FileNotFoundError(2, "No such file or directory (hidden)", str(path))

    def _met_at(self, text: str) -> float:
        """When this node was last told by the server that a name exists, because it tried to make it."""
        try:
            with self._open(f"{self._sidecar(text)}.{self.node}") as file:
                return float(json.load(file)[1])
        except (FileNotFoundError, ValueError):
            return 0.0

    def _exists(self, path: Any) -> bool:
        text = self._path(path)
        if text is None:
            return True
        try:
            self._real["stat"](text)
        except OSError:
            return False
        return True

    def _look(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def look(path: Any, *more: Any, **options: Any) -> Any:
            if self._is_hidden(path):
                raise FileNotFoundError(2, "No such file or directory (hidden)", str(path))
            return real(path, *more, **options)

        return look

    def _make(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Of functions whose last path is the new name."""

        def make(path: Any, *more: Any, **options: Any) -> Any:
            target = more[0] if more and isinstance(more[0], str | os.PathLike) else path
            self._require_parent(target)
            existed, at = self._exists(target), time.time()
            try:
                done = real(path, *more, **options)
            except FileExistsError:
                self._note(target, True, time.time())
                raise
            # From before it was made: who met it meanwhile has met it later.
            self._note(target, existed, at)
            return done

        return make

    def _os_open(self, path: Any, flags: int, *more: Any, **options: Any) -> int:
        self._require_parent(path)
        existed, at = self._exists(path), time.time()
        if not flags & os.O_CREAT and self._is_hidden(path):
            raise FileNotFoundError(2, "No such file or directory (hidden)", str(path))
        opened: int = self._real["open"](path, flags, *more, **options)
        if flags & os.O_CREAT:
            self._note(path, existed, at)
        return opened

    def _py_open(self, path: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        self._require_parent(path)
        existed, at = self._exists(path), time.time()
        if "r" in mode and self._is_hidden(path):
            raise FileNotFoundError(2, "No such file or directory (hidden)", str(path))
        opened = self._open(path, mode, *more, **options)
        if "r" not in mode:
            self._note(path, existed, at)
        return opened

    def _listdir(self, path: Any = ".") -> list[str]:
        return [name for name in self._real["listdir"](path) if not self._is_hidden(os.path.join(path, name))]

    def _scandir(self, path: Any = ".") -> _Entries:
        with self._real["scandir"](path) as entries:
            return _Entries([entry for entry in entries if not self._is_hidden(entry.path)])


class _Entries(list[Any]):
    """As `os.scandir` gives them: something to go through, and a context."""

    def __enter__(self) -> _Entries:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()


_LOOKS = {"stat", "lstat", "access", "listdir"}
_MAKES = {"mkdir", "rename", "replace", "link"}
