"""Which driver a run belongs to, also where no lock reaches: on object stores, and in folders without locks.

`claims.json` in the run's folder lists the drivers that have taken the run, the last one its owner, each with a token
and with the newest checkpoint that it found. A manifest holds the token of its driver. So

- a driver that was overtaken sees it at its next commit, and stops;
- what it commits in spite of that, because it was held up or saw an older list, does not count: a checkpoint of an
  earlier driver counts up to the step that each later one has found.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from maps_ray.files import write_atomically
from maps_ray.run_storage import NotThere, RunStorage
from maps_ray.training.run_faults import OvertakenError

CLAIMS_FILE = "claims.json"
LAG_S = 90.0
"""How long a file that another node has written may stay unseen on shared storage (NFS, EFS: 60 s)."""
_LOOK_S = 1.0


@dataclass(frozen=True)
class Claim:
    """One driver's."""

    token: str
    host: str
    pid: int
    time: float
    """Seconds since 1970."""
    step: int
    """Of the newest checkpoint that the driver found; 0 when there was none."""

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.time, UTC).isoformat(sep=" ", timespec="seconds")
        return f"process {self.pid} on {self.host} has taken it over at {since}"


class Fence:
    """The run as one driver has claimed it; its workers have a copy.

    Args:
        folder: of the run, on shared storage or of this node.
        storage: the run's folder on an object store, if it is there.
        claims: all that the driver found, its own the last one.
    """

    def __init__(self, folder: Path, storage: RunStorage | None, claims: Sequence[Claim]) -> None:
        self._folder, self._storage = folder, storage
        self.claims = tuple(claims)
        """What a worker makes its copy of, with the folder as its node has it."""

    @classmethod
    def earlier(cls, folder: Path, storage: RunStorage | None) -> Fence:
        """As the run was left, by a driver that has not claimed it yet."""
        return cls(folder, storage, _read(folder, storage) or ())

    @property
    def token(self) -> str | None:
        """Of the driver; None where nobody has claimed the run."""
        return self.claims[-1].token if self.claims else None

    def claim(self, step: int) -> Fence:
        """Takes the run over for this process, whose newest checkpoint is that of `step`."""
        own = Claim(uuid.uuid4().hex, socket.gethostname(), os.getpid(), time.time(), step)
        # All earlier ones stay in the list: each limits what counts of those before it.
        claims = (*self.claims, own)
        text = json.dumps([asdict(claim) for claim in claims], indent=1)
        if self._storage is not None:
            self._storage.write(CLAIMS_FILE, text.encode())
        else:
            write_atomically(self._folder / CLAIMS_FILE, text, shared=True)
        return Fence(self._folder, self._storage, claims)

    def accepts(self, token: str | None, step: int) -> bool:
        """Whether a checkpoint counts, by its driver's token and its step."""
        tokens = [claim.token for claim in self.claims]
        # Made before there were claims: all of them came later.
        place = tokens.index(token) if token in tokens else -1
        if token is not None and place < 0 and tokens:
            return False
        return all(step <= claim.step for claim in self.claims[place + 1 :])

    def knows(self, token: str | None) -> bool:
        """Whether a token is this driver's or an earlier one's."""
        return token is None or any(claim.token == token for claim in self.claims)

    def fault(self) -> str | None:
        """Why the driver has lost the run; None while it has it."""
        if not self.claims:
            return None
        own, deadline = self.claims[-1], time.monotonic() + LAG_S
        while True:
            claims = _read(self._folder, self._storage) or []
            if claims and claims[-1].token == own.token:
                return None
            # Two drivers that have read the same list write over one another, for neither folders nor all object stores
            # compare before they write: ours may be gone from the list, and the later one stands there.
            if any(claim.token == own.token for claim in claims) or any(claim.time > own.time for claim in claims):
                return f"the run belongs to another driver: {claims[-1]}"
            # An older list: another node's copy of it may lag. An object store's never does.
            if time.monotonic() > deadline or self._storage is not None:
                return f"the run's {CLAIMS_FILE} does not name this driver any more"
            time.sleep(_LOOK_S)

    def unseen(self) -> str | None:
        """Why this node cannot take part, where it does not see what the driver has written into the run's folder."""
        if self._storage is not None or not self.claims:
            return None
        own, deadline, why = self.claims[-1], time.monotonic() + LAG_S, ""
        while time.monotonic() < deadline:
            try:
                # A later driver's list will do: that the run is lost is for `fault` to say.
                if any(claim.time >= own.time for claim in _read(self._folder, None) or ()):
                    return None
            except OSError as error:
                why = f" ({error.strerror})"
            time.sleep(_LOOK_S)
        return (
            f"node {socket.gethostname()} does not see what the driver has written to {self._folder}{why}: "
            "cluster.storage must be a folder that all nodes share, or an object store (s3://bucket/runs)"
        )

    def require(self) -> None:
        """
        Raises:
            OvertakenError: the run belongs to another driver now.
        """
        fault = self.fault()
        if fault is not None:
            raise OvertakenError(overtaken(fault))


def overtaken(fault: str) -> str:
    """What is said of a driver that lost its run."""
    return f"{fault}; this driver stops, and what it has done since its last checkpoint is left to the other one"


def _read(folder: Path, storage: RunStorage | None) -> list[Claim] | None:
    try:
        raw = storage.read(CLAIMS_FILE) if storage is not None else (folder / CLAIMS_FILE).read_bytes()
        return [Claim(**claim) for claim in json.loads(raw)]
    except (FileNotFoundError, NotThere):
        # Absence alone: a store that does not answer is no run that nobody has claimed.
        return None
