"""What one node of a cluster is and has, as an actor on it finds out. The standard library only.

It is sent to the nodes as code, not by name: a node with another version of this package, or without it, answers too.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NotRequired, TypedDict

_LOOK_S = 0.1


class Room(TypedDict):
    """Of memory or of a folder's disk, in bytes."""

    free: int
    total: int
    folder: NotRequired[str]


class Gpu(TypedDict):
    """As nvidia-smi has it."""

    name: str
    memory_mib: int
    driver: str


class Description(TypedDict, total=False):
    """What one node says of itself; empty of one that does not answer."""

    host: str
    python: str
    versions: dict[str, str | None]
    """Package -> version, None where it is missing."""
    code: str | None
    """A short hash of the package's source, None without it."""
    scratch: Room
    memory: Room
    gpus: list[Gpu]


class NodeFacts:
    """Answers from one node, in plain data."""

    def __init__(self) -> None:
        self._made: list[Path] = []
        """Files and folders to take away again, in the order in which they came."""

    def clock(self) -> float:
        """Seconds since 1970 by this node's clock."""
        return time.time()

    def describe(self, packages: list[str], code: str, scratch: str | None) -> Description:
        """What does not change from question to question.

        Args:
            packages: whose versions are asked for.
            code: package whose source files are compared from node to node, byte by byte.
            scratch: folder for what a node keeps for itself; none takes the one for temporary files.
        """
        folder = Path(scratch or tempfile.gettempdir())
        # A folder that the run will make is on the file system of the nearest one that is there.
        while not folder.exists():
            folder = folder.parent
        disk = shutil.disk_usage(folder)
        return {
            "host": platform.node(),
            "python": platform.python_version(),
            "versions": {package: _version(package) for package in packages},
            "code": _code(code),
            "scratch": {"folder": str(folder), "free": disk.free, "total": disk.total},
            "memory": _memory(),
            "gpus": _gpus(),
        }

    def write(self, folder: str, name: str) -> str | None:
        """Makes a file as checkpoints are made, written under one name and renamed to `name`; returns what failed."""
        final = Path(folder, name)
        partial = final.with_name(f".{name}.partial")
        try:
            # Folder by folder: `forget` removes those that were made here, and no others.
            for path in reversed((final.parent, *final.parent.parents)):
                if not path.is_dir():
                    path.mkdir(exist_ok=True)
                    self._made.append(path)
            self._made += [partial, final]
            with partial.open("w") as file:
                file.write(name)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(final)
        except OSError as error:
            return error.strerror or str(error)
        return None

    def store(self, cluster: dict[str, object]) -> str | None:
        """Writes to an object store, and looks for this node's scratch; returns what failed."""
        try:
            from maps_ray.run_storage import storage_problems
            from maps_ray.spec import ClusterSpec
        except ImportError as error:
            return f"cannot be asked: {error}"
        problems = storage_problems(ClusterSpec.model_validate(cluster))
        return "; ".join(f"{problem.field}: {problem.message}" for problem in problems) or None

    def forget(self) -> None:
        """Takes away what `write` made, as far as nobody else's files are in it; asked again, what was left then."""
        left = []
        for path in reversed(self._made):
            try:
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
            except OSError:
                left.append(path)
        self._made = left[::-1]

    def see(self, folder: str, names: list[str], wait_s: float) -> tuple[list[str], float]:
        """Reads files that other nodes have renamed.

        Args:
            folder: with the files; each holds its own name.
            names: of the files.
            wait_s: how long to look for those that are not there yet: shared folders are cached.

        Returns:
            those not seen, and the seconds until the last of the others was.
        """
        began = time.monotonic()
        missing, last = list(names), 0.0
        while True:
            left = [name for name in missing if not _holds_its_name(os.path.join(folder, name))]
            if len(left) < len(missing):
                last = time.monotonic() - began
            missing = left
            if not missing or time.monotonic() - began > wait_s:
                return missing, last
            time.sleep(_LOOK_S)

    def reach(self, url: str, timeout_s: float) -> str | None:
        """Asks an HTTP server for a page; returns what is wrong, None when it answers."""
        try:
            with urllib.request.urlopen(url, timeout=timeout_s) as answer:
                answer.read(1)
        except urllib.error.HTTPError as error:
            # It is there; who may do what is for MLflow's client to find out.
            return f"it answers {error.code} ({error.reason})" if error.code not in (401, 403, 404) else None
        except (OSError, ValueError) as error:
            return str(getattr(error, "reason", None) or error)
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _code(package: str) -> str | None:
    module = find_spec(package)
    if module is None or not module.submodule_search_locations:
        return None
    root = Path(next(iter(module.submodule_search_locations)))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        # The name too: a file that has moved is other code.
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def _holds_its_name(path: str) -> bool:
    try:
        with open(path) as file:
            return file.read() == os.path.basename(path)
    except OSError:
        return False


def _memory() -> Room:
    """Of the machine, or of the container where that has less."""
    fields = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024
    total, free = fields["MemTotal"], fields["MemAvailable"]
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        # Pages of files are given back when memory is asked for.
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        used -= int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        # No cgroup of version 2, or no limit: `memory.max` then says `max`.
        return {"free": free, "total": total}
    return {"free": min(free, max(0, limit - used)), "total": min(total, limit)}


def _gpus() -> list[Gpu]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in listed.splitlines() if line.strip()]
    return [{"name": name, "memory_mib": int(memory), "driver": driver} for name, memory, driver in rows]
