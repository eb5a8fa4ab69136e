"""The spool: what a run has to tell MLflow, as files in `<run folder>/tracking`, whatever MLflow does meanwhile.

run.json          identity: written once, so that a resumed run continues the same MLflow run
owner.json        the process that will say how the run ended
segments/*.jsonl  records; each writer appends to a file of its own, so nothing is ever interleaved
artifacts/        copies of the artifacts, by content
cursor.json       how far the shipper has come
quarantine.jsonl  records that MLflow refused, each with the reason
shipper.log

`read_history` reads a run back from it, without MLflow.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, TypedDict, cast

import psutil

from maps_ray.files import file_lock, replaced, write_json
from maps_ray.spec import Problem, SpecError

FOLDER = "tracking"


class MetricsRecord(TypedDict):
    """Values of one step."""

    kind: Literal["metrics"]
    time: int
    """Milliseconds since 1970, as in all records."""
    step: int
    values: dict[str, float]


class TextsRecord(TypedDict):
    """Parameters or tags."""

    kind: Literal["params", "tags"]
    time: int
    values: dict[str, str]


class ArtifactRecord(TypedDict):
    """A file that is kept beside the segments."""

    kind: Literal["artifact"]
    time: int
    file: str
    """Its copy, relative to the spool."""
    folder: str
    """Where MLflow shows it; empty for the top."""


class StatusRecord(TypedDict):
    """How the run stands: RUNNING, or one of `FINAL`."""

    kind: Literal["status"]
    time: int
    status: str


Record = MetricsRecord | TextsRecord | ArtifactRecord | StatusRecord
"""A line of a segment. One of a later version may be of another kind."""


FINAL = ("FINISHED", "FAILED", "KILLED")


def status_rank(status: tuple[int, str]) -> tuple[int, bool]:
    """Orders statuses by time; of two in one millisecond the final one is the newer."""
    return status[0], status[1] in FINAL


@dataclass(frozen=True)
class Identity:
    """Which MLflow run this is. `run_key` is a tag of the run, so that creating it twice finds the first."""

    run_key: str
    uri: str
    experiment: str
    run_name: str
    start_time: int
    """Milliseconds since 1970."""
    parent: str | None = None
    """Run folder of the parent run."""
    credentials: str | None = None
    """File with the variables by which MLflow's client signs in; never the credentials themselves."""


@dataclass
class Cursor:
    """How far the records have been shipped, and where to."""

    uri: str = ""
    run_id: str | None = None
    experiment_id: str | None = None
    offsets: dict[str, int] = field(default_factory=dict)
    """Bytes of each segment that are done with."""
    status: str | None = None
    """Status that MLflow shows."""
    error: str | None = None
    """Why the last attempt failed; None after a success."""
    error_time: float = 0.0


@dataclass(frozen=True)
class Owner:
    """The process that will say how the run ended; start time and host tell it from a later one of the same id."""

    host: str
    pid: int
    started: float

    @classmethod
    def this_process(cls) -> Owner:
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def is_dead(self) -> bool:
        """True when it surely ended; False also for a process of another host, which cannot be seen from here."""
        if self.host != socket.gethostname():
            return False
        try:
            # Not equal to the digit: it is counted from the time of boot, which moves when the clock is set.
            return abs(psutil.Process(self.pid).create_time() - self.started) > 1.0
        except psutil.NoSuchProcess:
            return True


