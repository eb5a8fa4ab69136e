"""Which MLflow store a run is recorded in, and how to look at it. Nothing here imports mlflow."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import sys
from pathlib import Path

from maps_ray.spec import Problem, SpecError

_SQLITE = "sqlite:///"
_FIRST_UI_PORT = 5000
# SQLAlchemy takes what follows a question mark for options, and an escaped character for the character.
_READ_OTHERWISE = re.compile(r"\?|%[0-9A-Fa-f]{2}")


def resolve_uri(uri: str | None, storage: str | Path) -> str:
    """The tracking URI with absolute paths.

    Args:
        uri: `http(s)://server`, `sqlite:///file.db` (relative to the working directory, or absolute with a fourth
            slash), or None for `mlflow.db` inside `storage`.
        storage: folder shared by all nodes.

    Raises:
        SpecError: any other kind of store; MLflow itself refuses plain folders. Or a folder whose name MLflow would
            read as something else.
    """
    if uri is None:
        return _database_uri(Path(storage).resolve() / "mlflow.db", "cluster.storage", str(storage))
    if uri.startswith(("http://", "https://")) and len(uri.split("://", 1)[1].strip("/")) > 0:
        return uri.rstrip("/")
    if uri.startswith(_SQLITE) and len(uri) > len(_SQLITE):
        try:
            path = Path(uri.removeprefix(_SQLITE)).expanduser().resolve()
        except RuntimeError as error:
            raise SpecError([Problem("tracking.uri", uri, f"{error}: write the path in full, or set HOME")]) from None
        return _database_uri(path, "tracking.uri", uri)
    remedy = "use http(s)://server, sqlite:///path/to/mlflow.db, or leave it out for a database under cluster.storage"
    if uri.startswith(("file:", "/", ".")) or "://" not in uri:
        raise SpecError([Problem("tracking.uri", uri, f"MLflow no longer records into a plain folder; {remedy}")])
    raise SpecError([Problem("tracking.uri", uri, f"not a store that runs can be recorded in; {remedy}")])


def _database_uri(path: Path, field: str, value: str) -> str:
    strange = _READ_OTHERWISE.search(str(path))
    if strange is not None:
        message = (
            f"MLflow reads {strange.group()!r} in the path of a database as something else, and would write elsewhere; "
            "name a folder without it, or an MLflow server in tracking.uri"
        )
        raise SpecError([Problem(field, value, message)])
    if path.name == ":memory:":
        raise SpecError([Problem(field, value, "a database in memory goes with its process: name a file")])
    if path.is_dir():
        raise SpecError([Problem(field, value, f"is a folder: name a file in it, such as {path / 'mlflow.db'}")])
    return f"{_SQLITE}{path}"


def database_file(uri: str) -> Path | None:
    """The sqlite file of a resolved URI; None for a server."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def artifact_location(uri: str) -> str | None:
    """Where artifacts of a resolved URI's experiments go: `mlartifacts` beside a database; a server decides itself."""
    database = database_file(uri)
    return (database.parent / "mlartifacts").as_uri() if database else None


def ui_command(uri: str) -> str:
    """The command that opens the MLflow UI for a resolved URI, on a port that is free now; a server's own address."""
    database = database_file(uri)
    if database is None:
        return uri
    beside = Path(sys.executable).with_name("mlflow")
    program = "mlflow" if shutil.which("mlflow") or not beside.exists() else str(beside)
    port = free_port(_FIRST_UI_PORT)
    arguments = [program, "ui", "--workers", "1", "--port", str(port), "--backend-store-uri", uri]
    # Without this MLflow starts five more processes for jobs that nobody submits.
    return "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false " + shlex.join(arguments)


def free_port(first: int, tries: int = 200) -> int:
    """The first TCP port on 127.0.0.1 from `first` on that nobody listens on.

    Raises:
        OSError: none of `tries` ports is free.
    """
    for port in range(first, first + tries):
        with socket.socket() as probe:
            # As servers do: what is left of an earlier one in TIME_WAIT is not in the way.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port between {first} and {first + tries - 1}")
