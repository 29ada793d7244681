"""Shows how training goes: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from types import TracebackType
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0
_RECENT_STEPS = 20
_SHORT_NAMES = {
    "total loss": "loss",
    "logits distillation loss": "KD",
    "intermediate distillation loss": "intermediate",
    "attention distillation loss": "attention",
    "lm loss": "LM",
}


class Progress:
    """An observer of `flagscale.train.loop.train`, used as a context manager."""

    def __init__(self, first_step: int, last_step: int) -> None:
        """Start the clock.

        Args:
            first_step: steps done before.
            last_step: steps in all.
        """
        self._last_step = last_step
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT_STEPS)
        self._recent.append((first_step, time.monotonic()))
        self._next_line = 0.0
        self._bar: tqdm[Any] | None = None
        self._redirect = logging_redirect_tqdm()
        if sys.stdout.isatty():
            self._bar = tqdm(initial=first_step, total=last_step, unit="step", file=sys.stdout)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._redirect.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._redirect.__exit__(kind, error, traceback)
            self._bar.close()

    def trained(self, record: dict[str, float]) -> None:
        """Show a step."""
        step, now = int(record["step"]), time.monotonic()
        self._recent.append((step, now))
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(losses_text(record)))
            self._bar.update(1)
        elif now >= self._next_line or step == self._last_step:
            self._next_line = now + _SECONDS_BETWEEN_LINES
            logger.info("%s", ", ".join(self._line(record)))

    def validated(self, record: dict[str, float]) -> None:
        """Show a validation. It takes time that is no step's: it does not count as one."""
        step = int(record["step"])
        logger.info("validation after step %d: %s", step, ", ".join(losses_text(record)))
        self._recent.clear()
        self._recent.append((step, time.monotonic()))

    @property
    def left_seconds(self) -> float | None:
        """That the rest will take, at the speed of the last steps; None before there are any."""
        (first, began), (step, now) = self._recent[0], self._recent[-1]
        if step >= self._last_step:
            return 0.0
        return (self._last_step - step) * (now - began) / (step - first) if step > first else None

    def _line(self, record: dict[str, float]) -> list[str]:
        return [
            f"step {int(record['step'])}/{self._last_step}",
            *losses_text(record),
            f"learning rate {record['learning rate']:.2e}",
            f"grad norm {record['grad norm']:.3g}",
            f"{record['tokens per second']:.0f} tokens/s",
            f"{duration_text(self.left_seconds or 0.0)} left",
        ]


def losses_text(record: dict[str, float]) -> list[str]:
    """The losses of a record as short texts, the parts of a total only where they differ."""
    present = {short: record[name] for name, short in _SHORT_NAMES.items() if name in record}
    if present.get("intermediate") == 0:
        del present["intermediate"]
    if present.get("loss") == present.get("KD"):
        present.pop("loss", None)
    return [f"{short} {value:.4f}" for short, value in present.items()]


def duration_text(seconds: float) -> str:
    """`95` seconds as `1 min 35 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
