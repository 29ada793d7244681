"""One process at a time writes a place."""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flagscale.errors import UserError
from flagscale.shared.lease import leased
from flagscale.shared.store import is_url

logger = logging.getLogger(__name__)

_LOCK_SECONDS = 120.0


@contextmanager
def exclusively(place: str | None) -> Iterator[None]:
    """Keep other processes out of a folder, after waiting for one that is still ending.

    Args:
        place: a folder, which is locked; where the file system has no locks, and for a URL, a lease
            is taken. None: nothing to keep anybody out of.

    Raises:
        UserError: another process stays there.
    """
    if place is None:
        yield
        return
    if is_url(place):
        with leased(place):
            yield
        return
    path = Path(f"{place}.lock")  # beside it: the folder holds checkpoints and nothing else
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        deadline = time.monotonic() + _LOCK_SECONDS
        while (locked := _try_lock(stream.fileno())) is False:
            if time.monotonic() > deadline:
                raise UserError(f"{place}: another process writes there; stop it, or wait for it")
            logger.info("waiting for another process to leave %s", place)
            time.sleep(2)
        if locked:
            yield
        else:
            with leased(str(path.absolute())):
                yield


def _try_lock(descriptor: int) -> bool | None:
    """Whether it is ours now; None on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.info("no file locks here (%s): taking a lease", error.strerror)
        return None
    return True
