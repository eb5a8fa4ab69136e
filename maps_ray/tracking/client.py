"""The MLflow side: connecting, finding or creating the run, and what an error of the store means for a record."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from maps_ray.files import file_lock
from maps_ray.spec.credentials import VARIABLES, read_credentials, redact
from maps_ray.tracking.spool import Cursor, Spool
from maps_ray.tracking.store import artifact_location, database_file

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

RUN_KEY = "maps_ray.run_key"
_ENVIRONMENT = {
    # MLflow's own retries block for minutes; the shipper's loop is the retry.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    # 120 by default, for which a server that hangs would hold up every run of a shipper, one after the other.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A record counts as shipped when its call returns; where a user's shell turns this on, it would return before.
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
}
# Not 404: it is said of the run, never of a record in it. To put its records aside one by one would empty the spool.
_REFUSED = (400, 413, 422)
_THROTTLED = 429
# Before each next try of a call that was throttled; then the shipper's loop is the retry.
_PATIENCE_S = (0.25, 0.5, 1.0, 2.0)
# MLflow 3.17 takes 7 s to migrate a fresh database on a quiet machine, and openers come one after the other.
_LOCK_WAIT_S = 120.0
# A write of MLflow's takes 5 to 60 ms: who holds a database longer has it for something else.
_BUSY_S = 2.0

Result = TypeVar("Result")


class TrackingError(Exception):
    """A record did not arrive."""


class Unavailable(TrackingError):
    """The store does not answer now, or is busy: try again later."""


class Throttled(Unavailable):
    """The store asks for fewer requests."""


class Halted(TrackingError):
    """The store answers, but will take nothing until a person acts: no permission, or a deleted run."""


class Unknown(Halted):
    """The store has nothing of this name."""


class Refused(TrackingError):
    """The record itself is at fault, and would be refused again."""


def call(function: Callable[..., Result], *args: object, **kwargs: object) -> Result:
    """Calls MLflow; every failure becomes one of `Unavailable`, `Halted` and `Refused`. A call that is throttled is
    made again a few times."""
    for patience in _PATIENCE_S:
        try:
            return _call_once(function, *args, **kwargs)
        except Throttled:
            time.sleep(patience)
    return _call_once(function, *args, **kwargs)


def _call_once(function: Callable[..., Result], *args: object, **kwargs: object) -> Result:
    import requests
    from mlflow.exceptions import MlflowException

    try:
        return function(*args, **kwargs)
    except MlflowException as error:
        # Without retries of its own MLflow's client hides this status in a text.
        throttled = f"too many {_THROTTLED} error responses" in str(error)
        raise _meaning(_THROTTLED if throttled else error.get_http_status_code(), error) from error
    except requests.HTTPError as error:
        raise _meaning(error.response.status_code if error.response is not None else 500, error) from error
    except (TypeError, OverflowError) as error:
        # A value that MLflow or its database has no place for.
        raise _meaning(400, error) from error
    except Exception as error:
        # Also what the database itself says: it is locked, its disk is full, its server is down.
        raise _meaning(503, error) from error


def connect(uri: str, credentials: str | None = None, *, make: bool = True) -> MlflowClient:
    """A client for a resolved URI. A database is created or opened by one process at a time: MLflow's migration of a
    fresh one fails in the others otherwise.

    Args:
        uri: of the store.
        credentials: file with variables of MLflow's client, see `maps_ray.spec.credentials`.
        make: make the database's folder where there is none; else a run that was moved would be recorded in its old
            place.
    """
    os.environ.update(_ENVIRONMENT)
    if credentials is not None:
        try:
            os.environ.update(read_credentials(Path(credentials)))
        except ValueError as error:
            raise Halted(f"tracking.credentials = {credentials}: {error}") from None
    # Not above: MLflow takes seconds to import, and who only writes a spool needs none of it.
    from mlflow.tracking import MlflowClient

    database = database_file(uri)
    if database is None:
        return MlflowClient(tracking_uri=uri)
    if not make and not database.parent.is_dir():
        raise Unavailable(f"no folder {database.parent}: make it, or bring the run back to where it was begun")
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(database.with_name(f"{database.name}.lock"), _LOCK_WAIT_S) as held:
            if not held:
                raise Unavailable(f"another process has been opening {database} for {_LOCK_WAIT_S:.0f} s")
            _require_unlocked(database)
            # A fresh database gets an experiment `Default`, whose artifacts lie below the folder that this is done in.
            with contextlib.chdir(database.parent):
                client = call(MlflowClient, tracking_uri=uri)
                call(client.search_experiments, max_results=1)
    except OSError as error:
        raise Unavailable(f"cannot open {database}: {error}") from error
    return client


def _require_unlocked(database: Path) -> None:
    """Raises `Unavailable` where another program holds a database: MLflow itself would ask for minutes."""
    if not database.is_file():
        return
    with contextlib.closing(sqlite3.connect(database, timeout=_BUSY_S)) as connection:
        try:
            # To connect reads nothing yet, and would not meet the lock.
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.Error as error:
            raise Unavailable(f"{database}: {error}") from None


def ensure_run(client: MlflowClient, spool: Spool) -> Cursor:
    """The cursor of a spool whose MLflow run exists: the one that was made before, else a new one. Where MLflow has
    lost that one, as with a database that was removed, all is sent again.

    Raises:
        Halted: the run was deleted in MLflow.
    """
    # A parent's run is made by whoever comes first, its own shipper or a child's: without the lock by both.
    with spool.lock("identity.lock", _LOCK_WAIT_S) as held:
        if not held:
            raise Unavailable(f"another process holds {spool.folder / 'identity.lock'}")
        cursor = spool.cursor()
        try:
            if cursor.run_id is not None:
                check_active(client, cursor.run_id)
                return cursor
        except Unknown:
            pass
        cursor = _find_or_create(client, spool)
        spool.write_cursor(cursor)
        return cursor


def check_active(client: MlflowClient, run_id: str) -> None:
    """Raises `Halted` when the run was deleted in MLflow: then every record would look faulty."""
    if call(client.get_run, run_id).info.lifecycle_stage != "active":
        raise Halted(f"run {run_id} was deleted in MLflow: restore it (`mlflow runs restore --run-id {run_id}`) first")


def _find_or_create(client: MlflowClient, spool: Spool) -> Cursor:
    identity = spool.identity()
    if identity.parent is None:
        parent_run, experiment_id = None, _experiment(client, identity.experiment, identity.uri)
    else:
        # Where the parent is, whatever that experiment is called by now.
        parent = ensure_run(client, Spool(identity.parent))
        parent_run, experiment_id = parent.run_id, str(parent.experiment_id)
    query = f"tags.`{RUN_KEY}` = '{identity.run_key}'"
    runs = call(client.search_runs, [experiment_id], query, max_results=1)
    if runs:
        run_id = runs[0].info.run_id
    else:
        tags = {RUN_KEY: identity.run_key, "mlflow.source.name": "maps_ray", "maps_ray.run_dir": str(spool.run_dir)}
        if parent_run is not None:
            tags["mlflow.parentRunId"] = parent_run
        run = call(client.create_run, experiment_id, identity.start_time, tags, identity.run_name)
        run_id = run.info.run_id
    return Cursor(uri=identity.uri, run_id=run_id, experiment_id=experiment_id)


def _experiment(client: MlflowClient, name: str, uri: str) -> str:
    experiment = call(client.get_experiment_by_name, name)
    if experiment is None:
        try:
            return call(client.create_experiment, name, artifact_location(uri))
        except Refused:
            # Another run made it in between; any other reason leaves it missing.
            experiment = call(client.get_experiment_by_name, name)
            if experiment is None:
                raise Halted(f"MLflow does not accept the experiment name {name!r}") from None
    if experiment.lifecycle_stage != "active":
        restore = f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
        raise Halted(f"experiment {name!r} was deleted in MLflow: restore it ({restore}) or name another one")
    return str(experiment.experiment_id)


def _meaning(status: int, error: Exception) -> TrackingError:
    if status == _THROTTLED:
        return Throttled(f"MLflow asks for fewer requests: {_text(error)}")
    if status in (401, 403):
        return Halted(f"{_text(error)}; set {' and '.join(VARIABLES[:2])} or {VARIABLES[2]}, or tracking.credentials")
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        # Behind what MLflow's text is cut to.
        return Unavailable(
            f"the server's certificate is not trusted ({_text(error)[:200]}); set MLFLOW_TRACKING_SERVER_CERT_PATH to "
            "the file of its authority"
        )
    kinds = {**dict.fromkeys(_REFUSED, Refused), 404: Unknown}
    return kinds.get(status, Unavailable)(_text(error))


def _text(error: Exception) -> str:
    return redact(" ".join(str(error).split())[:500]) or type(error).__name__
