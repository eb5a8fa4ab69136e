"""From one run's spool into its MLflow run, batch by batch; each batch may be sent twice without harm."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from maps_ray.files import append_line
from maps_ray.tracking.client import Halted, Refused, TrackingError, call, check_active, ensure_run
from maps_ray.tracking.spool import FINAL, ArtifactRecord, Record, Segment, Spool, status_rank

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param, RunTag
    from mlflow.tracking import MlflowClient

# MLflow's limits on one call and on one value (`mlflow.utils.validation`); a call beyond them is refused as a whole.
_LIMITS = {"params": 100, "tags": 100, "metrics": 1000, "artifacts": 1}
_MAX_TEXT = 6000


@dataclass
class Counts:
    """What became of a run's records; a record with five metrics counts five."""

    shipped: int = 0
    already_there: int = 0
    """Shipped by an earlier attempt, or a (metric, step) that was recorded before."""
    quarantined: int = 0


@dataclass(frozen=True)
class _Owed:
    """An artifact that is to be sent, and where its record stands."""

    record: ArtifactRecord
    segment: str
    begin: int
    """In bytes."""


@dataclass
class _Batch:
    metrics: list[Metric] = field(default_factory=list)
    params: list[Param] = field(default_factory=list)
    tags: list[RunTag] = field(default_factory=list)
    artifacts: list[_Owed] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    offsets: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    pending: set[tuple[str, int]] = field(default_factory=set)
    """(name, step) of its metrics."""
    parts: list[tuple[str, list[object]]] | None = None
    """What is still to be sent, the next last; None before the first try."""
    shipped: int = 0

    @property
    def full(self) -> bool:
        return len(self.metrics) >= _LIMITS["metrics"] or len(self.artifacts) > 0

    def split(self) -> list[tuple[str, list[object]]]:
        """Its parts, each within MLflow's limits, in the reverse of the order in which they are sent."""
        parts: list[tuple[str, list[object]]] = []
        for kind, limit in _LIMITS.items():
            items = getattr(self, kind)
            parts += [(kind, items[start : start + limit]) for start in range(0, len(items), limit)]
        return parts[::-1]


