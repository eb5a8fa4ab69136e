"""What a run calls: every method writes to the spool and returns; a process of its own ships the spool to MLflow.

The driver makes the tracker, any worker may open it; killing either loses nothing that was logged:

    tracker = Tracker.create(run_dir, uri=resolve_uri(None, storage), experiment="maps_ray", run_name="libero-maps")
    Tracker.open(run_dir).metrics(step, {"train/loss": 0.1})     # in a worker
    tracker.finish("FINISHED")

A worker on another node than the driver's has a `SentTracker`, which sends its records to the driver's spool, whatever
storage they share. What is sent names the file and the place in it, so that sending it twice changes nothing, and a run
shows each record once. The worker keeps what has not been taken yet; `flush` waits for all of it, before a checkpoint
counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, SupportsFloat

from maps_ray.files import write_atomically
from maps_ray.machine import describe_environment
from maps_ray.tracking.spool import Cursor, Identity, Owner, Segment, Spool

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """The records of one run. Use `create` in the driver and `open` anywhere else."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.run_key = spool.identity().run_key
        self._segment = Segment(spool)
        self._shipper: subprocess.Popen[bytes] | None = None
        self._warned = False

    @classmethod
    def create(
        cls,
        run_dir: str | Path,
        *,
        uri: str,
        experiment: str,
        run_name: str,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
        parent: str | Path | None = None,
        credentials: str | Path | None = None,
        ship: bool = True,
    ) -> Tracker:
        """Begins the run of `run_dir`, or continues it when one was begun there: the same MLflow run.

        Takes milliseconds; the MLflow run itself is made by the shipper, once, when the store answers. Machine and
        versions become the artifact `environment.json`.

        Args:
            run_dir: folder on storage that the driver and the workers share.
            uri: from `resolve_uri`. Another one than before records the whole run again, there.
            params: nested, as a spec's `model_dump(mode="json")`; becomes `training.learning_rate` and so on. MLflow
                never changes a parameter: one that differs from the first time becomes the tag `resumed.<name>`.
            parent: run folder of the parent run, whose shipper ships this run too.
            credentials: file with the variables by which MLflow's client signs in, for the shipper.
            ship: False leaves the records in the spool for `replay`.

        Raises:
            ValueError: the parent is recorded in another store.
        """
        spool = Spool(run_dir)
        parent_spool = Spool(parent) if parent is not None else None
        if spool.exists:
            known = spool.identity()
            start, key, known_parent = known.start_time, known.run_key, known.parent
        else:
            start, key, known_parent = _now(), uuid.uuid4().hex, None
        if parent_spool is not None and parent_spool.identity().uri != uri:
            raise ValueError(f"{run_dir} and its parent {parent} must be recorded in the same store")
        parent_dir = str(parent_spool.run_dir) if parent_spool else known_parent
        file = str(credentials) if credentials is not None else None
        spool.write_identity(Identity(key, uri, experiment, run_name, start, parent_dir, file))
        # Before the status: to an earlier driver's shipper a run that goes on without a living owner was killed
        # (`settle`).
        spool.write_owner(Owner.this_process())
        tracker = cls(spool)
        tracker._say_status("RUNNING")
        tracker._write(kind="params", values=flatten(params or {}))
        tracker.tags(tags or {})
        tracker.text(json.dumps(describe_environment(), indent=1), "environment.json")
        if parent_spool is not None:
            parent_spool.register_child(spool.run_dir)
        elif ship:
            tracker._start_shipper()
        return tracker

    @classmethod
    def open(cls, run_dir: str | Path) -> Tracker:
        """The tracker of a run that `create` began, in another process.

        Raises:
            FileNotFoundError: no run was begun in `run_dir`.
        """
        return cls(Spool(run_dir))

    def metrics(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Records values of one step. A (name, step) that was recorded before keeps its first value.

        So a resumed run may log the steps since its last checkpoint again, and MLflow shows each once.
        """
        self._write(kind="metrics", step=int(step), values={key: float(value) for key, value in values.items()})

    def tags(self, values: Mapping[str, str]) -> None:
        if values:
            self._write(kind="tags", values={key: str(value) for key, value in values.items()})

    def artifact(self, path: str | Path, artifact_path: str = "") -> None:
        """Records a copy of the file `path`, in the artifact folder `artifact_path`.

        Raises:
            FileNotFoundError: `path` is no file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no such file to record: {path}")
        self._keep(path, path.name, artifact_path)

    def text(self, text: str, artifact_file: str) -> None:
        """Records `text` as the artifact `artifact_file` (`folder/name.ext`)."""
        file = PurePosixPath(artifact_file)
        self._keep(text.encode(), file.name, str(file.parent))

    def figure(self, figure: Figure, artifact_file: str) -> None:
        """Records a matplotlib figure as the artifact `artifact_file`, in the format of its ending (png, svg, pdf)."""
        file = PurePosixPath(artifact_file)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=file.suffix.removeprefix("."), bbox_inches="tight")
        self._keep(buffer.getvalue(), file.name, str(file.parent))

    def finish(self, status: Status, wait_s: float = 30.0) -> bool:
        """Says how the run ended, then lets the shipper catch up.

        Args:
            wait_s: seconds to wait at most; less when MLflow does not answer. 0 does not wait.

        Returns:
            True when all records are in MLflow; else the shipper goes on for a while, and `replay` ships the rest.
        """
        ended = time.time()
        self._say_status(status)
        self._segment.close()
        deadline = time.monotonic() + wait_s
        restarted = False
        while self._shipper is not None and time.monotonic() < deadline:
            ended_well = self._shipper.poll()
            if ended_well == 0:
                break
            if ended_well is not None:
                if restarted:
                    break
                self._start_shipper()
                restarted = True
            cursor = self.spool.cursor()
            # It was tried since the end: MLflow does not answer, and the caller would wait for nothing.
            if cursor.error is not None and cursor.error_time > ended:
                break
            time.sleep(0.1)
        return self.shipped

    def flush(self) -> None:
        """Returns when what was recorded so far is in the driver's spool, as it is at once beside it."""

    def leave(self) -> None:
        """Ends the records here without a word about the run, which goes on under another driver."""
        self._segment.close()
        if self._shipper is not None:
            self._shipper.terminate()

    @property
    def shipped(self) -> bool:
        """Whether everything recorded so far is in MLflow."""
        cursor = self.spool.cursor()
        return cursor.run_id is not None and next(self.spool.read(cursor.offsets), None) is None

    @property
    def missing(self) -> str | None:
        """One line about what MLflow has not got of this run, why, and what to do; None when it has everything."""
        lines = []
        cursor = self.spool.cursor()
        replay = f"maps-ray track replay {shlex.quote(str(self.spool.run_dir))}"
        if not self.shipped:
            what = "has not got all of this run" if cursor.run_id is not None else "has got nothing of this run"
            why = cursor.error or "the records are still on their way"
            goes_on = self._shipper is not None and self._shipper.poll() is None
            later = "sending goes on for some minutes; afterwards " if goes_on else "nothing sends it any more; "
            lines.append(f"MLflow {what}: {why} ({later}`{replay}` sends the rest)")
        if refused := self.spool.refused():
            lines.append(f"MLflow refused {refused} record(s) of this run: reasons in {self.spool.quarantine}")
        return "; ".join(lines) or None

    @property
    def cursor(self) -> Cursor:
        """Where the records are in MLflow (`run_id` is None until the store answered) and the last error."""
        return self.spool.cursor()

    def _keep(self, source: Path | bytes, name: str, folder: str) -> None:
        try:
            kept = self.spool.keep_artifact(source, name)
        except OSError as error:
            self._warn(f"artifact {name} was not recorded: {error}")
            return
        self._write(kind="artifact", file=kept, folder="" if folder == "." else folder)

    def _say_status(self, status: str) -> None:
        # Later than all that were said before: a run may go on where the clock is behind, and the newest counts.
        self._write(kind="status", status=status, time=max(_now(), self.spool.status()[0] + 1))

    def _write(self, **record: object) -> None:
        self._put({"time": _now(), **record})

    def _put(self, record: Mapping[str, object]) -> None:
        self._segment.write(record)
        if self._segment.lost:
            self._warn(f"records could not be written to {self._segment.path}: {self._segment.last_error}")

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"tracking goes on, but {message}", RuntimeWarning, stacklevel=3)

    def _start_shipper(self) -> None:
        # The package that runs here, wherever this interpreter has found it.
        package_root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        with contextlib.suppress(OSError), open(self.spool.folder / "shipper.log", "ab") as log:
            self._shipper = subprocess.Popen(
                [sys.executable, "-m", "maps_ray.tracking.shipper", str(self.spool.run_dir)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Cores and GPUs are training's, whatever MLflow may import.
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                # Ctrl-C in the terminal stops the run, and its records still arrive.
                start_new_session=True,
            )


def flatten(nested: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names with text values; lists and None as JSON."""
    flat: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _now() -> int:
    return time.time_ns() // 1_000_000


Item = tuple[str, int, bytes]
"""File relative to the spool, where in it, and what: -1 for a whole file."""


def take(spool: Spool, items: list[Item]) -> None:
    """Writes what was sent into the driver's spool."""
    for name, place, content in items:
        path = spool.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if place < 0:
            if not path.exists():
                write_atomically(path, content, durable=False, shared=True)
            continue
        # At its place, not at the end: what was not answered is sent again, and a second write changes nothing.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, content, place)
        finally:
            os.close(descriptor)


class SentTracker(Tracker):
    """As `Tracker`, on another node than the spool.

    Args:
        run_key: of the run.
        send: hands items to the driver's node and waits until they are there; raises when they are not.
    """

    def __init__(self, run_key: str, send: Callable[[list[Item]], None]) -> None:
        self.run_key = run_key
        self._send = send
        self._lock = threading.Lock()
        # Apart from the other lock, which is held for moments only: who records never waits for what is being sent.
        self._sending = threading.Lock()
        self._waiting: list[Item] = []
        name = f"{time.time_ns():020d}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}.jsonl"
        self._file, self._place = f"segments/{name}", 0

    def flush(self) -> None:
        """Sends what waits; returns when it has arrived."""
        with self._sending:
            with self._lock:
                items = list(self._waiting)
            if items:
                self._send(_joined(items))
                with self._lock:
                    # Only now: what was not answered is sent again, to the same places.
                    del self._waiting[: len(items)]

    def _keep(self, source: Path | bytes, name: str, folder: str) -> None:
        content = source if isinstance(source, bytes) else source.read_bytes()
        file = f"artifacts/{hashlib.sha256(content).hexdigest()[:16]}/{name}"
        with self._lock:
            self._waiting.append((file, -1, content))
        self._write(kind="artifact", file=file, folder="" if folder == "." else folder)

    def _put(self, record: Mapping[str, object]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._waiting.append((self._file, self._place, line))
            self._place += len(line)


def _joined(items: list[Item]) -> list[Item]:
    """Lines that follow one another as one item; in the same order."""
    joined: list[Item] = []
    for name, place, content in items:
        if joined and place >= 0 and joined[-1][0] == name and joined[-1][1] + len(joined[-1][2]) == place:
            joined[-1] = (name, joined[-1][1], joined[-1][2] + content)
        else:
            joined.append((name, place, content))
    return joined