class Spool:
    """The files of one run's spool."""

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir).resolve()
        self.folder = self.run_dir / FOLDER
        self.segments = self.folder / "segments"
        self.quarantine = self.folder / "quarantine.jsonl"

    @property
    def exists(self) -> bool:
        return (self.folder / "run.json").is_file()

    def identity(self) -> Identity:
        """Which run this is.

        Raises:
            FileNotFoundError: no run was begun here.
            SpecError: what says so cannot be read.
        """
        path = self.folder / "run.json"
        if not path.is_file():
            raise FileNotFoundError(f"{self.run_dir} holds no tracked run: {path} is missing")
        try:
            return Identity(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            message = f"cannot be read ({error}): bring it back as it was; or remove {self.folder}, and its records"
            raise SpecError([Problem("run.json", str(path), message)]) from None

    def write_identity(self, identity: Identity) -> None:
        self.segments.mkdir(parents=True, exist_ok=True)
        # Synced, as all that is written once for a driver: what was renamed before it was on disk may be empty after a
        # loss of power, and the run could not be resumed.
        write_json(self.folder / "run.json", asdict(identity), shared=True)

    def cursor(self) -> Cursor:
        """The cursor into the identity's store; a fresh one when the run is to be recorded in another store."""
        uri = self.identity().uri
        # Unreadable, as after a loss of power: all is sent again, into the run that its key finds.
        with contextlib.suppress(FileNotFoundError, ValueError):
            cursor = Cursor(**json.loads((self.folder / "cursor.json").read_text()))
            if cursor.uri == uri:
                return cursor
        return Cursor(uri=uri)

    def write_cursor(self, cursor: Cursor) -> None:
        # Not synced: without it, or with an older one, what MLflow has is sent again, which changes nothing.
        write_json(self.folder / "cursor.json", asdict(cursor), durable=False, shared=True)

    def note(self, error: str) -> None:
        """Writes into the cursor file why shipping failed."""
        cursor = self.cursor()
        cursor.error, cursor.error_time = error, time.time()
        self.write_cursor(cursor)

    def owner(self) -> Owner | None:
        with contextlib.suppress(FileNotFoundError):
            return Owner(**json.loads((self.folder / "owner.json").read_text()))
        return None

    def write_owner(self, owner: Owner) -> None:
        write_json(self.folder / "owner.json", asdict(owner), shared=True)

    def register_child(self, run_dir: Path) -> None:
        """The shipper of this run ships `run_dir` too."""
        folder = self.folder / "children"
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(str(run_dir).encode()).hexdigest()[:16]
        write_json(folder / f"{name}.json", {"run_dir": str(run_dir)}, shared=True)

    def adopt(self, child: Spool) -> None:
        """Ships a run that was recorded as a child of this one when both lay elsewhere."""
        known = child.identity()
        child.write_identity(replace(known, uri=self.identity().uri, parent=str(self.run_dir)))
        self.register_child(child.run_dir)

    def children(self) -> list[Spool]:
        files = sorted((self.folder / "children").glob("*.json"))
        return [Spool(json.loads(file.read_text())["run_dir"]) for file in files]

    def keep_artifact(self, source: str | Path | bytes, name: str) -> str:
        """Copies a file or bytes into the spool; returns its path relative to the spool folder."""
        if isinstance(source, bytes):
            digest = hashlib.sha256(source).hexdigest()
        else:
            with open(source, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        # By content: a later file of that name leaves the copy that an earlier record names as it is.
        folder = self.folder / "artifacts" / digest[:16]
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / name
        if not target.exists():
            with replaced(target, shared=True) as partial:
                if isinstance(source, bytes):
                    partial.write_bytes(source)
                else:
                    shutil.copyfile(source, partial)
        return str(target.relative_to(self.folder))

    def read(self, offsets: Mapping[str, int] | None = None) -> Iterator[tuple[str, int, Record | str]]:
        """Complete records from `offsets` on, in the order in which their writers were opened.

        Yields:
            Segment, offset of the end of the record in bytes, and the record; the raw text where it is not JSON (a
            line that a full disk or a kill cut off).
        """
        for path in sorted(self.segments.glob("*.jsonl")):
            offset = (offsets or {}).get(path.name, 0)
            with open(path, "rb") as file:
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        # Still being written, or the last of a killed writer: nothing can follow it in this segment.
                        break
                    offset += len(line)
                    if line.strip():
                        yield path.name, offset, _parse(line)

    def status(self) -> tuple[int, str]:
        """The newest status and its time."""
        newest = 0, "RUNNING"
        for _, _, record in self.read():
            if isinstance(record, dict) and "kind" in record and record["kind"] == "status":
                newest = max(newest, (record["time"], record["status"]), key=status_rank)
        return newest

    def refused(self) -> int:
        """Records that MLflow refused and that stand aside."""
        with contextlib.suppress(FileNotFoundError), open(self.quarantine, "rb") as file:
            return sum(1 for _ in file)
        return 0

    @contextlib.contextmanager
    def lock(self, name: str, wait_s: float) -> Iterator[bool]:
        """Holds the lock file `name`; yields False when another process keeps it longer than `wait_s` seconds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with file_lock(self.folder / name, wait_s) as held:
            yield held


class Segment:
    """Append-only file of one writer: a record is one line, written by one call. Safe for threads.

    A write that fails (full disk) loses that record and no other, and never raises: a run does not die of its records.
    """

    def __init__(self, spool: Spool) -> None:
        spool.segments.mkdir(parents=True, exist_ok=True)
        # By name the segments stand in the order in which they were opened.
        name = f"{time.time_ns():020d}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}.jsonl"
        self.path = spool.segments / name
        self.lost = 0
        """Records that could not be written."""
        self.last_error: OSError | None = None
        self._file = -1
        self._torn = False
        self._lock = threading.Lock()

    def write(self, record: Mapping[str, object]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                if self._file < 0:
                    self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                # Not buffered: what the kernel has got outlives a kill -9. A torn line is ended first, so that it takes
                # no other with it.
                whole = b"\n" + line if self._torn else line
                self._torn = os.write(self._file, whole) < len(whole)
            except OSError as error:
                self._torn, self.last_error = True, error
            if self._torn:
                self.lost += 1

    def close(self) -> None:
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1


def _parse(line: bytes) -> Record | str:
    try:
        record = json.loads(line)
    except ValueError:
        return line.decode(errors="replace").rstrip("\n")
    return cast(Record, record) if isinstance(record, dict) else str(record)


@dataclass
class RunHistory:
    """All that a run has recorded so far."""

    identity: Identity
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Per name the (step, value) pairs by rising step; a step that was recorded twice has its first value."""
    artifacts: dict[str, Path] = field(default_factory=dict)
    """Artifact path to the file in the spool; the newest where one was recorded twice."""
    status: str = "RUNNING"
    end_time: int | None = None
    """Milliseconds since 1970; None while it runs."""


def read_history(run_dir: str | Path) -> RunHistory:
    """Raises FileNotFoundError when no run was begun in `run_dir`."""
    spool = Spool(run_dir)
    history = RunHistory(spool.identity())
    values: dict[str, dict[int, float]] = {}
    newest = 0
    for _, _, record in spool.read():
        if isinstance(record, str) or "kind" not in record:
            continue
        if record["kind"] == "metrics":
            for key, value in record["values"].items():
                values.setdefault(key, {}).setdefault(record["step"], value)
        elif record["kind"] == "params":
            history.params = {**record["values"], **history.params}
        elif record["kind"] == "tags":
            history.tags.update(record["values"])
        elif record["kind"] == "artifact":
            file = Path(record["file"])
            history.artifacts[str(Path(record["folder"]) / file.name)] = spool.folder / file
        elif record["kind"] == "status" and record["time"] >= newest:
            newest, history.status = record["time"], record["status"]
    history.metrics = {key: sorted(steps.items()) for key, steps in values.items()}
    history.end_time = newest if history.status != "RUNNING" else None
    return history