class Feed:
    """Ships one spool. Only the process that holds the spool's `shipper.lock` may have one.

    Raises:
        TrackingError: (also in `ship`) the store does not answer or does not accept the run.
    """

    def __init__(self, client: MlflowClient, spool: Spool) -> None:
        self.client = client
        self.spool = spool
        self.cursor = ensure_run(client, spool)
        self.counts = Counts()
        self._seen: defaultdict[str, set[int]] = defaultdict(set)
        self._params: dict[str, str] = {}
        self._status: tuple[int, str] = (0, "RUNNING")
        # Half sent when the store gave out: its rest is sent first.
        self._begun: _Batch | None = None
        # Where artifacts are kept may be out of reach, or forbidden, while all else arrives: they wait here, and the
        # cursor stays before the first of them.
        self._owed: list[_Owed] = []
        self.stuck: TrackingError | None = None
        """Why they wait, and what `ship` raises when all else has arrived."""
        self._read = dict(self.cursor.offsets)
        # The cursor has places alone: which steps and parameters MLflow has, the records before them say.
        for segment, offset, record in spool.read():
            if offset <= self.cursor.offsets.get(segment, 0) and isinstance(record, dict):
                self.counts.already_there += self._recall(record)

    @property
    def has_ended(self) -> bool:
        """Whether the run has ended and all that was recorded is in MLflow."""
        ended = self._status[1] in FINAL and self._status[1] == self.cursor.status
        return ended and next(self.spool.read(self.cursor.offsets), None) is None

    def fail(self, error: TrackingError) -> None:
        """Notes in the cursor file why shipping failed."""
        self.cursor.error, self.cursor.error_time = str(error), time.time()
        self.spool.write_cursor(self.cursor)

    def ship(self) -> None:
        """Ships everything that stands in the spool now, the status last."""
        from mlflow.entities import Metric, Param, RunTag

        self.stuck = None
        if self._begun is not None:
            self._send(self._begun)
        if self._owed:
            owed, self._owed = self._owed, []
            self._send(_Batch(artifacts=owed))
        batch, places = _Batch(), dict(self._read)
        for segment, offset, record in self.spool.read(self._read):
            begin, places[segment] = places.get(segment, 0), offset
            batch.offsets[segment] = offset
            if isinstance(record, str):
                batch.refused.append((record, "not a record: the line was cut off"))
                continue
            if "kind" not in record:
                batch.refused.append((json.dumps(record), "unknown kind of record None"))
            elif record["kind"] == "metrics":
                step = record["step"]
                for key, value in record["values"].items():
                    # To MLflow two values of a step are one only where time and value agree too
                    # (`SqlAlchemyStore._log_metrics`, 3.17), which they do not in a step that a resumed run makes
                    # again.
                    if (key, step) in batch.pending or step in self._seen[key]:
                        batch.duplicates += 1
                    else:
                        batch.pending.add((key, step))
                        batch.metrics.append(Metric(key, value, record["time"], step))
            elif record["kind"] == "params":
                for key, text in record["values"].items():
                    first = self._params.setdefault(key, text)
                    # The first text again, not the new one: MLflow refuses a change, and with it the whole batch.
                    batch.params.append(Param(key, _shorten(first)))
                    if first != text:
                        batch.tags.append(RunTag(f"resumed.{key}", _shorten(text)))
            elif record["kind"] == "tags":
                batch.tags += [RunTag(key, _shorten(text)) for key, text in record["values"].items()]
            elif record["kind"] == "artifact":
                batch.artifacts.append(_Owed(record, segment, begin))
            elif record["kind"] == "status":
                self._status = max(self._status, (record["time"], record["status"]), key=status_rank)
            else:
                batch.refused.append((json.dumps(record), f"unknown kind of record {record['kind']!r}"))
            if batch.full:
                self._send(batch)
                batch = _Batch()
        if batch.offsets:
            self._send(batch)
        self._ship_status()
        if self.stuck is not None:
            raise self.stuck
        if self.cursor.error is not None:
            self.cursor.error = None
            self.spool.write_cursor(self.cursor)

    def _recall(self, record: Record) -> int:
        """Takes note of a record that was shipped before; returns how many values it has."""
        if "kind" not in record:
            return 1
        if record["kind"] == "status":
            self._status = max(self._status, (record["time"], record["status"]), key=status_rank)
            return 0
        if record["kind"] == "metrics":
            for key in record["values"]:
                self._seen[key].add(record["step"])
            return len(record["values"])
        if record["kind"] == "params" or record["kind"] == "tags":
            if record["kind"] == "params":
                # The first value of each stays, as in MLflow, which never changes one.
                self._params = {**record["values"], **self._params}
            return len(record["values"])
        return 1

    def _send(self, batch: _Batch) -> None:
        """Sends a batch part by part. What has arrived when the store gives out is not sent again by the next call."""
        self._begun = batch
        if batch.parts is None:
            batch.parts = batch.split()
        while batch.parts:
            kind, items = batch.parts[-1]
            try:
                if kind == "artifacts":
                    batch.shipped += self._upload(cast(_Owed, items[0]))
                else:
                    batch.shipped += self._log(kind, items)
                batch.parts.pop()
            except Refused as error:
                if len(items) == 1:
                    check_active(self.client, str(self.cursor.run_id))
                    record = (
                        cast(_Owed, items[0]).record
                        if kind == "artifacts"
                        # Entities of MLflow are pairs of names and values.
                        else {kind: dict(cast(Iterable[tuple[str, object]], items[0]))}
                    )
                    batch.refused.append((json.dumps(record), str(error)))
                    batch.parts.pop()
                else:
                    # Halved until the faulty ones stand alone.
                    half = len(items) // 2
                    batch.parts[-1:] = [(kind, items[half:]), (kind, items[:half])]
        # Before the cursor: a kill in between puts them aside twice, the other way round they would be lost.
        self._put_aside(batch.refused)
        for key, step in batch.pending:
            self._seen[key].add(step)
        self._read.update(batch.offsets)
        self.cursor.offsets = dict(self._read)
        for owed in self._owed:
            self.cursor.offsets[owed.segment] = min(self.cursor.offsets[owed.segment], owed.begin)
        if self.stuck is None:
            self.cursor.error = None
        self.spool.write_cursor(self.cursor)
        self._begun = None
        self.counts.shipped += batch.shipped
        self.counts.already_there += batch.duplicates
        self.counts.quarantined += len(batch.refused)

    def _log(self, kind: str, items: Sequence[object]) -> int:
        call(self.client.log_batch, self.cursor.run_id, **{kind: items})
        return len(items)

    def _upload(self, owed: _Owed) -> int:
        file, folder = self.spool.folder / owed.record["file"], owed.record["folder"]
        if not file.is_file():
            raise Refused("its copy in the spool is missing")
        # One that waits holds up those behind it: a later file of the same name must come later.
        if not self._owed:
            try:
                call(self.client.log_artifact, self.cursor.run_id, str(file), folder or None)
            except Refused:
                raise
            except TrackingError as error:
                self.stuck = type(error)(
                    f"artifact {Path(folder, file.name)} cannot be put where the experiment keeps its artifacts "
                    f"({error}): let this machine write there, or name another experiment"
                )
            else:
                return 1
        self._owed.append(owed)
        return 0

    def _put_aside(self, refused: list[tuple[str, str]]) -> None:
        for record, reason in refused:
            append_line(self.spool.quarantine, {"reason": reason, "record": record})

    def _ship_status(self) -> None:
        moment, status = self._status
        if status == self.cursor.status:
            return
        try:
            if status in FINAL:
                call(self.client.set_terminated, self.cursor.run_id, status, moment)
            else:
                call(self.client.update_run, self.cursor.run_id, status)
        except Refused as error:
            raise Halted(f"MLflow does not accept the status {status}: {error}") from error
        self.cursor.status = status
        self.spool.write_cursor(self.cursor)


def settle(spool: Spool) -> None:
    """Records KILLED for a run whose driver ended without saying how."""
    owner = spool.owner()
    said, status = spool.status()
    if owner is None or not owner.is_dead() or status in FINAL:
        return
    segment = Segment(spool)
    moment = max(time.time_ns() // 1_000_000, said + 1)
    reason = f"process {owner.pid} on {owner.host} ended without saying how"
    segment.write({"time": moment, "kind": "tags", "values": {"maps_ray.ended": reason}})
    # Last: the next `settle` looks for this one, and says both again after a kill in between.
    segment.write({"time": moment, "kind": "status", "status": "KILLED"})
    segment.close()


def _shorten(value: str) -> str:
    return value if len(value) <= _MAX_TEXT else value[: _MAX_TEXT - 1] + "…"
