"""What a checkpoint costs: the time that training waits for it, and when it is safe."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


class SaveCost:
    """Of one checkpoint, from now on."""

    def __init__(self, step: int) -> None:
        self._step, self._begun, self._waited = step, time.monotonic(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, training waits for this checkpoint."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - begun

    def tell(self, folder: Path) -> None:
        """Log it; the checkpoint is complete.

        Args:
            folder: of the checkpoint.
        """
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        logger.info(
            "checkpoint of step %d: training waited %.2f s, on disk after %.1f s, %.1f MB",
            self._step,
            self._waited,
            time.monotonic() - self._begun,
            size / 1e6,
        )
