"""A training's curves as MLflow gets them: few of them, and none with more points than a chart has.

At most 7 of training and 5 of validation (charts of many keys break MLflow's pages), of at most
about 1,000 points each (a database keeps a row for each, for good). Up to 1,000 steps every step is
there; then the first, the last and every second, every third... Which ones follows from the recipe,
so a training that goes on tells the same. `training.jsonl` and `validation.jsonl`, which the step
stores with the run, have everything.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from flagscale.tracking.letters import Point
from flagscale.tracking.run import StepRun

logger = logging.getLogger(__name__)

MOST_POINTS = 1000
MOST_KEYS = {"train": 7, "validation": 5}

_NO_LOSSES = ("learning rate", "grad norm", "tokens per second")  # before the fifth loss


class Curves:
    """Of one training."""

    def __init__(self, run: StepRun, last_step: int, eval_interval: int) -> None:
        """Begin to tell.

        Args:
            run: who is told.
            last_step: steps in all.
            eval_interval: steps from one validation to the next.
        """
        self._run = run
        self._last_step = last_step
        validations = math.ceil(last_step / eval_interval)
        self._every = {
            "train": math.ceil(last_step / MOST_POINTS),
            "validation": eval_interval * math.ceil(validations / MOST_POINTS),
        }
        self._validated: dict[int, list[Point]] = {}
        self._left_out: set[str] = set()

    def trained(self, record: Mapping[str, float]) -> None:
        """Tell of a step, if it is one of those."""
        self._log("train", record)

    def validated(self, record: Mapping[str, float]) -> None:
        """Tell of a validation, if it is one of those."""
        points = self._log("validation", record)
        if points:
            self._validated[int(record["step"])] = points

    def validation_of(self, step: int) -> list[Point]:
        """The figures of a step, as they were told; empty where it was none of those."""
        return self._validated.get(step, [])

    def _log(self, prefix: str, record: Mapping[str, float]) -> list[Point]:
        step = int(record["step"])
        if step % self._every[prefix] and step not in (1, self._last_step):
            return []
        names = _chosen([name for name in record if name != "step"], MOST_KEYS[prefix])
        self._tell_left_out({f"{prefix}/{n}" for n in record if n != "step" and n not in names})
        return self._run.log_metrics({f"{prefix}/{n}": record[n] for n in names}, step=step)

    def _tell_left_out(self, names: set[str]) -> None:
        new = names - self._left_out
        if new:
            self._left_out |= new
            logger.info("too many curves for MLflow; only in the files: %s", ", ".join(sorted(new)))


def _chosen(names: list[str], most: int) -> list[str]:
    """The losses that come first, and what is none."""
    others = [name for name in names if name in _NO_LOSSES]
    losses = [name for name in names if name not in _NO_LOSSES][: most - len(others)]
    return losses + others
