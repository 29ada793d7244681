"""Whether somebody asked this process to stop: long waits and loops ask, signals answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class StopRequest:
    """Whether this process was asked to stop, and whether that shall raise nothing for now."""

    requested = False
    deferred = False


def stop_requested() -> bool:
    """Whether the step was asked to stop: save, then raise `Interrupted`."""
    return StopRequest.requested


@contextmanager
def deferred_stop() -> Iterator[None]:
    """Inside, a signal only sets what `stop_requested` tells; it raises nothing."""
    before, StopRequest.deferred = StopRequest.deferred, True
    try:
        yield
    finally:
        StopRequest.deferred = before
