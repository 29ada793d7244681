"""A lease: keeps a second writer out where files cannot be locked.

A small file beside the place names its holder and the time, and is renewed while the holder lives.
It is free at once when a later attempt of the same KFP run comes, or when Kubernetes says that the
holder's pod has ended; else when it has not been renewed for two minutes, so clocks may differ by a
minute. In S3 each write is conditional: of two that want it one gets it. Where a store knows no
conditions the later write wins, and each looks a second time. A holder that finds another's name
(it had been cut off for minutes) stops its own process, which saves first if it can.
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
from dataclasses import asdict, dataclass

from flagscale.errors import UserError
from flagscale.shared.pods import Pod, has_ended, own_pod
from flagscale.shared.store import ObjectStore
from flagscale.shared.versions import Version, VersionedObject

logger = logging.getLogger(__name__)

_STALE_SECONDS = 120.0
_RENEW_SECONDS = 20.0
_PATIENCE_SECONDS = 30.0  # beyond that
_SETTLE_SECONDS = 1.0
_POLL_SECONDS = 2.0
_TELL_SECONDS = 30.0  # how often Kubernetes is asked, too
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


@dataclass(frozen=True)
class _Entry:
    """What the file says.

    Attributes:
        holder: a process.
        renewed: seconds since 1970, by the holder's clock.
        pod: that it runs in, if KFP started it.
    """

    holder: str
    renewed: float
    pod: Pod | None

    @classmethod
    def parse(cls, content: bytes) -> _Entry | None:
        """None: it says nothing."""
        try:
            found = json.loads(content)
            pod = Pod(**found["pod"]) if found.get("pod") else None
            return cls(str(found["holder"]), float(found["renewed"]), pod)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    @property
    def text(self) -> str:
        """For people: who that is."""
        if self.pod is None:
            return self.holder
        return f"pod {self.pod.name} (KFP run {self.pod.run})"


class _Lease:
    def __init__(self, place: str) -> None:
        folder, _, name = place.rstrip("/").rpartition("/")
        self._place = place
        self._object = VersionedObject(ObjectStore(folder), f"{name}.lease")
        # A renewal comes again by itself, and must not be late for the next.
        self._renewed = VersionedObject(ObjectStore(folder, patient=False), f"{name}.lease")
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._pod = own_pod()

    def take(self, patience_seconds: float | None) -> None:
        if patience_seconds is None:
            patience_seconds = _STALE_SECONDS + _PATIENCE_SECONDS
        deadline = time.monotonic() + patience_seconds
        told = -_TELL_SECONDS
        while True:
            version, entry = self._read(self._object)
            look = time.monotonic() >= told + _TELL_SECONDS
            if entry is None or self._is_free(entry, ask=look):
                if self._claim(version):
                    return
                continue
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{self._place}: {entry.text} writes there; stop it, wait for it, or give this "
                    "run a place of its own (parameter `training_checkpoints`)"
                )
            if look:
                told = time.monotonic()
                logger.info("waiting for %s to leave %s", entry.text, self._place)
            time.sleep(_POLL_SECONDS)

    def renew_until(self, stopped: threading.Event) -> None:
        while not stopped.wait(_RENEW_SECONDS):
            try:
                other = self._renew()
                if other is not None:
                    logger.error("%s: %s writes there now; this process stops", self._place, other)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
            except (UserError, OSError) as error:  # a full disk is no `UserError`
                logger.warning("the lease could not be renewed: %s", error)

    def release(self) -> None:
        """If it was taken. A failure is no harm: in two minutes anybody may take it."""
        try:
            version, entry = self._read(self._object)
            if version is not None and entry is not None and entry.holder == self._holder:
                self._object.remove(version)
        except (UserError, OSError) as error:
            logger.warning("the lease could not be given back: %s", error)

    def _is_free(self, entry: _Entry, *, ask: bool) -> bool:
        """Whether its holder is gone, or is this process.

        Args:
            entry: what it says.
            ask: Kubernetes too.
        """
        if entry.holder == self._holder:  # the answer to the write was lost
            return True
        if time.time() - entry.renewed > _STALE_SECONDS:
            return True
        if entry.pod is None:
            return False
        if self._pod is not None and self._pod.follows(entry.pod):
            logger.info("%s: taken over from %s, the attempt before", self._place, entry.text)
            return True
        if ask and has_ended(entry.pod):
            logger.info("%s: taken over from %s, which has ended", self._place, entry.text)
            return True
        return False

    def _claim(self, version: Version | None) -> bool:
        """Write this process's name, unless another was faster; whether it is there to stay."""
        if not self._object.write(self._content(), version):
            return False
        self._object.try_conditions(self._content())
        if self._object.has_conditions:
            return True
        self._renewed.has_conditions = False
        logger.info("%s: no conditional writes there: the lease goes by clocks", self._place)
        time.sleep(_SETTLE_SECONDS)
        _, entry = self._read(self._object)
        return entry is None or entry.holder == self._holder

    def _renew(self) -> str | None:
        """Write the time; who else holds it by now, None if nobody does."""
        while True:
            version, entry = self._read(self._renewed)
            if entry is not None and entry.holder != self._holder:
                return entry.text
            if self._renewed.write(self._content(), version):
                return None

    def _read(self, of: VersionedObject) -> tuple[Version | None, _Entry | None]:
        """What is there, and what that says: None if it says nothing."""
        for _ in range(_READS):
            version = of.read()
            entry = None if version is None else _Entry.parse(version.content)
            if entry is not None or version is None or of.has_conditions:
                break
            time.sleep(_SETTLE_SECONDS)  # on a file system, while it is written
        return version, entry

    def _content(self) -> bytes:
        pod = None if self._pod is None else asdict(self._pod)
        values = {"holder": self._holder, "renewed": time.time(), "pod": pod}
        return json.dumps(values).encode()
