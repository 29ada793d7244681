"""Checkpoints by time: what can be lost is known, however long a step takes."""

from __future__ import annotations

from collections.abc import Callable

from flagscale.checkpoint.agreement import is_first_rank


class SaveTimer:
    """Says when so much time has passed since the last checkpoint was begun, or since the start."""

    def __init__(self, minutes: float | None, clock: Callable[[], float]) -> None:
        """Begin to count.

        Args:
            minutes: between checkpoints; None: it is never time.
            clock: seconds.
        """
        self._minutes, self._clock = minutes, clock
        self._last = clock()

    def due(self) -> bool:
        """Whether it is time, on the first rank; elsewhere False: clocks differ."""
        if self._minutes is None or not is_first_rank():
            return False
        return self._clock() - self._last >= self._minutes * 60

    def restart(self) -> None:
        """A checkpoint is begun."""
        self._last = self._clock()
