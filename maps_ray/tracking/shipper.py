"""The process that ships a run's spool, and those of its child runs: `python -m maps_ray.tracking.shipper RUN_DIR`.

It outlives the driver: ended by kill -9, the driver's records still arrive, and the run's status becomes KILLED. It
leaves when all is shipped, when another driver has taken the run over, or `LINGER_S` after the run's end.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from datetime import datetime
from pathlib import Path

from maps_ray.spec.credentials import redact
from maps_ray.tracking.client import TrackingError, connect
from maps_ray.tracking.feed import Feed, settle
from maps_ray.tracking.spool import FINAL, Spool

POLL_S = 0.5
MAX_BACKOFF_S = 5.0
LINGER_S = 300.0
_TAKE_OVER_WAIT_S = 120.0


class Shipper:
    """Feeds for one run and its children, all in one store.

    Args:
        spool: its `shipper.lock` is held by the caller.
        locks: takes the children's locks.
    """

    def __init__(self, spool: Spool, locks: contextlib.ExitStack) -> None:
        self._locks = locks
        self._parent = spool
        self._spools = {spool.run_dir: spool}
        self._feeds: dict[Path, Feed] = {}

    def ship(self) -> None:
        """One round over all runs. Raises `TrackingError` at the first that fails; where artifacts alone do, at the
        end."""
        self._find_children()
        stuck: TrackingError | None = None
        for run_dir, spool in self._spools.items():
            settle(spool)
            feed = self._feeds.get(run_dir)
            try:
                if feed is None:
                    known = next(iter(self._feeds.values()), None)
                    identity = spool.identity()
                    client = known.client if known else connect(identity.uri, identity.credentials)
                    feed = Feed(client, spool)
                    self._feeds[run_dir] = feed
                feed.ship()
            except TrackingError as error:
                if feed is None:
                    spool.note(str(error))
                    raise
                feed.fail(error)
                if error is not feed.stuck:
                    raise
                stuck = error
        if stuck is not None:
            raise stuck

    @property
    def has_ended(self) -> bool:
        """Whether the run and its children have ended and stand in MLflow with all they recorded."""
        return len(self._feeds) == len(self._spools) and all(feed.has_ended for feed in self._feeds.values())

    def _find_children(self) -> None:
        for child in self._parent.children():
            if child.run_dir in self._spools or not child.exists:
                continue
            with contextlib.ExitStack() as attempt:
                # Who holds it ships this child (a replay); the next round asks again, and the other runs do not wait.
                if attempt.enter_context(child.lock("shipper.lock", 0.0)):
                    self._locks.push(attempt.pop_all())
                    self._spools[child.run_dir] = child


def main(run_dir: str) -> int:
    """Returns 0 when everything was shipped, 1 when something was left, 2 when another shipper is at work."""
    spool = Spool(run_dir)
    # Before the lock, which is waited for: a driver that takes the run over meanwhile ends this shipper at once.
    owner = spool.owner()
    # The user's may be removed meanwhile.
    os.chdir(spool.folder)
    # Training on the same cores comes first.
    os.nice(5)
    with contextlib.ExitStack() as locks:
        if not locks.enter_context(spool.lock("shipper.lock", _TAKE_OVER_WAIT_S)):
            _say("another shipper is at work")
            return 2
        shipper = Shipper(spool, locks)
        ended_at: float | None = None
        wait = POLL_S
        # A run that is resumed has another owner, which starts a shipper of its own: that one waits for this lock.
        while spool.owner() == owner:
            try:
                shipper.ship()
                if shipper.has_ended:
                    return 0
                wait = POLL_S
            except Exception as error:
                # Whatever it is, a full disk of its own too: it goes on, and says so in one line.
                _say(f"{type(error).__name__}: {redact(' '.join(str(error).split())[:500])}")
                wait = min(2 * wait, MAX_BACKOFF_S)
            if ended_at is None and spool.status()[1] in FINAL:
                # The driver waits for this in `finish`, and not for what is left of a wait from before.
                ended_at, wait = time.monotonic(), POLL_S
            if ended_at is not None and time.monotonic() - ended_at > LINGER_S:
                _say("the run has ended and something is left; `maps-ray track replay` ships it")
                return 1
            time.sleep(wait)
    return 1


def _say(message: str) -> None:
    print(f"{datetime.now().isoformat(timespec='seconds')} {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
