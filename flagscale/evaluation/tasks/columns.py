"""Students' scores on tasks side by side, each with its paired difference to the best student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from flagscale.evaluation.bootstrap import Estimate
from flagscale.evaluation.fidelity import TEACHER
from flagscale.evaluation.figures import AFTER
from flagscale.evaluation.tasks.estimates import task_estimates
from flagscale.evaluation.tasks.scores import TaskScores, figure_names


@dataclass(frozen=True)
class TaskCell:
    """A student's score.

    Attributes:
        value, error: and its standard error as lm-eval gives them.
        difference: value, low, high of it minus the first student's, paired by example; None for
            the first, and without a value for each example.
        verdict: `better`, `worse`, `not clear` or `equal`; empty without a difference.
    """

    value: float
    error: float | None
    difference: dict[str, float] | None
    verdict: str


@dataclass(frozen=True)
class TaskColumn:
    """One figure of a task.

    Attributes:
        name: `arc_easy`, or `arc_easy:acc_norm`.
        higher_is_better: direction.
        examples: that were asked.
        teacher: value, standard error.
        cells: number of a student -> score; of those that were asked the same examples.
    """

    name: str
    higher_is_better: bool
    examples: int
    teacher: tuple[float, float | None] | None
    cells: Mapping[int, TaskCell]


def task_columns(
    tasks: Mapping[int, Sequence[TaskScores]], samples: int, confidence: float
) -> tuple[TaskColumn, ...]:
    """A column for each figure that at least two students have, of the same examples.

    Args:
        tasks: number of a student -> its scores; the best student first.
        samples: resamples of each task's examples.
        confidence: mass of the intervals.
    """
    named = {
        number: dict(zip(figure_names(scores), scores, strict=True))
        for number, scores in tasks.items()
    }
    names = list(dict.fromkeys(name for scores in named.values() for name in scores))
    found = []
    for name in names:
        having = {number: scores[name] for number, scores in named.items() if name in scores}
        first = next(iter(having.values()))
        same = {
            number: one
            for number, one in having.items()
            if (one.examples, one.metric) == (first.examples, first.metric)
        }
        if len(same) > 1:
            found.append(_column(name, same, samples, confidence))
    return tuple(found)


def _column(
    name: str, having: Mapping[int, TaskScores], samples: int, confidence: float
) -> TaskColumn:
    first_number, first = next(iter(having.items()))
    values = {
        str(number): one.values[AFTER] for number, one in having.items() if AFTER in one.values
    }
    drawn: Mapping[str, Estimate] = {}
    if str(first_number) in values and len(first.examples) > 1:
        together = replace(first, values=values)
        (drawn, *_) = task_estimates([together], samples, 0).values()
    cells = {}
    for number, one in having.items():
        difference = None
        if number != first_number and str(number) in drawn:
            margin = drawn[str(number)] - drawn[str(first_number)]
            difference = asdict(margin.interval(confidence))
        value, error = one.reported[AFTER]
        cells[number] = TaskCell(value, error, difference, _verdict(difference, first))
    return TaskColumn(
        name=name,
        higher_is_better=first.higher_is_better,
        examples=len(first.examples),
        teacher=first.reported.get(TEACHER),
        cells=cells,
    )


def _verdict(difference: Mapping[str, float] | None, task: TaskScores) -> str:
    if difference is None:
        return ""
    low, high = difference["low"], difference["high"]
    if low <= 0 <= high:
        return "not clear" if low < high else "equal"
    return "better" if (low > 0) == task.higher_is_better else "worse"
