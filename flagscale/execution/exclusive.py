"""One process at a time writes a place."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from flagscale.errors import UserError
from flagscale.shared.lease import leased
from flagscale.shared.store import is_url

logger = logging.getLogger(__name__)

_LOCK_SECONDS = 120.0
_TELL_SECONDS = 30.0


@contextmanager
def exclusively(place: str, patience_seconds: float | None = None) -> Iterator[None]:
    """Keep other processes out of a folder, after waiting for one that is still ending.

    Args:
        place: a folder, which is locked; where the file system has no locks, and for a URL, a lease
            is taken.
        patience_seconds: how long to wait; None: as long as one that is ending may take.

    Raises:
        UserError: another process stays there.
    """
    if is_url(place):
        with leased(place, patience_seconds):
            yield
        return
    path = _lock_file(Path(place))
    deadline = time.monotonic() + (_LOCK_SECONDS if patience_seconds is None else patience_seconds)
    tell = 0.0
    while True:
        with _open(path) as stream:
            locked = _try_lock(stream.fileno())
            if locked is None:
                with leased(str(path.absolute()), patience_seconds):
                    yield
                return
            if locked and _is_at(path, stream):
                yield
                return
        if not locked:
            now = time.monotonic()
            if now >= deadline:
                raise UserError(f"{place}: another process writes there; stop it, or wait for it")
            if now >= tell:
                tell = now + _TELL_SECONDS
                logger.info("waiting for another process to leave %s", place)
            time.sleep(2)


def delete_unless_held(folder: Path) -> bool:
    """Delete a folder, and its lock, if no process keeps others out; whether it is gone."""
    try:
        with exclusively(str(folder), patience_seconds=0.0):
            shutil.rmtree(folder, ignore_errors=True)
            _lock_file(folder).unlink()
    except UserError:
        return False
    return True


def _lock_file(folder: Path) -> Path:
    """Beside the folder, which holds checkpoints and nothing else."""
    return folder.with_name(f"{folder.name}.lock")


def _open(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return path.open("w", encoding="utf-8")
    except FileNotFoundError:  # who left last has just deleted the empty parent
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8")


def _is_at(path: Path, stream: TextIO) -> bool:
    """Whether the open file is still the lock: who held it may have deleted it."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


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
