"""Scores on tasks as rows that pages show, with the paired difference to the teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flagscale.evaluation import bootstrap
from flagscale.evaluation.bootstrap import Interval
from flagscale.evaluation.fidelity import TEACHER
from flagscale.evaluation.figures import AFTER, BEFORE
from flagscale.evaluation.tasks.scores import TaskScores, figure_names

_SAMPLES, _CONFIDENCE = 1000, 0.95


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task.

    Attributes:
        name: `<task>`, or `<task>:<metric>` of further metrics.
        metric: lm-eval's name.
        examples: how many were asked.
        higher_is_better: direction.
        reported: model -> value and standard error, as lm-eval gives them.
        difference: the distilled student minus the teacher, paired by example; None without a
            value for each example.
        against_before: ditto, minus the student before distillation, where it was asked.
    """

    name: str
    metric: str
    examples: int
    higher_is_better: bool
    reported: Mapping[str, tuple[float, float | None]]
    difference: Interval | None
    against_before: Interval | None

    def text(self, model: str) -> str:
        """A model's value with its standard error; empty where it was not asked."""
        if model not in self.reported:
            return ""
        value, error = self.reported[model]
        if not error:
            return f"{value:,.4g}"
        digits = decimals(error)
        return f"{value:,.{digits}f} ± {round(error, 1 - _exponent(error)):,.{digits}f}"


def task_rows(
    tasks: Sequence[TaskScores], samples: int = _SAMPLES, confidence: float = _CONFIDENCE
) -> list[TaskRow]:
    """All of them, in their order.

    Args:
        tasks: scores.
        samples: resamples of the examples.
        confidence: mass of the intervals.
    """
    return [
        TaskRow(
            name=name,
            metric=task.metric,
            examples=len(task.examples),
            higher_is_better=task.higher_is_better,
            reported=task.reported,
            difference=_difference(task, TEACHER, samples, confidence),
            against_before=_difference(task, BEFORE, samples, confidence),
        )
        for name, task in zip(figure_names(tasks), tasks, strict=True)
    ]


def decimals(error: float) -> int:
    """Behind the point, of a figure whose error is shown with two digits that count."""
    return max(0, 1 - _exponent(error)) if error else 3


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def _difference(task: TaskScores, other: str, samples: int, confidence: float) -> Interval | None:
    if AFTER not in task.values or other not in task.values or len(task.examples) < 2:
        return None
    difference_e = task.values[AFTER] - task.values[other]
    (mean,) = bootstrap.totals([difference_e / len(difference_e)], samples)
    return mean.interval(confidence)
