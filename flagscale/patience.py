"""Asks again where a failure can pass: a hub, a store, a server that is away for some minutes.

It is for the pods of a pipeline: KFP rightly starts no step anew that ended with an error of its
own, so the step itself has to outlast what passes. Elsewhere (`KFP_RUN_ID` is not set) a person
waits, and is told at once. `FLAGSCALE_PATIENCE_SECONDS` sets it, here and there.

    patiently(lambda: fetch(name), f"fetch {name}", is_away)

What can pass is for each use to say; most say `is_away`, with what their library raises.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from flagscale import variables
from flagscale.errors import Interrupted, UserError
from flagscale.stop import stop_requested

logger = logging.getLogger(__name__)

PATIENCE_VARIABLE = "FLAGSCALE_PATIENCE_SECONDS"
_PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 60.0, 60.0)  # seconds
_POLL_SECONDS = 0.2
_OVERLOADED = (408, 429)  # HTTP: beside all of 5xx, what is said to those who ask too early

T = TypeVar("T")


def pauses() -> tuple[float, ...]:
    """Seconds to wait before each further try: four minutes in all in a pod, none elsewhere.

    Raises:
        UserError: `FLAGSCALE_PATIENCE_SECONDS` is no number of seconds.
    """
    default = sum(_PAUSES) if variables.KFP_RUN in os.environ else 0.0
    text = os.environ.get(PATIENCE_VARIABLE, str(default))
    try:
        share = float(text) / sum(_PAUSES)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise UserError(f"{PATIENCE_VARIABLE}={text!r}: must be a number of seconds, e.g. 240")
    return tuple(share * pause for pause in _PAUSES) if share else ()


def patiently(
    call: Callable[[], T],
    doing: str,
    passes: Callable[[Exception], bool],
    pauses: Sequence[float] | None = None,
) -> T:
    """Call until it succeeds, fails for good, or patience ends.

    Args:
        call: may be made several times.
        doing: for the log, e.g. "read the tokenizer of x".
        passes: whether a failure can pass by itself.
        pauses: seconds before each further try; None for `pauses()`.

    Raises:
        Exception: what `call` raised last.
        Interrupted: the step was asked to stop meanwhile.
    """
    left = iter(_default(pauses))
    while True:
        try:
            return call()
        except Exception as error:
            _wait(left, doing, error, passes)


def resumed(
    start: Callable[[], Iterator[T]],
    doing: str,
    passes: Callable[[Exception], bool],
    pauses: Sequence[float] | None = None,
) -> Iterator[T]:
    """What an iterator gives, which is begun anew where it broke off, without what it has given.

    Patience begins anew too whenever it has got further.

    Args:
        start: an iterator that always gives the same in the same order.
        doing: see `patiently`.
        passes: see `patiently`.
        pauses: see `patiently`.

    Raises:
        Exception: what the iterator raised last.
        Interrupted: the step was asked to stop meanwhile.
    """
    given = 0
    whole = _default(pauses)
    left = iter(whole)
    while True:
        try:
            for item in itertools.islice(start(), given, None):
                given += 1
                left = iter(whole)
                yield item
            return
        except Exception as error:
            _wait(left, doing, error, passes)


def is_away(error: BaseException, *unreachable: type[BaseException]) -> bool:
    """Whether a server did not answer, or said that it cannot now.

    Looks at the error and at what caused it: the first HTTP status decides; without one, a broken
    connection.

    Args:
        error: of whatever library.
        unreachable: the library's own errors of a connection, beside Python's.
    """
    lost = False
    for one in causes(error):
        status = _status(one)
        if status is not None:
            return status in _OVERLOADED or status >= 500
        lost = lost or isinstance(one, (ConnectionError, TimeoutError, *unreachable))
    return lost


def _default(given: Sequence[float] | None) -> Sequence[float]:
    return pauses() if given is None else given


def _wait(
    left: Iterator[float], doing: str, error: Exception, passes: Callable[[Exception], bool]
) -> None:
    """Wait before the next try; raise `error` where there shall be none.

    A stop ends the main thread's waiting alone: an upload of what was saved for it goes on.
    """
    pause = next(left, None) if passes(error) else None
    if pause is None:
        raise error
    told = (str(error) or type(error).__name__).strip().splitlines()[0]
    logger.warning("cannot %s: %s; trying again in %.0f s", doing, told, pause)
    until = time.monotonic() + pause
    heeds = threading.current_thread() is threading.main_thread()
    while (rest := until - time.monotonic()) > 0:
        if heeds and stop_requested():
            raise Interrupted(f"stopped by a signal; could not {doing}: {told}")
        time.sleep(min(rest, _POLL_SECONDS))


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, each once: a library may raise a cause anew from its effect."""
    seen: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and not any(found is one for one in seen):
        seen.append(found)
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _status(error: BaseException) -> int | None:
    """HTTP status: `status` of kubernetes and aiohttp, `response.status_code` of most others."""
    response = getattr(error, "response", None)
    for value in (getattr(error, "status", None), getattr(response, "status_code", None)):
        if isinstance(value, int):
            return value
    return None
