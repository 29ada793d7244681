"""A lease: keeps a second writer out where files cannot be locked.

A small file beside the place names its holder and the time, and is renewed while the holder lives.
One that has not been renewed for two minutes is up for taking, so clocks may differ by a minute.
Between two that ask at the same moment the later write wins, and each looks a second time. A holder
that finds another's name (it had been cut off for minutes) stops its own process, which saves first
if it can.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from flagscale.errors import UserError
from flagscale.shared.store import ObjectStore

logger = logging.getLogger(__name__)

_STALE_SECONDS = 120.0
_PATIENCE_SECONDS = 30.0  # beyond that
_SETTLE_SECONDS = 1.0
_POLL_SECONDS = 2.0
_READS = 3


@contextmanager
def leased(place: str, patience_seconds: float | None = None) -> Iterator[None]:
    """Hold the lease of a place; wait for one who is still ending, or has died.

    Args:
        place: URL or path; the lease lies beside it, as `<place>.lease`.
        patience_seconds: how long to wait; None: until one who has died does not count any more.

    Raises:
        UserError: another process holds it and goes on renewing it.
    """
    lease = _Lease(place)
    stopped = threading.Event()
    thread = threading.Thread(target=lease.renew_until, args=(stopped,), daemon=True)
    try:
        lease.take(patience_seconds)
        thread.start()
        yield
    finally:
        stopped.set()
        if thread.ident is not None:
            thread.join(timeout=_POLL_SECONDS)
        lease.release()


class _Lease:
    def __init__(self, place: str) -> None:
        folder, _, name = place.rstrip("/").rpartition("/")
        self._store, self._name = ObjectStore(folder), f"{name}.lease"
        self._place = place
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"

    def take(self, patience_seconds: float | None) -> None:
        if patience_seconds is None:
            patience_seconds = _STALE_SECONDS + _PATIENCE_SECONDS
        deadline = time.monotonic() + patience_seconds
        while True:
            other = self._other()
            if other is None:
                self._write()
                time.sleep(_SETTLE_SECONDS)
                if self._other() is None:
                    return
            elif time.monotonic() >= deadline:
                raise UserError(
                    f"{self._place}: {other} writes there; stop it, wait for it, or give this run "
                    "a place of its own (parameter `checkpoints`)"
                )
            else:
                logger.info("waiting for %s to leave %s", other, self._place)
            time.sleep(_POLL_SECONDS)

    def renew_until(self, stopped: threading.Event) -> None:
        while not stopped.wait(_STALE_SECONDS / 6):
            try:
                other = self._other()
                if other is not None:
                    logger.error("%s: %s writes there now; this process stops", self._place, other)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                self._write()
            except (UserError, OSError) as error:  # a full disk is no `UserError`
                logger.warning("the lease could not be renewed: %s", error)

    def release(self) -> None:
        """If it was taken. A failure is no harm: in two minutes anybody may take it."""
        try:
            if self._current() == self._holder:
                self._store.remove(self._name)
        except (UserError, OSError) as error:
            logger.warning("the lease could not be given back: %s", error)

    def _other(self) -> str | None:
        """Who else holds it, None if nobody does."""
        holder = self._current()
        return None if holder == self._holder else holder

    def _current(self) -> str | None:
        """Who holds it, None if nobody does."""
        for _ in range(_READS):
            content = self._store.read(self._name)
            if content is None:
                return None
            try:
                found = json.loads(content)
                holder, renewed = str(found["holder"]), float(found["renewed"])
            except (ValueError, TypeError, KeyError):  # on a file system, while it is written
                time.sleep(_SETTLE_SECONDS)
                continue
            mine = holder == self._holder
            return holder if mine or time.time() - renewed <= _STALE_SECONDS else None
        return None

    def _write(self) -> None:
        values = {"holder": self._holder, "renewed": time.time()}
        self._store.write(self._name, json.dumps(values).encode())
