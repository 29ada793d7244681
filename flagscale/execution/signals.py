"""Signals to a step: they raise `Interrupted`, or wait until a loop asks (`flagscale.stop`)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from flagscale.errors import Interrupted
from flagscale.processes import RUNNER_VARIABLE, is_alive
from flagscale.stop import StopRequest

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Handler:
    """Whether a signal reaches `signals_raise`."""

    installed = False


@contextmanager
def signals_raise() -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into `Interrupted`; under a runner only SIGTERM counts.

    A terminal sends Ctrl-C to the runner and to the step. The runner passes it on as SIGTERM, so
    that one key press asks once.
    """

    def handle(_number: int, _frame: FrameType | None) -> None:
        first, StopRequest.requested = not StopRequest.requested, True
        if first and not StopRequest.deferred:
            raise Interrupted("stopped by a signal")

    StopRequest.requested = False
    under_runner = RUNNER_VARIABLE in os.environ
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, handle),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN if under_runner else handle),
    }
    _Handler.installed = True
    try:
        yield
    finally:
        _Handler.installed = StopRequest.requested = False
        for number, handler in before.items():
            signal.signal(number, handler)


_mask = threading.local()  # of the thread that forks


def _before_fork() -> None:
    if _Handler.installed:
        _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _after_fork_in_parent() -> None:
    if _Handler.installed:
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _after_fork_in_child() -> None:
    """A forked worker, e.g. of a pool that is being closed, just ends.

    The signals are blocked over the fork: Python forgets one that reaches a child before it runs.
    """
    if _Handler.installed:
        _Handler.installed = False
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)


def end_with_runner() -> None:
    """Watch the runner: when it is killed, this process must not train on unseen."""
    runner = os.environ.get(RUNNER_VARIABLE)
    if runner is None:
        return

    def watch() -> None:
        while is_alive(runner):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
