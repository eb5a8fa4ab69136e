"""Ships what is left in spools: after a server that was down, a killed shipper, or a run on another machine."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from maps_ray.tracking.client import TrackingError, connect
from maps_ray.tracking.feed import Counts, Feed, settle
from maps_ray.tracking.spool import FOLDER, Spool

_BUSY_WAIT_S = 10.0


@dataclass
class RunReplay:
    """What became of one run."""

    run_dir: Path
    uri: str
    run_id: str | None = None
    status: str = "RUNNING"
    """Status in the spool; RUNNING also when the driver was killed on another host, which cannot be seen from here."""
    counts: Counts = field(default_factory=Counts)
    quarantine: Path | None = None
    """File with the refused records and the reasons, where there are any."""
    error: str | None = None
    """Why something is left; None when everything is in MLflow."""


@dataclass
class ReplaySummary:
    """What `replay` did, run by run, parents before their children."""

    runs: list[RunReplay]

    @property
    def complete(self) -> bool:
        return all(run.error is None for run in self.runs)

    @property
    def counts(self) -> Counts:
        return Counts(
            shipped=sum(run.counts.shipped for run in self.runs),
            already_there=sum(run.counts.already_there for run in self.runs),
            quarantined=sum(run.counts.quarantined for run in self.runs),
        )

    @property
    def missing(self) -> str | None:
        """What MLflow has not got, a line or two for each such run; None when it has everything."""
        left = [run for run in self.runs if run.error is not None or run.quarantine is not None]
        return f"MLflow has not got everything:\n{ReplaySummary(left)}" if left else None

    def __str__(self) -> str:
        lines = []
        for run in self.runs:
            counts = run.counts
            line = f"{run.run_dir.name}: {counts.shipped} shipped, {counts.already_there} already there, {run.status}"
            if counts.quarantined:
                line += f", {counts.quarantined} refused (see {run.quarantine})"
            elif run.quarantine is not None:
                line += f", some refused earlier (see {run.quarantine})"
            lines.append(f"{line}\n  not complete: {run.error}" if run.error else line)
        return "\n".join(lines)


def find_spools(path: str | Path) -> list[Spool]:
    """The spools of a run folder (or its `tracking` folder) and of its child runs, or of all runs below a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path).resolve()
    if not path.is_dir():
        raise FileNotFoundError(f"no such folder: {path}")
    root = Spool(path.parent if path.name == FOLDER and (path / "run.json").is_file() else path)
    if root.exists:
        return [root, *(child for child in root.children() if child.exists)]
    spools = [Spool(file.parents[1]) for file in sorted(path.glob(f"**/{FOLDER}/run.json"))]
    if not spools:
        raise FileNotFoundError(f"no tracked run in {path}: no {FOLDER}/run.json in it or below")
    return sorted(spools, key=lambda spool: (spool.identity().parent is not None, str(spool.run_dir)))


def replay(path: str | Path, *, make: bool = True) -> ReplaySummary:
    """Ships all that `find_spools(path)` holds and MLflow lacks. Doing it twice changes nothing.

    A run whose driver died on this host without a word is set to KILLED.

    Args:
        path: as `find_spools` takes it.
        make: as in `connect`.

    Raises:
        FileNotFoundError: no tracked run there. A store that does not answer is not raised but stands in `error`.
    """
    return ReplaySummary([_replay(spool, make) for spool in find_spools(path)])


def _replay(spool: Spool, make: bool) -> RunReplay:
    identity = spool.identity()
    run = RunReplay(spool.run_dir, identity.uri)
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(spool.lock("shipper.lock", _BUSY_WAIT_S)):
            run.error = "the run's own shipper is still at work"
            run.run_id, run.status = spool.cursor().run_id, spool.status()[1]
            return run
        settle(spool)
        run.status = spool.status()[1]
        feed: Feed | None = None
        try:
            feed = Feed(connect(run.uri, identity.credentials, make=make), spool)
            feed.ship()
        except TrackingError as error:
            run.error = f"{run.uri}: {error}"
            spool.note(str(error))
        if feed is not None:
            run.run_id, run.counts = feed.cursor.run_id, feed.counts
        if spool.quarantine.is_file():
            run.quarantine = spool.quarantine
    return run
