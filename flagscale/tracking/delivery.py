"""Telling a server something until it has taken it, will never take it, or patience ends."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flagscale.errors import UserError
from flagscale.tracking.names import first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 10.0  # seconds between attempts
_STRIKES = 20  # attempts at what a server does not take that serves otherwise
_REFUSALS = {
    "ALREADY_EXISTS",
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_LIMIT_EXCEEDED",
}
_NO_ENTRY = {"PERMISSION_DENIED", "UNAUTHENTICATED"}


class Patience:
    """For how long this process still waits for a server when its work is done.

    A server that is away for five minutes is waited for; one that is gone for good costs a process
    this once, however many runs it has.

    Attributes:
        left: seconds.
    """

    left = 400.0

    @classmethod
    @contextmanager
    def spent(cls) -> Iterator[None]:
        """Inside, the process waits."""
        begun = time.monotonic()
        try:
            yield
        finally:
            cls.left = max(0.0, cls.left - (time.monotonic() - begun))


def delivered(
    send: Callable[[], Any],
    serves: Callable[[], bool],
    waits: Callable[[Exception, float], bool],
) -> tuple[Any, str | None]:
    """Send something until it is taken.

    A server that is away, or has trouble with everything, is asked for as long as `waits` says; one
    that takes other things but not this, twenty times.

    Args:
        send: may be called several times.
        serves: whether the server takes other things.
        waits: between two attempts; is given why the last one failed and for how long to wait,
            seconds; gives back whether there is another.

    Returns:
        What `send` returned, and None; or None, and why it was not taken.
    """
    strikes = 0
    for attempt in itertools.count():
        try:
            return send(), None
        except Exception as error:  # MLflow, databases and stores raise many kinds
            strikes += 0 if is_refusal(error) or not serves() else 1
            pause = min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE)
            if is_refusal(error) or strikes == _STRIKES or not waits(error, pause):
                return None, first_line(error)
    raise AssertionError


def is_refusal(error: Exception, *, at_the_door: bool = False) -> bool:
    """Whether another attempt would fare no better.

    Args:
        error: of whatever library.
        at_the_door: credentials that are not taken count too: later they may be being renewed.
    """
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        codes = _REFUSALS | (_NO_ENTRY if at_the_door else set())
        return error.error_code in codes
    return isinstance(error, UserError | FileNotFoundError)


def answers(client: MlflowClient) -> bool:
    """Whether the server serves at all."""
    try:
        client.search_experiments(max_results=1)
    except Exception:  # of whatever kind: it does not
        return False
    return True
