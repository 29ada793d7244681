"""How far a model is with its text: a line every few seconds, with the time left."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)

_SECONDS = 5.0


class TokenProgress:
    """Counts the tokens that a model was run on."""

    def __init__(self, name: str, total: int) -> None:
        """Begin.

        Args:
            name: of the model, for the log.
            total: tokens.
        """
        self._name, self._total, self._done = name, total, 0
        self._start = self._last = time.monotonic()

    @property
    def speed(self) -> float:
        """Tokens a second so far."""
        return self._done / max(time.monotonic() - self._start, 1e-9)

    def advance(self, tokens: int) -> None:
        """It was run on so many more."""
        self._done = min(self._done + tokens, self._total)
        now = time.monotonic()
        if not self._done or (now - self._last < _SECONDS and self._done < self._total):
            return
        self._last, speed = now, self.speed
        logger.info(
            "%s model: run on %d of %d tokens (%.0f%%), %.0f tokens/s, %.0f s left",
            self._name,
            self._done,
            self._total,
            100 * self._done / self._total,
            speed,
            (self._total - self._done) / speed,
        )
