"""Run-wide state that the core functions read: the arguments and the timers.

Megatron's convention. Everything else is passed explicitly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from megatron.core.timers import Timers

if TYPE_CHECKING:
    from flagscale.megatron.arguments import Arguments

_args: Arguments | None = None
_timers: Timers | None = None


def get_args() -> Arguments:
    """The run's arguments.

    Raises:
        RuntimeError: they are not set.
    """
    if _args is None:
        raise RuntimeError("the arguments are not set: call within `with use_args(args):`")
    return _args


def get_timers() -> Timers:
    """The run's timers.

    Raises:
        RuntimeError: they are not set.
    """
    if _timers is None:
        raise RuntimeError("the timers are not set: call within `with use_args(args):`")
    return _timers


@contextmanager
def use_args(args: Arguments) -> Iterator[None]:
    """Set the arguments, and fresh timers, for the body; put back what was set before."""
    global _args, _timers
    before = _args, _timers
    _args, _timers = args, Timers(args.timing_log_level, log_option="minmax")
    try:
        yield
    finally:
        _args, _timers = before
