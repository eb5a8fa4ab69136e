"""This node's copy of a run's folder that lies on an object store.

    <scratch>/s3/bucket/runs/<name>/    on the driver's node: spec, records, reports; never a checkpoint
    s3://bucket/runs/<name>/            all of it, checkpoints and trained weights too

The spool and MLflow's sqlite are appended to, so they live on the driver's disk; a copy of them goes with each
checkpoint. A driver on another node begins with that copy: what MLflow has already got of it is sent again, and
recorded once.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path

from maps_ray.files import replaced
from maps_ray.run_storage import NotThere, RunStorage, full_scratch_named, make_scratch, run_storage
from maps_ray.spec import RunSpec
from maps_ray.tracking.spool import FOLDER, Spool
from maps_ray.tracking.store import database_file, resolve_uri
from maps_ray.training.claims import CLAIMS_FILE

_DATABASE = "mlflow.db"
# Of this node alone: how far its shipper has come, and in which store.
_OWN = ("cursor.json", "owner.json", "shipper.log", "children")
# This node's alone, and the object store's alone.
_APART = ("lock", CLAIMS_FILE)


class Mirror:
    """A run's folder as this node has it, and on the object store; without one there is nothing to carry.

    Args:
        run_dir: of this node.
        storage: the run's folder on the object store.
    """

    def __init__(self, run_dir: Path, storage: RunStorage | None) -> None:
        self.run_dir, self.storage = run_dir, storage
        self._pushed: dict[str, tuple[int, int]] = {}

    @classmethod
    def of(cls, spec: RunSpec) -> Mirror:
        """Of a run."""
        return cls(spec.run_dir, run_storage(spec))

    def has(self, name: str) -> bool:
        """Whether the run has a file."""
        return (self.run_dir / name).is_file() if self.storage is None else self.storage.exists(name)

    def begin(self) -> None:
        """Leaves nothing here of an earlier run of that name; its lock is held."""
        for path in self.run_dir.iterdir() if self.storage is not None else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != "lock":
                path.unlink()

    def pull(self, spec: RunSpec) -> None:
        """Brings this node's copy up to the object store's, but for checkpoints, weights and rollouts. Records of the
        same run that are here, and not there yet, stay.

        Raises:
            StorageError: the store fails.
        """
        if self.storage is None:
            return
        make_scratch(spec.cluster.scratch)
        spool, key = Spool(self.run_dir), _run_key(self.storage)
        # Records of another run of that name would be sent as this one's.
        if not spool.exists or spool.identity().run_key != key:
            shutil.rmtree(self.run_dir, ignore_errors=True)
        names = self.storage.fetch_folder("", self.run_dir, lambda name, size: "/" not in name and name not in _APART)
        for path in self.run_dir.iterdir() if self.run_dir.is_dir() else ():
            if path.is_file() and path.name not in (*names, *_APART):
                path.unlink()
        for name, size in self.storage.files(FOLDER).items():
            path = spool.folder / name
            # Segments only grow: one that is shorter here lacks records, one that is longer has some not sent yet.
            if not path.is_file() or (name.startswith("segments/") and path.stat().st_size < size):
                self.storage.fetch(f"{FOLDER}/{name}", path)
        self._restore_database(resolve_uri(spec.tracking.uri, spec.cluster.local_storage))

    def pull_file(self, name: str) -> None:
        """Brings one file up to the object store's; where that has none, there is none here."""
        if self.storage is not None:
            try:
                self.storage.fetch(name, self.run_dir / name)
            except NotThere:
                (self.run_dir / name).unlink(missing_ok=True)

    def push(self, *names: str) -> None:
        """Brings files of the object store up to this node's; what is not here is removed there."""
        for name in names if self.storage is not None else ():
            assert self.storage is not None
            if (self.run_dir / name).is_file():
                self.storage.upload(self.run_dir / name, name)
            else:
                self.storage.remove(name)

    def push_all(self) -> None:
        """The same for all files that lie directly in the folder."""
        if self.storage is not None:
            self.push(*(path.name for path in self.run_dir.iterdir() if path.is_file() and path.name not in _APART))

    def push_folder(self, source: Path, name: str, last: tuple[str, ...] = ()) -> None:
        """Makes a folder on the object store hold what a local one has; files named `last` come last."""
        if self.storage is not None:
            self.storage.upload_folder(source, name, last)

    def push_records(self) -> None:
        """Copies the spool, and MLflow's sqlite where the run is recorded in one; what has not changed is left out."""
        spool = Spool(self.run_dir)
        if self.storage is None or not spool.exists:
            return
        identity = spool.identity()
        database = database_file(identity.uri)
        # That of a sweep goes with the sweep's own records, once for all of its trials.
        if database is not None and database.is_file() and identity.parent is None:
            _copy_database(database, spool.folder / _DATABASE)
        for path in sorted(spool.folder.rglob("*")):
            name = path.relative_to(spool.folder).as_posix()
            if not path.is_file() or name.startswith((*_OWN, ".")) or "/." in name or name.endswith(".lock"):
                continue
            # Before the upload: what is appended meanwhile is another state, and goes the next time.
            facts = path.stat()
            state = (facts.st_size, facts.st_mtime_ns)
            if self._pushed.get(name) != state:
                self.storage.upload(path, f"{FOLDER}/{name}")
                self._pushed[name] = state

    def remove(self) -> None:
        """Takes this node's copy away; the object store has all of it."""
        if self.storage is not None:
            shutil.rmtree(self.run_dir, ignore_errors=True)

    def _restore_database(self, uri: str) -> None:
        database, copy = database_file(uri), self.run_dir / FOLDER / _DATABASE
        if database is not None and not database.exists() and copy.is_file():
            with full_scratch_named(database.parent, "MLflow's database", lambda: copy.stat().st_size):
                database.parent.mkdir(parents=True, exist_ok=True)
                with replaced(database, shared=True) as partial:
                    shutil.copyfile(copy, partial)
            # What this node's shipper had sent was to a database that is gone.
            (self.run_dir / FOLDER / "cursor.json").unlink(missing_ok=True)


def _run_key(storage: RunStorage) -> str | None:
    try:
        return str(json.loads(storage.read(f"{FOLDER}/run.json"))["run_key"])
    except NotThere:
        return None


def _copy_database(database: Path, to: Path) -> None:
    """As it is at one moment, while others write it; nothing where it is held for long."""
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=2)) as source,
        contextlib.closing(sqlite3.connect(to)) as target,
    ):
        # A copy of the file could be cut between two pages of one transaction; SQLite's backup starts anew where one
        # comes in between (sqlite.org/backup.html).
        source.backup(target)
