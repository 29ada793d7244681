"""What ranks agree on: that a part of the work succeeded everywhere, and what the first one found.

A rank that raises alone leaves the others waiting in the next collective. So whatever touches the
disk, and can fail on one rank, is done in `same_outcome`: then all raise, or none.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.api import CheckpointException

from flagscale.artifacts import disk_full, is_disk_full
from flagscale.errors import Interrupted, UserError

_NOTHING_FREE = 2**16  # bytes
_SHARED = (UserError, Interrupted)  # what the other ranks raise as it is
_PREFIXES = re.compile(r"^(?:[\w.]*(?:Error|Exception): |Worker failure: )+")

ResultT = TypeVar("ResultT")
_Told = tuple[str, type[BaseException] | None]  # an error's message, and which of `_SHARED` it is


def is_first_rank() -> bool:
    """Whether this rank does what is done once."""
    return torch.distributed.get_rank() == 0


@contextmanager
def same_outcome(folder: Path, doing: str) -> Iterator[None]:
    """Raise on every rank what one rank raises inside. All ranks call it.

    Args:
        folder: what is read or written, for the message.
        doing: what failed if it fails: `the checkpoint <doing>`.

    Raises:
        UserError: a file could not be read or written, on any rank.
        Interrupted: a rank was asked to stop.
        RuntimeError: another error of another rank.
    """
    error: BaseException | None = None
    try:
        yield
    except (Exception, CheckpointException, Interrupted) as raised:
        error = _explained(raised, folder, doing)
    mine = None if error is None else (str(error), _kind(error))
    told: list[_Told | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, mine)
    if error is not None:
        raise error
    for other in told:
        if other is not None:
            message, kind = other
            raise kind(message) if kind else RuntimeError(f"on another rank: {message}")


def on_first_rank(folder: Path, doing: str, function: Callable[[], ResultT]) -> ResultT:
    """Let the first rank do something, and every rank know the result. All ranks call it.

    Args:
        folder: see `same_outcome`.
        doing: see `same_outcome`.
        function: its result can be pickled.
    """
    result: list[Any] = [None]
    with same_outcome(folder, doing):
        if is_first_rank():
            result = [function()]
    torch.distributed.broadcast_object_list(result, src=0)
    found: ResultT = result[0]
    return found


def storage_error(error: BaseException | None) -> BaseException | None:
    """What the operating system, or torch's collection of it, said in `error` or before it.

    Torch's zip writer reports a failed write as a position that it did not expect.
    """
    while error is not None and not isinstance(error, OSError | CheckpointException):
        error = error.__cause__ or error.__context__
    return error


def _explained(error: BaseException, folder: Path, doing: str) -> BaseException:
    """A failure of the storage as a `UserError`; anything else as it is."""
    error = _request_to_stop(error) or error
    if isinstance(error, Interrupted):
        return error
    found = storage_error(error)
    if isinstance(error, UserError) or found is None:
        return error
    if _is_disk_full(found, folder):
        explained = disk_full(folder)
    else:
        explained = UserError(f"{folder}: the checkpoint {doing}: {last_line(found)}")
    explained.__cause__ = error
    return explained


def _request_to_stop(error: BaseException) -> Interrupted | None:
    """The `Interrupted` that torch took for a failure of the storage, if that is all there is."""
    if not isinstance(error, CheckpointException):
        return None
    failures = [failure for failure, _ in error.failures.values()]
    stops = [failure for failure in failures if isinstance(failure, Interrupted)]
    return stops[0] if stops and len(stops) == len(failures) else None


def _kind(error: BaseException) -> type[BaseException] | None:
    return next((kind for kind in _SHARED if isinstance(error, kind)), None)


def _is_disk_full(error: BaseException, folder: Path) -> bool:
    if is_disk_full(error) or os.strerror(errno.ENOSPC) in str(error):
        return True
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free < _NOTHING_FREE


def last_line(error: BaseException) -> str:
    """What was wrong: torch passes a rank's error on as text, traceback and all."""
    line = (str(error).strip().splitlines() or [""])[-1]
    return _PREFIXES.sub("", line) or line or type(error).__name__
